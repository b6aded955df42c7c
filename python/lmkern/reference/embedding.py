"""Embeddings and bags of them, in plain torch operations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *,
    inplace: bool = False,
    sparse: bool = False,
) -> Tensor:
    """weight[indices]; padding_idx = -1 means none.

    Rows with a norm above ``max_norm`` are scaled down to it: in ``weight`` if ``inplace``, else in the
    result only, and the gradient is that of the scaled row.
    """
    rows = F.embedding(
        indices,
        weight,
        None if padding_idx < 0 else padding_idx,
        max_norm if inplace else None,
        norm_type,
        scale_grad_by_freq,
        sparse,
    )
    return rows if inplace or max_norm is None else clip_norm(rows, max_norm, norm_type)


def clip_norm(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Rows [..., D] whose p-norm is above ``max_norm`` scaled down, as torch.embedding_renorm_ does."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, norm_type, -1, keepdim=True)
    return (wide * torch.where(norm > max_norm, max_norm / (norm + 1e-7), 1.0)).to(rows.dtype)


def embedding_bag(
    indices: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    mode: str = "mean",
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    include_last_offset: bool = False,
    winners: Tensor | None = None,
) -> Tensor:
    """Sums, means or maxima of the rows of each bag; padding_idx = -1 means none.

    Args:
        indices: [N] with ``offsets`` ([B], or [B + 1] with ``include_last_offset``), or [B, L].
        per_sample_weights: as ``indices``; they multiply the rows before anything else.
        winners: [B, D], which term of its bag is the maximum, instead of finding out.
    """
    flat = indices.reshape(-1)
    if offsets is None:
        bags = indices.shape[0]
        bag = torch.arange(bags, device=flat.device).repeat_interleave(indices.shape[1])
    else:
        ends = offsets.new_tensor([flat.shape[0]])
        lengths = (offsets if include_last_offset else torch.cat([offsets, ends])).diff()
        bags = lengths.shape[0]
        bag = torch.arange(bags, device=flat.device).repeat_interleave(lengths)
        flat = flat[: bag.shape[0]]
    padding = None if padding_idx < 0 else padding_idx
    rows = F.embedding(flat, weight, padding, scale_grad_by_freq=scale_grad_by_freq)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1)[: bag.shape[0], None]
    kept = flat != padding_idx
    rows, bag = rows[kept], bag[kept]
    count = torch.bincount(bag, minlength=bags)
    if mode != "max" or rows.shape[0] == 0:
        out = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows)
        if mode == "mean":
            out = out / count.clamp(min=1)[:, None]
        return out.to(weight.dtype)
    first = count.cumsum(0) - count
    if winners is None:
        term = torch.arange(bag.shape[0], device=bag.device) - first[bag]
        table = rows.new_full((bags, int(count.max()), rows.shape[1]), -math.inf)
        winners = table.index_put((bag, term), rows.detach()).max(1).indices
    chosen = (first[:, None] + winners).clamp(max=rows.shape[0] - 1)
    out = rows.gather(0, chosen).masked_fill(count[:, None] == 0, 0.0)
    return out.to(weight.dtype)
