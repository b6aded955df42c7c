"""The checks of attention's arguments, and the form in which a kernel takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmkern.ops.attention import FARTHEST
from lmkern.ops.check import check_dtype, check_shape, check_tensors
from lmkern.ops.library import accumulate_dtype

OP = "scaled_dot_product_attention"


class Extents(NamedTuple):
    """Sizes of one call: leading dimensions without heads, heads, lengths, widths."""

    lead: tuple[int, ...]
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int  # of a value
    dims: int  # of the result


def check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Extents:
    """query, key and value fit each other; their dtypes and shapes."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{OP}: {name} must be [..., length, width], got {list(x.shape)}")
    check_dtype(OP, query.dtype, key=key, value=value)
    queries, depth = query.shape[-2:]
    keys, width = value.shape[-2:]
    check_shape(OP, "key", key, (*key.shape[:-2], keys, depth), "[..., S, D]")
    repeat = 1
    if enable_gqa:
        heads, key_heads = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key))
        check_shape(
            OP, "value", value, (*value.shape[:-3], key_heads, keys, width), "[..., H_kv, S, Dv]"
        )
        if key_heads == 0 or heads % key_heads:
            raise ValueError(
                f"{OP}: query's heads must be a multiple of key's, got {heads} and {key_heads}"
            )
        repeat = heads // key_heads
    lead, heads, key_heads = _leading(query, key, value, repeat)
    dims = max(query.dim(), key.dim(), value.dim())
    return Extents(lead, heads, key_heads, queries, keys, width, dims)


def _leading(
    query: Tensor, key: Tensor, value: Tensor, repeat: int
) -> tuple[tuple[int, ...], int, int]:
    """The broadcast leading dimensions without heads, the heads of query, and those of key."""
    shapes = [x.shape[:-2] for x in (query, key, value)]
    same = shapes[0][:-1] == shapes[1][:-1] == shapes[2][:-1]
    if same and len(shapes[0]) > 0 and (repeat > 1 or shapes[0] == shapes[1] == shapes[2]):
        return tuple(shapes[0][:-1]), shapes[0][-1], shapes[1][-1]  # torch.broadcast_shapes is slow
    heads, key_heads = (s[-1] if len(s) else 1 for s in shapes[:2])
    try:
        lead = tuple(torch.broadcast_shapes(*(s[:-1] for s in shapes)))
        if repeat == 1:
            heads = key_heads = (*torch.broadcast_shapes(*(s[-1:] for s in shapes)), 1)[0]
    except RuntimeError:
        raise ValueError(
            f"{OP}: leading dimensions must broadcast (set enable_gqa for grouped heads), got query "
            f"{list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        ) from None
    return lead, heads, key_heads


def as_heads(x: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """x as [B, heads, length, width], without a copy where its leading dimensions are those already."""
    if x.dim() == 4 and x.shape[:2] == (*lead, heads):
        return x
    return x.expand(*lead, heads, *x.shape[-2:]).reshape(math.prod(lead), heads, *x.shape[-2:])


def check_mask(mask: Tensor, dtype: torch.dtype, e: Extents) -> Tensor:
    """The mask as [1 or B, 1 or H, 1 or L, 1 or S], bool or of the dtype of the heads.

    It is not expanded, so that its gradient need not be either.
    """
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"{OP}: attn_mask must be bool or floating, got {mask.dtype}")
        if mask.dtype != dtype:
            # A large finite value stays finite in a narrower dtype: only -inf hides a key.
            mask = mask.to(torch.promote_types(mask.dtype, accumulate_dtype(dtype)))
            finite = mask.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
            mask = torch.where(mask.isinf(), mask, finite).to(dtype)
    target = (*e.lead, e.heads, e.queries, e.keys) if e.dims > 2 else (e.queries, e.keys)
    given = mask.shape
    if mask.dim() > len(target) or any(
        size not in (1, wanted) for size, wanted in zip(given[::-1], target[::-1], strict=False)
    ):
        raise ValueError(f"{OP}: attn_mask must broadcast to {list(target)}, got {list(given)}")
    if mask.dim() == 4 and len(e.lead) == 1:
        return mask
    mask = mask.reshape((1,) * (len(e.lead) + 3 - mask.dim()) + given)
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*e.lead, *mask.shape[-3:]).reshape(math.prod(e.lead), *mask.shape[-3:])


def check_window(window: Any, is_causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for an unbounded side: query at p sees keys p - left to p + right.

    Causal is right = 0.
    """
    left = right = -1
    if window is not None:
        sides = window if isinstance(window, (tuple, list)) and len(window) == 2 else ("",)
        if not all(w is None or (isinstance(w, int) and w >= -1) for w in sides):
            raise ValueError(
                f"{OP}: window must be (left, right), each None, -1 or a distance >= 0, got {window}"
            )
        left, right = (-1 if w is None else min(int(w), FARTHEST) for w in sides)
    return left, 0 if is_causal else right


def check_slopes(slopes: Tensor, dtype: torch.dtype, e: Extents, sequences: int | None) -> Tensor:
    """alibi_slopes as [B, H], with cu_seqlens as [n, H], in ``dtype``."""
    _check_floating("alibi_slopes", slopes)
    lead = e.lead if sequences is None else (sequences,)
    slopes = _expand("alibi_slopes", slopes, (*lead, e.heads))
    return slopes.reshape(math.prod(lead), e.heads).to(dtype)


def check_sinks(sinks: Tensor, dtype: torch.dtype, e: Extents) -> Tensor:
    """sinks [H] in ``dtype``."""
    _check_floating("sinks", sinks)
    check_shape(OP, "sinks", sinks, (e.heads,), "[H]")
    return sinks.to(dtype)


def check_key_lengths(lengths: Tensor, e: Extents) -> Tensor:
    """key_lengths as [B]."""
    _check_integer("key_lengths", lengths)
    if _has_values(lengths) and lengths.numel() > 0:
        values = [int(lengths.min()), int(lengths.max())]
        if values[0] < 0 or values[1] > e.keys:
            raise ValueError(
                f"{OP}: key_lengths must be between 0 and S = {e.keys}, "
                f"got {values[0]} to {values[1]}"
            )
    return _expand("key_lengths", lengths, e.lead).reshape(-1)


def check_cu_seqlens(cu_seqlens: Any, query: Tensor, e: Extents) -> tuple[Tensor, Tensor]:
    """(cu_q, cu_k), each [n + 1]."""
    pair = cu_seqlens if isinstance(cu_seqlens, (tuple, list)) else (cu_seqlens, cu_seqlens)
    if len(pair) != 2:
        raise ValueError(f"{OP}: cu_seqlens must be a tensor or (cu_q, cu_k), got {len(pair)}")
    if e.dims != 3:
        raise ValueError(f"{OP}: query must be [H, N, D] with cu_seqlens, got {list(query.shape)}")
    check_tensors(OP, query=query, **{"cu_seqlens[0]": pair[0], "cu_seqlens[1]": pair[1]})
    for index, (cu, rows) in enumerate(zip(pair, (e.queries, e.keys), strict=True)):
        name = f"cu_seqlens[{index}]" if isinstance(cu_seqlens, (tuple, list)) else "cu_seqlens"
        _check_integer(name, cu)
        if cu.dim() != 1 or cu.shape[0] == 0:
            raise ValueError(f"{OP}: {name} must be [n + 1], got {list(cu.shape)}")
        if _has_values(cu):
            values = cu.tolist()
            if values[0] != 0 or values[-1] != rows or values != sorted(values):
                raise ValueError(
                    f"{OP}: {name} must rise from 0 to {rows}, the rows packed, got {values[:9]}"
                )
    check_shape(OP, "cu_seqlens[1]", pair[1], pair[0].shape, "[n + 1]")
    return tuple(pair)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """value is one of choices."""
    if value not in choices:
        raise ValueError(f"{OP}: {name} must be one of {list(choices)}, got {value!r}")


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{OP}: {name} must be floating, got {x.dtype}")


def _check_integer(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: {name} must be int32 or int64, got {x.dtype}")


def _expand(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return x.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{OP}: {name} must broadcast to {list(shape)}, got {list(x.shape)}"
        ) from None


def _has_values(x: Tensor) -> bool:
    """Whether the values may be looked at: not of a fake tensor, nor inside a functorch transform."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and x.device.type == "cpu"
    )
