"""Recurrent cells: one step. Math and layouts: csrc/ops/recurrent.h."""

from __future__ import annotations

from torch import Tensor

from lmkern.functional._layer import rnn_cell_name, run_layer
from lmkern.ops.check import check_pair
from lmkern.ops.recurrent_passes import CELLS
from lmkern.ops.recurrent_step import plain_step


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    peephole: Tensor | None = None,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lmkern.functional.lstm`.

    Args:
        input: [B, I], or [I].
        hx: (h, c), each [B, H], or [H] if the input is [I]; zeros if None.
        w_ih: [4H, I]. w_hh: [4H, H]. b_ih, b_hh: [4H], both or neither.
        peephole, norm_ih, norm_hh, norm_cell_weight, norm_cell_bias, eps: as in ``lstm``.

    Returns:
        the new (h, c), shaped as hx.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before anything is computed.
    """
    h0, c0 = (None, None) if hx is None else check_pair("lstm_cell", hx)
    if norm_ih is None is norm_hh and norm_cell_weight is None is peephole:
        step = plain_step(0, input, h0, c0, w_ih, w_hh, b_ih, b_hh)
        if step is not None:
            return step
    if not isinstance(input, Tensor) or input.dim() != 2:
        check_unbatched("lstm_cell", input, h0, c0)
        hx = None if h0 is None or c0 is None else (h0.unsqueeze(0), c0.unsqueeze(0))
        h, c = lstm_cell(
            input.unsqueeze(0), hx, w_ih, w_hh, b_ih, b_hh, peephole=peephole, norm_ih=norm_ih,
            norm_hh=norm_hh, norm_cell_weight=norm_cell_weight, norm_cell_bias=norm_cell_bias,
            eps=eps,
        )  # fmt: skip
        return h.squeeze(0), c.squeeze(0)
    _, h_n, c_n, _ = run_layer(
        "lstm_cell", "lstm", 4, input.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, h0, c0,
        norm_ih=norm_ih, norm_hh=norm_hh, eps=eps, peephole=peephole,
        norm_cell_weight=norm_cell_weight, norm_cell_bias=norm_cell_bias,
    )  # fmt: skip
    assert c_n is not None
    return h_n, c_n


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """One step of :func:`lmkern.functional.gru`.

    Args:
        input: [B, I], or [I].
        hx: h [B, H], or [H] if the input is [I]; zeros if None.
        w_ih: [3H, I]. w_hh: [3H, H]. b_ih, b_hh: [3H], both or neither.
        norm_ih, norm_hh, eps: as in ``gru``.

    Returns:
        the new h, shaped as hx.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before anything is computed.
    """
    if norm_ih is None is norm_hh:
        step = plain_step(1, input, hx, None, w_ih, w_hh, b_ih, b_hh)
        if step is not None:
            return step
    if not isinstance(input, Tensor) or input.dim() != 2:
        check_unbatched("gru_cell", input, hx)
        hx = None if hx is None else hx.unsqueeze(0)
        return gru_cell(
            input.unsqueeze(0),
            hx,
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            norm_ih=norm_ih,
            norm_hh=norm_hh,
            eps=eps,
        ).squeeze(0)
    return run_layer(
        "gru_cell", "gru", 3, input.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, hx, None,
        norm_ih=norm_ih, norm_hh=norm_hh, eps=eps,
    )[1]  # fmt: skip


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    activation: str = "tanh",
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """One step of :func:`lmkern.functional.rnn`.

    Args:
        input: [B, I], or [I].
        hx: h [B, H], or [H] if the input is [I]; zeros if None.
        w_ih: [H, I]. w_hh: [H, H]. b_ih, b_hh: [H], both or neither.
        activation: one of "tanh", "relu", "sigmoid".
        norm_ih, norm_hh, eps: as in ``rnn``.

    Returns:
        the new h, shaped as hx.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before anything is computed.
    """
    cell = rnn_cell_name("rnn_cell", activation)
    if norm_ih is None is norm_hh:
        step = plain_step(CELLS.index(cell), input, hx, None, w_ih, w_hh, b_ih, b_hh)
        if step is not None:
            return step
    if not isinstance(input, Tensor) or input.dim() != 2:
        check_unbatched("rnn_cell", input, hx)
        hx = None if hx is None else hx.unsqueeze(0)
        return rnn_cell(
            input.unsqueeze(0), hx, w_ih, w_hh, b_ih, b_hh, activation=activation,
            norm_ih=norm_ih, norm_hh=norm_hh, eps=eps,
        ).squeeze(0)  # fmt: skip
    return run_layer(
        "rnn_cell", cell, 1, input.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, hx, None,
        norm_ih=norm_ih, norm_hh=norm_hh, eps=eps,
    )[1]  # fmt: skip


def check_unbatched(op: str, input: Tensor, *states: Tensor | None) -> None:
    """An input without batch dimension, with states that have none either."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a Tensor, got {type(input).__name__}")
    if input.dim() != 1:
        raise ValueError(f"{op}: input must be [B, I] or [I], got {list(input.shape)}")
    for state in states:
        if state is not None and state.dim() != 1:
            raise ValueError(f"{op}: hx must be [H] for an input [I], got {list(state.shape)}")
