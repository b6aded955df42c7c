"""Rotary position embedding of [B, H, L, D]. Math and layouts: csrc/ops/rotary.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern import _C
from lmkern.ops.library import define_op


def _fake(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_rows(q)), q.new_empty(0) if k is None else torch.empty_like(_rows(k))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _cpu(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    q, k = _rows(q), None if k is None else _rows(k)
    outputs = _fake(q, k, cos, sin, interleaved, inverse)
    _C.rotary_embedding(
        q, k, cos.contiguous(), sin.contiguous(), outputs[0], None if k is None else outputs[1],
        interleaved, inverse,
    )  # fmt: skip
    return outputs


define_op(
    "rotary_embedding(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool inverse) "
    "-> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
)


class RotaryFunction(torch.autograd.Function):
    """(q, k or None, cos, sin, interleaved, inverse) -> q, k turned; linear in both."""

    @staticmethod
    def forward(ctx: Any, q, k, cos, sin, interleaved, inverse):  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        ctx.options, ctx.has_key = (interleaved, inverse), k is not None
        return torch.ops.lmkern.rotary_embedding(q, k, cos, sin, interleaved, inverse)

    @staticmethod
    def backward(ctx: Any, d_q, d_k):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        interleaved, inverse = ctx.options
        d_q, d_k = RotaryFunction.apply(
            d_q, d_k if ctx.has_key else None, cos, sin, interleaved, not inverse
        )
        return d_q, d_k if ctx.has_key else None, None, None, None, None
