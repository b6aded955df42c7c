"""Single steps: cells the short way, and `stream`/`step` token by token."""

from __future__ import annotations

import pytest
import torch

import lmkern
from lmkern.ops import recurrent_step
from lmkern.ops.backend import kernels_of
from oracle import assert_oracle

CELLS = ["LSTM", "GRU", "RNN"]


def cell_function(kind: str, module_type):
    """The cell as a function of (x, h[, c], w_ih, w_hh, b_ih, b_hh)."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def run(x, *rest):
        states, weights = rest[:-4], rest[-4:]
        module = module_type(x.shape[1], weights[1].shape[1])
        hx = states if kind == "LSTM" else states[0]
        out = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, hx))
        return tuple(out) if kind == "LSTM" else (out,)

    return run


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "size", [(1, 5, 7), (3, 9, 41), (4, 64, 64), (9, 7, 59), (130, 33, 48)], ids=str
)
@pytest.mark.parametrize("kind", CELLS)
def test_oracle(isa, kind, size, dtype):
    B, I, H = size
    G = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    states = [(B, H)] * (2 if kind == "LSTM" else 1)
    shapes = [(B, I), *states, (G * H, I), (G * H, H), (G * H,), (G * H,)]
    scales = [1.0, *[1.0] * len(states), I**-0.5, H**-0.5, 0.5, 0.5]
    inputs = [(torch.randn(s) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)]
    ours, theirs = (getattr(m, f"{kind}Cell") for m in (lmkern.nn, torch.nn))
    assert_oracle(cell_function(kind, ours), cell_function(kind, theirs), inputs)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [1, 6])
def test_the_short_way_is_taken_and_differentiates_twice(kind, batch, monkeypatch):
    called = []
    kernels = kernels_of(torch.empty(0))
    kernel = kernels.recurrent_step
    monkeypatch.setattr(kernels, "recurrent_step", lambda *a: (called.append(1), kernel(*a))[1])
    cell = getattr(lmkern.nn, f"{kind}Cell")(4, 5, dtype=torch.float64)
    x = torch.randn(batch, 4, dtype=torch.float64, requires_grad=True)

    def run(v):
        out = cell(v)
        return out[0] if kind == "LSTM" else out

    assert torch.autograd.gradcheck(run, (x,)) and torch.autograd.gradgradcheck(run, (x,))
    assert called
    called.clear()
    with torch.no_grad():
        cell(x)
    assert called == [1]


def test_what_does_not_fit_takes_the_usual_way():
    w = torch.randn(20, 4), torch.randn(20, 5), torch.randn(20), torch.randn(20)
    x, h, c = torch.randn(2, 4), torch.randn(2, 5), torch.randn(2, 5)
    run = recurrent_step.plain_step
    assert run(0, x, h, c, *w) is not None
    assert run(0, x, h[:1], c, *w) is None
    assert run(0, x.long(), h, c, *w) is None
    assert run(0, x[:0], h[:0], c[:0], *w) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert run(0, x, h, c, *w) is None
    with pytest.raises(ValueError, match="lstm_cell: h0 must be"):
        lmkern.functional.lstm_cell(x, (h[:1], c), *w)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 3}, {"batch_first": True}], ids=str
)
@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("kind", CELLS)
def test_steps_equal_the_sequence(isa, kind, batch, options):
    module = getattr(lmkern.nn, kind)(5, 19, **options).eval()
    x = torch.randn(6, batch, 5)
    y, final = module(x.transpose(0, 1) if module.batch_first else x)
    y = y.transpose(0, 1) if module.batch_first else y
    state = module.stream(batch)
    steps = torch.stack([module.step(v, state).clone() for v in x])
    torch.testing.assert_close(steps, y.detach(), atol=1e-5, rtol=1e-5)
    h, c = final if kind == "LSTM" else (final, None)
    torch.testing.assert_close(torch.stack(state.h), h.detach(), atol=1e-5, rtol=1e-5)
    if c is not None:
        torch.testing.assert_close(torch.stack(state.c), c.detach(), atol=1e-5, rtol=1e-5)
    resumed = module.stream(batch, final)
    again = module.step(x[0], resumed).clone()
    torch.testing.assert_close(again, module.step(x[0], state), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"layer_norm": True}, {"peephole": True}, {"proj_size": 3}, {"zoneout": (0.2, 0.1)}],
    ids=str,
)
def test_steps_with_options(options):
    module = lmkern.nn.LSTM(5, 8, **options).eval()
    x = torch.randn(4, 2, 5)
    state = module.stream(2)
    steps = torch.stack([module.step(v, state).clone() for v in x])
    torch.testing.assert_close(steps, module(x)[0].detach(), atol=1e-5, rtol=1e-5)


def test_steps_allocate_nothing_and_see_changed_weights():
    module = lmkern.nn.LSTM(5, 8).eval()
    state = module.stream(1)
    x = torch.randn(1, 5)
    buffers = {module.step(x, state).data_ptr() for _ in range(6)}
    assert len(buffers) == 2
    state.reset()
    before = module.step(x, state).clone()
    module.weight_ih_l0.data.mul_(2)
    state.reset()
    after = module.step(x, state).clone()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, module(x[None])[0][0].detach(), atol=1e-6, rtol=1e-6)


def test_reset_of_some_rows():
    module = lmkern.nn.GRU(5, 8).eval()
    state = module.stream(3)
    x = torch.randn(3, 5)
    first = module.step(x, state).clone()
    module.step(x, state)
    state.reset(torch.tensor([True, False, True]))
    third = module.step(x, state)
    assert torch.equal(third[0], first[0]) and torch.equal(third[2], first[2])
    assert not torch.equal(third[1], first[1])


def test_bad_streams():
    module = lmkern.nn.LSTM(5, 8, num_layers=2)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        module.stream(0)
    with pytest.raises(ValueError, match="hx must have 2 layers, got 1"):
        module.stream(1, (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)))
    with pytest.raises(ValueError, match="bidirectional must be False"):
        lmkern.nn.GRU(5, 8, bidirectional=True).stream()
    state = module.stream(1)
    for x, error, match in (
        (torch.zeros(5), ValueError, r"LSTM: x must be \[B, I\] = \[1, 5\], got \[5\]"),
        (torch.zeros(1, 4), ValueError, r"x must be \[B, I\] = \[1, 5\], got \[1, 4\]"),
        (torch.zeros(2, 5), ValueError, r"x must be \[B, I\] = \[1, 5\], got \[2, 5\]"),
        (torch.zeros(1, 5).double(), TypeError, "x must be torch.float32, got torch.float64"),
        (None, TypeError, "x must be a Tensor, got NoneType"),
    ):
        with pytest.raises(error, match=match):
            module.step(x, state)
    with pytest.raises(TypeError, match="state must be a StreamState, got NoneType"):
        module.step(torch.zeros(1, 5), None)
    with pytest.raises(ValueError, match="call eval"):
        noisy = lmkern.nn.LSTM(5, 8, weight_drop=0.5)
        noisy.step(torch.zeros(1, 5), noisy.stream(1))


def test_a_stream_that_goes_on_from_a_prompt_is_outside_of_its_graph():
    module = lmkern.nn.LSTM(5, 7)
    _, hx = module(torch.randn(3, 2, 5))
    state = module.stream(2)
    state.set(hx)
    for _ in range(3):
        assert not module.step(torch.randn(2, 5), state).requires_grad
    assert not any(c.requires_grad for c in state.c)


def test_streams_of_strided_input_and_parametrized_weights():
    module = lmkern.nn.GRU(5, 7, batch_first=True).eval()
    x = torch.randn(3, 4, 5)
    state = module.stream(3)
    steps = torch.stack([module.step(x[:, t], state).clone() for t in range(4)], 1)
    torch.testing.assert_close(steps, module(x)[0].detach())
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    state = module.stream(3)
    module.step(x[:, 0], state)
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(0.5)
    state.reset()
    steps = torch.stack([module.step(x[:, t], state).clone() for t in range(4)], 1)
    torch.testing.assert_close(steps, module(x)[0].detach())
    with pytest.raises(ValueError, match="state must come from this layer's stream"):
        lmkern.nn.GRU(5, 7).eval().step(x[:, 0], state)


def test_what_others_raise_passes_through():
    cell = lmkern.nn.LSTMCell(4, 5)

    def refuse(tensor):
        raise RuntimeError("no")

    hooks = torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor)
    with pytest.raises(RuntimeError, match="no"), hooks:
        cell(torch.randn(1, 4))


@pytest.mark.parametrize("batch", [2, 8])
def test_biases_are_checked_at_any_batch(batch):
    x, w = torch.randn(batch, 4), (torch.randn(20, 4), torch.randn(20, 5))
    for b_ih in (torch.randn(1), torch.randn(batch, 20)):
        with pytest.raises(ValueError, match="b_ih must be"):
            lmkern.functional.lstm_cell(x, None, *w, b_ih, torch.randn(20))
    with pytest.raises(ValueError, match="given together"):
        lmkern.functional.lstm_cell(x, None, *w, torch.randn(20), None)


def test_strided_biases_of_a_large_layer():
    x, w_ih, w_hh = torch.randn(8, 16, 128), torch.randn(256, 128) / 11, torch.randn(256, 64) / 8
    b = torch.randn(256, 2)
    ours = lmkern.functional.lstm(x, w_ih, w_hh, b[:, 0], b[:, 1])[0]
    theirs = lmkern.functional.lstm(x, w_ih, w_hh, b[:, 0].clone(), b[:, 1].clone())[0]
    assert torch.equal(ours, theirs)
