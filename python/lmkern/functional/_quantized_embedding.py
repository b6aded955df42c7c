"""Lookup in quantised tables. Layout: csrc/ops/quantized_embedding.h.

The underscore keeps ``lmkern.functional.quantized_embedding`` free for the function.
"""

from __future__ import annotations

import torch
from torch import Tensor

import lmkern.ops.quantized_embedding  # noqa: F401, defines the ops
from lmkern import reference
from lmkern.functional._embedding import resolve_padding_idx
from lmkern.functional._embedding_bag import check_bags
from lmkern.ops.check import check_dims, check_dtype, check_tensors
from lmkern.ops.embedding_bag import MODES
from lmkern.ops.library import needs_grad, use_kernel

_OP = "quantized_embedding"


def quantized_embedding(
    input: Tensor,
    weight: Tensor,
    embedding_dim: int,
    bits: int = 8,
    *,
    mode: str | None = None,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a table of 8 or 4 bits an element, or sums or means of bags of them; for inference.

    Args:
        input: int32 or int64 indices of any shape; with a ``mode`` as for
            :func:`~lmkern.functional.embedding_bag`.
        weight: [V, ceil(D bits / 8) + 8] uint8, as :func:`lmkern.nn.quantize_embedding` makes it: the
            elements, then scale and minimum of the row in float32. With 8 bits it is the layout of
            ``torch.ops.quantized.embedding_bag_byte_prepack``.
        embedding_dim: D. bits: 8 or 4.
        mode: None for the rows themselves, "sum" or "mean" for bags.
        offsets, per_sample_weights, include_last_offset, padding_idx: of bags, as there;
            ``per_sample_weights`` of ``dtype``.
        dtype: of the result.

    Returns:
        [*input, D], or [B, D]: scale · q + minimum, which is within scale / 2 of what was quantised,
        rounded to ``dtype``.

    Raises:
        IndexError: an index outside [0, V), naming index, position and V.
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Guan et al. 2019.
    """
    check_tensors(
        _OP, weight=weight, input=input, offsets=offsets, per_sample_weights=per_sample_weights
    )
    check_dims(_OP, "weight", weight, 2, "[V, ceil(D bits / 8) + 8]")
    check_dtype(_OP, torch.uint8, weight=weight)
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_OP}: input must be int32 or int64, got {input.dtype}")
    if mode not in ("sum", "mean", None):
        raise ValueError(f"{_OP}: mode must be 'sum', 'mean' or None, got {mode!r}")
    if mode is None and (offsets is not None or per_sample_weights is not None):
        raise ValueError(f"{_OP}: offsets and per_sample_weights need a mode")
    if needs_grad(per_sample_weights):
        raise ValueError(f"{_OP}: per_sample_weights must not require a gradient, there is none")
    name = _OP if mode is None else "quantized_embedding_bag"
    kernel = use_kernel(_OP, weight, kernel=name, dtype=dtype)
    if mode is None:
        if kernel:
            return torch.ops.lmkern.quantized_embedding(weight, embedding_dim, bits, input, dtype)
        return reference.dequantize_rows(weight[input], embedding_dim, bits, dtype)
    check_bags(_OP, input, offsets, per_sample_weights, dtype)
    padding = resolve_padding_idx(_OP, padding_idx, weight.shape[0])
    include_last_offset = include_last_offset and offsets is not None
    if kernel:
        return torch.ops.lmkern.quantized_embedding_bag(
            weight, embedding_dim, bits, dtype, input, offsets, per_sample_weights,
            include_last_offset, MODES.index(mode), padding,
        )  # fmt: skip
    table = reference.dequantize_rows(weight, embedding_dim, bits, dtype)
    return reference.embedding_bag(
        input, table, offsets, per_sample_weights, mode, padding, False, include_last_offset
    )
