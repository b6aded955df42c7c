"""Bags of embeddings. Math and layouts: csrc/ops/embedding_bag.h."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import reference
from lmkern.functional._embedding import (
    check_max_norm_mode,
    embedding,
    renorm,
    resolve_padding_idx,
)
from lmkern.ops.check import check_dims, check_dtype, check_shape, check_tensors
from lmkern.ops.embedding_bag import MODES, EmbeddingBagFunction
from lmkern.ops.library import needs_grad, use_kernel


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    max_norm_mode: str = "inplace",
    reuse_grad: bool = True,
) -> Tensor:
    """Sum, mean or maximum of the rows of ``weight`` in each bag, without the rows in between.

    Signature and semantics of :func:`torch.nn.functional.embedding_bag`. Empty bags give zeros.

    Args:
        input: int32 or int64 indices: [B, L], B bags of L, or [N], all bags one after the other; or a
            nested tensor of bags (jagged layout).
        weight: [V, D].
        offsets: where each bag of a 1-D ``input`` begins: [B], from 0 and not decreasing. With
            ``include_last_offset`` [B + 1], where the last element ends the last bag; what comes after
            it is in no bag.
        max_norm, norm_type: rows with a larger p-norm are scaled down to it, by
            max_norm / (norm + 1e-7).
        scale_grad_by_freq: divide a row's gradient by how often it occurs (torch: not for max).
        mode: "sum", "mean" or "max". Of equal maxima the first gets the gradient.
        sparse: the gradient of ``weight`` is a coalesced sparse tensor, as for
            :func:`~lmkern.functional.embedding` (torch: not for max).
        per_sample_weights: [B, L] or [N], dtype of ``weight``; rows are multiplied with them first.
            Differentiable. The mean is still over the number of rows: sum(w x) / count (torch: only
            for sum).
        padding_idx: rows of this index belong to no bag and get no gradient.
        max_norm_mode: "inplace" scales the rows in ``weight`` itself first, as torch does;
            "functional" leaves ``weight`` alone, and the gradient is that of the scaled rows: each
            distinct row is copied and scaled once (under torch.compile, whose shapes are static, the
            whole table is, and the gradient is dense).
        reuse_grad: as for :func:`~lmkern.functional.embedding`.

    Returns:
        [B, D].

    Raises:
        IndexError: an index outside [0, V); on a GPU, later (:func:`lmkern.synchronize`), and for
            offsets that do not fit, too. ValueError: offsets that do not fit; an unknown mode.
    """
    if isinstance(input, Tensor) and input.is_nested:
        samples = None if per_sample_weights is None else per_sample_weights.values()
        input, offsets, per_sample_weights = input.values(), input.offsets(), samples  # type: ignore[attr-defined]
        include_last_offset = True
    op = "embedding_bag"
    check_tensors(
        op, weight=weight, input=input, offsets=offsets, per_sample_weights=per_sample_weights
    )
    check_dims(op, "weight", weight, 2, "[V, D]")
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: input must be int32 or int64, got {input.dtype}")
    check_bags(op, input, offsets, per_sample_weights, weight.dtype)
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be 'sum', 'mean' or 'max', got {mode!r}")
    padding = resolve_padding_idx(op, padding_idx, weight.shape[0])
    include_last_offset = include_last_offset and offsets is not None
    inplace = check_max_norm_mode(op, max_norm_mode)
    if max_norm is not None and not inplace:
        return _of_scaled_rows(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
            per_sample_weights, include_last_offset, padding, reuse_grad,
        )  # fmt: skip
    if sparse and torch.compiler.is_compiling():
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, True,
            per_sample_weights, include_last_offset, padding_idx,
        )  # fmt: skip
    kernel = use_kernel(op, weight)
    if max_norm is not None:
        renorm(weight, input, max_norm, norm_type, kernel=kernel)
    if not kernel:
        return reference.embedding_bag(
            input, weight, offsets, per_sample_weights, mode, padding, scale_grad_by_freq,
            include_last_offset,
        )  # fmt: skip
    options = include_last_offset, MODES.index(mode), padding
    if needs_grad(weight, per_sample_weights):
        return EmbeddingBagFunction.apply(
            weight,
            per_sample_weights,
            input,
            offsets,
            *options,
            scale_grad_by_freq,
            sparse,
            reuse_grad,
        )
    return torch.ops.lmkern.embedding_bag_forward(
        weight, input, offsets, per_sample_weights, *options, False
    )[0]


def _of_scaled_rows(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    max_norm: float,
    norm_type: float,
    scale_grad_by_freq: bool,
    mode: str,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    reuse_grad: bool,
) -> Tensor:
    """Bags of rows that are scaled on the fly: the lookup of each distinct one, then bags of those."""
    padding = None if padding_idx < 0 else padding_idx
    plain = use_kernel("embedding_bag", weight) and not weight.is_meta
    if not plain or torch.compiler.is_compiling():
        rows = reference.clip_norm(weight, max_norm, norm_type)
    else:
        distinct, inverse = torch.unique(input, return_inverse=True)
        if distinct.numel() and not 0 <= int(distinct[0]) <= int(distinct[-1]) < weight.shape[0]:
            embedding(input, weight)  # says where
        rows = embedding(
            distinct, weight, None, max_norm, norm_type, False, sparse, max_norm_mode="functional",
            reuse_grad=reuse_grad,
        )  # fmt: skip
        if padding is not None:
            place = (distinct == padding).nonzero()
            padding = int(place) if place.numel() else None
        input = inverse
    return embedding_bag(
        input, rows, offsets, None, norm_type, scale_grad_by_freq, mode, False, per_sample_weights,
        include_last_offset, padding,
    )  # fmt: skip


def check_bags(
    op: str,
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """The shapes of what describes the bags, of rows of ``dtype``."""
    if input.dim() not in (1, 2):
        raise ValueError(f"{op}: input must be [B, L] or [N], got {list(input.shape)}")
    if (offsets is None) != (input.dim() == 2):
        raise ValueError(f"{op}: offsets must be given with input [N], and only then")
    if per_sample_weights is not None:
        shape = tuple(input.shape)
        check_shape(op, "per_sample_weights", per_sample_weights, shape, "like input")
        check_dtype(op, dtype, per_sample_weights=per_sample_weights)
