"""Losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn
from torch import Tensor

from lmkern.functional.loss import LossOrMore, cross_entropy, linear_cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on lmkern's kernels: one pass over the logits each way.

    Constructor as torch's, and keyword-only ``z_loss`` and ``softcap``
    (:func:`lmkern.functional.cross_entropy`).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss = cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )
        assert isinstance(loss, Tensor)
        return loss


class LinearCrossEntropyLoss(torch.nn.Module):
    r"""Cross entropy of ``linear(input)``, whose logits never exist at once.

    Constructor, ``state_dict`` (``linear.weight``, ``linear.bias``, ``weight``) and initialisation of
    ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13), and keyword-only ``z_loss``, ``softcap``,
    ``shift`` (:func:`lmkern.functional.linear_cross_entropy`).

    Args:
        in_features: D. num_classes: C. out_features: (d_1, ..., d_K) for K losses an input.
        bias: whether the logits have one. weight: [C], of each class.
        reduction, ignore_index, label_smoothing: of the loss. options: without effect.

    Shape: input [..., D], target [...] -> scalar, or [...] with ``reduction='none'``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
    ) -> None:
        super().__init__()
        rows = num_classes
        for extent in out_features:
            rows *= extent
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.options = label_smoothing, options
        self.z_loss, self.softcap, self.shift = z_loss, softcap, shift
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.weight: Tensor | None

    def forward(self, input: Tensor, target: Tensor) -> LossOrMore:
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.unflatten(0, shape) if self.out_features else self.linear.weight,
            target,
            linear_bias=bias.unflatten(0, shape)
            if bias is not None and self.out_features
            else bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            shift=self.shift,
        )
