"""``attn_implementation="lmkern"`` for Hugging Face transformers.

transformers asks an implementation for two functions: one makes the mask, once per forward pass, the
other computes attention in each layer. Ours keep to what those of its "sdpa" mean by a mask and by
None. Beyond them: the padding of a bidirectional model stays one row per sequence, broadcast by stride;
grouped heads are never copied; soft-capped scores, attention sinks and position biases are served.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lmkern import functional
from lmkern._warnings import warn_once

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("its masks are made another way")
except ImportError as error:
    raise ImportError(
        f"lmkern.register_transformers() needs Hugging Face transformers >= 5.6: {error}"
    ) from error

NAME = "lmkern"

# On a mask that is a causal window and nothing else: its width. On the tensor itself, so that it is gone
# as soon as a model computes another mask from this one.
_WINDOW = "lmkern_window"


def register() -> None:
    """Register :func:`attention` and :func:`attention_mask` as "lmkern"."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer, as transformers' ``AttentionInterface`` wants it.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: [B, H, L, D]. key: [B, H_kv, S, D]. value: [B, H_kv, S, Dv], H a multiple of H_kv.
        attention_mask: broadcastable to [B, H, L, S]; bool (True takes part) or additive. With a
            mask nothing is causal beyond it. Nor is the ``sliding_window`` read that models pass as
            well: it is in the mask already, and a mask may let more through than the window.
        dropout: probability of dropping an attention weight.
        scaling: of the scores; default 1/√D.
        is_causal: without a mask and for more than one query, query i sees keys 0..i.
        softcap: scores become softcap · tanh(scores / softcap).
        s_aux: [H], attention sinks: a score for each head that takes part in the softmax only.
        position_bias: added to the scores, as T5's; broadcastable to [B, H, L, S].
        output_attentions: return the weights, too.

    Returns:
        [B, L, H, Dv], and the weights [B, H, L, S] or None.

    Raises:
        NotImplementedError: a paged cache (``generate_batch``).
    """
    if type(cache).__name__ == "PagedAttentionCache":
        raise NotImplementedError(
            "attn_implementation='lmkern' does not serve generate_batch's paged cache, use 'sdpa' there"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # One query is the last position, which sees all keys.
    causal = query.shape[2] > 1 and attention_mask is None and bool(is_causal)

    options: dict[str, Any] = {}
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["sinks"] = s_aux
    window = getattr(attention_mask, _WINDOW, None)
    if window is not None and position_bias is None and _takes("window"):
        attention_mask, options["window"] = None, (window - 1, 0)
    if position_bias is not None:
        attention_mask = _with_bias(
            attention_mask, position_bias, causal, query.shape[2], key.shape[2]
        )
        causal = False
    if output_attentions and _takes("return_weights"):
        options["return_weights"] = "heads"
    elif output_attentions:
        warn_once(
            "attn_implementation='lmkern' returns no attention weights yet, use 'eager' for them"
        )
    result = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )
    out, weights = result if isinstance(result, tuple) else (result, None)
    return out.transpose(1, 2).contiguous(), weights


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask of one forward pass, as transformers' ``AttentionMaskInterface`` wants it.

    Args:
        batch_size, q_length, kv_length: B, L, S.
        q_offset, kv_offset: positions of the first query and key.
        attention_mask: [B, S'] bool, False for padding.
        options: what else "sdpa" takes, above all ``mask_function``.

    Returns:
        [B, 1, L, S] bool, True takes part; None where ``is_causal`` or no mask at all says the same.
    """
    plain = options.get("allow_is_causal_skip", True)  # False where a model adds to a causal mask
    if options.get("mask_function") is bidirectional_mask_function and not plain:
        # All queries see the same keys: made for one of them, and stride 0 for L.
        row = sdpa_mask(
            batch_size, 1, kv_length, 0, kv_offset, attention_mask=attention_mask, **options
        )
        return None if row is None else row.expand(-1, -1, q_length, -1)
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        **options,
    )
    if mask is None or torch.compiler.is_compiling():
        return mask
    config, window = options.get("config"), options.get("local_size")
    is_window = (
        plain
        and window is not None
        and window == getattr(config, "sliding_window", None)
        and window != getattr(config, "attention_chunk_size", None)
        and q_length == kv_length
        and not isinstance(q_offset, Tensor)
        and q_offset == kv_offset
    )
    if is_window and (attention_mask is None or bool(attention_mask.all())):
        setattr(mask, _WINDOW, window)
    return mask


def _takes(argument: str) -> bool:
    return argument in inspect.signature(functional.scaled_dot_product_attention).parameters


def _with_bias(mask: Tensor | None, bias: Tensor, causal: bool, queries: int, keys: int) -> Tensor:
    """``bias`` and the mask as one additive mask."""
    bias = bias[..., :keys]
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -torch.inf)
    return bias + mask
