"""Embedding lookup, its dense and sparse gradient, renormalisation. Math: csrc/ops/embedding.h.

Both backends sum the rows of the gradient in the order of what they look up. The CPU knows the buckets
then; on a GPU nobody waits to hear how many there are, and a dense gradient needs no more than the
sorted list.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.backend import kernels_of, takes_cuda
from lmkern.ops.gradient_buffer import GradientBuffer, buffer_of, fill_gradient
from lmkern.ops.library import define_op, is_plain_backward, reference_backward
from lmkern.ops.memory import fresh


class Buckets(NamedTuple):
    """The positions of each distinct index: ids[u] is at order[starts[u] : starts[u + 1]]."""

    ids: Tensor
    starts: Tensor
    order: Tensor


def bucket(indices: Tensor, num_embeddings: int, padding_idx: int = -1) -> Buckets:
    """Sort ``indices`` (contiguous) into buckets, without those of ``padding_idx``."""
    count = indices.numel()
    most = min(count, num_embeddings)
    ids = fresh(indices, most, dtype=torch.int64)
    starts = fresh(indices, most + 1, dtype=torch.int64)
    order = fresh(indices, count, dtype=torch.int64)
    distinct = _C.embedding_buckets(indices, num_embeddings, padding_idx, ids, starts, order)
    if distinct < most:
        ids, starts = ids[:distinct], starts[: distinct + 1]
    return Buckets(ids, starts, order)


class SortedPositions(NamedTuple):
    """The positions of a lookup on a GPU, by the rows of the gradient that they add to."""

    rows: Tensor  # [N] int32 ascending; beyond the last row: no gradient
    order: Tensor  # [N] int64


def sort_positions(
    indices: Tensor, num_embeddings: int, padding_idx: int = -1, covered: Tensor | None = None
) -> SortedPositions:
    """Sort ``indices`` (contiguous) on a GPU; ``covered`` [1]: positions from there on do not count."""
    keys = fresh(indices, indices.numel(), dtype=torch.int32)
    kernels_of(indices).embedding_keys(indices, num_embeddings, padding_idx, covered, keys)
    return SortedPositions(*torch.sort(keys, stable=True))


def distinct_rows(
    positions: SortedPositions, num_embeddings: int
) -> tuple[Tensor, SortedPositions]:
    """The distinct rows, int64 ascending, and the positions by their numbers. Waits for the GPU."""
    ids, numbers = torch.unique_consecutive(positions.rows, return_inverse=True)
    if ids.numel() and int(ids[-1]) >= num_embeddings:
        ids = ids[:-1]
    return ids.long(), SortedPositions(numbers.int(), positions.order)


def workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _write_sorted(
    d_out: Tensor,
    positions: SortedPositions,
    gradient: Tensor,
    scale_grad_by_freq: bool,
    scale: float,
) -> None:
    """Write the rows of ``gradient`` that occur."""
    kernels = kernels_of(d_out)
    size = kernels.embedding_sorted_workspace(*d_out.shape, d_out.dtype == torch.float64)
    kernels.embedding_sorted_backward(
        d_out, *positions, gradient, workspace(d_out, size), scale_grad_by_freq, scale
    )


def contiguous_rows(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 or weight.shape[1] <= 1 else weight.contiguous()


def _forward_fake(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    return fresh(weight, *indices.shape, weight.shape[1])


def _forward(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    out = _forward_fake(weight, indices, max_norm, norm_type)
    kernels_of(weight).embedding_forward(
        contiguous_rows(weight), indices.contiguous(), out, max_norm, norm_type
    )
    return out


def _renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> None:
    rows, indices = contiguous_rows(weight), indices.contiguous()
    if takes_cuda(weight):
        ids = sort_positions(indices, weight.shape[0]).rows.long()
    else:
        ids = bucket(indices, weight.shape[0]).ids
    kernels_of(weight).embedding_renorm(rows, ids, max_norm, norm_type)
    if rows is not weight:
        weight.copy_(rows)
    elif not weight.is_inference():
        torch.autograd.graph.increment_version(weight)


def _backward_fake(
    d_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    scale: float = 1.0,
) -> Tensor:
    return fresh(d_out, num_embeddings, d_out.shape[-1])


def _backward(
    d_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    scale: float = 1.0,
) -> Tensor:
    return dense_gradient(
        d_out, indices, num_embeddings, padding_idx, scale_grad_by_freq, None, scale
    )


def dense_gradient(
    d_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    buffer: GradientBuffer | None,
    scale: float = 1.0,
) -> Tensor:
    """The gradient [V, D] times ``scale``, in the weight's buffer (CPU only) or in fresh memory."""
    indices, rows = indices.contiguous(), _flat(d_out)
    if takes_cuda(rows):
        gradient = rows.new_zeros(num_embeddings, rows.shape[1])
        positions = sort_positions(indices, num_embeddings, padding_idx)
        _write_sorted(rows, positions, gradient, scale_grad_by_freq, scale)
        return gradient
    buckets = bucket(indices, num_embeddings, padding_idx)

    def write(gradient: Tensor, stale: Tensor | None) -> None:
        _C.embedding_backward(rows, *buckets, stale, gradient, False, scale_grad_by_freq, scale)

    return fill_gradient(buffer, (num_embeddings, rows.shape[1]), rows.dtype, buckets.ids, write)


def _flat(d_out: Tensor) -> Tensor:
    return d_out.reshape(math.prod(d_out.shape[:-1]), d_out.shape[-1]).contiguous()


define_op(
    "embedding_forward(Tensor weight, Tensor indices, float max_norm, float norm_type) -> Tensor",
    cpu=_forward,
    cuda=_forward,
    fake=_forward_fake,
)
define_op(
    "embedding_renorm_(Tensor(a!) weight, Tensor indices, float max_norm, float norm_type) -> ()",
    cpu=_renorm,
    cuda=_renorm,
    fake=lambda weight, indices, max_norm, norm_type: None,
)
define_op(
    "embedding_backward(Tensor d_out, Tensor indices, SymInt num_embeddings, int padding_idx, "
    "bool scale_grad_by_freq, float scale=1.0) -> Tensor",
    cpu=_backward,
    cuda=_backward,
    fake=_backward_fake,
)


def sparse_gradient(
    d_out: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    scale: float = 1.0,
) -> Tensor:
    """The gradient as a coalesced sparse tensor [V, D]: int64 ids ascending, rows [U, D]."""
    indices, d_out = indices.contiguous(), _flat(d_out)
    if takes_cuda(d_out):
        ids, positions = distinct_rows(
            sort_positions(indices, num_embeddings, padding_idx), num_embeddings
        )
        rows = fresh(d_out, ids.shape[0], d_out.shape[1])
        _write_sorted(d_out, positions, rows, scale_grad_by_freq, scale)
    else:
        buckets = bucket(indices, num_embeddings, padding_idx)
        ids, rows = buckets.ids, fresh(d_out, buckets.ids.shape[0], d_out.shape[1])
        _C.embedding_backward(d_out, *buckets, None, rows, True, scale_grad_by_freq, scale)
    return sparse_tensor(ids, rows, num_embeddings)


def sparse_tensor(ids: Tensor, rows: Tensor, num_embeddings: int) -> Tensor:
    """The coalesced sparse tensor [V, D] with these rows at these ascending ids."""
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0), rows, (num_embeddings, rows.shape[1]),
        check_invariants=False, is_coalesced=True,
    )  # fmt: skip


def weak_leaf(weight: Tensor) -> weakref.ref[Tensor] | None:
    """A leaf whose ``grad`` :func:`mark_coalesced` may look at later."""
    return weakref.ref(weight) if weight.is_leaf else None


def mark_coalesced(leaf: weakref.ref[Tensor] | None, gradient: Tensor) -> None:
    """Becoming the ``grad`` of a leaf, a sparse tensor loses the mark of being coalesced: set it again
    when this backward pass is over."""
    if leaf is None:
        return
    data = gradient._values().data_ptr()  # not a tensor: AccumulateGrad must be their only owner

    def mark() -> None:
        weight = leaf()
        grad = None if weight is None else weight.grad
        if grad is not None and grad.is_sparse and grad._values().data_ptr() == data:
            grad._coalesced_(True)

    torch.autograd.Variable._execution_engine.queue_callback(mark)


def clip_norm_backward(rows: Tensor, d_out: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """The gradient of :func:`lmkern.reference.clip_norm`, in operations that any graph can hold.

    y = s w with s = max_norm / (|w| + e): d_w = s (d_y - (d_y . w) / (|w| + e) d|w|/dw).
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    w, d_y = rows.to(wide), d_out.to(wide)
    norm = torch.linalg.vector_norm(w, norm_type, -1, keepdim=True)
    if norm_type == 0:
        slope = torch.zeros_like(w)
    elif math.isinf(norm_type):  # shared among equals
        extreme = (w.abs() == norm).to(wide)
        slope = w.sgn() * extreme / extreme.sum(-1, keepdim=True)
    else:
        slope = w.sgn() * (w.abs() / norm).pow(norm_type - 1)
        slope = slope.masked_fill(w == 0, 0.0)
    along = (d_y * w).sum(-1, keepdim=True) / (norm + 1e-7)
    d_w = max_norm / (norm + 1e-7) * (d_y - along * slope)
    return torch.where(norm > max_norm, d_w, d_y).to(rows.dtype)


class EmbeddingFunction(torch.autograd.Function):
    """(weight, indices, padding_idx or -1, scale_grad_by_freq, sparse, max_norm, norm_type, reuse_grad)
    -> rows. ``max_norm`` is that of the scaled lookup, infinity for none.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight, indices, padding_idx, scale_grad_by_freq, sparse, max_norm, norm_type,
        reuse_grad,
    ):  # fmt: skip
        # The weight only where it is scaled: a plain lookup is linear in it, and it may change
        # before backward.
        ctx.save_for_backward(indices, weight if max_norm < math.inf else None)
        ctx.rows, ctx.sparse = weight.shape[0], sparse
        ctx.leaf = weak_leaf(weight) if sparse else None
        ctx.buffer = None
        if not sparse and not torch.compiler.is_compiling():
            ctx.buffer = buffer_of(weight, reuse_grad)
        ctx.padding_idx, ctx.scale_grad_by_freq = padding_idx, scale_grad_by_freq
        ctx.norm = max_norm, norm_type
        return torch.ops.lmkern.embedding_forward(weight, indices, max_norm, norm_type)

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        indices, weight = ctx.saved_tensors
        lookup = ctx.padding_idx, ctx.scale_grad_by_freq
        if torch.is_grad_enabled():
            norm = () if weight is None else ctx.norm
            if weight is None:
                weight = d_out.new_zeros(ctx.rows, d_out.shape[-1], requires_grad=True)
            (d_weight,) = reference_backward(
                lambda w: reference.embedding(indices, w, *lookup, *norm), (weight,), (d_out,)
            )
        else:
            if weight is not None:
                rows = torch.ops.lmkern.embedding_forward(weight, indices, math.inf, 2.0)
                d_out = clip_norm_backward(rows, d_out, *ctx.norm)
            if ctx.sparse:
                d_weight = sparse_gradient(d_out, indices, ctx.rows, *lookup)
                mark_coalesced(ctx.leaf, d_weight)
            elif ctx.buffer is not None and is_plain_backward(d_out):
                d_weight = dense_gradient(d_out, indices, ctx.rows, *lookup, ctx.buffer)
            else:
                d_weight = torch.ops.lmkern.embedding_backward(d_out, indices, ctx.rows, *lookup)
        return d_weight, None, None, None, None, None, None, None
