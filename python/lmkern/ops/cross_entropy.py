"""The terms of a cross entropy, of given logits and of x W^T + b in chunks of classes.

Math and layouts: csrc/ops/cross_entropy.h. The loss itself is arithmetic on one number a position
(functional/loss.py), so every reduction, and any gradient that comes back to it, is autograd's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.library import accumulate_dtype, define_op, matmul, reference_backward

# Logits up to so many elements are kept from forward to backward; of more, chunks of classes of
# about so many are computed twice. At 16 and 8 MB the product before and after finds them in L2 or L3.
_KEPT, _CHUNK = 4 << 20, 2 << 20
_LEAST_COLUMNS, _GRAIN = 256, 64


class Terms(NamedTuple):
    """One number for each position, in float32 (float64 for float64); p is the softmax."""

    lse: Tensor
    likelihood: Tensor  # log p_y, or the sum of t w log p
    total: Tensor  # the sum of w log p; empty without smoothing
    correct: Tensor  # bool, whether the target has the largest logit; empty for probabilities


class Saved(NamedTuple):
    """What the gradient wants of the logits."""

    maximum: Tensor
    log_sum: Tensor
    mass: Tensor  # empty for class indices


class Target(NamedTuple):
    """What logits are compared with: ``index`` or ``probabilities``."""

    index: Tensor | None
    probabilities: Tensor | None
    weight: Tensor | None
    ignore_index: int
    softcap: float
    smooth: bool


_TARGET = (
    "Tensor? index, Tensor? probabilities, Tensor? weight, int ignore_index, float softcap, bool smooth"
)


def _terms(like: Tensor, shape: tuple[int, int], target: Target) -> tuple[Terms, Saved]:
    def term(wanted: bool = True, dtype: torch.dtype = accumulate_dtype(like.dtype)) -> Tensor:
        return like.new_empty(shape if wanted else (0,), dtype=dtype)

    probable = target.probabilities is not None
    terms = Terms(term(), term(), term(target.smooth), term(not probable, torch.bool))
    return terms, Saved(term(), term(), term(probable))


def _continue(
    logits: Tensor, target: Target, first: int, classes: int, terms: Terms, saved: Saved
) -> None:
    """Take the classes from ``first`` on into the sums that `_finish` makes terms of."""
    _C.cross_entropy_forward(
        logits, target.index, target.probabilities, target.weight, first, classes,
        target.ignore_index, target.softcap, saved.maximum, saved.log_sum, terms.likelihood,
        None if target.probabilities is None else saved.mass, terms.total if target.smooth else None,
    )  # fmt: skip


def _whole(target: Target, classes: int) -> Tensor | int:
    """The sum of the weights of all classes."""
    return classes if target.weight is None else target.weight.sum()


def _finish(target: Target, classes: int, terms: Terms, saved: Saved) -> None:
    saved.log_sum.log_()
    torch.add(saved.maximum, saved.log_sum, out=terms.lse)
    if target.probabilities is None:
        torch.ge(terms.likelihood, saved.maximum, out=terms.correct)
        # In this order: both may be far from 0, and close to each other.
        terms.likelihood.sub_(saved.maximum).sub_(saved.log_sum)
    else:
        terms.likelihood.sub_(saved.mass * terms.lse)
    if target.smooth:
        terms.total.sub_(_whole(target, classes) * terms.lse)


def _sum_gradients(
    target: Target, classes: int, saved: Saved, d_terms: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of the terms to those of lse, picked and total as the kernel knows them."""
    d_lse, d_likelihood, d_total = d_terms
    d_lse = d_lse - (d_likelihood if target.probabilities is None else d_likelihood * saved.mass)
    if target.smooth:
        d_lse -= d_total * _whole(target, classes)
    return d_lse.contiguous(), d_likelihood.contiguous(), d_total.contiguous()


def _differentiate(
    logits: Tensor,
    target: Target,
    first: int,
    classes: int,
    saved: Saved,
    d_sums: tuple[Tensor, Tensor, Tensor],
    d_logits: Tensor,
) -> None:
    d_lse, d_picked, d_total = d_sums
    _C.cross_entropy_backward(
        logits, target.index, target.probabilities, target.weight, first, classes,
        target.ignore_index, target.softcap, saved.maximum, saved.log_sum, d_lse, d_picked,
        d_total if target.smooth else None, d_logits,
    )  # fmt: skip


def _slice(target: Target, first: int, end: int) -> Target:
    """The part of the classes [first, end)."""
    return target._replace(
        probabilities=None if target.probabilities is None else target.probabilities[:, first:end],
        weight=None if target.weight is None else target.weight[first:end],
    )


def _dense(logits: Tensor) -> Tensor:
    """[N, C, P] with contiguous classes if P = 1, with contiguous positions otherwise."""
    inner = 2 if logits.shape[2] > 1 else 1
    return logits if logits.stride(inner) == 1 or logits.shape[inner] == 1 else logits.contiguous()


def _kernel_target(target: Target) -> Target:
    return target._replace(
        index=None if target.index is None else target.index.contiguous(),
        probabilities=None if target.probabilities is None else _dense(target.probabilities),
        weight=None if target.weight is None else target.weight.contiguous(),
    )


# ---- of given logits ------------------------------------------------------------------------------

_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # Terms, Saved
_SAVED = (
    "Tensor maximum, Tensor log_sum, Tensor mass, Tensor d_lse, Tensor d_likelihood, Tensor d_total"
)


def _forward_fake(logits: Tensor, *target: Any) -> tuple[Tensor, ...]:
    terms, saved = _terms(logits, (logits.shape[0], logits.shape[2]), Target(*target))
    return *terms, *saved


def _forward_cpu(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    target, classes = _kernel_target(Target(*arguments)), logits.shape[1]
    terms, saved = _terms(logits, (logits.shape[0], logits.shape[2]), target)
    _continue(_dense(logits), target, 0, classes, terms, saved)
    _finish(target, classes, terms, saved)
    return *terms, *saved


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward_cpu(
    logits: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    mass: Tensor,
    d_lse: Tensor,
    d_likelihood: Tensor,
    d_total: Tensor,
    *arguments: Any,
) -> Tensor:
    target, saved, classes = Target(*arguments), Saved(maximum, log_sum, mass), logits.shape[1]
    d_logits = _backward_fake(logits)
    _C.prefer_huge_pages(d_logits)
    d_sums = _sum_gradients(target, classes, saved, (d_lse, d_likelihood, d_total))
    _differentiate(_dense(logits), _kernel_target(target), 0, classes, saved, d_sums, d_logits)
    return d_logits


define_op(
    f"cross_entropy_forward(Tensor logits, {_TARGET}) -> {_OUTPUTS}",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    f"cross_entropy_backward(Tensor logits, {_SAVED}, {_TARGET}) -> Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


class CrossEntropyFunction(torch.autograd.Function):
    """(logits [N, C, P], *Target) -> Terms of [N, P]."""

    @staticmethod
    def forward(ctx: Any, logits, *target):  # type: ignore[override]
        index, probabilities, weight, *ctx.options = target
        *terms, maximum, log_sum, mass = torch.ops.lmkern.cross_entropy_forward(logits, *target)
        ctx.save_for_backward(logits, maximum, log_sum, mass, index, probabilities, weight)
        ctx.mark_non_differentiable(terms[3])
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, d_lse, d_likelihood, d_total, _):  # type: ignore[override]
        logits, maximum, log_sum, mass, *tensors = ctx.saved_tensors
        target = Target(*tensors, *ctx.options)
        if torch.is_grad_enabled():
            (d_logits,) = reference_backward(
                lambda z: reference.cross_entropy_terms(z, *target)[:3],
                (logits,),
                (d_lse, d_likelihood, d_total if target.smooth else None),
            )
        else:
            d_logits = torch.ops.lmkern.cross_entropy_backward(
                logits, maximum, log_sum, mass, d_lse, d_likelihood, d_total, *target
            )
        return d_logits, *(None,) * len(target)


# ---- of x W^T + b ---------------------------------------------------------------------------------


def chunks(rows: int, classes: int) -> Iterator[tuple[int, int]]:
    """The chunks of classes: all at once if the logits are kept, else at most an eighth of them."""
    width = classes
    if rows * classes > _KEPT:
        width = max(_CHUNK // rows, _LEAST_COLUMNS) // _GRAIN * _GRAIN
        width = max(1, min(width, classes // 8))
    for first in range(0, classes, max(1, width)):
        yield first, min(first + width, classes)


def _keeps(rows: int, classes: int) -> bool:
    return 0 < rows * classes <= _KEPT


class _Product:
    """Chunks of logits of x W^T + b, in the dtype of the sums."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.dtype = accumulate_dtype(x.dtype)
        self.x, self.weight, self.bias = x.to(self.dtype), weight, bias
        rows, classes = x.shape[0], weight.shape[0]
        width = max((end - first for first, end in chunks(rows, classes)), default=0)
        self.buffer = x.new_empty(rows * width, dtype=self.dtype)

    def rows_of_weight(self, first: int, end: int) -> Tensor:
        return self.weight[first:end].to(self.dtype)

    def logits(self, first: int, end: int) -> Tensor:
        rows = self.x.shape[0]
        out = self.buffer[: rows * (end - first)].view(rows, end - first)
        bias = None if self.bias is None else self.bias[first:end].to(self.dtype)
        return matmul(self.x, self.rows_of_weight(first, end), bias, out, transpose_b=True)


def _linear_forward_fake(
    x: Tensor, linear_weight: Tensor, bias: Tensor | None, keep: bool, *target: Any
) -> tuple[Tensor, ...]:
    rows, classes = x.shape[0], linear_weight.shape[0]
    kept = rows * classes if keep and _keeps(rows, classes) else 0
    terms, saved = _terms(x, (rows, 1), Target(*target))
    return *terms, *saved, x.new_empty(kept, dtype=accumulate_dtype(x.dtype))


def _linear_forward_cpu(
    x: Tensor, linear_weight: Tensor, bias: Tensor | None, keep: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    target = _kernel_target(Target(*arguments))
    rows, classes = x.shape[0], linear_weight.shape[0]
    product = _Product(x, linear_weight, bias)
    terms, saved = _terms(x, (rows, 1), target)
    for first, end in chunks(rows, classes):
        logits = product.logits(first, end).unsqueeze(2)
        _continue(logits, _slice(target, first, end), first, classes, terms, saved)
    _finish(target, classes, terms, saved)
    kept = keep and _keeps(rows, classes)
    return *terms, *saved, product.buffer if kept else product.buffer.new_empty(0)


def _linear_backward_fake(
    x: Tensor, linear_weight: Tensor, bias: Tensor | None, logits: Tensor, wanted: list[bool], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, linear_weight.shape, linear_weight.shape[:1])
    d_x, d_weight, d_bias = (
        x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )
    return d_x, d_weight, d_bias


def _linear_backward_cpu(
    x: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    wanted: list[bool],
    maximum: Tensor,
    log_sum: Tensor,
    mass: Tensor,
    d_lse: Tensor,
    d_likelihood: Tensor,
    d_total: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    target, saved = _kernel_target(Target(*arguments)), Saved(maximum, log_sum, mass)
    rows, classes = x.shape[0], linear_weight.shape[0]
    d_x, d_weight, d_bias = _linear_backward_fake(x, linear_weight, bias, logits, wanted)
    _C.prefer_huge_pages(d_weight)
    d_sums = _sum_gradients(target, classes, saved, (d_lse, d_likelihood, d_total))
    product = _Product(x, linear_weight, bias)
    wide = x.dtype == product.dtype
    d_rows = d_x if wide else d_x.to(product.dtype)
    for first, end in chunks(rows, classes):
        z = logits.view(rows, -1) if logits.numel() else product.logits(first, end)
        d_z = product.buffer[: rows * (end - first)].view(rows, end - first)
        part = _slice(target, first, end)
        _differentiate(z.unsqueeze(2), part, first, classes, saved, d_sums, d_z.unsqueeze(2))
        if wanted[0]:
            matmul(d_z, product.rows_of_weight(first, end), out=d_rows, accumulate=first > 0)
        if wanted[1]:
            part_of_d_weight = d_weight[first:end]
            if wide:
                matmul(d_z, product.x, out=part_of_d_weight, transpose_a=True)
            else:  # summed in float32, rounded once
                part_of_d_weight.copy_(matmul(d_z, product.x, transpose_a=True))
        if wanted[2]:
            d_bias[first:end] = d_z.sum(0)
    if wanted[0] and not wide:
        d_x.copy_(d_rows)
    return d_x, d_weight, d_bias


define_op(
    "linear_cross_entropy_forward(Tensor x, Tensor linear_weight, Tensor? bias, bool keep, "
    f"{_TARGET}) -> {_OUTPUTS[:-1]}, Tensor)",
    cpu=_linear_forward_cpu,
    fake=_linear_forward_fake,
)
define_op(
    "linear_cross_entropy_backward(Tensor x, Tensor linear_weight, Tensor? bias, Tensor logits, "
    f"bool[] wanted, {_SAVED}, {_TARGET}) -> (Tensor, Tensor, Tensor)",
    cpu=_linear_backward_cpu,
    fake=_linear_backward_fake,
)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """(x [N, D], linear_weight [C, D], bias [C] or None, *Target) -> Terms of [N, 1]."""

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
        x, linear_weight, bias, logits, *saved, index, probabilities, weight = ctx.saved_tensors
        target = Target(index, probabilities, weight, *ctx.options)
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
                x, linear_weight, bias, logits, wanted, *saved, d_lse, d_likelihood, d_total, *target
            )
            grads = tuple(g if want else None for g, want in zip(computed, wanted, strict=True))
        return *grads, *(None,) * len(target)
