"""lmkern.nn.{RNN,LSTM,GRU} and their cells against torch.nn's: what they compute and what they refuse.

How they are built, copied, changed and trained: test_recurrent_modules.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import lmkern
from recurrent_helpers import CONFIGS, LAYERS, NN_CELLS, assert_same, leaves, pair, state_for

# ---- call forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
@pytest.mark.parametrize(("kind", "options"), CONFIGS, ids=str)
def test_layer_equals_torch(kind, options, unbatched, state):
    ours, theirs = pair(kind, 5, 7, **options)
    dtype = options.get("dtype", torch.float32)
    x = torch.randn(*((6, 5) if unbatched else (6, 4, 5)), dtype=dtype)
    batch = () if unbatched else (6 if options.get("batch_first") else 4,)
    args = (x, state_for(ours, batch)) if state else (x,)
    assert_same(ours, theirs, *args)


@pytest.mark.parametrize("state", [False, True], ids=["", "hx"])
@pytest.mark.parametrize(
    "lengths", [[6, 4, 4, 1], [4, 1, 6, 4], [3, 3, 3, 3], [1, 1, 1, 1]], ids=str
)
@pytest.mark.parametrize(("kind", "options"), CONFIGS, ids=str)
def test_packed_sequence(kind, options, lengths, state):
    ours, theirs = pair(kind, 5, 7, **options)
    x = torch.randn(4, 6, 5, dtype=options.get("dtype", torch.float32))
    is_sorted = lengths == sorted(lengths, reverse=True)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted)
    args = (packed, state_for(ours, (4,))) if state else (packed,)
    assert_same(ours, theirs, *args)
    output = ours(*args)[0]
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    for a, b in zip(output[2:], packed[2:], strict=True):
        assert a is b


@pytest.mark.parametrize("kind", LAYERS)
def test_packing_is_the_same_as_rows_one_by_one(kind):
    ours, _ = pair(kind, 5, 7, bidirectional=True)
    rows = [torch.randn(n, 5) for n in (2, 5, 3)]
    output, state = ours(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output)
    for b, row in enumerate(rows):
        y, own = ours(row)
        torch.testing.assert_close(padded[: lengths[b], b], y, atol=1e-5, rtol=1e-5)
        for s, o in zip(leaves(state), leaves(own), strict=True):
            torch.testing.assert_close(s[:, b], o, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
@pytest.mark.parametrize("state", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", NN_CELLS)
def test_cell_equals_torch(kind, options, state, unbatched):
    ours, theirs = pair(kind, 5, 7, **options)
    batch = () if unbatched else (4,)
    h = torch.randn(*batch, 7)
    hx = (h, torch.randn(*batch, 7)) if kind == "LSTMCell" else h
    args = (torch.randn(*batch, 5), *((hx,) if state else ()))
    assert_same(ours, theirs, *args)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_cell_nonlinearity(nonlinearity):
    ours, theirs = pair("RNNCell", 5, 7, nonlinearity=nonlinearity)
    assert_same(ours, theirs, torch.randn(3, 5), torch.randn(3, 7))


def test_sigmoid_elman():
    """h = σ(W x + U h + b), which torch does not have."""
    ours = lmkern.nn.RNN(5, 7, nonlinearity="sigmoid")
    cell = lmkern.nn.RNNCell(5, 7, nonlinearity="sigmoid")
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in ours.state_dict().items()})
    assert "sigmoid" in repr(ours) and "sigmoid" in repr(cell)
    x, h = torch.randn(4, 2, 5), torch.zeros(2, 7)
    for t in range(4):
        expected = torch.sigmoid(
            x[t] @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh
        )
        h = cell(x[t], h)
        torch.testing.assert_close(h, expected)
        torch.testing.assert_close(ours(x)[0][t], expected)


@pytest.mark.parametrize(("layer", "cell"), list(zip(LAYERS, NN_CELLS, strict=True)))
def test_layer_is_its_cell_over_time(layer, cell):
    ours, _ = pair(layer, 5, 7)
    step = getattr(lmkern.nn, cell)(5, 7)
    step.load_state_dict({k.removesuffix("_l0"): v for k, v in ours.state_dict().items()})
    x, state = torch.randn(6, 3, 5), None
    output, final = ours(x)
    for t in range(6):
        state = step(x[t], state)
        h = state[0] if layer == "LSTM" else state
        torch.testing.assert_close(output[t], h, atol=1e-5, rtol=1e-5)
    for a, b in zip(leaves(final), leaves(state), strict=True):
        torch.testing.assert_close(a[0], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_step_depends_on_a_later_one(kind):
    ours, _ = pair(kind, 5, 7, num_layers=2)
    x = torch.randn(6, 2, 5)
    changed = x.clone()
    changed[4:] += 1
    a, b = ours(x)[0], ours(changed)[0]
    assert torch.equal(a[:4], b[:4]) and not torch.equal(a[4:], b[4:])


@pytest.mark.parametrize("kind", LAYERS)
def test_state_carried_over_a_cut_sequence(kind):
    ours, _ = pair(kind, 5, 7, num_layers=2)
    x = torch.randn(7, 2, 5)
    whole, final = ours(x)
    first, state = ours(x[:3])
    second, state = ours(x[3:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, final, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("strided", ["transposed", "stepped", "expanded"])
def test_input_and_state_without_contiguous_memory(kind, strided):
    ours, theirs = pair(kind, 5, 7)
    x = {
        "transposed": torch.randn(4, 6, 5).transpose(0, 1),
        "stepped": torch.randn(6, 4, 10)[..., ::2],
        "expanded": torch.randn(6, 1, 5).expand(6, 4, 5),
    }[strided]
    hx = state_for(ours, (4,))
    hx = tuple(h.mT.contiguous().mT for h in hx) if kind == "LSTM" else hx.mT.contiguous().mT
    torch.testing.assert_close(ours(x, hx), theirs(x, hx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_large_input_does_not_overflow(kind):
    ours, theirs = pair(kind, 3, 4)
    x = torch.full((2, 1, 3), 1e4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert all(t.isfinite().all() for t in leaves(ours(x)))


@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batch(kind):
    ours, _ = pair(kind, 3, 4)
    y, state = ours(torch.randn(5, 0, 3))
    assert y.shape == (5, 0, 4) and all(s.shape == (1, 0, 4) for s in leaves(state))
    y.sum().backward()
    assert (ours.weight_hh_l0.grad == 0).all()


@pytest.mark.parametrize("kind", NN_CELLS)
def test_cell_of_hidden_size_zero(kind):
    ours = getattr(lmkern.nn, kind)(5, 0)
    hx = torch.randn(3, 0)
    outputs = ours(torch.randn(3, 5), (hx, hx) if kind == "LSTMCell" else hx)
    assert all(o.shape == (3, 0) for o in leaves(outputs))


# ---- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_torchs_numbers(kind, packed):
    """Between the layers, only in training, and from the same seed the very same values as torch."""
    ours, theirs = pair(kind, 5, 7, num_layers=3, dropout=0.4, bidirectional=True)
    x = torch.randn(6, 4, 5)
    x = pack_padded_sequence(x, [6, 5, 2, 1]) if packed else x
    results = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        results.append(module(x))
    for a, b in zip(leaves(results[0]), leaves(results[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.manual_seed(8)
    assert not torch.equal(leaves(ours(x))[0], leaves(results[0])[0])
    assert torch.equal(leaves(ours.eval()(x))[0], leaves(ours(x))[0])
    assert_same(ours, theirs.eval(), x)


@pytest.mark.parametrize("p", [0, 0.276, 0.5, 1])
def test_dropout_rate(p):
    """An RNN that copies: layer 1 sees what dropout leaves of layer 0, so the ones can be counted."""
    module = lmkern.nn.RNN(10, 1000, 2, bias=False, dropout=p, nonlinearity="relu")
    with torch.no_grad():
        module.weight_ih_l0.fill_(1)
        module.weight_hh_l0.fill_(0)
        module.weight_ih_l1.copy_(torch.eye(1000))
        module.weight_hh_l1.fill_(0)
    output, hidden = module(torch.ones(1, 1, 10))
    kept = output.ne(0)
    assert abs(kept.double().mean().item() - (1 - p)) <= 0.06
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 10 / (1 - p or 1)))
    assert (hidden[0] == 10).all() and torch.equal(hidden[1], output[0])
    assert (module.eval()(torch.ones(1, 1, 10))[0] == 10).all()


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(6, 2, 4), ValueError, r"input must have 5 features \(input_size\), got \[6, 2, 4\]"),
        (torch.zeros(5), ValueError, "input must be 2-D or 3-D"),
        (torch.zeros(1, 6, 2, 5), ValueError, "input must be 2-D or 3-D"),
        (torch.zeros(0, 2, 5), ValueError, "at least one time step"),
        (torch.zeros(6, 2, 5, dtype=torch.float64), ValueError, "input must be torch.float32 like the parameters"),
        ("text", TypeError, "input must be a Tensor or PackedSequence, got str"),
        (torch.zeros(6, 2, 5, device="meta"), ValueError, "must be on"),
        (pack_sequence([torch.zeros(3, 4)]), ValueError, "input must have 5 features"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_layer_input(kind, x, error, match):
    with pytest.raises(error, match=match) as caught:
        getattr(lmkern.nn, kind)(5, 7)(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize(
    "shape", [(1, 2, 7), (2, 3, 7), (2, 2, 8), (2, 7), (2, 2, 1, 7)], ids=str
)  # right: (2, 2, 7)
def test_bad_layer_state(kind, shape, packed):
    ours, theirs = pair(kind, 5, 7, bidirectional=True)
    x = torch.zeros(6, 2, 5)
    x = pack_padded_sequence(x, [6, 3]) if packed else x
    good, bad = torch.zeros(2, 2, 7), torch.zeros(shape)
    for hx in [(bad, good), (good, bad)] if kind == "LSTM" else [bad]:
        if not packed:  # there torch checks nothing and crashes
            with pytest.raises((RuntimeError, IndexError)):
                theirs(x, hx)
        with pytest.raises(ValueError, match=r"must be \[2, 2, 7\], got"):
            ours(x, hx)


@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched_input_wants_an_unbatched_state(kind):
    h = torch.zeros(1, 1, 7)
    with pytest.raises(ValueError, match=r"must be \[1, 7\], got \[1, 1, 7\]"):
        getattr(lmkern.nn, kind)(5, 7)(torch.zeros(6, 5), (h, h) if kind == "LSTM" else h)


def test_lstm_state_is_a_pair():
    for hx in (torch.zeros(1, 2, 7), (torch.zeros(1, 2, 7),)):
        with pytest.raises(TypeError, match="hx must be a pair"):
            lmkern.nn.LSTM(5, 7)(torch.zeros(6, 2, 5), hx)
    with pytest.raises(TypeError, match="hx must be a pair"):
        lmkern.nn.LSTMCell(5, 7)(torch.zeros(2, 5), torch.zeros(2, 7))


@pytest.mark.parametrize(
    ("x", "h", "match"),
    [
        (torch.zeros(3, 6), torch.zeros(3, 7), r"w_ih must be .* = \[\d+, 6\], got \[\d+, 5\]"),
        (torch.zeros(3, 5), torch.zeros(3, 8), r"h0 must be \[B, H\] = \[3, 7\], got \[3, 8\]"),
        (torch.zeros(3, 5), torch.zeros(2, 7), r"h0 must be \[B, H\] = \[3, 7\], got \[2, 7\]"),
        (torch.zeros(3, 5), torch.zeros(7), r"h0 must be"),
        (torch.zeros(5), torch.zeros(1, 7), r"hx must be \[H\] for an input \[I\], got \[1, 7\]"),
        (torch.zeros(1, 3, 5), torch.zeros(3, 7), r"input must be \[B, I\] or \[I\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", NN_CELLS)
def test_bad_cell_input(kind, x, h, match):
    ours, theirs = pair(kind, 5, 7)
    hx = (h, h) if kind == "LSTMCell" else h
    with pytest.raises((RuntimeError, ValueError)):
        theirs(x, hx)
    with pytest.raises(ValueError, match=match):
        ours(x, hx)


@pytest.mark.parametrize("kind", NN_CELLS)
def test_bad_cell_arguments(kind):
    with pytest.raises(TypeError, match="input must be a Tensor, got list"):
        getattr(lmkern.nn, kind)(5, 7)([1.0])
    with pytest.raises(ValueError, match="hidden_size must be at least 0"):
        getattr(lmkern.nn, kind)(5, -1)
    with pytest.raises(TypeError, match="float64, got"):
        getattr(lmkern.nn, kind)(5, 7)(torch.zeros(2, 5, dtype=torch.float64))
