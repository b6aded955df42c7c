"""Bags of embedding rows and their gradients. Math and layouts: csrc/ops/embedding_bag.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.backend import kernels_of, takes_cuda
from lmkern.ops.embedding import (
    bucket,
    contiguous_rows,
    distinct_rows,
    mark_coalesced,
    sort_positions,
    sparse_tensor,
    weak_leaf,
    workspace,
)
from lmkern.ops.gradient_buffer import GradientBuffer, buffer_of, fill_gradient
from lmkern.ops.library import define_op, is_plain_backward, reference_backward
from lmkern.ops.memory import fresh

MODES = ("sum", "mean", "max")  # lmkern::BagMode, in its order
_MAX = MODES.index("max")

# indices [N] or [B, L], offsets or None, per_sample_weights or None, include_last_offset, mode's
# number, padding_idx or -1: lmkern::EmbeddingBags.
BAGS = (
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, bool include_last_offset, int mode, "
    "int padding_idx"
)
Bags = tuple[Tensor, Tensor | None, Tensor | None, bool, int, int]


def contiguous_bags(bags: Bags) -> Bags:
    indices, offsets, weights, *options = bags
    return (
        indices.contiguous(),
        None if offsets is None else offsets.contiguous(),
        None if weights is None else weights.contiguous(),
        *options,
    )  # type: ignore[return-value]


def bag_count(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Any:
    if offsets is None:
        return indices.shape[0]
    return torch.sym_max(offsets.shape[0] - 1, 0) if include_last_offset else offsets.shape[0]


def _forward_fake(weight: Tensor, *bags_and_save: Any) -> tuple[Tensor, Tensor]:
    *bags, save = bags_and_save
    count = bag_count(bags[0], bags[1], bags[3])
    shape = (count, weight.shape[1]) if bags[4] == _MAX and save else (0,)
    return fresh(weight, count, weight.shape[1]), fresh(weight, shape, dtype=torch.int32)


def _kept(bags: Bags) -> Tensor | None:
    """On a GPU with padding_idx: how many of positions 0 .. n do not look it up."""
    indices, *_, padding_idx = bags
    if padding_idx < 0 or not takes_cuda(indices):
        return None
    return torch.cumsum(indices.flatten() != padding_idx, 0)


def _forward(weight: Tensor, *bags_and_save: Any) -> tuple[Tensor, Tensor]:
    *bags, save = bags_and_save
    out, winners = _forward_fake(weight, *bags_and_save)
    kernels_of(weight).embedding_bag_forward(
        contiguous_bags(tuple(bags)), contiguous_rows(weight), out,  # type: ignore[arg-type]
        winners if bags[4] == _MAX and save else None,
    )  # fmt: skip
    return out, winners


def _gradient(
    d_out: Tensor,
    winners: Tensor,
    bags: Bags,
    num_embeddings: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    buffer: GradientBuffer | None,
) -> Tensor:
    """The gradient of the weight, sparse or dense; the dense one in the buffer, if there is one."""
    bags = contiguous_bags(bags)
    d_out, winning = d_out.contiguous(), winners if bags[4] == _MAX else None
    if takes_cuda(d_out):
        return _sorted_gradient(d_out, winning, bags, num_embeddings, scale_grad_by_freq, sparse)
    indices, offsets, _, include_last_offset, _, padding_idx = bags
    if offsets is not None and include_last_offset:  # positions past the last offset are in no bag
        indices = indices[: int(offsets[-1])]
    elif offsets is not None and offsets.shape[0] == 0:
        indices = indices[:0]
    buckets = bucket(indices, num_embeddings, padding_idx)

    def write(gradient: Tensor, stale: Tensor | None) -> None:
        _C.embedding_bag_backward(
            bags, d_out, winning, *buckets, stale, gradient, sparse, scale_grad_by_freq
        )

    if sparse:
        rows = fresh(d_out, buckets.ids.shape[0], d_out.shape[1])
        write(rows, None)
        return sparse_tensor(buckets.ids, rows, num_embeddings)
    shape = num_embeddings, d_out.shape[1]
    return fill_gradient(buffer, shape, d_out.dtype, buckets.ids, write)


def _sorted_gradient(
    d_out: Tensor,
    winners: Tensor | None,
    bags: Bags,
    num_embeddings: int,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    """:func:`_gradient` on a GPU."""
    indices, offsets, _, include_last_offset, _, padding_idx = bags
    covered = None
    if offsets is not None and include_last_offset:
        covered = offsets[-1:]  # read there: nobody waits
    elif offsets is not None and offsets.shape[0] == 0:
        covered = offsets.new_zeros(1)
    positions = sort_positions(indices, num_embeddings, padding_idx, covered)
    if sparse:
        ids, positions = distinct_rows(positions, num_embeddings)
    gradient = d_out.new_zeros(ids.shape[0] if sparse else num_embeddings, d_out.shape[1])
    kernels = kernels_of(d_out)
    size = kernels.embedding_bag_sorted_workspace(
        indices.numel(), d_out.shape[1], d_out.dtype == torch.float64
    )
    kernels.embedding_bag_sorted_backward(
        bags, d_out, winners, _kept(bags), *positions, gradient, workspace(d_out, size),
        scale_grad_by_freq,
    )  # fmt: skip
    return sparse_tensor(ids, gradient, num_embeddings) if sparse else gradient


def _backward_fake(d_out: Tensor, winners: Tensor, *rest: Any) -> Tensor:
    return fresh(d_out, rest[-2], d_out.shape[1])


def _backward(d_out: Tensor, winners: Tensor, *rest: Any) -> Tensor:
    *bags, num_embeddings, scale_grad_by_freq = rest
    return _gradient(d_out, winners, tuple(bags), num_embeddings, scale_grad_by_freq, False, None)  # type: ignore[arg-type]


def _weights_backward_fake(d_out: Tensor, winners: Tensor, weight: Tensor, *bags: Any) -> Tensor:
    return fresh(weight, bags[0].shape)


def _weights_backward(d_out: Tensor, winners: Tensor, weight: Tensor, *bags: Any) -> Tensor:
    d_weights = _weights_backward_fake(d_out, winners, weight, *bags)
    kernels_of(weight).embedding_bag_weights_backward(
        contiguous_bags(bags), d_out.contiguous(), winners if bags[4] == _MAX else None,  # type: ignore[arg-type]
        _kept(bags), contiguous_rows(weight), d_weights,  # type: ignore[arg-type]
    )  # fmt: skip
    return d_weights


define_op(
    f"embedding_bag_forward(Tensor weight, {BAGS}, bool save) -> (Tensor, Tensor)",
    cpu=_forward,
    cuda=_forward,
    fake=_forward_fake,
)
define_op(
    f"embedding_bag_backward(Tensor d_out, Tensor winners, {BAGS}, SymInt num_embeddings, "
    "bool scale_grad_by_freq) -> Tensor",
    cpu=_backward,
    cuda=_backward,
    fake=_backward_fake,
)
define_op(
    f"embedding_bag_weights_backward(Tensor d_out, Tensor winners, Tensor weight, {BAGS}) -> Tensor",
    cpu=_weights_backward,
    cuda=_weights_backward,
    fake=_weights_backward_fake,
)


class EmbeddingBagFunction(torch.autograd.Function):
    """(weight, per_sample_weights or None, indices, offsets or None, include_last_offset, mode's number,
    padding_idx or -1, scale_grad_by_freq, sparse, reuse_grad) -> [B, D]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight, per_sample_weights, indices, offsets, include_last_offset, mode, padding_idx,
        scale_grad_by_freq, sparse, reuse_grad,
    ):  # fmt: skip
        options = include_last_offset, mode, padding_idx
        out, winners = torch.ops.lmkern.embedding_bag_forward(
            weight, indices, offsets, per_sample_weights, *options, ctx.needs_input_grad[0] or
            ctx.needs_input_grad[1],
        )  # fmt: skip
        # The weight only where a gradient depends on it, as in EmbeddingFunction.
        kept = weight if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, per_sample_weights, indices, offsets, winners)
        ctx.rows, ctx.options = weight.shape[0], options
        ctx.scale_grad_by_freq, ctx.sparse = scale_grad_by_freq, sparse
        ctx.leaf = weak_leaf(weight) if sparse else None
        ctx.buffer = None
        if ctx.needs_input_grad[0] and not sparse and not torch.compiler.is_compiling():
            ctx.buffer = buffer_of(weight, reuse_grad)
        return out

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        weight, samples, indices, offsets, winners = ctx.saved_tensors
        bags: Any = (indices, offsets, samples, *ctx.options)
        need_weight, need_samples = ctx.needs_input_grad[:2]
        d_weight = d_samples = None
        if torch.is_grad_enabled():
            d_weight, d_samples = _reference_backward(ctx, d_out, weight, bags, winners)
        else:
            by_freq = ctx.scale_grad_by_freq
            if need_weight and ctx.sparse:
                d_weight = _gradient(d_out, winners, bags, ctx.rows, by_freq, True, None)
                mark_coalesced(ctx.leaf, d_weight)
            elif need_weight and ctx.buffer is not None and is_plain_backward(d_out):
                d_weight = _gradient(d_out, winners, bags, ctx.rows, by_freq, False, ctx.buffer)
            elif need_weight:
                d_weight = torch.ops.lmkern.embedding_bag_backward(
                    d_out, winners, *bags, ctx.rows, by_freq
                )
            if need_samples:
                d_samples = torch.ops.lmkern.embedding_bag_weights_backward(
                    d_out, winners, weight, *bags
                )
        return d_weight, d_samples, None, None, None, None, None, None, None, None


def _reference_backward(
    ctx: Any, d_out: Tensor, weight: Tensor | None, bags: Bags, winners: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    indices, offsets, samples, include_last_offset, mode, padding_idx = bags

    def run(w: Tensor, s: Tensor | None) -> Tensor:
        return reference.embedding_bag(
            indices, w, offsets, s, MODES[mode], padding_idx, ctx.scale_grad_by_freq,
            include_last_offset, winners.long() if mode == _MAX else None,
        )  # fmt: skip

    if weight is None:
        weight = d_out.new_zeros(ctx.rows, d_out.shape[1], requires_grad=True)
    d_weight, d_samples = reference_backward(run, (weight, samples), (d_out,))
    return (
        d_weight if ctx.needs_input_grad[0] else None,
        d_samples if ctx.needs_input_grad[1] else None,
    )
