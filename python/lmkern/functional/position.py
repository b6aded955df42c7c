"""Positions inside of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.ops.check import check_tensors

OP = "rotary_embedding"


def rotary_embedding(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor | None]:
    r"""Rotate pairs of features of query and key by the angle of their position.

    .. math:: x'_a = x_a \cos θ - x_b \sin θ, \qquad x'_b = x_b \cos θ + x_a \sin θ

    The R first features are rotated, the others left alone. Pair r is (a, b) = (r, r + R/2) as in
    Llama, or (2r, 2r + 1) as in GPT-J with ``interleaved``.

    Args:
        query: [..., H, L, D]. key: [..., H_kv, L, D], or None.
        cos, sin: broadcastable to [..., 1, L, R/2], R <= D, usually [L, R/2]: cos θ and sin θ of each
            position and pair, in float32 (float64 for float64 inputs), in which the products are taken.
        interleaved: whether pairs are neighbours.

    Returns:
        (query, key) rotated, of the same shapes and dtypes; key is None if it was None.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Su et al. 2021 (RoFormer), section 3.2.2.
    """
    check_tensors(OP, query=query, key=key, cos=cos, sin=sin)
    if cos.shape != sin.shape:
        raise ValueError(f"{OP}: sin must be like cos {list(cos.shape)}, got {list(sin.shape)}")
    for name, x in (("query", query), ("key", key)):
        if x is None:
            continue
        if x.dim() < 2 or not x.is_floating_point():
            raise ValueError(
                f"{OP}: {name} must be floating [..., L, D], got {x.dtype} {list(x.shape)}"
            )
        if cos.dim() < 2 or cos.shape[-2] != x.shape[-2] or 2 * cos.shape[-1] > x.shape[-1]:
            raise ValueError(
                f"{OP}: cos must be [..., L, R/2] with L = {x.shape[-2]} and R <= {x.shape[-1]} "
                f"like {name}, got {list(cos.shape)}"
            )
    rotated = _rotate(query, cos, sin, interleaved)
    return rotated, None if key is None else _rotate(key, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    pairs = cos.shape[-1]
    if interleaved:
        a, b = x[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    rotated = rotated.to(x.dtype)
    if 2 * pairs == x.shape[-1]:
        return rotated
    return torch.cat([rotated, x[..., 2 * pairs :]], -1)
