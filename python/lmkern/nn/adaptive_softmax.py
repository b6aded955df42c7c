"""Adaptive softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmkern.functional import linear, linear_cross_entropy
from lmkern.ops.check import check_shape


class AdaptiveOutput(NamedTuple):
    """As torch's: the log probability of each target [N], and the loss."""

    output: Tensor
    loss: Tensor


class AdaptiveLogSoftmaxWithLoss(torch.nn.AdaptiveLogSoftmaxWithLoss):
    """``torch.nn.AdaptiveLogSoftmaxWithLoss``: classes in clusters, of which rare ones cost less.

    Constructor, parameters, ``log_prob`` and ``predict`` are torch's; no cluster's logits exist at once
    (:func:`lmkern.functional.linear_cross_entropy`).

    Args:
        ignore_index: a target that counts for nothing: its output is 0. reduction: 'mean' (over the
            targets that count), 'sum' or 'none' ([N]).

    Shape: input [N, in_features] or [in_features], target [N] or [] -> (output like target, loss).

    Raises:
        IndexError: a target outside of [0, n_classes) that is not ``ignore_index``.

    Source: Grave et al. 2017, "Efficient softmax approximation for GPUs".
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        cutoffs: Sequence[int],
        div_value: float = 4.0,
        head_bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(in_features, n_classes, cutoffs, div_value, head_bias, device, dtype)
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, input_: Tensor, target_: Tensor) -> AdaptiveOutput:  # type: ignore[override]
        op = "AdaptiveLogSoftmaxWithLoss"
        check_shape(op, "target", target_, input_.shape[:-1], "[N]")
        if target_.dim() > 1:
            raise ValueError(f"{op}: target must be [N] or [], got {list(target_.shape)}")
        rows, target = input_.reshape(-1, self.in_features), target_.reshape(-1)
        valid = target != self.ignore_index
        wrong = valid & ((target < 0) | (target >= self.n_classes))
        if wrong.any():
            raise IndexError(
                f"{op}: target {target[wrong][0].item()} is out of range for {self.n_classes} classes"
            )
        # In the head, a rare class is its cluster's; -100, unlike ignore_index, is no cluster's number.
        cluster = torch.bucketize(target, target.new_tensor(self.cutoffs[:-1]), right=True)
        of_head = target.where(cluster == 0, self.shortlist_size - 1 + cluster).where(valid, -100)
        losses = self._losses(rows, self.head, of_head)
        for i, tail in enumerate(self.tail):
            members = ((cluster == i + 1) & valid).nonzero().squeeze(1)
            if members.numel() == 0:
                continue
            project, classes = tail.children()
            hidden = linear(rows.index_select(0, members), project.weight)  # type: ignore[arg-type]
            inside = target[members] - self.cutoffs[i]
            losses = losses.index_add(0, members, self._losses(hidden, classes, inside))
        loss = losses
        if self.reduction != "none":
            loss = losses.sum() / (valid.sum() if self.reduction == "mean" else 1)
        return AdaptiveOutput(-losses.reshape(target_.shape), loss)

    @staticmethod
    def _losses(input: Tensor, layer: Any, target: Tensor) -> Tensor:
        losses = linear_cross_entropy(
            input, layer.weight, target, linear_bias=layer.bias, reduction="none"
        )
        assert isinstance(losses, Tensor)
        return losses
