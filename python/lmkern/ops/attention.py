"""Scaled dot-product attention on [B, H, L, D]. Math and layouts: csrc/ops/attention.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.library import accumulate_dtype, define_op, reference_backward


def _rows(x: Tensor) -> Tensor:
    """``x`` with a contiguous last dimension, which is all the kernels ask for."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    # [B, L, H, Dv] in memory, as torch's fused kernels: models merge the heads next, without a copy.
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=accumulate_dtype(q.dtype))


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(q, k, v, mask, scale, is_causal)
    _C.attention_forward(_rows(q), _rows(k), _rows(v), mask, out, lse, scale, is_causal)
    return out, lse


def _backward_fake(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        # Heads are views of one projection more often than not: their gradients are laid out for it.
        batch, heads, length, width = x.shape
        return x.new_empty(batch, length, heads, width).transpose(1, 2)

    return like(q), like(k), like(v)


def _backward_cpu(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_fake(d_out, q, k, v, mask, out, lse, scale, is_causal)
    _C.attention_backward(
        _rows(d_out), _rows(q), _rows(k), _rows(v), mask, out, lse, *grads, scale, is_causal
    )
    return grads


define_op(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal) "
    "-> (Tensor out, Tensor lse)",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
    "Tensor lse, float scale, bool is_causal) -> (Tensor d_q, Tensor d_k, Tensor d_v)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, mask, scale, is_causal) -> out, with gradients for q, k and v."""

    @staticmethod
    def forward(ctx: Any, q, k, v, mask, scale, is_causal):  # type: ignore[override]
        out, lse = torch.ops.lmkern.attention_forward(q, k, v, mask, scale, is_causal)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.scale, ctx.is_causal = scale, is_causal
        return out

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        q, k, v, mask, out, lse = ctx.saved_tensors
        scale, is_causal = ctx.scale, ctx.is_causal
        if torch.is_grad_enabled():
            grads = reference_backward(
                lambda q, k, v: reference.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True
                ),
                (q, k, v),
                (d_out,),
            )
        else:
            grads = torch.ops.lmkern.attention_backward(
                d_out, q, k, v, mask, out, lse, scale, is_causal
            )
        return (*grads, None, None, None)
