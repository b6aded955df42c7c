"""Embedding. Math and layouts: csrc/ops/embedding.h.

The underscore keeps ``lmkern.functional.embedding`` free for the function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmkern import reference
from lmkern.ops.check import check_dims, check_tensors
from lmkern.ops.embedding import EmbeddingFunction
from lmkern.ops.library import needs_grad, use_kernel


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    max_norm_mode: str = "inplace",
    reuse_grad: bool = True,
) -> Tensor:
    """Rows of ``weight``: out[..., :] = weight[input[...], :].

    Signature and semantics of :func:`torch.nn.functional.embedding`.

    Args:
        input: int32 or int64 indices of any shape.
        weight: [V, D].
        padding_idx: the row that gets no gradient; negative counts from the end.
        max_norm: rows with a larger p-norm are scaled down to it, by max_norm / (norm + 1e-7).
        norm_type: the p of that norm.
        scale_grad_by_freq: divide a row's gradient by how often it occurs in ``input``; also with
            ``sparse`` (torch: only without).
        sparse: the gradient of ``weight`` is a sparse COO tensor [V, D], coalesced: distinct int64 ids,
            ascending (torch: one entry for each index). Under torch.compile it is torch's.
        max_norm_mode: "inplace" scales the rows in ``weight`` itself before the lookup, outside of
            autograd, as torch does. "functional" leaves ``weight`` alone and scales what is looked
            up; the gradient is that of the scaled row.
        reuse_grad: keep the memory of the dense gradient for the next step, which then costs what the
            touched rows cost, not V (lmkern/ops/gradient_buffer.py: when and how; V D elements stay
            allocated). Turn it off for a ``weight.grad`` that is written to behind autograd's back,
            through ``.data``, NumPy or a pointer.

    Returns:
        [*input, D].

    Raises:
        IndexError: an index outside [0, V), naming index, position and V. On a GPU, later
            (:func:`lmkern.synchronize`).
    """
    check_tensors("embedding", weight=weight, input=input)
    check_dims("embedding", "weight", weight, 2, "[V, D]")
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embedding: input must be int32 or int64, got {input.dtype}")
    padding = resolve_padding_idx("embedding", padding_idx, weight.shape[0])
    inplace = check_max_norm_mode("embedding", max_norm_mode) and max_norm is not None
    if not use_kernel("embedding", weight) or (sparse and torch.compiler.is_compiling()):
        return reference.embedding(
            input, weight, padding, scale_grad_by_freq, max_norm, norm_type,
            inplace=inplace, sparse=sparse,
        )  # fmt: skip
    limit = math.inf if max_norm is None or inplace else float(max_norm)
    if inplace:
        assert max_norm is not None
        renorm(weight, input, max_norm, norm_type)
    if needs_grad(weight):
        return EmbeddingFunction.apply(
            weight, input, padding, scale_grad_by_freq, sparse, limit, float(norm_type), reuse_grad
        )
    return torch.ops.lmkern.embedding_forward(weight, input, limit, float(norm_type))


def resolve_padding_idx(op: str, padding_idx: int | None, rows: int) -> int:
    """``padding_idx`` counted from the front, -1 for none."""
    if padding_idx is None:
        return -1
    if not -rows <= padding_idx < rows:
        raise ValueError(f"{op}: padding_idx must be in [-{rows}, {rows}), got {padding_idx}")
    return padding_idx % rows


def check_max_norm_mode(op: str, mode: str) -> bool:
    """Whether the rows are scaled in place."""
    if mode not in ("inplace", "functional"):
        raise ValueError(f"{op}: max_norm_mode must be 'inplace' or 'functional', got {mode!r}")
    return mode == "inplace"


def renorm(
    weight: Tensor, input: Tensor, max_norm: float, norm_type: float, *, kernel: bool = True
) -> None:
    """Scale the rows that ``input`` names down to ``max_norm``, in place and outside of autograd."""
    run = torch.ops.lmkern.embedding_renorm_ if kernel else torch.embedding_renorm_
    with torch.no_grad():
        run(weight, input.contiguous(), float(max_norm), float(norm_type))
