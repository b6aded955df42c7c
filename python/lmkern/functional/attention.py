"""Attention. Math and layouts: csrc/ops/attention.h."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmkern import reference
from lmkern.functional._attention import (
    OP,
    Extents,
    as_heads,
    check_choice,
    check_cu_seqlens,
    check_heads,
    check_key_lengths,
    check_mask,
    check_sinks,
    check_slopes,
    check_window,
)
from lmkern.ops.attention import (
    AttentionFunction,
    Problem,
    attention_weights,
    plain_attention,
    transformed_attention,
)
from lmkern.ops.check import check_tensors
from lmkern.ops.library import accumulate_dtype, autocast, needs_grad, use_kernel


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    return_weights: str | None = None,
) -> Any:
    r"""softmax(scale · Q Kᵀ + mask) V, with memory linear in the sequence lengths, and more.

    Signature and semantics of :func:`torch.nn.functional.scaled_dot_product_attention`; what follows
    ``enable_gqa`` is ours. The score of query i and key j, and its weight:

    .. math::
        s_{ij} = \text{softcap} · \tanh(\text{scale} · q_i · k_j / \text{softcap})
                 - \text{slope} · |p_i - j| + \text{mask}_{ij}, \qquad
        w_{ij} = \frac{e^{s_{ij}}}{e^{\text{sink}} + \sum_{j'} e^{s_{ij'}}}

    with each part where its argument is given, and s = -∞ where i does not see j. Query i stands at
    position p_i = i, or p_i = i + S - L with ``causal_align="bottom_right"``.

    Args:
        query: [..., H, L, D]; the leading dimensions broadcast against those of key and value.
        key: [..., H, S, D], or [..., H_kv, S, D] with ``enable_gqa``. value: [..., H, S, Dv] likewise.
        attn_mask: broadcastable to [..., H, L, S]. Bool: True takes part. Floating: added to the
            scores. Must not contain NaN.
        dropout_p: probability of dropping an attention weight, in multiples of 2^-16. Which are dropped
            follows from one number of torch's default generator, for any number of threads.
        is_causal: query i sees keys up to p_i. Excludes ``attn_mask``.
        scale: default 1/√D.
        enable_gqa: H may be a multiple of H_kv; query head h reads key head h // (H / H_kv).
        window: (left, right): query i sees keys p_i - left to p_i + right; None or -1 leaves a side
            unbounded. With ``is_causal``, right is 0.
        softcap: > 0, bounds the scores smoothly, before anything is added to them.
        alibi_slopes: floating [H] or [..., H], with the leading dimensions of query.
        sinks: floating [H], a logit for each head that takes weight and gives nothing.
        key_lengths: int32 or int64, broadcastable to the leading dimensions of query without heads
            ([B] for [B, H, L, D]), between 0 and S: keys and values from there on are not seen; what
            stands in them has no effect, NaN included. In p_i it takes the place of S.
        cu_seqlens: n sequences packed one after the other, each of which attends inside of itself
            only: query [H, N, D], key and value [H, M, D] and sequence b in the rows
            cu_seqlens[b] to cu_seqlens[b + 1]. int32 or int64 [n + 1] from 0 to N, or a pair of
            these for query and for key. i, j, L and S count inside of a sequence, and
            ``alibi_slopes`` may be [n, H]. Excludes ``attn_mask``, ``key_lengths`` and
            ``return_weights``.
        causal_align: "top_left" or "bottom_right", the corner of [L, S] where positions agree.
        return_lse: also return log(e^sink + Σ_j e^s_ij).
        return_weights: "heads" or "mean": also return the weights, after dropout, [..., H, L, S] or
            their mean over the heads [..., L, S].

    Returns:
        [..., H, L, Dv], or a tuple of it, the log-sum-exp [..., H, L] (float32, float64 for float64
        inputs) and the weights, those that were asked for. A query that sees no key gives zeros, zero
        weights and zero gradients; its log-sum-exp is -∞, or the sink. There are gradients for query,
        key, value, a floating mask (reduced over the dimensions along which it was broadcast),
        ``alibi_slopes`` and ``sinks``. Memory grows with L + S, never with L · S, but for the mask's
        gradient and the weights themselves; a gradient *of* weights that were returned, and second
        derivatives, run in plain torch operations.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Dao et al. 2022 (FlashAttention), Dao 2023; window: Beltagy et al. 2020; softcap: Gemma
    Team 2024; alibi_slopes: Press et al. 2022; sinks: Xiao et al. 2024, as in gpt-oss.
    """
    if (
        attn_mask is None and window is None and softcap is None and alibi_slopes is None
        and sinks is None and key_lengths is None and cu_seqlens is None and dropout_p == 0.0
        and not return_lse and return_weights is None
        and isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        and query.dim() == key.dim() == value.dim() == 4
        and (query.shape[1] == key.shape[1] or enable_gqa)
        and (causal_align == "top_left" or query.shape[2] in (1, key.shape[2]))
    ):  # fmt: skip
        causal = bool(is_causal) and (causal_align == "top_left" or query.shape[2] > 1)
        plain = plain_attention(query, key, value, scale, causal)
        if plain is not None:
            return plain
    check_tensors(
        OP, query=query, key=key, value=value, attn_mask=attn_mask, alibi_slopes=alibi_slopes,
        sinks=sinks, key_lengths=key_lengths,
    )  # fmt: skip
    if is_causal and attn_mask is not None:
        raise ValueError(f"{OP}: attn_mask must be None when is_causal=True")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{OP}: dropout_p must be in [0, 1], got {dropout_p}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{OP}: softcap must be positive and finite, got {softcap}")
    check_choice("causal_align", causal_align, ("top_left", "bottom_right"))
    check_choice("return_weights", return_weights, (None, "heads", "mean"))
    query, key, value = autocast(query.device.type, query, key, value)
    e = check_heads(query, key, value, enable_gqa)
    left, right = check_window(window, is_causal)
    accumulate = accumulate_dtype(query.dtype)
    mask = lengths = cu = slopes = None
    if cu_seqlens is not None:
        for name, excluded in (
            ("attn_mask", attn_mask),
            ("key_lengths", key_lengths),
            ("return_weights", return_weights),
        ):
            if excluded is not None:
                raise ValueError(f"{OP}: {name} must be None when cu_seqlens is given")
        cu = check_cu_seqlens(cu_seqlens, query, e)
    if attn_mask is not None:
        mask = check_mask(attn_mask, query.dtype, e)
    if key_lengths is not None:
        lengths = check_key_lengths(key_lengths, e)
    if alibi_slopes is not None:
        slopes = check_slopes(alibi_slopes, accumulate, e, cu and cu[0].shape[0] - 1)
    if sinks is not None:
        sinks = check_sinks(sinks, accumulate, e)

    bottom_right = causal_align == "bottom_right"
    if bottom_right and cu is None and slopes is None and left < 0 and e.queries == 1:
        bottom_right, right = False, -1  # the last position sees all keys
    if bottom_right and cu is None and lengths is None and e.queries == e.keys:
        bottom_right = False
    factor = float(scale) if scale is not None else 1 / math.sqrt(max(query.shape[-1], 1))
    q = as_heads(query, e.lead, e.heads)
    k, v = (as_heads(x, e.lead, e.key_heads) for x in (key, value))

    cu_q, cu_k = (None, None) if cu is None else (cu[0], None if cu[1] is cu[0] else cu[1])
    seed = None
    if dropout_p > 0.0:  # of torch's generator, so that torch.manual_seed rules
        seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")
    problem = Problem(
        q, k, v, mask, slopes, sinks, lengths, cu_q, cu_k, seed, factor, softcap or 0.0, left, right,
        bottom_right, dropout_p,
    )  # fmt: skip
    lse = weights = None
    training = needs_grad(q, k, v, mask, slopes, sinks)
    # Dynamo traces a gradient of the weights, wanted or not, and that one is not the kernel's.
    traced_weights = return_weights is not None and training and torch.compiler.is_compiling()
    # Under vmap dropout draws for each element or once: torch's operator knows.
    transforms = return_weights is None and seed is None
    if traced_weights or not use_kernel(
        OP, query, kernel="attention_forward", transforms=transforms
    ):
        results = reference.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, scale=factor, enable_gqa=e.heads != e.key_heads,
            window=(left, right), softcap=softcap, alibi_slopes=slopes, sinks=sinks,
            key_lengths=lengths, cu_seqlens=cu, return_lse=True, return_weights=return_weights,
            causal_align="bottom_right" if bottom_right else "top_left",
        )  # fmt: skip
        out, lse, *rest = results
        weights = rest[0] if rest else None
    elif not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        out, lse = transformed_attention(problem)
    elif training:
        # torch.compile refuses one tensor in two places of an autograd Function.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        out, lse, *rest = AttentionFunction.apply(q, k, v, *problem[3:], return_weights)
        weights = rest[0] if rest else None
    else:
        out, lse = torch.ops.lmkern.attention_forward(*problem)
        if return_weights is not None:
            weights = attention_weights(problem, lse, return_weights)
    out = _as_given(out, e)
    if not return_lse and weights is None:
        return out
    return (
        out,
        *([_as_given(lse[..., None], e)[..., 0]] if return_lse else []),
        *([] if weights is None else [_as_given(weights, e, return_weights == "mean")]),
    )


def _as_given(x: Tensor, e: Extents, without_heads: bool = False) -> Tensor:
    """[B, H, ...] or [B, ...] with the leading dimensions of the arguments."""
    if without_heads:
        return x.reshape(*e.lead, *x.shape[-2:]) if len(e.lead) != 1 else x
    return x if e.dims == 4 else x.reshape((*e.lead, e.heads, *x.shape[-2:])[-e.dims :])
