"""Where op implementations take the memory of their results from."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lmkern import _C

# Below, torch's allocator reuses memory as well (csrc/core/pool.h).
_LEAST_BYTES = 1 << 21
# DLPack's type codes and bits.
_DLPACK = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}


if os.environ.get("LMKERN_KEEP_MEMORY") == "0":
    _C.pool_enable(False)


def fresh(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(*shape, dtype=dtype)``, in memory of the pool if it is large and on the CPU."""
    sizes = shape[0] if isinstance(shape[0], (tuple, list)) else shape
    dtype = dtype or like.dtype
    if _is_pooled(like, sizes, dtype):
        return _C.pool_empty(list(sizes), [], *_DLPACK[dtype])
    return like.new_empty(sizes, dtype=dtype)  # type: ignore[call-overload]


def fresh_heads(like: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    """As :func:`fresh`, [batch, heads, length, width] with the strides of [B, L, H, D]."""
    sizes = (batch, heads, length, width)
    strides = (length * heads * width, width, heads * width, 1)
    if _is_pooled(like, sizes, like.dtype):
        return _C.pool_empty(list(sizes), list(strides), *_DLPACK[like.dtype])
    return like.new_empty_strided(sizes, strides)


def _is_pooled(like: Tensor, sizes: Sequence[Any], dtype: torch.dtype) -> bool:
    return (
        type(like) in (Tensor, Parameter)  # not a tensor without memory, of a tracer
        and math.prod(sizes) * dtype.itemsize >= _LEAST_BYTES
        and like.is_cpu
        and dtype in _DLPACK
    )


def empty_cache() -> None:
    """Return the memory that lmkern keeps for its next large tensors to the system.

    What its kernels write into tensors of 2 MiB and more lies in a pool: memory of a freed tensor
    serves the next one of about its size, since new memory costs more than many a kernel. In use and
    kept together are never more than the most that was in use at once. Set the environment variable
    ``LMKERN_KEEP_MEMORY=0`` to keep nothing.
    """
    _C.pool_clear()
