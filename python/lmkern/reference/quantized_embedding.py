"""Embedding tables of 8 or 4 bits an element, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements that are quantised at a time


def quantize_rows(weight: Tensor, bits: int) -> Tensor:
    """The table [V, ceil(D bits / 8) + 8] uint8 of weight [V, D] (csrc/ops/quantized_embedding.h).

    Raises:
        ValueError: a row is not finite, or wider than float32.
    """
    rows, width = weight.shape
    packed = (width * bits + 7) // 8
    table = torch.empty(rows, packed + 8, dtype=torch.uint8, device=weight.device)
    step, levels = max(1, BLOCK // width), 2**bits - 1
    for first in range(0, rows, step):
        w = weight[first : first + step].detach().double()
        low, high = w.aminmax(dim=1)
        bad = ~((high - low) <= torch.finfo(torch.float32).max)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"quantize_embedding: row {first + row} must be finite, and its range below float32's "
                f"largest number, got elements from {low[row]:.3g} to {high[row]:.3g}"
            )
        affine = torch.stack([(high - low) / levels, low], 1).float()
        scale, minimum = affine.double().unsqueeze(-1).unbind(1)
        q = ((w - minimum) / scale.where(scale > 0, 1.0)).round().clamp(0, levels)
        q = q.to(torch.uint8)
        if bits == 4:
            q = torch.nn.functional.pad(q, (0, width % 2))
            q = q[:, ::2] | q[:, 1::2] << 4
        table[first : first + step] = torch.cat([q, affine.view(torch.uint8)], 1)
    return table


def row_affine(rows: Tensor) -> Tensor:
    """[..., 2] float32, scale and minimum of rows of such a table."""
    # A clone, even of one row: what is viewed as float32 must be aligned like it.
    return rows[..., -8:].clone(memory_format=torch.contiguous_format).view(torch.float32)


def dequantize_rows(rows: Tensor, width: int, bits: int, dtype: torch.dtype) -> Tensor:
    """[..., D] of rows [..., ceil(D bits / 8) + 8] of such a table."""
    affine = row_affine(rows)
    q = rows[..., :-8]
    if bits == 4:
        q = torch.stack([q & 15, q >> 4], -1).flatten(-2)[..., :width]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (q.to(wide) * affine[..., :1] + affine[..., 1:]).to(dtype)
