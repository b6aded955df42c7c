"""Inputs of recurrent layers, and torch's own operators in one form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmkern.functional import gru, lstm, rnn

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "rnn_sigmoid": 1}
CELLS = list(GATES)


def weights(
    cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, w_ih, w_hh, b_ih, b_hh, h0 (, c0) at a scale where gates neither saturate nor idle."""
    G = GATES[cell]
    shapes = [(T, B, I), (G * H, I), (G * H, H), (G * H,), (G * H,), (B, H), (B, H)]
    scales = [1.0, I**-0.5, H**-0.5, 0.5, 0.5, 1.0, 1.0]
    tensors = [(torch.randn(s) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)]
    return tensors if cell == "lstm" else tensors[:6]


def call(cell: str, x, w_ih, w_hh, b_ih, b_hh, h0, c0=None, **options) -> tuple[Tensor, ...]:
    """lmkern.functional's function of this cell, its results in a row."""
    args = (x, w_ih, w_hh, b_ih, b_hh)
    if cell == "lstm":
        y, (h, c), *cells = lstm(*args, None if h0 is None else (h0, c0), **options)
        return y, h, c, *cells
    if cell == "gru":
        return gru(*args, h0, **options)
    return rnn(*args, h0, activation=cell.removeprefix("rnn_"), **options)


def torch_layer(cell: str, x, w_ih, w_hh, b_ih, b_hh, h0, c0=None, reverse=False):
    """torch's own operator: one layer, one direction."""
    if reverse:
        y, *state = torch_layer(cell, x.flip(0), w_ih, w_hh, b_ih, b_hh, h0, c0)
        return y.flip(0), *state
    if cell == "rnn_sigmoid":  # torch has none
        y, h = [], h0
        for x_t in x:
            h = torch.sigmoid(F.linear(x_t, w_ih, b_ih) + F.linear(h, w_hh, b_hh))
            y.append(h)
        return torch.stack(y), h
    state = (h0[None], c0[None]) if cell == "lstm" else h0[None]
    run = getattr(torch._VF, cell)
    y, *state = run(x, state, [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, False, False, False)
    return y, *(s[0] for s in state)
