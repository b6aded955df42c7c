"""Losses. Math and layouts: csrc/ops/cross_entropy.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from lmkern import reference
from lmkern.functional._linear import linear
from lmkern.ops.check import check_shape, check_tensors
from lmkern.ops.cross_entropy import (
    CrossEntropyFunction,
    CrossEntropyLossFunction,
    Target,
    Terms,
)
from lmkern.ops.library import (
    accumulate_dtype,
    autocast,
    is_autocast_on,
    needs_grad,
    use_kernel,
    without_autocast,
)
from lmkern.ops.linear_cross_entropy import LinearCrossEntropyFunction

# Up to here (a megabyte) chunks save nothing, and their bookkeeping is most of the time.
_FEW_LOGITS = 1 << 18

LossOrMore = Tensor | tuple[Tensor, ...]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
) -> LossOrMore:
    r"""Cross entropy of given logits, one pass over them forward and one backward.

    .. math:: \ell_n = (1 - ε) w_y (lse_n - z_{n,y}) + \frac{ε}{C} \sum_j w_j (lse_n - z_{n,j})
              + ζ\, lse_n^2

    with :math:`lse_n = \log \sum_j e^{z_{n,j}}`. Signature and semantics of
    :func:`torch.nn.functional.cross_entropy`; the arguments after ``label_smoothing`` are lmkern's.

    Args:
        input: logits, [C], [N, C] or [N, C, d_1, ..., d_K].
        target: classes, integers of the shape of ``input`` without C; or probabilities of its shape.
        weight: [C], of each class.
        ignore_index: a target that counts for nothing.
        reduction: 'mean' (over the weights of the targets), 'sum' or 'none'.
        label_smoothing: ε, in [0, 1].
        z_loss: ζ, keeps the logits near 0 (PaLM: 1e-4).
        softcap: the loss is of softcap tanh(z / softcap) (Gemma 2: 30).
        return_lse: also return lse, of the shape of ``target``; it has a gradient.
        return_accuracy: also return the share of the targets that count whose logit is the largest.

    Returns:
        The loss; or (loss, lse), (loss, accuracy), (loss, lse, accuracy), as asked for.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.
        IndexError: a target outside of [0, C) that is not ``ignore_index``.

    Source: Szegedy et al. 2016, section 7 (label smoothing); Chowdhery et al. 2022, section 5 (z loss).
    """
    op = "cross_entropy"
    check_tensors(op, input=input, target=target, weight=weight)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if input.dim() == 0 or not input.is_floating_point():
        raise ValueError(
            f"{op}: input must be floating [C] or [N, C, ...], got {input.dtype} {list(input.shape)}"
        )
    if is_autocast_on(input.device.type) and input.dtype != torch.float64:
        input = input.float()
    logits = input.unsqueeze(0) if input.dim() == 1 else input
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()
    logits = logits.flatten(2) if logits.dim() > 2 else logits.unsqueeze(2)
    goal = _target(
        op, target, input.shape, shape, logits, weight, ignore_index, softcap, label_smoothing
    )
    return _of_logits(
        op, logits, goal, needs_grad(target, weight), shape, input.dtype, reduction, label_smoothing,
        z_loss, return_lse, return_accuracy,
    )  # fmt: skip


def _of_logits(
    op: str,
    logits: Tensor,
    goal: Target,
    use_plain: bool,
    shape: torch.Size,
    dtype: torch.dtype,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    return_lse: bool,
    return_accuracy: bool,
) -> LossOrMore:
    """The loss of logits [N, C, P]."""
    use_plain = use_plain or not use_kernel(op, logits, kernel="cross_entropy_forward")
    simple = goal.labels is not None and goal.weight is None and not goal.smooth and not z_loss
    if simple and needs_grad(logits) and not (use_plain or return_lse or return_accuracy):
        _check_reduction(op, reduction)
        loss = CrossEntropyLossFunction.apply(logits, reduction, *goal)
        return (loss.reshape(shape) if reduction == "none" else loss).to(dtype)
    terms = _terms(
        (logits,),
        goal,
        CrossEntropyFunction,
        torch.ops.lmkern.cross_entropy_forward,
        reference.cross_entropy_terms,
        needs_grad(logits),
        use_plain,
    )
    return _loss(
        op, terms, goal, logits.shape[1], shape, dtype, reduction, label_smoothing, z_loss,
        return_lse, return_accuracy,
    )  # fmt: skip


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    return_lse: bool = False,
    return_accuracy: bool = False,
) -> LossOrMore:
    r"""Cross entropy of the logits ``input @ linear_weight.T + linear_bias``, which never exist at once.

    Forward and backward go over chunks of classes. Of more than 4 million logits at most an eighth is
    held at a time, and computed once more in the backward pass. Gradients of the weight are summed in
    float32 (float64 for float64) and rounded once. Any ``reduction`` has any upstream gradient.

    Signature of :func:`torch.nn.functional.linear_cross_entropy` (torch 2.13); formula and the
    other arguments: :func:`cross_entropy`.

    Args:
        input: [..., D]. linear_weight: [C, D]. linear_bias: [C].
        target: classes [...], or probabilities [..., C].
        options: of torch's chunks; accepted, and without effect.
        shift: targets are the inputs' own tokens: position l of [..., L, D] predicts target l + 1,
            and the last one nothing. ``reduction='none'`` then gives [..., L - 1].
        ignore_index: None stands for -100.

    A ``linear_weight`` of [C, d_1, ..., d_K, D] with ``target`` [N, d_1, ..., d_K] or probabilities
    [N, C, d_1, ..., d_K] is K losses for each input, as in torch; its logits are computed at once.

    Returns:
        As :func:`cross_entropy`.

    Raises:
        ValueError, TypeError, IndexError: as :func:`cross_entropy`.

    Source: Wijmans et al. 2024 ("Cut your losses"); here in chunks of classes, deterministic.
    """
    op = "linear_cross_entropy"
    check_tensors(
        op, input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias,
        weight=weight,
    )  # fmt: skip
    ignore = -100 if ignore_index is None else ignore_index
    if input.dim() == 0 or linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"{op}: linear_weight must be [C, D] with D = {input.shape[-1] if input.dim() else '?'} "
            f"like input {list(input.shape)}, got {list(linear_weight.shape)}"
        )
    check_shape(op, "linear_bias", linear_bias, linear_weight.shape[:-1], "[C]")
    if linear_weight.dim() > 2:
        if shift:
            raise ValueError(
                f"{op}: shift must be False with a linear_weight of several dimensions"
            )
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = linear(input, linear_weight.flatten(0, -2), bias)
        return cross_entropy(
            logits.unflatten(-1, linear_weight.shape[:-1]), target, weight,
            ignore_index=ignore, reduction=reduction, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, return_lse=return_lse, return_accuracy=return_accuracy,
        )  # fmt: skip
    input, linear_weight, linear_bias = autocast(
        input.device.type, input, linear_weight, linear_bias
    )
    shape, classes = input.shape[:-1], linear_weight.shape[0]
    if shift:
        target = _shifted(op, target, shape, ignore)
    x = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
    goal = _target(
        op, target, (*shape, classes), shape, x, weight, ignore, softcap, label_smoothing,
    )  # fmt: skip
    dtypes = {t.dtype for t in (x, linear_weight, linear_bias) if t is not None}
    few = len(x) * classes <= _FEW_LOGITS and len(dtypes) == 1
    with without_autocast(input.device.type):
        # Narrow dtypes are not rounded to logits.
        if few and goal.labels is not None and x.dtype in (torch.float32, torch.float64):
            loss = _of_logits(
                op, linear(x, linear_weight, linear_bias).unsqueeze(2),
                goal._replace(labels=goal.labels.t()), needs_grad(weight), shape, input.dtype,
                reduction, label_smoothing, z_loss, return_lse, return_accuracy,
            )  # fmt: skip
            return _without_last(loss, reduction, return_lse) if shift else loss
        terms = _terms(
            (x, linear_weight, linear_bias),
            goal,
            LinearCrossEntropyFunction,
            lambda x, w, b, *t: torch.ops.lmkern.linear_cross_entropy_forward(x, w, b, False, *t),
            reference.linear_cross_entropy_terms,
            needs_grad(x, linear_weight, linear_bias),
            needs_grad(target, weight) or len(dtypes) > 1 or not use_kernel(op, x),
        )
        loss = _loss(
            op, terms, goal, classes, shape, input.dtype, reduction, label_smoothing, z_loss,
            return_lse, return_accuracy,
        )  # fmt: skip
    return _without_last(loss, reduction, return_lse) if shift else loss


def _without_last(loss: LossOrMore, reduction: str, return_lse: bool) -> LossOrMore:
    """Without the last position of each sequence, which predicts nothing."""
    if reduction != "none" and not return_lse:
        return loss
    several = loss if isinstance(loss, tuple) else (loss,)
    several = tuple(t if t.dim() == 0 else t[..., :-1] for t in several)
    return several if isinstance(loss, tuple) else several[0]


def _shifted(op: str, target: Tensor, shape: torch.Size, ignore_index: int) -> Tensor:
    """The target of each position: the next one's, and none for the last."""
    if target.is_floating_point() or not shape:
        raise ValueError(f"{op}: target must be class indices [..., L] with shift")
    check_shape(op, "target", target, shape, "[..., L]")
    return F.pad(target[..., 1:].long(), (0, 1), value=ignore_index)


def _target(
    op: str,
    target: Tensor,
    full: torch.Size | tuple[int, ...],
    shape: torch.Size,
    rows: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
) -> Target:
    """Check the target and what belongs to it; ``rows``: the logits [N, C, P], or x [P, D]."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be > 0 or None, got {softcap}")
    last = rows.dim() == 2  # the linear form: classes come last, and positions are rows
    classes = full[-1] if last or len(full) == 1 else full[1]
    check_shape(op, "weight", weight, (classes,), "[C]")
    wide = accumulate_dtype(rows.dtype)
    weight = None if weight is None else weight.to(wide)
    options = (weight, ignore_index, softcap or 0.0, label_smoothing > 0)
    if target.is_floating_point():
        check_shape(op, "target", target, full, "like the logits")
        if last:
            flat = target.reshape(len(rows), classes).t().unsqueeze(0).to(wide)
        else:
            flat = target.reshape(rows.shape).to(rows.dtype)
        return Target(None, flat, *options)
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"{op}: target must be int64 or floating, got {target.dtype}")
    check_shape(op, "target", target, shape, "[N, ...], one class for each position")
    flat = target.reshape(1, -1) if last else target.reshape(rows.shape[0], rows.shape[2])
    return Target(flat.long(), None, *options)


def _check_reduction(op: str, reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def _terms(
    inputs: tuple[Tensor | None, ...],
    target: Target,
    function: Any,
    op: Callable[..., Any],
    plain: Callable[..., Any],
    with_gradient: bool,
    use_plain: bool,
) -> Terms:
    if use_plain:
        return Terms(*plain(*inputs, *target))
    return Terms(*(function.apply if with_gradient else op)(*inputs, *target)[:4])


def _loss(
    op: str,
    terms: Terms,
    target: Target,
    classes: int,
    shape: torch.Size,
    dtype: torch.dtype,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    return_lse: bool,
    return_accuracy: bool,
) -> LossOrMore:
    """From the terms to the loss."""
    _check_reduction(op, reduction)
    lse, likelihood, total, correct = terms
    labels, weight = target.labels, target.weight
    valid = share = None
    loss = -likelihood
    if labels is not None:
        valid = labels != target.ignore_index
        if weight is not None:
            share = weight[labels.where(valid, 0)] * valid
            loss = loss * share
    if label_smoothing > 0:
        loss = loss * (1.0 - label_smoothing) - total * (label_smoothing / classes)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if valid is not None:
        loss = loss.where(valid, 0.0)
    if reduction == "none":
        result = loss.reshape(shape)
    elif reduction == "sum":
        result = loss.sum()
    elif valid is None:
        result = loss.sum() / loss.numel()
    else:
        result = loss.sum() / (valid if share is None else share).sum()
    more = []
    if return_lse:
        more.append(lse.reshape(shape))
    if return_accuracy:
        if valid is None:
            raise ValueError(f"{op}: return_accuracy must be False with probabilities as target")
        more.append((correct & valid).sum() / valid.sum())
    return (result.to(dtype), *more) if more else result.to(dtype)
