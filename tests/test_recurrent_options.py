"""What lmkern's recurrent functions have beyond torch's, against a loop over single rows and steps.

``slow`` states every option a second time, for one row of the batch after the other, on torch.nn's
own cells' formulas; it shares no line with lmkern.reference. Options of the layers and cells:
test_recurrent_layer_options.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lmkern
from lmkern.functional import gru, lstm, rnn
from recurrent_helpers import CELLS, GATES, call, weights

OPTIONS = [
    "lengths", "reset_mask", "layer_norm", "zoneout", "zoneout_rate", "h_mask", "recompute",
]  # fmt: skip
LSTM_OPTIONS = [*OPTIONS, "peephole", "w_hr", "cells"]
CASES = [(cell, o) for cell in CELLS for o in (LSTM_OPTIONS if cell == "lstm" else OPTIONS)]
T, B, I, H, P = 5, 4, 3, 4, 2


def norm(v, gain, bias):
    v = v - v.mean()
    v = v / torch.sqrt((v * v).mean() + 1e-5)
    return v * gain if bias is None else v * gain + bias


def blend(new, old, zone):
    """``zone``: a row of a mask, or a rate."""
    zone = zone.to(new.dtype) if isinstance(zone, torch.Tensor) else zone
    return zone * old + (1 - zone) * new


def slow_step(cell, x, h, c, p, mask, zone_h, zone_c):
    """One step of one row: vectors in, vectors out."""
    xs, hh = p["w_ih"] @ x, p["w_hh"] @ (h if mask is None else h * mask)
    xs = norm(xs, p["norm_ih"], p["b_ih"]) if "norm_ih" in p else xs + p["b_ih"]
    hh = norm(hh, p["norm_hh"], p["b_hh"]) if "norm_hh" in p else hh + p["b_hh"]
    if cell == "lstm":
        n = len(c)
        s = xs + hh
        peep = p.get("peephole", torch.zeros(3 * n, dtype=x.dtype))
        i = torch.sigmoid(s[:n] + peep[:n] * c)
        f = torch.sigmoid(s[n : 2 * n] + peep[n : 2 * n] * c)
        cell_new = f * c + i * torch.tanh(s[2 * n : 3 * n])
        o = torch.sigmoid(s[3 * n :] + peep[2 * n :] * cell_new)
        seen = cell_new
        if "norm_cell_weight" in p:
            seen = norm(cell_new, p["norm_cell_weight"], p["norm_cell_bias"])
        h_new = o * torch.tanh(seen)
        if "w_hr" in p:
            h_new = p["w_hr"] @ h_new
        c = blend(cell_new, c, zone_c)
    elif cell == "gru":
        n = len(h)
        r = torch.sigmoid(xs[:n] + hh[:n])
        z = torch.sigmoid(xs[n : 2 * n] + hh[n : 2 * n])
        new = torch.tanh(xs[2 * n :] + r * hh[2 * n :])
        h_new = new + z * (h - new)
    else:
        phi = {"rnn_tanh": torch.tanh, "rnn_relu": F.relu, "rnn_sigmoid": torch.sigmoid}[cell]
        h_new = phi(xs + hh)
    return blend(h_new, h, zone_h), c


def slow(cell, x, h0, c0, p, *, reverse=False, h_mask=None, zoneout_h=0.0, zoneout_c=0.0,
         reset_mask=None, lengths=None, **_):  # fmt: skip
    """y, h_n (, c_n, cells), for padded sequences."""
    steps, batch, _ = x.shape
    ys, cs, hs_n, cs_n = [], [], [], []
    for b in range(batch):
        h, c = h0[b], None if c0 is None else c0[b]
        length = steps if lengths is None else int(lengths[b])
        y = [torch.zeros_like(h)] * steps
        cells = [None if c is None else torch.zeros_like(c)] * steps
        order = list(range(length))
        for t in order[::-1] if reverse else order:
            if reset_mask is not None and bool(reset_mask[t, b]):
                h, c = torch.zeros_like(h), None if c is None else torch.zeros_like(c)
            zones = [z[t, b] if isinstance(z, torch.Tensor) else z for z in (zoneout_h, zoneout_c)]
            mask = None if h_mask is None else h_mask[b]
            h, c = slow_step(cell, x[t, b], h, c, p, mask, *zones)
            y[t], cells[t] = h, c
        ys.append(torch.stack(y))
        hs_n.append(h)
        if c is not None:
            cs.append(torch.stack(cells))
            cs_n.append(c)
    result = (torch.stack(ys, 1), torch.stack(hs_n))
    return (*result, torch.stack(cs_n), torch.stack(cs, 1)) if cs else result


def problem(cell, options, dtype=torch.float64, reverse=False):
    """Float tensors that take part (x, states, parameters, masks) and the other arguments."""
    hidden, features = H, P if "w_hr" in options else H
    x, w_ih, w_hh, b_ih, b_hh, *states = weights(cell, T, B, I, H, dtype)
    wide = GATES[cell] * H
    tensors = {"x": x, "w_ih": w_ih, "w_hh": w_hh[:, :features], "b_ih": b_ih, "b_hh": b_hh}
    tensors["h0"] = states[0][:, :features]
    if cell == "lstm":
        tensors["c0"] = states[1]
    if "w_hr" in options:
        tensors["w_hr"] = torch.randn(features, hidden, dtype=dtype)
    if "peephole" in options:
        tensors["peephole"] = torch.randn(3 * hidden, dtype=dtype)
    if "layer_norm" in options:
        tensors["norm_ih"] = 1 + 0.3 * torch.randn(wide, dtype=dtype)
        tensors["norm_hh"] = 1 + 0.3 * torch.randn(wide, dtype=dtype)
        if cell == "lstm":
            tensors["norm_cell_weight"] = 1 + 0.3 * torch.randn(hidden, dtype=dtype)
            tensors["norm_cell_bias"] = 0.3 * torch.randn(hidden, dtype=dtype)
    if "h_mask" in options:
        tensors["h_mask"] = F.dropout(torch.ones(B, features, dtype=dtype), 0.4)
    rest = {"reverse": reverse}
    if "zoneout" in options:
        rest["zoneout_h"] = torch.rand(T, B, features) < 0.4
        if cell == "lstm":
            rest["zoneout_c"] = torch.rand(T, B, hidden) < 0.4
    elif "zoneout_rate" in options:
        rest["zoneout_h"] = 0.3
        if cell == "lstm":
            rest["zoneout_c"] = 0.2
    if "reset_mask" in options:
        rest["reset_mask"] = torch.rand(T, B) < 0.3
    if "lengths" in options:
        rest["lengths"] = torch.tensor([3, 5, 0, 1])
    if "recompute" in options:
        rest["recompute"] = True
    if "cells" in options:
        rest["return_cell_states"] = True
    return tensors, rest


def run_ours(cell, tensors, rest):
    return call(cell, **tensors, **rest)


def run_slow(cell, tensors, rest):
    p = dict(tensors)
    x, h0, c0, mask = (p.pop(k, None) for k in ("x", "h0", "c0", "h_mask"))
    outputs = slow(cell, x, h0, c0, p, h_mask=mask, **rest)
    return outputs if rest.get("return_cell_states") else outputs[:3]


def values_and_gradients(run, tensors):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(2)
    parts = [(o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs]
    return outputs, dict(
        zip(leaves, torch.autograd.grad(sum(parts), list(leaves.values())), strict=True)
    )


def assert_equals_slow(cell, options, reverse=False):
    tensors, rest = problem(cell, options, reverse=reverse)
    ours, d_ours = values_and_gradients(lambda t: run_ours(cell, t, rest), tensors)
    exact, d_exact = values_and_gradients(lambda t: run_slow(cell, t, rest), tensors)
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    for name, grad in d_exact.items():
        torch.testing.assert_close(
            d_ours[name], grad, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize(("cell", "option"), CASES)
def test_option(cell, option, reverse):
    assert_equals_slow(cell, [option], reverse)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CELLS), st.sets(st.sampled_from(LSTM_OPTIONS)), st.booleans())
def test_options_combine(cell, options, reverse):
    torch.manual_seed(len(options))
    if cell != "lstm":
        options = options & set(OPTIONS)
    assert_equals_slow(cell, options, reverse)


@pytest.mark.parametrize(("cell", "option"), CASES)
def test_gradcheck(cell, option):
    tensors, rest = problem(cell, [option])
    args = [v.requires_grad_() for v in tensors.values()]

    def run(*values):
        return run_ours(cell, dict(zip(tensors, values, strict=True)), rest)

    assert torch.autograd.gradcheck(run, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, args, fast_mode=True, atol=1e-4)
    # One step of forward mode, against the reverse mode.
    x, others = args[0], args[1:]
    jvp = torch.func.jvp(lambda v: run(v, *others)[0].sum(0), (x,), (torch.ones_like(x),))[1]
    jacobian = torch.autograd.functional.jacobian(lambda v: run(v, *others)[0].sum(0), x)
    torch.testing.assert_close(jvp, jacobian.sum((2, 3, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "option"), CASES)
def test_lower_precision(cell, option, dtype):
    tensors, rest = problem(cell, [option])
    lower = {k: v.to(dtype) for k, v in tensors.items()}
    tol = 1e-5 if dtype == torch.float32 else 0.15 if dtype == torch.bfloat16 else 1e-2
    exact = {k: v.double() for k, v in lower.items()}
    for a, b in zip(run_ours(cell, lower, rest), run_slow(cell, exact, rest), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=tol, rtol=tol)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_packed_rows_with_all_options(cell, reverse):
    """The same rows as padded with lengths, as packed with batch_sizes: the same results."""
    options = ["layer_norm", "zoneout", "h_mask", "reset_mask"]
    options += ["peephole", "w_hr", "cells"] if cell == "lstm" else []
    tensors, rest = problem(cell, options, reverse=reverse)
    lengths = torch.tensor([5, 3, 3, 1])
    packed = dict(rest)
    for name in ("zoneout_h", "zoneout_c", "reset_mask"):
        if name in packed:
            packed[name] = pack_padded_sequence(packed[name], lengths).data
    batch_sizes = pack_padded_sequence(tensors["x"], lengths).batch_sizes

    def run_packed(t):
        rows = pack_padded_sequence(t["x"], lengths).data
        y, h, *others = call(cell, **{**t, "x": rows}, **packed, batch_sizes=batch_sizes)
        pad = [
            pad_packed_sequence(torch.nn.utils.rnn.PackedSequence(v, batch_sizes))[0]
            for v in (y, *others[1:])
        ]
        return (pad[0], h, *others[:1], *pad[1:])

    ours, d_ours = values_and_gradients(run_packed, tensors)
    exact, d_exact = values_and_gradients(
        lambda t: run_slow(cell, t, {**rest, "lengths": lengths}), tensors
    )
    torch.testing.assert_close(ours, tuple(exact), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(d_ours, d_exact, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norms", [False, True], ids=["", "layer_norm"])
def test_padding_is_never_read(cell, norms):
    """NaN in the padding reaches neither a result nor a gradient."""
    tensors, rest = problem(cell, ["lengths", "layer_norm"] if norms else ["lengths"])
    poisoned = dict(tensors, x=tensors["x"].clone())
    for b, length in enumerate(rest["lengths"].tolist()):
        poisoned["x"][length:, b] = torch.nan
    clean, d_clean = values_and_gradients(lambda t: run_ours(cell, t, rest), tensors)
    ours, d_ours = values_and_gradients(lambda t: run_ours(cell, t, rest), poisoned)
    torch.testing.assert_close(ours, clean)
    torch.testing.assert_close(d_ours, d_clean)
    assert (ours[0][3:, 0] == 0).all() and torch.equal(ours[1][2], tensors["h0"][2])


def test_vmap_over_the_batch_with_options():
    tensors, rest = problem("lstm", ["layer_norm", "peephole", "h_mask", "reset_mask", "lengths"])
    x = torch.stack([tensors["x"], tensors["x"] + 1])
    lengths = torch.stack([rest["lengths"], rest["lengths"].flip(0)])

    def run(v, n):
        return run_ours("lstm", {**tensors, "x": v}, {**rest, "lengths": n})[0]

    mapped = torch.func.vmap(run)(x, lengths)
    for i in range(2):
        torch.testing.assert_close(mapped[i], run(x[i], lengths[i]))


BAD = [
    (lstm, {"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths must be \[B\] = \[4\], got \[3\]"),
    (lstm, {"lengths": torch.tensor([1, 2, 3, 6])}, ValueError, "lengths must be between 0 and T = 5, got 1 to 6"),
    (gru, {"lengths": torch.tensor([1, 2, 3, -1])}, ValueError, "got -1 to 3"),
    (rnn, {"lengths": torch.tensor([1.0, 2, 3, 4])}, TypeError, "lengths must be int64, got float32"),
    (lstm, {"lengths": [1, 2, 3, 4]}, TypeError, "lengths must be a Tensor, got list"),
    (lstm, {"reset_mask": torch.zeros(4, 5, dtype=torch.bool)}, ValueError, r"reset_mask must be \[T, B\] = \[5, 4\]"),
    (gru, {"reset_mask": torch.zeros(5, 4)}, TypeError, "reset_mask must be bool, got float32"),
    (lstm, {"peephole": torch.zeros(8)}, ValueError, r"peephole must be \[3H\] = \[12\], got \[8\]"),
    (lstm, {"norm_hh": torch.zeros(4)}, ValueError, r"norm_hh must be \[4H\] = \[16\], got \[4\]"),
    (gru, {"norm_ih": torch.zeros(4)}, ValueError, r"norm_ih must be \[3H\] = \[12\], got \[4\]"),
    (lstm, {"norm_cell_weight": torch.zeros(4)}, ValueError, "norm_cell_weight and norm_cell_bias must be given together"),
    (lstm, {"norm_cell_bias": torch.zeros(4)}, ValueError, "must be given together"),
    (rnn, {"h_mask": torch.zeros(4, 5)}, ValueError, r"h_mask must be \[B, P\] = \[4, 4\], got \[4, 5\]"),
    (lstm, {"w_hr": torch.zeros(2, 4)}, ValueError, r"w_hh must be \[4H, P\] = \[16, 2\], got \[16, 4\]"),
    (lstm, {"w_hr": torch.zeros(4)}, ValueError, r"w_hr must be a Tensor \[P, H\]"),
    (lstm, {"zoneout_h": 1.5}, ValueError, r"zoneout_h must be a bool mask or a rate in \[0, 1\], got 1.5"),
    (gru, {"zoneout_h": "a"}, ValueError, "zoneout_h must be a bool mask or a rate"),
    (lstm, {"zoneout_c": torch.zeros(5, 4, 3, dtype=torch.bool)}, ValueError, r"zoneout_c must be \[T, B, H\] = \[5, 4, 4\]"),
    (rnn, {"zoneout_h": torch.zeros(5, 4, 4)}, TypeError, "zoneout_h must be bool"),
    (rnn, {"activation": "softsign"}, ValueError, r"activation must be one of \['tanh', 'relu', 'sigmoid'\]"),
    (lstm, {"batch_sizes": torch.tensor([4, 4])}, ValueError, r"input must be \[N, I\] with batch_sizes"),
    (lstm, {"batch_sizes": torch.tensor([4]), "lengths": torch.tensor([1] * 4)}, ValueError, "lengths must be None when batch_sizes is given"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "change", "error", "match"), BAD, ids=str)
def test_bad_option(device, function, change, error, match):
    if device == "cuda" and match in (
        "got -1 to 3",
        "lengths must be between 0 and T = 5, got 1 to 6",
    ):
        pytest.skip("lengths that are on a GPU are not read")
    cell = {lstm: "lstm", gru: "gru", rnn: "rnn_tanh"}[function]
    args = weights(cell, T, B, I, H)[:5]
    function(*args)
    with pytest.raises(error, match=f"^{function.__name__}: .*{match}") as caught:
        function(*args, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "error", "match"),
    [
        (torch.tensor([3, 4], device="cpu"), ValueError, "must not increase and sum to N = 7"),
        (torch.tensor([4, 2], device="cpu"), ValueError, "must not increase and sum to N = 7"),
        (torch.tensor([7, 0], device="cpu"), ValueError, "must not increase and sum to N = 7"),
        (torch.tensor([4.0, 3.0], device="cpu"), TypeError, "must be int64 on the cpu"),
        (torch.tensor(7, device="cpu"), ValueError, r"must be \[T\]"),
        ([4, 3], TypeError, "must be a Tensor, got list"),
    ],
    ids=str,
)
def test_bad_batch_sizes(sizes, error, match):
    x, *others = weights("gru", 7, 1, I, H)[:5]
    gru(x[:, 0], *others, batch_sizes=torch.tensor([4, 3], device="cpu"))
    with pytest.raises(error, match=f"gru: batch_sizes {match}"):
        gru(x[:, 0], *others, batch_sizes=sizes)


def test_lengths_are_checked_before_they_go_to_another_device():
    """There nobody looks at their values."""
    module = lmkern.nn.LSTM(I, H, device="meta")
    x = torch.empty(T, B, I, device="meta")
    module(x, lengths=[1, 2, 3, 5])
    with pytest.raises(
        ValueError, match=r"^LSTM: lengths must be between 0 and T = 5, got 1 to 6$"
    ):
        module(x, lengths=[1, 2, 3, 6])
