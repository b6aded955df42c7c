"""The terms of a cross entropy: what logits are reduced to, and how that is differentiated.

Math and layouts: csrc/ops/cross_entropy.h. The loss itself is arithmetic on one number a position
(functional/loss.py), so every reduction, and any gradient that comes back to it, is autograd's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmkern import _C, reference
from lmkern.ops.library import accumulate_dtype, define_op, reference_backward
from lmkern.ops.memory import fresh


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
    """What logits are compared with: ``labels`` or ``probabilities``."""

    labels: Tensor | None
    probabilities: Tensor | None
    weight: Tensor | None
    ignore_index: int
    softcap: float
    smooth: bool


TARGET = (
    "Tensor? index, Tensor? probabilities, Tensor? weight, int ignore_index, float softcap, "
    "bool smooth"
)


def new_terms(like: Tensor, shape: tuple[int, int], target: Target) -> tuple[Terms, Saved]:
    wide, probable = accumulate_dtype(like.dtype), target.probabilities is not None

    def term(wanted: bool = True, dtype: torch.dtype = wide) -> Tensor:
        return like.new_empty(shape if wanted else (0,), dtype=dtype)

    terms = Terms(term(), term(), term(target.smooth), term(not probable, torch.bool))
    return terms, Saved(term(), term(), term(probable))


def continue_terms(
    logits: Tensor,
    target: Target,
    bias: Tensor | None,
    first: int,
    classes: int,
    terms: Terms,
    saved: Saved,
) -> None:
    """Take the classes from ``first`` on into the sums that `finish_terms` makes terms of."""
    _C.cross_entropy_forward(
        logits, target.labels, target.probabilities, target.weight, bias, first, classes,
        target.ignore_index, target.softcap, saved.maximum, saved.log_sum, terms.likelihood,
        None if target.probabilities is None else saved.mass, terms.total if target.smooth else None,
    )  # fmt: skip


def _whole(target: Target, classes: int) -> Tensor | int:
    """The sum of the weights of all classes."""
    return classes if target.weight is None else target.weight.sum()


def finish_terms(target: Target, classes: int, terms: Terms, saved: Saved) -> None:
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


def sum_gradients(
    target: Target, classes: int, saved: Saved, d_terms: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of the terms to those of lse, picked and total as the kernel knows them."""
    d_lse, d_likelihood, d_total = d_terms
    d_lse = d_lse - (d_likelihood if target.probabilities is None else d_likelihood * saved.mass)
    if target.smooth:
        d_lse -= d_total * _whole(target, classes)
    return d_lse.contiguous(), d_likelihood.contiguous(), d_total.contiguous()


def differentiate(
    logits: Tensor,
    target: Target,
    bias: Tensor | None,
    first: int,
    classes: int,
    saved: Saved,
    d_sums: tuple[Tensor, Tensor, Tensor],
    d_logits: Tensor,
) -> None:
    d_lse, d_picked, d_total = d_sums
    _C.cross_entropy_backward(
        logits, target.labels, target.probabilities, target.weight, bias, first, classes,
        target.ignore_index, target.softcap, saved.maximum, saved.log_sum, d_lse, d_picked,
        d_total if target.smooth else None, d_logits,
    )  # fmt: skip


def slice_target(target: Target, first: int, end: int) -> Target:
    """The part of the classes [first, end), as the kernel reads it."""
    return _kernel_target(
        target._replace(
            probabilities=None
            if target.probabilities is None
            else target.probabilities[:, first:end],
            weight=None if target.weight is None else target.weight[first:end],
        )
    )


def _dense(logits: Tensor) -> Tensor:
    """[N, C, P] with contiguous classes if P = 1, with contiguous positions otherwise."""
    inner = 2 if logits.shape[2] > 1 else 1
    return logits if logits.stride(inner) == 1 or logits.shape[inner] == 1 else logits.contiguous()


def _kernel_target(target: Target) -> Target:
    return target._replace(
        labels=None if target.labels is None else target.labels.contiguous(),
        probabilities=None if target.probabilities is None else _dense(target.probabilities),
        weight=None if target.weight is None else target.weight.contiguous(),
    )


OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # Terms, Saved
SAVED = (
    "Tensor maximum, Tensor log_sum, Tensor mass, Tensor d_lse, Tensor d_likelihood, Tensor d_total"
)


def _forward_fake(logits: Tensor, *target: Any) -> tuple[Tensor, ...]:
    terms, saved = new_terms(logits, (logits.shape[0], logits.shape[2]), Target(*target))
    return *terms, *saved


def _forward_cpu(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    target, classes = _kernel_target(Target(*arguments)), logits.shape[1]
    terms, saved = new_terms(logits, (logits.shape[0], logits.shape[2]), target)
    continue_terms(_dense(logits), target, None, 0, classes, terms, saved)
    finish_terms(target, classes, terms, saved)
    return *terms, *saved


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return fresh(logits, logits.shape)


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
    d_sums = sum_gradients(target, classes, saved, (d_lse, d_likelihood, d_total))
    target = _kernel_target(target)
    differentiate(_dense(logits), target, None, 0, classes, saved, d_sums, d_logits)
    return d_logits


define_op(
    f"cross_entropy_forward(Tensor logits, {TARGET}) -> {OUTPUTS}",
    cpu=_forward_cpu,
    fake=_forward_fake,
)
define_op(
    f"cross_entropy_backward(Tensor logits, {SAVED}, {TARGET}) -> Tensor",
    cpu=_backward_cpu,
    fake=_backward_fake,
)


class CrossEntropyLossFunction(torch.autograd.Function):
    """(logits [N, C, P], reduction, *Target) -> the loss of labels, with neither weight nor smoothing.

    In one node what CrossEntropyFunction and the arithmetic on its terms need ten for: of few logits,
    the nodes are most of the time.
    """

    @staticmethod
    def forward(ctx: Any, logits, reduction, *target):  # type: ignore[override]
        labels, ignore_index = target[0], target[3]
        _, likelihood, _, _, *saved = torch.ops.lmkern.cross_entropy_forward(logits, *target)
        ignored = labels == ignore_index
        loss = likelihood.neg_().masked_fill_(ignored, 0.0)
        count = None
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            count = ignored.numel() - ignored.sum()
            loss /= count
        ctx.save_for_backward(logits, *saved, labels, ignored, count)
        ctx.target, ctx.reduction = target[1:], reduction
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss):  # type: ignore[override]
        logits, *saved, labels, ignored, count = ctx.saved_tensors
        target = Target(labels, *ctx.target)
        if torch.is_grad_enabled():

            def run(z):
                likelihood = reference.cross_entropy_terms(z, *target)[1]
                loss = (-likelihood).masked_fill(ignored, 0.0)
                loss = loss if ctx.reduction == "none" else loss.sum()
                return loss if count is None else loss / count

            (d_logits,) = reference_backward(run, (logits,), (d_loss,))
        else:
            d_loss = d_loss if count is None else d_loss / count
            d_likelihood = torch.where(ignored, 0.0, d_loss.to(saved[0].dtype)).neg_()
            d_lse, d_total = torch.zeros_like(d_likelihood), d_likelihood.new_empty(0)
            d_logits = torch.ops.lmkern.cross_entropy_backward(
                logits, *saved, d_lse, d_likelihood, d_total, *target
            )
        return d_logits, None, *(None,) * len(target)


class CrossEntropyFunction(torch.autograd.Function):
    """(logits [N, C, P], *Target) -> Terms of [N, P]."""

    @staticmethod
    def forward(ctx: Any, logits, *target):  # type: ignore[override]
        labels, probabilities, weight, *ctx.options = target
        *terms, maximum, log_sum, mass = torch.ops.lmkern.cross_entropy_forward(logits, *target)
        ctx.save_for_backward(logits, maximum, log_sum, mass, labels, probabilities, weight)
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
