"""Adam with moments of touched rows only: SparseAdam, and AdamW with decay that catches up."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lmkern.ops.embedding_optimizer import Table, adam_, fresh_state
from lmkern.optim.base import RowOptimizer


class _Adam(RowOptimizer):
    """Moments of touched rows, bias correction by the parameter's number of steps."""

    def _state_shapes(self, group: dict[str, Any], parameter: Tensor) -> dict[str, torch.Size]:
        return {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}

    def _first_step(self) -> Any:
        raise NotImplementedError

    def _adam(
        self, group: dict[str, Any], parameter: Tensor, table: Table, corrected_eps: bool
    ) -> None:
        """``corrected_eps``: eps is added to the root of the corrected v."""
        state = self.state[parameter]
        if not state:
            state["step"] = self._first_step()
            for key, shape in self._state_shapes(group, parameter).items():
                state[key] = fresh_state(parameter, shape)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        step = float(state["step"]) + 1
        correction = math.sqrt(1 - beta2**step)
        adam_(
            table._replace(step_size=float(group["lr"]) * correction / (1 - beta1**step)),
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1,
            beta2,
            group["eps"] * correction if corrected_eps else group["eps"],
        )
        state["step"] += 1


class SparseAdam(_Adam):
    """``torch.optim.SparseAdam``: Adam on the rows that have a gradient.

    For a touched row w with gradient g in step t of the parameter, whether or not the row took part in
    the others:
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g²
        w <- w - lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)

    Args:
        params: parameters, or groups of them, of float32, float64, bfloat16 or float16.
        lr: learning rate, a number or a tensor of one element. betas, eps: see above.
        maximize: go up instead of down.

    State: ``step`` (an int), ``exp_avg``, ``exp_avg_sq`` like the parameter; float32 for 16-bit ones.

    Raises:
        ValueError: an option out of range.
        RuntimeError: in a step, a dense gradient.

    Source: torch.optim.SparseAdam; Kingma & Ba 2015, algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize})

    def _update(self, group: dict[str, Any], parameter: Tensor, table: Table) -> None:
        if table.rows is None:
            raise RuntimeError(
                f"SparseAdam: the gradient of {self._name(parameter)} must be sparse, got a dense one; "
                "AdamW takes both"
            )
        self._adam(group, parameter, table, corrected_eps=False)

    def _first_step(self) -> Any:
        return 0


class AdamW(_Adam):
    """``torch.optim.AdamW`` on the rows that have a gradient, with weight decay that catches up.

    For a touched row w with gradient g in step t of the parameter, last touched in step s:
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g²
        w <- w prod over s < i <= t of (1 - lr_i weight_decay)
        w <- w - lr_t / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    With a dense gradient, or where every row is touched in every step, this is torch.optim.AdamW. Of a
    row that is not touched, moments and weight rest, as with SparseAdam (torch.optim.AdamW goes on to
    move it by its decaying moments); only the decay of such a step is owed, with that step's lr, and
    paid when the row is next touched or in :meth:`catch_up`. Forward passes until then read the row
    without it.

    Args:
        params: parameters, or groups of them, of float32, float64, bfloat16 or float16.
        lr: learning rate, a number or a tensor of one element. betas, eps, weight_decay: see above.
        amsgrad, differentiable: must be False.
        maximize: go up instead of down.
        foreach, capturable, fused: accepted and ignored.

    State: ``step`` (a tensor), ``exp_avg``, ``exp_avg_sq`` like the parameter; float32 for 16-bit ones.

    Raises:
        ValueError: an option out of range or not supported.

    Source: torch.optim.AdamW; Loshchilov & Hutter 2019, algorithm 2.
    """

    _without: ClassVar[dict[str, str]] = {
        "amsgrad": "it would keep a third moment",
        "differentiable": "steps run outside of autograd",
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)

    def _decay(self, group: dict[str, Any]) -> float:
        return 1.0 - float(group["lr"]) * float(group["weight_decay"])

    def _update(self, group: dict[str, Any], parameter: Tensor, table: Table) -> None:
        self._adam(group, parameter, table, corrected_eps=True)

    def _first_step(self) -> Any:
        return torch.tensor(0.0, dtype=torch.get_default_dtype())
