"""Token, position and segment embeddings with norm and dropout, in plain torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .embedding import embedding
from .norm import norm as normalise


def token_position_embedding(
    input: Tensor,
    token: Tensor,
    position: Tensor | None = None,
    segment: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    segments: Tensor | None = None,
    scale: float = 1.0,
    norm: str | None = None,
    padding_idx: int = -1,
    dropout_p: float = 0.0,
    sparse: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """dropout(norm(scale token[input] + position[positions] + segment[segments])).

    ``positions``: as ``input``, or [L] for its last dimension; default ``offset``, ``offset`` + 1, ...
    ``norm``: None, "layer" or "rms". ``keep``, instead of ``dropout_p``: what dropout multiplies with.
    """
    x = embedding(input, token, padding_idx, sparse=sparse) * scale
    if position is not None:
        if positions is None:
            length = input.shape[-1] if input.dim() else 1
            positions = torch.arange(offset, offset + length, device=input.device)
            positions = positions if input.dim() else positions[0]
        x = x + F.embedding(positions, position)
    if segment is not None:
        assert segments is not None
        x = x + F.embedding(segments, segment)
    if norm is not None:
        x = normalise(x, x.shape[-1:], weight, bias, eps, norm == "rms")
    return F.dropout(x, dropout_p) if keep is None else x * keep
