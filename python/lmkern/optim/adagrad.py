"""Adagrad, for each element or for each row."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmkern.ops.embedding_optimizer import Table, adagrad_, fresh_state
from lmkern.optim.base import RowOptimizer


class Adagrad(RowOptimizer):
    """``torch.optim.Adagrad`` on the rows that have a gradient, and its row-wise form.

    For a touched row w with gradient g in step t, and clr = lr / (1 + (t - 1) lr_decay):
        s <- s + g²,         w <- w - clr g / (sqrt(s) + eps)      element by element, or
        s <- s + mean(g²)    with ``rowwise``, one s for the row.

    Args:
        params: parameters, or groups of them, of float32, float64, bfloat16 or float16.
        lr: learning rate, a number or a tensor of one element. lr_decay: see above.
        weight_decay: the L2 penalty's factor; for dense gradients only, as in torch.
        initial_accumulator_value: of s. eps: see above.
        maximize: go up instead of down.
        rowwise: state of one number for a row: a D-th of the memory, and half the traffic.
        foreach, fused: accepted and ignored. differentiable: must be False.

    State: ``step`` and ``sum`` [V, D], with ``rowwise`` [V]; float32 for 16-bit parameters.

    Raises:
        ValueError: an option out of range or not supported.
        RuntimeError: in a step, a sparse gradient with weight_decay.

    Source: torch.optim.Adagrad; FBGEMM's EXACT_ROWWISE_ADAGRAD.
    """

    _without: ClassVar[dict[str, str]] = {"differentiable": "steps run outside of autograd"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rowwise: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "rowwise": rowwise,
        }
        super().__init__(params, defaults)

    def _state_shapes(self, group: dict[str, Any], parameter: Tensor) -> dict[str, torch.Size]:
        return {"sum": parameter.shape[:1] if group["rowwise"] else parameter.shape}

    def _update(self, group: dict[str, Any], parameter: Tensor, table: Table) -> None:
        weight_decay = float(group["weight_decay"])
        if weight_decay != 0 and table.rows is not None:
            raise RuntimeError(
                f"Adagrad: weight_decay must be 0 for {self._name(parameter)}, whose gradient is "
                "sparse: the L2 penalty would give every row a gradient"
            )
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.get_default_dtype())
            shape = self._state_shapes(group, parameter)["sum"]
            state["sum"] = fresh_state(parameter, shape, group["initial_accumulator_value"])
        rate = float(group["lr"]) / (1 + float(state["step"]) * group["lr_decay"])
        adagrad_(table._replace(step_size=rate), state["sum"], weight_decay, group["eps"])
        state["step"] += 1
