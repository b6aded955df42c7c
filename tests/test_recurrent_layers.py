"""lmkern.nn.{RNN,LSTM,GRU} and their cells against torch.nn's: what torch has, exactly as torch has it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import typing
import warnings

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import lmkern

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
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


# ---- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_signature_is_torchs(kind):
    """torch's layers take (*args, **kwargs); their signature is the first overload of __init__."""
    theirs = getattr(torch.nn, kind).__init__
    overloads = typing.get_overloads(theirs) if hasattr(typing, "get_overloads") else []
    if kind in LAYERS and not overloads:
        pytest.skip("needs Python 3.11 to see overloads")
    expected = list(inspect.signature((overloads or [theirs])[0]).parameters.values())[1:]
    actual = list(inspect.signature(getattr(lmkern.nn, kind)).parameters.values())
    shared = [(p.name, p.default, p.kind) for p in actual[: len(expected)]]
    assert shared == [(p.name, p.default, p.kind) for p in expected]
    assert all(p.kind is p.KEYWORD_ONLY for p in actual[len(expected) :])
    forward = inspect.signature(getattr(lmkern.nn, kind).forward).parameters
    assert [n for n, p in forward.items() if p.kind is not p.KEYWORD_ONLY] == [
        "self",
        "input",
        "hx",
    ]


def test_rnn_takes_the_nonlinearity_by_position_too():
    ours, theirs = pair("RNN", 5, 7, 1, "relu", False)
    assert ours.nonlinearity == "relu" and ours.mode == theirs.mode == "RNN_RELU"
    assert not ours.bias
    assert_same(ours, theirs, torch.randn(4, 2, 5))


@pytest.mark.parametrize(("kind", "options"), CONFIGS, ids=str)
def test_same_parameters_as_torch(kind, options):
    ours, theirs = pair(kind, 5, 7, **options)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for x, y in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    assert ours.all_weights[0][0] is ours.weight_ih_l0
    for module in (ours, theirs):  # again, from a later state of the generator
        torch.manual_seed(4)
        module.reset_parameters()
    assert all(torch.equal(p, theirs.state_dict()[k]) for k, p in ours.state_dict().items())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.float64}], ids=str)
def test_cell_has_the_same_parameters_as_torch(kind, options):
    ours, theirs = pair(kind, 5, 7, **options)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert repr(ours) == repr(theirs)
    assert ("bias_ih" in ours._parameters) and (ours.bias_ih is None) == (theirs.bias_ih is None)


def test_repr_of_nonlinearity():
    for nonlinearity in ("tanh", "relu"):
        ours, theirs = pair("RNNCell", 5, 7, nonlinearity=nonlinearity)
        assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden_size": 0}, ValueError),
        ({"input_size": 0}, ValueError),
        ({"num_layers": 0}, ValueError),
        ({"input_size": 2.5}, TypeError),
        ({"hidden_size": "7"}, TypeError),
        ({"bias": 1}, TypeError),
        ({"batch_first": "yes"}, TypeError),
        ({"dropout": 1.5}, ValueError),
        ({"dropout": -0.1}, ValueError),
        ({"dropout": True}, ValueError),
        ({"dropout": "a"}, ValueError),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", LAYERS)
def test_constructor_refuses_what_torch_refuses(kind, change, error):
    kwargs = {"input_size": 5, "hidden_size": 7, "num_layers": 2, **change}
    with pytest.raises((TypeError, ValueError)):
        getattr(torch.nn, kind)(**kwargs)
    with pytest.raises(error, match=f"^{kind}: {next(iter(change))} must be") as caught:
        getattr(lmkern.nn, kind)(**kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("proj_size", [-1, 7, 8])
def test_projection_is_refused_like_torchs(proj_size):
    for module in (torch.nn, lmkern.nn):
        with pytest.raises(ValueError, match="proj_size"):
            module.LSTM(5, 7, proj_size=proj_size)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_projection_is_for_lstm_only(kind):
    with pytest.raises(TypeError, match="proj_size"):
        getattr(lmkern.nn, kind)(5, 7, proj_size=3)


def test_unknown_nonlinearity():
    for kind in ("RNN", "RNNCell"):
        with pytest.raises(ValueError, match=f"{kind}: nonlinearity must be .*got 'garbage'"):
            getattr(lmkern.nn, kind)(5, 7, nonlinearity="garbage")


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_in_a_single_layer_warns(kind):
    for module in (torch.nn, lmkern.nn):
        with pytest.warns(UserWarning, match="dropout"):
            getattr(module, kind)(5, 7, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(lmkern.nn, kind)(5, 7, 2, dropout=0.5)


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
@pytest.mark.parametrize("kind", CELLS)
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


@pytest.mark.parametrize(("layer", "cell"), list(zip(LAYERS, CELLS, strict=True)))
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


@pytest.mark.parametrize("kind", CELLS)
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


# ---- modules as users treat them ------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_copy_pickle_save(kind):
    ours, _ = pair(kind, 5, 7, num_layers=2)
    x = torch.randn(6, 2, 5)
    expected = ours(x)[0]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert torch.equal(other(x)[0], expected)
        with torch.no_grad():
            other.weight_hh_l1.zero_()  # a copy shares nothing
        assert not torch.equal(other(x)[0], expected)
    assert torch.equal(ours(x)[0], expected)
    ours.flatten_parameters()
    torch.testing.assert_close(ours.double()(x.double())[0].float(), expected)


@pytest.mark.parametrize("kind", CELLS)
def test_cell_copy_pickle(kind):
    ours, _ = pair(kind, 5, 7)
    x = torch.randn(2, 5)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(
            torch.equal(a, b) for a, b in zip(leaves(other(x)), leaves(ours(x)), strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_half_precision(kind, dtype):
    ours, theirs = pair(kind, 8, 12)
    exact = copy.deepcopy(ours).double()
    for module in (ours, theirs):
        module.bfloat16() if dtype == torch.bfloat16 else module.half()
    x = torch.randn(*((6, 3) if kind in LAYERS else (3,)), 8).to(dtype)
    for a, e in zip(leaves(ours(x)), leaves(exact(x.double())), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e, atol=2e-2, rtol=2e-2)
    assert_same(ours, theirs, x, tol=2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_weights_replaced_after_construction(kind):
    """`.data` does not count up a tensor's version, a new Parameter has another address: see both."""
    ours, theirs = pair(kind, 5, 40)
    x = torch.randn(6, 2, 5) if kind in LAYERS else torch.randn(2, 5)
    suffix = "_l0" if kind in LAYERS else ""
    ours(x)
    for module in (ours, theirs):
        getattr(module, "weight_hh" + suffix).data.mul_(2)
    assert_same(ours, theirs, x)
    replacement = torch.randn_like(getattr(ours, "weight_ih" + suffix)) * 0.3
    for module in (ours, theirs):
        setattr(module, "weight_ih" + suffix, torch.nn.Parameter(replacement.clone()))
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_shared_between_layers(kind):
    ours, theirs = pair(kind, 7, 7, num_layers=2)
    for module in (ours, theirs):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{name}_l1", getattr(module, f"{name}_l0"))
    assert len(list(ours.parameters())) == 4
    assert_same(ours, theirs, torch.randn(5, 2, 7))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_parametrize(kind):
    class Double(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    ours, _ = pair(kind, 5, 7)
    expected = copy.deepcopy(ours)
    name = "weight_hh_l0" if kind in LAYERS else "weight_hh"
    with torch.no_grad():
        getattr(expected, name).mul_(2)
    parametrize.register_parametrization(ours, name, Double())
    x = torch.randn(6, 2, 5) if kind in LAYERS else torch.randn(2, 5)
    for a, b in zip(leaves(ours(x)), leaves(expected(x)), strict=True):
        torch.testing.assert_close(a, b)
    leaves(ours(x))[-1].sum().backward()
    leaves(expected(x))[-1].sum().backward()
    torch.testing.assert_close(
        ours.parametrizations[name].original.grad, 2 * getattr(expected, name).grad
    )
    ours.reset_parameters()
    parametrize.remove_parametrizations(ours, name)
    assert name in dict(ours.named_parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_norm(kind):
    ours, theirs = pair(kind, 5, 7)
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(
        ours(torch.ones(4, 2, 5)), theirs(torch.ones(4, 2, 5)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_functional_call_sees_the_given_weights(kind):
    ours, _ = pair(kind, 5, 7)
    x = torch.randn(4, 2, 5)
    zeros = {k: torch.zeros_like(v) for k, v in ours.named_parameters()}
    y = torch.func.functional_call(ours, zeros, (x,))[0]
    assert (y == 0).all() and not (ours(x)[0] == 0).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_ensemble_by_vmap_over_stacked_weights(kind):
    modules = [pair(kind, 5, 7)[0] for _ in range(3)]
    for module in modules:
        module.reset_parameters()
    params, _ = torch.func.stack_module_state(modules)
    x = torch.randn(4, 2, 5)
    run = torch.func.vmap(lambda p: torch.func.functional_call(modules[0], p, (x,))[0])
    y = run({k: v.detach() for k, v in params.items()})
    for row, module in zip(y, modules, strict=True):
        torch.testing.assert_close(row, module(x)[0], atol=1e-5, rtol=1e-5)
    batch = torch.randn(6, 4, 5)
    rows = torch.func.vmap(lambda v: modules[0](v)[0])(batch)  # unbatched calls over the batch
    torch.testing.assert_close(rows[2], modules[0](batch[2])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_training_a_step_equals_torch(kind):
    """Clipped gradients and an optimizer: the two stay together."""
    ours, theirs = pair(kind, 5, 7, num_layers=2)
    x = torch.randn(6, 3, 5)
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradgradcheck_of_the_layer(kind):
    ours, _ = pair(kind, 2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: ours(v)[0], (x,))


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_fullgraph_and_export(kind):
    ours, _ = pair(kind, 5, 7, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))
    exported = torch.export.export(ours.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), ours(x))


@pytest.mark.parametrize("kind", CELLS)
def test_cell_compile_fullgraph(kind):
    ours, _ = pair(kind, 5, 7)
    x = torch.randn(2, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(leaves(compiled(x)), leaves(ours(x)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_meta_device_and_autocast(kind):
    x = torch.randn(4, 2, 8) if kind in LAYERS else torch.randn(2, 8)
    meta = getattr(lmkern.nn, kind)(8, 7, device="meta")
    assert leaves(meta(x.to("meta")))[0].shape == (*x.shape[:-1], 7)
    ours, _ = pair(kind, 8, 7)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = leaves(ours(x))
    assert all(o.dtype == torch.bfloat16 for o in outputs)
    outputs[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(outputs[0].float(), leaves(ours(x))[0], atol=3e-2, rtol=3e-2)


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
@pytest.mark.parametrize("kind", CELLS)
def test_bad_cell_input(kind, x, h, match):
    ours, theirs = pair(kind, 5, 7)
    hx = (h, h) if kind == "LSTMCell" else h
    with pytest.raises((RuntimeError, ValueError)):
        theirs(x, hx)
    with pytest.raises(ValueError, match=match):
        ours(x, hx)


@pytest.mark.parametrize("kind", CELLS)
def test_bad_cell_arguments(kind):
    with pytest.raises(TypeError, match="input must be a Tensor, got list"):
        getattr(lmkern.nn, kind)(5, 7)([1.0])
    with pytest.raises(ValueError, match="hidden_size must be at least 0"):
        getattr(lmkern.nn, kind)(5, -1)
    with pytest.raises(TypeError, match="float64, got"):
        getattr(lmkern.nn, kind)(5, 7)(torch.zeros(2, 5, dtype=torch.float64))
