"""Checks of the arguments that torch consumes before a kernel sees them.

Everything a kernel reads is checked in C++ (csrc/ops); these have the same form of message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """All given ones are tensors and lie on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None and name != first_name:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        assert first is not None
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device} like {first_name}, got {tensor.device}"
            )


def check_dtype(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """All given ones have this dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {_name(dtype)}, got {_name(tensor.dtype)}")


def check_shape(
    op: str, name: str, tensor: Tensor | None, shape: Sequence[int], symbolic: str
) -> None:
    """The exact shape, where the tensor is given; ``symbolic`` names the extents."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} must be {symbolic} = {list(shape)}, got {list(tensor.shape)}"
        )


def check_dims(op: str, name: str, tensor: Tensor, dims: int, symbolic: str) -> None:
    """The number of dimensions."""
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} must be {symbolic}, got {list(tensor.shape)}")


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    symbolic: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Everything about one tensor at once: for calls so short that the checks show."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        check_shape(op, name, tensor, shape, symbolic)
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like input, got {tensor.device}")


def check_pair(op: str, hx: Sequence[Tensor]) -> Sequence[Tensor]:
    """The state (h, c) of an LSTM."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"{op}: hx must be a pair (h, c), got {type(hx).__name__}")
    return hx


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
