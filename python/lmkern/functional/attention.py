"""Attention. Math and layouts: csrc/ops/attention.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmkern import reference
from lmkern._warnings import warn_once
from lmkern.ops.attention import AttentionFunction
from lmkern.ops.check import check_dtype, check_shape, check_tensors
from lmkern.ops.library import autocast, needs_grad, use_kernel


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
