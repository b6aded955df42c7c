"""The terms of a cross entropy of x W^T + b, in chunks of classes. Math: csrc/ops/cross_entropy.h."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmkern import reference
from lmkern.ops.cross_entropy import (
    OUTPUTS,
    SAVED,
    TARGET,
    Saved,
    Target,
    Terms,
    continue_terms,
    differentiate,
    finish_terms,
    new_terms,
    slice_target,
    sum_gradients,
)
from lmkern.ops.library import accumulate_dtype, define_op, matmul, reference_backward
from lmkern.ops.memory import fresh

# Logits up to so many elements are kept from forward to backward; of more, chunks of classes of
# about so many are computed twice. A chunk of 8 MB is still in L2 or L3 when it is read.
_KEPT, _CHUNK = 4 << 20, 2 << 20
_LEAST_CLASSES, _GRAIN = 2048, 64


def chunks(rows: int, classes: int, depth: int) -> Iterator[tuple[int, int]]:
    """The chunks of classes, [first, end): none is more than an eighth of logits that are not kept.

    From rows >= depth / 2 on this includes a chunk's part of the weight, which a product on tiles
    splits into 6 bytes an element; of fewer rows, a chunk would be too small to be fast.
    """
    width = max(_CHUNK // max(1, rows), _LEAST_CLASSES) // _GRAIN * _GRAIN
    if not _keeps(rows, classes):
        with_split = rows * classes // 8 // (rows + depth * 3 // 2)
        width = min(width, classes // 8, max(with_split, _LEAST_CLASSES // 2))
    width = max(1, width)
    for first in range(0, classes, width):
        yield first, min(first + width, classes)


def _keeps(rows: int, classes: int) -> bool:
    return rows * classes <= _KEPT


class _Logits:
    """Chunks of the logits x W^T in the dtype of the sums; the kernel adds the bias.

    The tiles of a product like many rows better than many columns. So a chunk is [rows, classes] where
    it has more rows, and [classes, rows] where it has more classes.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.dtype = accumulate_dtype(x.dtype)
        self.x, self.weight = x.to(self.dtype).contiguous(), weight
        self.bias = None if bias is None else bias.to(self.dtype).contiguous()
        self.rows, self.classes = x.shape[0], weight.shape[0]
        self.parts = list(chunks(self.rows, self.classes, x.shape[1]))
        self.width = max((end - first for first, end in self.parts), default=0)
        self.by_rows = self.rows > self.width

    def new_chunk(self) -> Tensor:
        """Room for any one chunk."""
        return fresh(self.x, self.width * self.rows)

    def new_whole(self, keep: bool) -> Tensor:
        """Room for all of them, one after the other, if they are kept; empty otherwise."""
        keep = keep and _keeps(self.rows, self.classes)
        return fresh(self.x, self.classes * self.rows if keep else 0)

    def chunk_of(self, whole: Tensor, first: int, end: int) -> Tensor:
        return self.matrix(whole[self.rows * first : self.rows * end], end - first)

    def matrix(self, room: Tensor, classes: int) -> Tensor:
        shape = (self.rows, classes) if self.by_rows else (classes, self.rows)
        return room[: self.rows * classes].view(shape)

    def compute(self, first: int, end: int, out: Tensor) -> Tensor:
        weight = self.weight_of(first, end)
        a, b = (self.x, weight) if self.by_rows else (weight, self.x)
        return matmul(a, b, out=out, transpose_b=True)

    def weight_of(self, first: int, end: int) -> Tensor:
        return self.weight[first:end].to(self.dtype)

    def bias_of(self, first: int, end: int) -> Tensor | None:
        return None if self.bias is None else self.bias[first:end]

    def view(self, z: Tensor) -> Tensor:
        """A chunk as the kernel takes it, [N, C, P]."""
        return z.unsqueeze(2 if self.by_rows else 0)

    def positions(self, x: Tensor) -> Tensor:
        """[1, rows] as the kernel takes it, [N, P]; or [1, C, rows], as [N, C, P]."""
        return x.transpose(0, -1) if self.by_rows and x.dim() > 1 else x

    def target(self, target: Target) -> Target:
        labels, probabilities = (
            None if t is None else self.positions(t) for t in (target.labels, target.probabilities)
        )
        return target._replace(labels=labels, probabilities=probabilities)


def _forward_fake(
    x: Tensor, linear_weight: Tensor, bias: Tensor | None, keep: bool, *target: Any
) -> tuple[Tensor, ...]:
    terms, saved = new_terms(x, (1, x.shape[0]), Target(*target))
    return *terms, *saved, _Logits(x, linear_weight, bias).new_whole(keep)


def _forward_cpu(
    x: Tensor, linear_weight: Tensor, bias: Tensor | None, keep: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    logits = _Logits(x, linear_weight, bias)
    terms, saved = new_terms(x, (1, x.shape[0]), Target(*arguments))
    own_terms = Terms(*(logits.positions(t) for t in terms))
    own_saved = Saved(*(logits.positions(t) for t in saved))
    target = logits.target(Target(*arguments))
    whole = logits.new_whole(keep)
    keep_none = whole.numel() == 0
    room = logits.new_chunk() if keep_none else whole
    for first, end in logits.parts:
        out = logits.matrix(room, end - first) if keep_none else logits.chunk_of(whole, first, end)
        z = logits.view(logits.compute(first, end, out))
        part, part_bias = slice_target(target, first, end), logits.bias_of(first, end)
        continue_terms(z, part, part_bias, first, logits.classes, own_terms, own_saved)
    finish_terms(target, logits.classes, terms, saved)
    return *terms, *saved, whole


def _backward_fake(
    x: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    whole: Tensor,
    wanted: list[bool],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, linear_weight.shape, linear_weight.shape[:1])
    d_x, d_weight, d_bias = (
        fresh(x, shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )
    return d_x, d_weight, d_bias


def _backward_cpu(
    x: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    whole: Tensor,
    wanted: list[bool],
    maximum: Tensor,
    log_sum: Tensor,
    mass: Tensor,
    d_lse: Tensor,
    d_likelihood: Tensor,
    d_total: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _Logits(x, linear_weight, bias)
    target, saved = Target(*arguments), Saved(maximum, log_sum, mass)
    d_sums = sum_gradients(target, logits.classes, saved, (d_lse, d_likelihood, d_total))
    d_lse, d_likelihood, d_total = (logits.positions(d) for d in d_sums)
    own_saved = Saved(*(logits.positions(t) for t in saved))
    target = logits.target(target)
    d_x, d_weight, d_bias = _backward_fake(x, linear_weight, bias, whole, wanted)
    wide, by_rows = x.dtype == logits.dtype, logits.by_rows
    d_rows = d_x if wide else d_x.to(logits.dtype)
    room = logits.new_chunk()
    for first, end in logits.parts:
        d_z = logits.matrix(room, end - first)
        kept = whole.numel() > 0
        z = logits.chunk_of(whole, first, end) if kept else logits.compute(first, end, d_z)
        part, part_bias = slice_target(target, first, end), logits.bias_of(first, end)
        differentiate(
            logits.view(z), part, part_bias, first, logits.classes, own_saved,
            (d_lse, d_likelihood, d_total),
            logits.view(d_z),
        )  # fmt: skip
        if wanted[0]:
            weight = logits.weight_of(first, end)
            matmul(d_z, weight, out=d_rows, transpose_a=not by_rows, accumulate=first > 0)
        if wanted[1]:
            if wide:
                matmul(d_z, logits.x, out=d_weight[first:end], transpose_a=by_rows)
            else:  # summed in float32, rounded once
                d_weight[first:end] = matmul(d_z, logits.x, transpose_a=by_rows)
        if wanted[2]:
            d_bias[first:end] = d_z.sum(0 if by_rows else 1)
    if wanted[0] and not wide:
        d_x.copy_(d_rows)
    return d_x, d_weight, d_bias


define_op(
    "linear_cross_entropy_forward(Tensor x, Tensor linear_weight, Tensor? bias, bool keep, "
    f"{TARGET}) -> {OUTPUTS[:-1]}, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    "linear_cross_entropy_backward(Tensor x, Tensor linear_weight, Tensor? bias, Tensor whole, "
    f"bool[] wanted, {SAVED}, {TARGET}) -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """(x [N, D], linear_weight [C, D], bias [C] or None, *Target of [1, N]) -> Terms of [1, N]."""

    @staticmethod
    def forward(ctx: Any, x, linear_weight, bias, *target):  # type: ignore[override]
        ctx.options = target[3:]
        outputs = torch.ops.lmkern.linear_cross_entropy_forward(
            x, linear_weight, bias, True, *target
        )
        ctx.save_for_backward(x, linear_weight, bias, outputs[7], *outputs[4:7], *target[:3])
        ctx.mark_non_differentiable(outputs[3])
        return outputs[:4]

    @staticmethod
    def backward(ctx: Any, d_lse, d_likelihood, d_total, _):  # type: ignore[override]
        x, linear_weight, bias, whole, *saved, labels, probabilities, weight = ctx.saved_tensors
        target = Target(labels, probabilities, weight, *ctx.options)
        d_terms = d_lse, d_likelihood, d_total if target.smooth else None
        if torch.is_grad_enabled():
            grads = reference_backward(
                lambda *inputs: reference.linear_cross_entropy_terms(*inputs, *target)[:3],
                (x, linear_weight, bias),
                d_terms,
            )
        else:
            wanted = list(ctx.needs_input_grad[:3])
            computed = torch.ops.lmkern.linear_cross_entropy_backward(
                x, linear_weight, bias, whole, wanted, *saved, d_lse, d_likelihood, d_total, *target
            )
            grads = tuple(g if want else None for g, want in zip(computed, wanted, strict=True))
        return *grads, *(None,) * len(target)
