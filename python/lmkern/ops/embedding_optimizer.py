"""Optimizer steps on the rows of a table. Math and layouts: csrc/ops/embedding_optimizer.h.

Straight calls of the kernels rather than ops of torch.library: a step runs outside of autograd, and
torch.compile cannot trace the sparse gradients that it lives on. All that a schema with mutable
arguments would do for us is to count the weight's version up, which is one line here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmkern import reference
from lmkern.ops.backend import kernels_of, takes_cuda
from lmkern.ops.library import accumulate_dtype, declare_cuda, use_kernel
from lmkern.ops.memory import fresh

declare_cuda("embedding_sgd", "embedding_adagrad", "embedding_adam")


class Table(NamedTuple):
    """What every rule takes. From ``rows`` to ``step_size``, the kernels' arguments in order."""

    parameter: Tensor  # of any shape and strides
    shape: tuple[int, int]  # [V, D], as which the parameter is seen
    rows: Tensor | None = None  # int64 [N] in any order; None: all
    gradient: Tensor | None = None  # [N, D]
    gradient_scale: float = 1.0
    touched: Tensor | None = None  # float64 [V]
    decay: float = 1.0
    step_size: float = 0.0
    ascending: bool = False  # rows are known to be, strictly


def sgd_(table: Table) -> None:
    """Moves rows against their gradient; without a gradient, only decays them."""
    _run("embedding_sgd", table)


def adagrad_(table: Table, sum: Tensor, weight_decay: float, eps: float) -> None:
    """Adagrad, for each element or, with ``rowwise``, a ``sum`` of [V], for each row."""
    _run("embedding_adagrad", table, _as_rows(sum, table), weight_decay, eps)


def adam_(
    table: Table, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float, eps: float
) -> None:
    """Adam; bias corrections are part of ``step_size`` and ``eps``."""
    moments = _as_rows(exp_avg, table), _as_rows(exp_avg_sq, table)
    _run("embedding_adam", table, *moments, beta1, beta2, eps)


def _as_rows(state: Tensor, table: Table) -> Tensor:
    return state.view(table.shape) if state.shape == table.parameter.shape else state


def _run(rule: str, table: Table, *state: Any) -> None:
    parameter = table.parameter
    if parameter.numel() == 0 or parameter.is_meta:
        return
    weight = parameter
    if parameter.shape != table.shape or parameter.stride(1) != 1:
        weight = parameter.detach().reshape(table.shape)
        if weight.stride(1) != 1:
            weight = weight.contiguous()
    if use_kernel("optim", weight, kernel=rule):
        if takes_cuda(weight):
            table = _sorted(table)
        getattr(kernels_of(weight), rule)(weight, *table[2:8], *state)
        torch._C._increment_version((parameter,))  # of torch.autograd.graph.increment_version
    else:
        getattr(reference, rule)(weight, *table[2:8], *state)
    if weight is not parameter and weight.data_ptr() != parameter.data_ptr():
        parameter.copy_(weight.view(parameter.shape))  # no kernel could follow its strides


def _sorted(table: Table) -> Table:
    """With ascending rows, as a GPU's kernels want them; those of one row stay in their order."""
    if table.rows is None or table.gradient is None or table.ascending:
        return table
    rows, order = torch.sort(table.rows, stable=True)
    return table._replace(rows=rows, gradient=table.gradient.index_select(0, order))


def fresh_state(parameter: Tensor, shape: torch.Size, value: float = 0.0) -> Tensor:
    """A state tensor: float32 (float64 for a float64 parameter), contiguous, filled with ``value``."""
    return fresh(parameter, shape, dtype=accumulate_dtype(parameter.dtype)).fill_(value)
