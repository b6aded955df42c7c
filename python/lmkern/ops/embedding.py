"""Embedding lookup and its dense gradient. Math and layouts: csrc/ops/embedding.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.library import define_op, reference_backward


def _forward_fake(weight: Tensor, indices: Tensor) -> Tensor:
    return weight.new_empty(*indices.shape, weight.shape[1])


def _forward_cpu(weight: Tensor, indices: Tensor) -> Tensor:
    out = _forward_fake(weight, indices)
    _C.prefer_huge_pages(out)
    rows = weight if weight.stride(1) == 1 else weight.contiguous()
    _C.embedding_forward(rows, indices.contiguous(), out)
    return out


def _backward_fake(
    d_out: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    return d_out.new_empty(num_embeddings, d_out.shape[-1])


def _backward_cpu(
    d_out: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    d_weight = _backward_fake(d_out, indices, num_embeddings, padding_idx, scale_grad_by_freq)
    _C.prefer_huge_pages(d_weight)
    _C.embedding_backward(
        d_out.contiguous(), indices.contiguous(), d_weight, padding_idx, scale_grad_by_freq
    )
    return d_weight


define_op(
    "embedding_forward(Tensor weight, Tensor indices) -> Tensor",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    "embedding_backward(Tensor d_out, Tensor indices, SymInt num_embeddings, int padding_idx, "
    "bool scale_grad_by_freq) -> Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


class EmbeddingFunction(torch.autograd.Function):
    """(weight, indices, padding_idx or -1, scale_grad_by_freq) -> rows, with a dense gradient."""

    @staticmethod
    def forward(ctx: Any, weight, indices, padding_idx, scale_grad_by_freq):  # type: ignore[override]
        # Not the weight: the lookup is linear in it, and it may change before backward.
        ctx.save_for_backward(indices)
        ctx.rows = weight.shape[0]
        ctx.padding_idx, ctx.scale_grad_by_freq = padding_idx, scale_grad_by_freq
        return torch.ops.lmkern.embedding_forward(weight, indices)

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        (indices,) = ctx.saved_tensors
        padding_idx, by_freq = ctx.padding_idx, ctx.scale_grad_by_freq
        if torch.is_grad_enabled():
            (d_weight,) = reference_backward(
                lambda w: reference.embedding(indices, w, padding_idx, by_freq),
                (d_out.new_zeros(ctx.rows, d_out.shape[-1], requires_grad=True),),
                (d_out,),
            )
        else:
            d_weight = torch.ops.lmkern.embedding_backward(
                d_out, indices, ctx.rows, padding_idx, by_freq
            )
        return d_weight, None, None, None
