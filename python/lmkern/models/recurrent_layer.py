"""One recurrent layer of a language model, on lmkern's kernels or on torch's operators.

A backend is a function `f(input, w_ih, w_hh, b_ih, b_hh, hx, *, h_mask)` with the signature of
`lmkern.functional.lstm`, `.gru` and `.rnn`. Parameters, and everything random, live in the layer
above it, so that both backends start from the same values and drop the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pretrained import Backend

Cell = Literal["lstm", "gru", "rnn"]
State = tuple[Tensor, ...]

GATES: dict[str, int] = {"lstm": 4, "gru": 3, "rnn": 1}


class RecurrentLayer(nn.Module):
    """One layer in one direction; parameters named and initialised as those of torch's cells.

    Args:
        cell: lstm, gru or rnn (tanh).
        input_size, hidden_size: widths of x_t and h_t.
        weight_drop: probability of dropping an entry of W_hh, drawn once per call (DropConnect,
            Wan et al. 2013; Merity et al. 2018).
        recurrent_dropout: probability of dropping a value of h_{t-1} on its way into W_hh, one mask
            for all steps of a sequence (Gal & Ghahramani 2016).
        backend: whose recurrence.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        weight_drop: float = 0.0,
        recurrent_dropout: float = 0.0,
        backend: Backend = "lmkern",
    ) -> None:
        super().__init__()
        self.cell, self.backend = cell, backend
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight_drop, self.recurrent_dropout = weight_drop, recurrent_dropout
        rows = GATES[cell] * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    @property
    def state_size(self) -> int:
        """How many tensors [B, hidden_size] a state has: h, and for an LSTM c."""
        return 2 if self.cell == "lstm" else 1

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x [T, B, input_size] and (h,) or (h, c), zeros if None -> y [T, B, hidden_size], state."""
        w_hh = F.dropout(self.weight_hh, self.weight_drop, self.training)
        h_mask = None
        if self.training and self.recurrent_dropout > 0.0:
            ones = self.weight_hh.new_ones(x.shape[1], self.hidden_size)
            h_mask = F.dropout(ones, self.recurrent_dropout)
        hx: Any = state[0] if state is not None and self.cell != "lstm" else state
        run = recurrence(self.cell, self.backend)
        options = {} if h_mask is None else {"h_mask": h_mask}
        y, last = run(x, self.weight_ih, w_hh, self.bias_ih, self.bias_hh, hx, **options)
        return y, last if self.cell == "lstm" else (last,)

    def extra_repr(self) -> str:
        return f"{self.cell}, {self.input_size}, {self.hidden_size}, backend={self.backend}"


def recurrence(cell: Cell, backend: Backend) -> Callable[..., Any]:
    """The function that runs `cell`, lmkern's or torch's."""
    if backend == "lmkern":
        from lmkern.functional import gru, lstm, rnn

        ours: dict[str, Callable[..., Any]] = {"lstm": lstm, "gru": gru, "rnn": rnn}
        return ours[cell]
    theirs: dict[str, Callable[..., Any]] = {"lstm": torch_lstm, "gru": torch_gru, "rnn": torch_rnn}
    return theirs[cell]


def torch_lstm(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    hx: State | None = None,
    *,
    h_mask: Tensor | None = None,
) -> tuple[Tensor, State]:
    """`lmkern.functional.lstm` on torch's operator, or on a loop where h is masked."""
    shape = (input.shape[1], w_hh.shape[1])
    h, c = (input.new_zeros(shape), input.new_zeros(shape)) if hx is None else hx
    if h_mask is None:
        y, h_n, c_n = torch._VF.lstm(
            input, (h[None], c[None]), [w_ih, w_hh, b_ih, b_hh], *_one_layer()
        )
        return y, (h_n[0], c_n[0])
    steps = []
    for x_t in F.linear(input, w_ih, b_ih):
        i, f, g, o = (x_t + F.linear(h * h_mask, w_hh, b_hh)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(h)
    return torch.stack(steps), (h, c)


def torch_gru(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    hx: Tensor | None = None,
    *,
    h_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lmkern.functional.gru` on torch's operator, or on a loop where h is masked."""
    h = input.new_zeros(input.shape[1], w_hh.shape[1]) if hx is None else hx
    if h_mask is None:
        y, h_n = torch._VF.gru(input, h[None], [w_ih, w_hh, b_ih, b_hh], *_one_layer())
        return y, h_n[0]
    steps = []
    for x_t in F.linear(input, w_ih, b_ih):
        r, z, n = x_t.chunk(3, dim=1)
        h_r, h_z, h_n = F.linear(h * h_mask, w_hh, b_hh).chunk(3, dim=1)
        z = (z + h_z).sigmoid()
        n = (n + (r + h_r).sigmoid() * h_n).tanh()
        h = n + z * (h - n)
        steps.append(h)
    return torch.stack(steps), h


def torch_rnn(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    hx: Tensor | None = None,
    *,
    h_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lmkern.functional.rnn` (tanh) on torch's operator, or on a loop where h is masked."""
    h = input.new_zeros(input.shape[1], w_hh.shape[1]) if hx is None else hx
    if h_mask is None:
        y, h_n = torch._VF.rnn_tanh(input, h[None], [w_ih, w_hh, b_ih, b_hh], *_one_layer())
        return y, h_n[0]
    steps = []
    for x_t in F.linear(input, w_ih, b_ih):
        h = (x_t + F.linear(h * h_mask, w_hh, b_hh)).tanh()
        steps.append(h)
    return torch.stack(steps), h


def _one_layer() -> tuple[Any, ...]:
    """has_biases, num_layers, dropout, train (keep what backward needs), bidirectional, batch_first."""
    return True, 1, 0.0, torch.is_grad_enabled(), False, False
