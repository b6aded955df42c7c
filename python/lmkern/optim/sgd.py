"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmkern.ops.embedding_optimizer import Table, sgd_
from lmkern.optim.base import RowOptimizer


class SGD(RowOptimizer):
    """``torch.optim.SGD`` without momentum, on the rows that have a gradient.

    For a touched row w with gradient g:  w <- (1 - lr weight_decay) w - lr g.  A row that is not
    touched owes the factor (1 - lr weight_decay) of that step, with that step's lr, and pays when it
    is next touched or in :meth:`catch_up`. Forward passes until then read it without.

    Args:
        params: parameters, or groups of them, of float32, float64, bfloat16 or float16.
        lr: learning rate, a number or a tensor of one element.
        momentum, nesterov: must be off. dampening: without effect then.
        weight_decay: the L2 penalty's factor.
        maximize: go up instead of down.
        foreach, fused: accepted and ignored. differentiable: must be False.

    Raises:
        ValueError: an option out of range or not supported.

    Source: torch.optim.SGD.
    """

    _without: ClassVar[dict[str, str]] = {
        "momentum": "a momentum buffer moves every row in every step",
        "nesterov": "there is no momentum",
        "differentiable": "steps run outside of autograd",
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _decay(self, group: dict[str, Any]) -> float:
        return 1.0 - float(group["lr"]) * float(group["weight_decay"])

    def _update(self, group: dict[str, Any], parameter: Tensor, table: Table) -> None:
        sgd_(table._replace(step_size=float(group["lr"])))
