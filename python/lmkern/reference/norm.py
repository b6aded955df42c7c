"""Normalisations, in plain torch operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
) -> Tensor:
    """torch's layer norm, or RMS norm, which has no bias; eps = None is the default of that."""
    if rms:
        return F.rms_norm(input, normalized_shape, weight, eps)
    return F.layer_norm(input, normalized_shape, weight, bias, 1e-5 if eps is None else eps)


def add_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    rms: bool = False,
    dropout_p: float = 0.0,
    input_bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum), sum = residual + dropout(input + input_bias).

    ``keep``, instead of ``dropout_p``: what dropout multiplies with.
    """
    x = input if input_bias is None else input + input_bias
    x = F.dropout(x, dropout_p) if keep is None else x * keep
    sum = residual + x
    return norm(sum, normalized_shape, weight, bias, eps, rms), sum
