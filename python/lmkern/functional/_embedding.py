"""Embedding. Math and layouts: csrc/ops/embedding.h.

The underscore keeps ``lmkern.functional.embedding`` free for the function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern import reference
from lmkern._warnings import warn_once
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
