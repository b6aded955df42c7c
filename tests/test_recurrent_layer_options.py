"""Options of lmkern.nn's recurrent layers and cells beyond torch's: what they hand to the functions.

What an option computes, as a function: test_recurrent_options.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lmkern
from lmkern.functional import gru, lstm, rnn
from recurrent_helpers import LAYERS

FUNCTIONS = {"RNN": rnn, "LSTM": lstm, "GRU": gru}


def make(kind, *args, **options):
    torch.manual_seed(1)
    return getattr(lmkern.nn, kind)(*args, **options)


def arguments(module, suffix="_l0"):
    """A layer's parameters as arguments of its function."""
    found = {k.removesuffix(suffix): v for k, v in module.named_parameters() if k.endswith(suffix)}
    rename = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    rename["weight_hr"] = "w_hr"
    return {rename.get(k, k): v for k, v in found.items()}


def h_of(state):
    return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("kind", LAYERS)
def test_extra_parameters(kind):
    """They come after torch's in each group, have no share in the random numbers of torch's, and load."""
    options = {"layer_norm": True} | ({"peephole": True} if kind == "LSTM" else {})
    module = make(kind, 5, 7, 2, bidirectional=True, **options)
    plain = make(kind, 5, 7, 2, bidirectional=True)
    names = list(module.state_dict())
    G = {"RNN": 1, "LSTM": 4, "GRU": 3}[kind]
    first = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "norm_ih_l0", "norm_hh_l0"]
    if kind == "LSTM":
        first += ["norm_cell_weight_l0", "norm_cell_bias_l0", "peephole_l0"]
        assert module.norm_cell_weight_l1.shape == module.norm_cell_bias_l1.shape == (7,)
        assert (module.norm_cell_weight_l1 == 1).all() and (module.norm_cell_bias_l1 == 0).all()
        assert module.peephole_l1_reverse.shape == (21,)
        assert 0 < module.peephole_l1_reverse.abs().max() < 7**-0.5
    assert names[: len(first)] == first
    assert module.norm_ih_l0.shape == module.norm_hh_l1_reverse.shape == (G * 7,)
    assert (module.norm_ih_l0 == 1).all()
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)
    result = module.load_state_dict(
        getattr(torch.nn, kind)(5, 7, 2, bidirectional=True).state_dict(), strict=False
    )
    assert all(k.startswith(("norm", "peephole")) for k in result.missing_keys)
    assert [len(group) for group in module.all_weights] == [len(first)] * 4
    assert "layer_norm=True" in repr(module)
    copy.deepcopy(module)(torch.randn(3, 2, 5))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [{"layer_norm": True}, {"layer_norm": True, "bias": False}, {"zoneout": 0.3}, {"recompute": True}, {"peephole": True}],
    ids=str,
)  # fmt: skip
def test_layer_hands_its_options_to_the_function(kind, options):
    if "peephole" in options and kind != "LSTM":
        with pytest.raises(TypeError, match="peephole"):
            make(kind, 5, 7, **options)
        return
    module = make(kind, 5, 7, 2, bidirectional=True, **options).eval()
    x = torch.randn(6, 4, 5)
    given = {"recompute": True} if "recompute" in options else {}
    given |= {"zoneout_h": 0.3} if "zoneout" in options else {}
    layer_in, states = x, []
    for layer in range(2):
        outputs = []
        for suffix, reverse in ((f"_l{layer}", False), (f"_l{layer}_reverse", True)):
            y, state = FUNCTIONS[kind](
                layer_in, **arguments(module, suffix), **given, reverse=reverse
            )
            outputs.append(y)
            states.append(h_of(state))
        layer_in = torch.cat(outputs, 2)
    output, state = module(x)
    assert torch.equal(output, layer_in) and torch.equal(h_of(state), torch.stack(states))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_equal_packing(kind, batch_first):
    module = make(kind, 5, 7, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(*((4, 6) if batch_first else (6, 4)), 5)
    lengths = [2, 6, 1, 4]
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    output, state = module(packed)
    expected = pad_packed_sequence(output, batch_first)[0]
    for form in (lengths, torch.tensor(lengths)):
        ours, final = module(x, lengths=form)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(final, state)
    with pytest.raises(ValueError, match="lengths must be None, a PackedSequence has its own"):
        module(packed, lengths=lengths)
    row = x[1] if batch_first else x[:, 1]
    torch.testing.assert_close(module(row, lengths=4)[0][:4], module(row[:4])[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_reset_mask_starts_anew(kind, batch_first):
    module = make(kind, 5, 7, 2, batch_first=batch_first)
    x = torch.randn(6, 2, 5)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = True

    def run(v, r):
        if not batch_first:
            return module(v, reset_mask=r)[0]
        return module(v.transpose(0, 1), reset_mask=r.transpose(0, 1))[0].transpose(0, 1)

    y = run(x, reset)
    plain = run(x, torch.zeros_like(reset))
    assert torch.equal(y[:, 1], plain[:, 1]) and torch.equal(y[:3], plain[:3])
    torch.testing.assert_close(y[3:, :1], run(x[3:, :1], torch.zeros(3, 1, dtype=torch.bool)))
    torch.testing.assert_close(module(x[:, 0], reset_mask=reset[:, 0])[0], y[:, 0])
    packed = pack_padded_sequence(x, [6, 4])
    mask = pack_padded_sequence(reset, [6, 4])
    for form in (mask, mask.data):
        out = pad_packed_sequence(module(packed, reset_mask=form)[0])[0]
        torch.testing.assert_close(out[:, 0], y[:, 0])
    with pytest.raises(ValueError, match=r"reset_mask must be \[T, B\] = \[6, 2\]"):
        run(x, reset[:5])


@pytest.mark.parametrize("form", ["", "batch_first", "unbatched", "packed", "lengths"])
def test_cell_states(form):
    """The cell state after t steps is the final one of the first t steps."""
    module = make("LSTM", 5, 7, 2, proj_size=3, batch_first=form == "batch_first")
    x = torch.randn(5, 3, 5)
    lengths = [5, 3, 2]
    if form == "packed":
        out = module(pack_padded_sequence(x, lengths), return_cell_states=True)
        assert torch.equal(out[2].batch_sizes, out[0].batch_sizes)
        cells = pad_packed_sequence(out[2])[0]
    elif form == "unbatched":
        cells = module(x[:, 0], return_cell_states=True)[2].unsqueeze(1)
        assert cells.shape == (5, 1, 7)
    elif form == "batch_first":
        cells = module(x.transpose(0, 1), return_cell_states=True)[2].transpose(0, 1)
    else:
        cells = module(x, lengths=lengths if form else None, return_cell_states=True)[2]
    module.batch_first = False
    for b in range(cells.shape[1]):
        count = lengths[b] if form in ("packed", "lengths") else 5
        for t in range(count):
            torch.testing.assert_close(cells[t, b], module(x[: t + 1, b])[1][1][-1])
        assert (cells[count:, b] == 0).all()


def test_cell_states_of_both_directions():
    module = make("LSTM", 5, 7, bidirectional=True)
    output, (_, c_n), cells = module(torch.randn(5, 3, 5), return_cell_states=True)
    assert cells.shape == (5, 3, 14) and output.shape == (5, 3, 14)
    assert torch.equal(cells[-1, :, :7], c_n[0]) and torch.equal(cells[0, :, 7:], c_n[1])


@pytest.mark.parametrize("kind", LAYERS)
def test_recurrent_dropout_is_one_mask_for_the_sequence(kind):
    module = make(kind, 5, 7, recurrent_dropout=0.4)
    x = torch.randn(6, 4, 5)
    torch.manual_seed(9)
    y, _ = module(x)
    torch.manual_seed(9)
    mask = F.dropout(torch.ones(4, 7), 0.4)
    assert 0 < (mask == 0).double().mean() < 1
    assert torch.equal(y, FUNCTIONS[kind](x, **arguments(module), h_mask=mask)[0])
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], FUNCTIONS[kind](x, **arguments(module))[0])
    all_of_it = make(kind, 5, 7, recurrent_dropout=1.0)
    torch.testing.assert_close(all_of_it(x)[0][:1], all_of_it(x[:1])[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_drop(kind):
    module = make(kind, 5, 7, weight_drop=0.4)
    x = torch.randn(6, 4, 5)
    torch.manual_seed(9)
    y, _ = module(x)
    torch.manual_seed(9)
    given = arguments(module)
    given["w_hh"] = F.dropout(given["w_hh"], 0.4)
    assert torch.equal(y, FUNCTIONS[kind](x, **given)[0])
    y.sum().backward()
    assert torch.equal(module.weight_hh_l0.grad == 0, given["w_hh"] == 0)
    assert torch.equal(module.eval()(x)[0], FUNCTIONS[kind](x, **arguments(module))[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_zoneout_keeps_values_in_training(kind, packed):
    module = make(kind, 5, 200, zoneout=0.3)
    x = torch.randn(6, 4, 5)
    y = module(pack_padded_sequence(x, [6] * 4) if packed else x)[0]
    y = pad_packed_sequence(y)[0] if packed else y
    kept = (y[1:] == y[:-1]).double().mean().item()
    assert abs(kept - 0.3) < 0.04
    assert (make(kind, 5, 7, zoneout=1.0)(x)[0] == 0).all()  # nothing but the zeros before
    assert torch.equal(
        module.eval()(x)[0], FUNCTIONS[kind](x, **arguments(module), zoneout_h=0.3)[0]
    )


def test_zoneout_pair():
    module = make("LSTM", 5, 200, zoneout=(0.0, 0.4))
    y, _, cells = module(torch.randn(6, 4, 5), return_cell_states=True)
    assert (y[1:] != y[:-1]).all()
    assert abs((cells[1:] == cells[:-1]).double().mean().item() - 0.4) < 0.04
    module = make("LSTM", 5, 7, zoneout=(0.2, 0.4)).eval()
    x = torch.randn(6, 4, 5)
    assert torch.equal(module(x)[0], lstm(x, **arguments(module), zoneout_h=0.2, zoneout_c=0.4)[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", ["", "unbatched", "packed"])
def test_hidden_sizes(kind, form):
    """Each layer as a layer of its own; states are tuples."""
    module = make(kind, 5, 7, hidden_sizes=[4, 9, 7], bidirectional=True)
    assert module.num_layers == 3 and "hidden_sizes=[4, 9, 7]" in repr(module)
    assert module.weight_hh_l1.abs().max() <= 1 / 3 < module.weight_hh_l0.abs().max() * 1.2
    lengths = [3, 6]
    batch = () if form == "unbatched" else (2,)
    x = torch.randn(6, *batch, 5)
    h0 = [torch.randn(*batch, n) for n in (4, 4, 9, 9, 7, 7)]
    hx = (h0, [torch.randn_like(h) for h in h0]) if kind == "LSTM" else h0
    given = pack_padded_sequence(x, lengths, enforce_sorted=False) if form == "packed" else x
    output, final = module(given, hx)
    value = given
    for layer, (below, size) in enumerate([(5, 4), (8, 9), (18, 7)]):
        single = getattr(torch.nn, kind)(below, size, bidirectional=True)
        single.load_state_dict(
            {k.replace(f"_l{layer}", "_l0"): v for k, v in module.state_dict().items() if f"_l{layer}" in k}
        )  # fmt: skip
        rows = slice(2 * layer, 2 * layer + 2)
        part = [torch.stack(s[rows]) for s in (hx if kind == "LSTM" else (hx,))]
        value, state = single(value, tuple(part) if kind == "LSTM" else part[0])
        for ours, theirs in zip(
            final if kind == "LSTM" else (final,),
            state if kind == "LSTM" else (state,),
            strict=True,
        ):
            assert isinstance(ours, tuple)
            torch.testing.assert_close(torch.stack(ours[rows]), theirs, atol=1e-5, rtol=1e-5)
    if form == "packed":
        output, value = output.data, value.data
    torch.testing.assert_close(output, value, atol=1e-5, rtol=1e-5)
    module(given, final)  # what comes out goes in
    with pytest.raises(TypeError, match="must be a list of 6 tensors with hidden_sizes"):
        module(given, (h0[0], h0[0]) if kind == "LSTM" else h0[0])
    bad = [*h0[:3], h0[0], *h0[4:]]
    with pytest.raises(ValueError, match=r"\[3\] must be \[.*9\], got \[.*4\]"):
        module(given, (bad, bad) if kind == "LSTM" else bad)


@pytest.mark.parametrize(
    ("kind", "options", "error", "match"),
    [
        ("LSTM", {"hidden_sizes": [4, 8]}, ValueError, r"hidden_sizes must end in hidden_size = 7, got \[4, 8\]"),
        ("GRU", {"hidden_sizes": [4, 7], "num_layers": 3}, ValueError, "hidden_sizes must have num_layers = 3 values"),
        ("RNN", {"hidden_sizes": []}, ValueError, "hidden_sizes must be positive integers"),
        ("RNN", {"hidden_sizes": [0, 7]}, ValueError, "hidden_sizes must be positive integers"),
        ("LSTM", {"hidden_sizes": [4, 7], "proj_size": 3}, ValueError, "hidden_sizes and proj_size exclude each other"),
        ("GRU", {"zoneout": (0.1, 0.1)}, ValueError, r"zoneout must be a rate, got \(0.1, 0.1\)"),
        ("LSTM", {"zoneout": (0.1,)}, ValueError, "zoneout must be a rate or a pair of rates"),
        ("LSTM", {"zoneout": (0.1, 2)}, ValueError, r"zoneout\[1\] must be a probability"),
        ("RNN", {"zoneout": -1}, ValueError, "zoneout must be a probability"),
        ("GRU", {"recurrent_dropout": 1.1}, ValueError, "recurrent_dropout must be a probability"),
        ("LSTM", {"weight_drop": "x"}, ValueError, "weight_drop must be a probability"),
        ("GRU", {"peephole": True}, TypeError, "peephole"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense(kind, options, error, match):
    with pytest.raises(error, match=match):
        getattr(lmkern.nn, kind)(5, 7, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_everything_at_once_trains(kind):
    """All options of a layer together, packed and padded: finite gradients for every parameter."""
    options = {"layer_norm": True, "zoneout": 0.1, "recurrent_dropout": 0.2, "weight_drop": 0.2}
    options |= {"recompute": True, "hidden_sizes": [6, 7], "dropout": 0.2, "bidirectional": True}
    options |= {"peephole": True, "zoneout": (0.1, 0.2)} if kind == "LSTM" else {}
    module = make(kind, 5, 7, **options)
    x = torch.randn(6, 4, 5)
    reset = torch.rand(6, 4) < 0.3
    for inputs in (
        {"input": x, "lengths": [6, 2, 5, 1], "reset_mask": reset},
        {"input": pack_padded_sequence(x, [6, 3, 3, 1]), "reset_mask": pack_padded_sequence(reset, [6, 3, 3, 1])},
    ):  # fmt: skip
        output, state = module(**inputs)
        y = output if isinstance(output, torch.Tensor) else output.data
        (y.sum() + h_of(state)[0].sum()).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        module.zero_grad()


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_fullgraph_with_options(kind):
    module = make(kind, 5, 7, layer_norm=True, recurrent_dropout=0.5, zoneout=0.2).eval()
    x = torch.randn(4, 2, 5)
    given = {"lengths": torch.tensor([4, 2]), "reset_mask": torch.rand(4, 2) < 0.5}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **given), module(x, **given))


# ---- the cells ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("option", ["layer_norm", "peephole"])
def test_cell_options_equal_the_layers(kind, option):
    if option == "peephole" and kind != "LSTM":
        with pytest.raises(TypeError, match="peephole"):
            make(kind + "Cell", 5, 7, peephole=True)
        return
    layer = make(kind, 5, 7, **{option: True})
    cell = make(kind + "Cell", 5, 7, **{option: True})
    ours = {k.removesuffix("_l0"): v for k, v in layer.state_dict().items()}
    assert list(cell.state_dict()) == list(ours)
    assert all(torch.equal(v, ours[k]) for k, v in cell.state_dict().items())
    assert f"{option}=True" in repr(cell)
    for p in cell.parameters():  # away from gains of one
        p.data.add_(0.1)
    layer.load_state_dict({k + "_l0": v for k, v in cell.state_dict().items()})
    x = torch.randn(3, 2, 5)
    state = None
    for t in range(3):
        state = cell(x[t], state)
        torch.testing.assert_close(layer(x)[0][t], h_of(state))
    single = cell(x[0, 0])
    torch.testing.assert_close(h_of(single), layer(x)[0][0, 0])


def test_lengths_cost_no_gradient_where_nothing_ran():
    """A row of length 0 gives its state back, with gradient 1."""
    module = make("GRU", 5, 7)
    h0 = torch.randn(1, 2, 7, requires_grad=True)
    y, h_n = module(torch.randn(4, 2, 5), h0, lengths=[0, 4])
    assert torch.equal(h_n[:, 0], h0[:, 0]) and (y[:, 0] == 0).all()
    (grad,) = torch.autograd.grad(h_n[:, 0].sum(), h0)
    assert (grad[:, 0] == 1).all() and (grad[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("kind", "recompute", "values"),
    [("LSTM", False, 6), ("LSTM", True, 2), ("GRU", False, 5), ("GRU", True, 1), ("RNN", False, 2), ("RNN", True, 1)],
)  # fmt: skip
def test_memory_that_the_documentation_states(kind, recompute, values):
    """Saved values for each unit and step, the output among them."""
    T, B, H = 60, 8, 64  # larger than any weight
    module = getattr(lmkern.nn, kind)(16, H, recompute=recompute)
    seen: dict[int, int] = {}

    def keep(tensor):
        if tensor.numel() >= T * B * H:
            seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.randn(T, B, 16))
    assert sum(seen.values()) == values * T * B * H
