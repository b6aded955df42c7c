"""Dropout, its mask a function of seed and position. Math: csrc/ops/dropout.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern import _C
from lmkern.ops.library import define_op
from lmkern.ops.memory import fresh


def _flat(x: Tensor) -> Tensor:
    """A contiguous tensor with few enough dimensions for a kernel."""
    return x if x.dim() <= 8 else x.view(-1)


def _fake(input: Tensor, seed: Tensor, p: float) -> Tensor:
    return fresh(input, input.shape)


def _cpu(input: Tensor, seed: Tensor, p: float) -> Tensor:
    out = _fake(input, seed, p)
    _C.dropout(_flat(input.contiguous()), _flat(out), p, int(seed))
    return out


def _inplace_fake(input: Tensor, seed: Tensor, p: float) -> None:
    return None


def _inplace_cpu(input: Tensor, seed: Tensor, p: float) -> None:
    if input.is_contiguous():
        _C.dropout(_flat(input), _flat(input), p, int(seed))
    else:
        input.copy_(_cpu(input, seed, p))


define_op("dropout(Tensor input, Tensor seed, float p) -> Tensor", cpu=_cpu, fake=_fake)
define_op(
    "dropout_(Tensor(a!) input, Tensor seed, float p) -> ()", cpu=_inplace_cpu, fake=_inplace_fake
)


class DropoutFunction(torch.autograd.Function):
    """(input, seed, p, inplace) -> out; linear, so that the gradient is the same function."""

    @staticmethod
    def forward(ctx: Any, input, seed, p, inplace):  # type: ignore[override]
        ctx.save_for_backward(seed)
        ctx.p = p
        if not inplace:
            return torch.ops.lmkern.dropout(input, seed, p)
        ctx.mark_dirty(input)
        torch.ops.lmkern.dropout_(input, seed, p)
        return input

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        (seed,) = ctx.saved_tensors
        return DropoutFunction.apply(d_out, seed, ctx.p, False), None, None, None
