"""The functional API: drop-in counterparts of :mod:`torch.nn.functional`, on lmkern's kernels.

All functions are differentiable (twice, too), work under ``torch.compile``, autocast and
``torch.func``, and fall back to plain torch operations, with one :class:`lmkern.LmkernWarning`, where
there is no kernel for a device or dtype. Kernels exist on the CPU for float32, float64 and bfloat16.
Bad arguments raise ``ValueError``, ``TypeError`` or ``IndexError`` naming the argument, what was
expected and what came; nothing has been computed then.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import reference
from lmkern._warnings import warn_once
from lmkern.ops.attention import AttentionFunction
from lmkern.ops.check import check_dims, check_dtype, check_shape, check_tensors
from lmkern.ops.embedding import EmbeddingFunction
from lmkern.ops.library import autocast, needs_grad, use_kernel
from lmkern.ops.recurrent import LSTMFunction

__all__ = ["embedding", "lstm", "scaled_dot_product_attention"]


def lstm(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""One LSTM layer in one direction over a whole sequence.

    .. math::
        i, f, g, o = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ \tanh(g), \quad h_t = σ(o) ⊙ \tanh(c_t)

    Args:
        input: [T, B, I], time first.
        w_ih: [4H, I], gates in torch's order i, f, g, o.
        w_hh: [4H, H].
        b_ih, b_hh: [4H], both or neither.
        hx: initial (h, c), each [B, H]; zeros if None.
        reverse: run from the last step to the first; ``output`` keeps the input's order.

    Returns:
        output [T, B, H] and the final (h, c), each [B, H], all of the input's dtype.

    Source: Hochreiter & Schmidhuber 1997; Gers et al. 2000. Equals one layer of ``torch.nn.LSTM``.
    """
    h0, c0 = (None, None) if hx is None else hx
    check_tensors("lstm", input=input, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, h0=h0, c0=c0)
    if (b_ih is None) != (b_hh is None):
        raise ValueError("lstm: b_ih and b_hh must be given together")
    input, w_ih, w_hh, b_ih, b_hh, h0, c0 = autocast(
        input.device.type, input, w_ih, w_hh, b_ih, b_hh, h0, c0
    )
    check_dims("lstm", "input", input, 3, "[T, B, I]")
    check_dims("lstm", "w_hh", w_hh, 2, "[4H, H]")
    if input.shape[0] == 0:
        raise ValueError(f"lstm: input must have at least one time step, got {list(input.shape)}")
    batch, hidden = input.shape[1], w_hh.shape[1]
    check_shape("lstm", "w_hh", w_hh, (4 * hidden, hidden), "[4H, H]")
    check_shape("lstm", "w_ih", w_ih, (4 * hidden, input.shape[2]), "[4H, I]")
    check_shape("lstm", "b_ih", b_ih, (4 * hidden,), "[4H]")
    check_shape("lstm", "b_hh", b_hh, (4 * hidden,), "[4H]")
    check_shape("lstm", "h0", h0, (batch, hidden), "[B, H]")
    check_shape("lstm", "c0", c0, (batch, hidden), "[B, H]")
    check_dtype("lstm", input.dtype, w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, h0=h0, c0=c0)
    if not use_kernel("lstm", input):
        y, h_n, c_n = reference.lstm(input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse)
    elif needs_grad(input, w_ih, w_hh, b_ih, b_hh, h0, c0):
        y, h_n, c_n = LSTMFunction.apply(input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse)
    else:
        y, h_n, c_n, _, _ = torch.ops.lmkern.lstm_forward(
            input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, False
        )
    return y, (h_n, c_n)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""softmax(scale · Q Kᵀ + mask) V, with memory linear in the sequence lengths.

    Signature and semantics of :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: [..., H, L, D]; the leading dimensions broadcast against those of key and value.
        key: [..., H, S, D], or [..., H_kv, S, D] with ``enable_gqa``. value: [..., H, S, Dv] likewise.
        attn_mask: broadcastable to [..., H, L, S]. Bool: True takes part. Floating: added to the
            scores. Must not contain NaN.
        dropout_p: probability of dropping an attention weight. With dropout, and for a mask that needs
            a gradient, plain torch operations run for now.
        is_causal: query i sees keys 0..i (aligned at the top left). Excludes ``attn_mask``.
        scale: default 1/√D.
        enable_gqa: H may be a multiple of H_kv; query head h reads key head h // (H / H_kv).

    Returns:
        [..., H, L, Dv]. A query that sees no key gives zeros, and zero gradients.

    Source: Dao et al. 2022 (FlashAttention), Dao 2023.
    """
    op = "scaled_dot_product_attention"
    check_tensors(op, query=query, key=key, value=value, attn_mask=attn_mask)
    if is_causal and attn_mask is not None:
        raise ValueError(f"{op}: attn_mask must be None when is_causal=True")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{op}: {name} must be [..., length, width], got {list(x.shape)}")
    query, key, value = autocast(query.device.type, query, key, value)
    check_dtype(op, query.dtype, key=key, value=value)
    queries, depth = query.shape[-2:]
    keys, width = value.shape[-2:]
    check_shape(op, "key", key, (*key.shape[:-2], keys, depth), "[..., S, D]")
    heads, key_heads = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key))
    if enable_gqa:
        check_shape(
            op, "value", value, (*value.shape[:-3], key_heads, keys, width), "[..., H_kv, S, Dv]"
        )
        if key_heads == 0 or heads % key_heads:
            raise ValueError(
                f"{op}: query's heads must be a multiple of key's, got {heads} and {key_heads}"
            )
        repeat = heads // key_heads
    else:
        repeat = 1
    lead, heads, key_heads = _leading(op, query, key, value, repeat)
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool:
            if not attn_mask.is_floating_point():
                raise TypeError(f"{op}: attn_mask must be bool or floating, got {attn_mask.dtype}")
            if attn_mask.dtype != query.dtype:
                # A large finite value stays finite in a narrower dtype: only -inf hides a key.
                low, high = torch.finfo(query.dtype).min, torch.finfo(query.dtype).max
                finite = attn_mask.clamp(low, high)
                attn_mask = torch.where(attn_mask.isinf(), attn_mask, finite).to(query.dtype)
        target = (
            (*lead, heads, queries, keys) if max(query.dim(), key.dim()) > 2 else (queries, keys)
        )
        try:
            attn_mask = attn_mask.expand(target)
        except RuntimeError:
            raise ValueError(
                f"{op}: attn_mask must broadcast to {list(target)}, got {list(attn_mask.shape)}"
            ) from None

    kernel = use_kernel(op, query)
    if kernel and dropout_p > 0.0:
        warn_once(f"{op}: no kernel for dropout_p > 0 yet, running plain torch operations")
        kernel = False
    if kernel and needs_grad(attn_mask):
        warn_once(
            f"{op}: no kernel for the gradient of attn_mask yet, running plain torch operations"
        )
        kernel = False
    if not kernel:
        return reference.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )

    q, k, v = (
        _as_heads(x, lead, n) for x, n in ((query, heads), (key, key_heads), (value, key_heads))
    )
    mask = None if attn_mask is None else _as_heads(attn_mask, lead, heads)
    factor = float(scale) if scale is not None else 1 / math.sqrt(max(depth, 1))
    if needs_grad(q, k, v):
        # torch.compile refuses one tensor in two places of an autograd Function.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        out = AttentionFunction.apply(q, k, v, mask, factor, is_causal)
    else:
        out, _ = torch.ops.lmkern.attention_forward(q, k, v, mask, factor, is_causal)
    ranks = max(query.dim(), key.dim(), value.dim())
    return out if ranks == 4 else out.reshape((*lead, heads, queries, width)[-ranks:])


def _leading(
    op: str, query: Tensor, key: Tensor, value: Tensor, repeat: int
) -> tuple[tuple[int, ...], int, int]:
    """The broadcast leading dimensions without heads, the heads of query, and those of key."""
    shapes = [x.shape[:-2] for x in (query, key, value)]
    same = shapes[0][:-1] == shapes[1][:-1] == shapes[2][:-1]
    if same and len(shapes[0]) > 0 and (repeat > 1 or shapes[0] == shapes[1] == shapes[2]):
        return tuple(shapes[0][:-1]), shapes[0][-1], shapes[1][-1]  # torch.broadcast_shapes is slow
    heads, key_heads = (s[-1] if len(s) else 1 for s in shapes[:2])
    try:
        lead = tuple(torch.broadcast_shapes(*(s[:-1] for s in shapes)))
        if repeat == 1:
            heads = key_heads = (*torch.broadcast_shapes(*(s[-1:] for s in shapes)), 1)[0]
    except RuntimeError:
        raise ValueError(
            f"{op}: leading dimensions must broadcast (set enable_gqa for grouped heads), got query "
            f"{list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        ) from None
    return lead, heads, key_heads


def _as_heads(x: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """x as [B, heads, length, width], without a copy where its leading dimensions are those already."""
    if x.dim() == 4 and x.shape[:2] == (*lead, heads):
        return x
    return x.expand(*lead, heads, *x.shape[-2:]).reshape(math.prod(lead), heads, *x.shape[-2:])


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of ``weight``: out[..., :] = weight[input[...], :].

    Signature and semantics of :func:`torch.nn.functional.embedding`.

    Args:
        input: int32 or int64 indices of any shape.
        weight: [V, D].
        padding_idx: the row that gets no gradient; negative counts from the end.
        max_norm, norm_type, sparse: as torch, through torch's own operator for now.
        scale_grad_by_freq: divide a row's gradient by how often it occurs in ``input``.

    Returns:
        [*input, D].

    Raises:
        IndexError: an index outside [0, V), naming index, position and V.
    """
    check_tensors("embedding", weight=weight, input=input)
    check_dims("embedding", "weight", weight, 2, "[V, D]")
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embedding: input must be int32 or int64, got {input.dtype}")
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx must be in [-{rows}, {rows}), got {padding_idx}")
    padding = -1 if padding_idx is None else padding_idx % rows
    if max_norm is not None or sparse:
        option = "max_norm" if max_norm is not None else "sparse=True"
        warn_once(f"embedding: no kernel for {option} yet, running torch's operator")
        return F.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    if not use_kernel("embedding", weight):
        return reference.embedding(input, weight, padding, scale_grad_by_freq)
    if needs_grad(weight):
        return EmbeddingFunction.apply(weight, input, padding, scale_grad_by_freq)
    return torch.ops.lmkern.embedding_forward(weight, input)
