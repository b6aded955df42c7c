"""Positions inside of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.ops.check import check_tensors
from lmkern.ops.library import accumulate_dtype, needs_grad, use_kernel
from lmkern.ops.rotary import RotaryFunction

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
    q, k, table_cos, table_sin = _as_heads(query), _as_heads(key), *_as_tables(query, cos, sin)
    if (
        q is None
        or table_cos is None
        or (key is not None and (k is None or k.shape[0] != q.shape[0] or key.dtype != query.dtype))
        or needs_grad(cos, sin)
        or not use_kernel(OP, query, kernel="rotary_embedding")
    ):
        rotated = _rotate(query, cos, sin, interleaved)
        return rotated, None if key is None else _rotate(key, cos, sin, interleaved)
    if needs_grad(query, key):
        q, k = RotaryFunction.apply(q, k, table_cos, table_sin, interleaved, False)
    else:
        q, k = torch.ops.lmkern.rotary_embedding(q, k, table_cos, table_sin, interleaved, False)
    return q.reshape(query.shape), None if key is None else k.reshape(key.shape)


def _as_heads(x: Tensor | None) -> Tensor | None:
    """x as [B, H, L, D]; None where that would take a copy."""
    if x is None or x.dim() == 4:
        return x
    return x.unsqueeze(0) if x.dim() == 3 else x[None, None] if x.dim() == 2 else None


def _as_tables(query: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin as [1 or B, L, R/2] in the dtype of the products; None where they differ by head."""
    wide = accumulate_dtype(query.dtype)
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    elif (
        cos.dim() == query.dim() == 4 and cos.shape[1] == 1 and cos.shape[0] in (1, query.shape[0])
    ):
        cos, sin = cos.squeeze(1), sin.squeeze(1)
    else:
        return None, None
    return cos.to(wide), sin.to(wide)


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
