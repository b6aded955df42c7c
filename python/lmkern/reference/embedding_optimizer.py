"""Optimizer steps on rows of a table, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_sgd(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor | None,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
) -> None:
    """In place: rows of ``weight`` decay by what they owe, and move by step_size * u (here: gradient).

    Args:
        weight: [V, D]. rows: int64 [N], or None for all. gradient: [N, D], or None for u = 0; gradients
            of the same row are summed.
        touched: float64 [V]: a row decays by ``decay / touched``; without, by ``decay``.
    """
    u = None
    if gradient is not None:
        rows, u = _summed(rows, gradient, gradient_scale)
    _move_rows(weight, rows, u, touched, decay, step_size)


def embedding_adagrad(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
    sum: Tensor,
    weight_decay: float,
    eps: float,
) -> None:
    """As :func:`embedding_sgd`, u = g / (sqrt(sum) + eps); a ``sum`` of [V] takes means over rows."""
    rows, g = _summed(rows, gradient, gradient_scale)
    if weight_decay != 0:
        g = g + weight_decay * _wide(_read(weight, rows))
    s = _read(sum, rows) + (g.square().mean(1) if sum.dim() == 1 else g.square())
    _write(sum, rows, s)
    u = g / ((s.unsqueeze(1) if sum.dim() == 1 else s).sqrt() + eps)
    _move_rows(weight, rows, u, touched, decay, step_size)


def embedding_adam(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """As :func:`embedding_sgd`, u = exp_avg / (sqrt(exp_avg_sq) + eps)."""
    rows, g = _summed(rows, gradient, gradient_scale)
    m = torch.lerp(_read(exp_avg, rows), g, 1 - beta1)
    v = beta2 * _read(exp_avg_sq, rows) + (1 - beta2) * g.square()
    _write(exp_avg, rows, m)
    _write(exp_avg_sq, rows, v)
    _move_rows(weight, rows, m / (v.sqrt() + eps), touched, decay, step_size)


def _move_rows(
    weight: Tensor,
    rows: Tensor | None,
    u: Tensor | None,
    touched: Tensor | None,
    decay: float,
    step_size: float,
) -> None:
    w = _wide(_read(weight, rows))
    if touched is None:
        w = w * decay
    else:
        before = _read(touched, rows)
        w = w * (decay / before).unsqueeze(1).to(w.dtype)
        _write(touched, rows, torch.full_like(before, decay))
    _write(weight, rows, w if u is None else w - step_size * u)


def _summed(
    rows: Tensor | None, gradient: Tensor, gradient_scale: float
) -> tuple[Tensor | None, Tensor]:
    g = _wide(gradient) * gradient_scale
    if rows is None:
        return None, g
    rows, place = rows.unique(return_inverse=True)
    return rows, g.new_zeros(len(rows), g.shape[1]).index_add_(0, place, g)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _read(table: Tensor, rows: Tensor | None) -> Tensor:
    return table if rows is None else table.index_select(0, rows)


def _write(table: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        table.copy_(values)
    else:
        table.index_copy_(0, rows, values.to(table.dtype))
