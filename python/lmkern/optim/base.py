"""What the optimizers share: groups, gradients in rows, decay that is owed, state like torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lmkern.ops.embedding_optimizer import Table, sgd_
from lmkern.ops.library import accumulate_dtype

# Where the running product of decays leaves these bounds, all rows pay at once and it starts from 1.
_LEAST, _MOST = 1e-100, 1e100


@dataclass
class _Debt:
    """The decay that the rows of one parameter owe: row r owes ``product / touched[r]``."""

    product: float  # of all steps' factors
    touched: Tensor  # float64 [V]: what the product was when the row was last up to date


def _row_shape(parameter: Tensor) -> tuple[int, int]:
    """[V, D]: the first dimension against all others."""
    count = len(parameter) if parameter.dim() else 1
    return count, parameter.numel() // max(count, 1)


class RowOptimizer(Optimizer):
    """An optimizer whose step touches the rows that the gradient has.

    A subclass says what to do with them (:meth:`_update`), by which factor its step decays every row
    (:meth:`_decay`), which tensors its state has (:meth:`_state_shapes`) and what of torch's options it
    cannot have (``_without``: option -> the reason).
    """

    _without: ClassVar[dict[str, str]] = {}

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._debts: dict[Tensor, _Debt] = {}
        super().__init__(params, defaults)

    # ---- of the subclass ----------------------------------------------------------------------

    def _update(self, group: dict[str, Any], parameter: Tensor, table: Table) -> None:
        raise NotImplementedError

    def _decay(self, group: dict[str, Any]) -> float:
        return 1.0

    def _state_shapes(self, group: dict[str, Any], parameter: Tensor) -> dict[str, torch.Size]:
        return {}

    # ---- the step -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss, which is returned.

        Raises:
            RuntimeError: a gradient of a kind that this optimizer cannot take; a CUDA graph is captured.
        """
        if torch.compiler.is_compiling():
            return _uncompiled_step(self, closure)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: step() cannot be captured in a CUDA graph, whose replays would "
                "repeat its rates and its number"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._check_supported(group)
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_one(group, parameter, parameter.grad)
        return loss

    def _step_one(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        factor = self._decay(group)
        if gradient.layout == torch.strided:
            self._pay(parameter)
            self._update(group, parameter, self._table(group, parameter, gradient, decay=factor))
            return
        if gradient.layout != torch.sparse_coo or gradient.sparse_dim() != 1:
            sparse_dim = f" of sparse_dim {gradient.sparse_dim()}" if gradient.is_sparse else ""
            raise RuntimeError(
                f"{type(self).__name__}: the gradient of {self._name(parameter)} must be dense, or "
                f"sparse COO with sparse_dim 1, got {gradient.layout}{sparse_dim}"
            )
        # Not coalesced first: the kernels sum the gradients of a row as they read them.
        rows, values = gradient._indices()[0].contiguous(), gradient._values()
        ascending = gradient.is_coalesced()
        debt = self._debts.get(parameter)
        if debt is None and factor != 1.0:
            touched = torch.ones(len(parameter), dtype=torch.float64, device=parameter.device)
            debt = self._debts[parameter] = _Debt(1.0, touched)
        if debt is not None and not _LEAST < abs(debt.product * factor) < _MOST:
            debt.product *= factor
            self._pay(parameter)
            debt, factor = None, 1.0
        if debt is None:
            table = self._table(group, parameter, values, rows, ascending=ascending)
            self._update(group, parameter, table)
            return
        product = debt.product * factor
        table = self._table(group, parameter, values, rows, debt.touched, product, ascending)
        self._update(group, parameter, table)
        debt.product = product

    def _table(
        self,
        group: dict[str, Any],
        parameter: Tensor,
        gradient: Tensor,
        rows: Tensor | None = None,
        touched: Tensor | None = None,
        decay: float = 1.0,
        ascending: bool = False,
    ) -> Table:
        # Where nothing goes by rows, a vector is one row: faster than many of one element.
        by_row = rows is not None or parameter.dim() > 1 or group.get("rowwise")
        shape = _row_shape(parameter) if by_row else (1, parameter.numel())
        gradient = gradient.reshape(shape[0] if rows is None else len(rows), shape[1]).contiguous()
        scale = -1.0 if group["maximize"] else 1.0
        return Table(parameter, shape, rows, gradient, scale, touched, decay, ascending=ascending)

    # ---- decay that is owed -------------------------------------------------------------------

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring the weights of all rows up to date with the weight decay that they owe.

        One pass over each table with weight decay; without weight decay there is nothing to do. Needed
        where weights are read outside of training steps: before evaluating, saving or replacing them.
        """
        for parameter in list(self._debts):
            self._pay(parameter)

    def _pay(self, parameter: Tensor) -> None:
        debt = self._debts.pop(parameter, None)
        if debt is not None:
            shape = _row_shape(parameter)
            sgd_(Table(parameter, shape, touched=debt.touched, decay=debt.product))

    # ---- options ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError for an option that is out of range or not supported."""
        if isinstance(param_group, dict):
            self._check_values({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.is_floating_point() or parameter.layout != torch.strided:
                kind = f"{parameter.layout} {parameter.dtype}".replace("torch.", "")
                name = self._name(parameter)
                self.param_groups.pop()
                raise ValueError(
                    f"{type(self).__name__}: {name} must be dense and of real numbers, got {kind}"
                )

    def _check_values(self, group: dict[str, Any]) -> None:
        self._check_supported(group)
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(
                f"{type(self).__name__}: lr must be a number or a tensor of one element, "
                f"got {list(lr.shape)}"
            )
        for option in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            if not group.get(option, 0) >= 0:
                raise ValueError(
                    f"{type(self).__name__}: {option} must be at least 0, got {group[option]}"
                )
        for i, beta in enumerate(group.get("betas", ())):
            if not 0 <= beta < 1:
                raise ValueError(f"{type(self).__name__}: betas[{i}] must be in [0, 1), got {beta}")

    def _check_supported(self, group: dict[str, Any]) -> None:
        # In every step, because schedulers and loaded states change groups.
        for option, reason in self._without.items():
            if group.get(option):
                raise ValueError(
                    f"{type(self).__name__}: {option}={group[option]} is not supported: {reason}"
                )

    def _name(self, parameter: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for i, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    if "param_names" in group:
                        return f"parameter '{group['param_names'][i]}'"
                    return f"parameter {i} of group {number}"
        return "a parameter"

    # ---- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, after :meth:`catch_up`: what is saved is exact and owes nothing.

        The weights change with that, so save the optimizer's state before the model's, or call
        :meth:`catch_up` first.
        """
        self.catch_up()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, of a state that this class or torch's class of the same name has saved.

        Moments keep float32 for 16-bit parameters. The weights are taken to be up to date.

        Raises:
            ValueError: another model's state, or options that are not supported.
        """
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)
            self._check_state(final)

        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(
                lambda _: self._restore_precision(loaded), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _loaded_state(self, loaded: dict[str, Any]) -> list[tuple[dict, Tensor, dict]]:
        """(saved group, our parameter, its saved state), where there is one."""
        return [
            (saved, parameter, loaded["state"][number])
            for group, saved in zip(self.param_groups, loaded["param_groups"], strict=False)
            for parameter, number in zip(group["params"], saved["params"], strict=False)
            if number in loaded["state"]
        ]

    def _check_state(self, loaded: dict[str, Any]) -> None:
        for saved in loaded["param_groups"]:
            self._check_supported({**self.defaults, **saved})
        for saved, parameter, state in self._loaded_state(loaded):
            shapes = self._state_shapes({**self.defaults, **saved}, parameter)
            for key, shape in shapes.items() if state else ():
                found = state.get(key)
                if found is None or found.shape != shape:
                    raise ValueError(
                        f"{type(self).__name__}: {key} of {self._name(parameter)} must be "
                        f"{list(shape)}, got {None if found is None else list(found.shape)}"
                    )

    def _restore_precision(self, loaded: dict[str, Any]) -> None:
        # torch has cast all state to the parameters' dtype.
        for _, parameter, state in self._loaded_state(loaded):
            for key, value in state.items():
                if key != "step" and isinstance(value, Tensor):
                    dtype = accumulate_dtype(parameter.dtype)
                    self.state[parameter][key] = value.to(parameter.device, dtype).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._debts = {}
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)


# Not a decorator of step: the passage through it would take a fifth of a small step.
_uncompiled_step = torch._disable_dynamo(RowOptimizer.step)
