"""Inputs of recurrent layers, torch's own operators in one form, and modules beside torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import lmkern
from lmkern.functional import gru, lstm, rnn

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "rnn_sigmoid": 1}
CELLS = list(GATES)

# lmkern.nn's and torch.nn's modules, and what the layers are built with.
LAYERS = ["RNN", "LSTM", "GRU"]
NN_CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
COMMON = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True, "num_layers": 2},
    {"dtype": torch.float64},
    {"bidirectional": True, "batch_first": True, "bias": False, "num_layers": 2},
]
CONFIGS = [(kind, options) for kind in LAYERS for options in COMMON]
CONFIGS += [("RNN", {"nonlinearity": "relu", "num_layers": 2})]
CONFIGS += [
    ("LSTM", {"proj_size": 3}),
    ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False}),
]


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


def pair(kind, *args, **kwargs):
    """Ours and torch's, from the same seed."""
    torch.manual_seed(3)
    theirs = getattr(torch.nn, kind)(*args, **kwargs)
    torch.manual_seed(3)
    return getattr(lmkern.nn, kind)(*args, **kwargs), theirs


def state_for(module, batch=(), dtype=None):
    """A random hx for a layer."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    dtype = dtype or module.weight_ih_l0.dtype
    h = torch.randn(rows, *batch, module.proj_size or module.hidden_size, dtype=dtype)
    if module.mode != "LSTM":
        return h
    return h, torch.randn(rows, *batch, module.hidden_size, dtype=dtype)


def leaves(value):
    """All tensors in nested tuples and packed sequences, in order."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in leaves(v)]


def assert_same(ours, theirs, *args, tol=1e-5):
    """Outputs, states and all gradients, those of the tensors in args too."""

    def gradients(module):
        own = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in leaves(args)]
        it = iter(own)

        def rebuild(value):
            if isinstance(value, PackedSequence):
                return PackedSequence(next(it), *value[1:])
            if isinstance(value, torch.Tensor):
                return next(it)
            return tuple(rebuild(v) for v in value)

        outputs = leaves(module(*(rebuild(a) for a in args)))
        torch.manual_seed(5)
        sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
        grads = [t.grad for t in own] + [p.grad for p in module.parameters()]
        module.zero_grad(set_to_none=True)
        return outputs, grads

    (a, da), (b, db) = gradients(ours), gradients(theirs)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, atol=tol, rtol=tol)
    for x, y in zip(da, db, strict=True):
        torch.testing.assert_close(x, y, atol=20 * tol, rtol=20 * tol)
