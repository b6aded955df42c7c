"""lmkern.nn.{RNN,LSTM,GRU} and their cells as modules, against torch.nn's: built, copied, changed, trained."""

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

import lmkern
from recurrent_helpers import CONFIGS, LAYERS, NN_CELLS, assert_same, leaves, pair

# ---- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS + NN_CELLS)
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


@pytest.mark.parametrize("kind", NN_CELLS)
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


@pytest.mark.parametrize("kind", NN_CELLS)
def test_cell_copy_pickle(kind):
    ours, _ = pair(kind, 5, 7)
    x = torch.randn(2, 5)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(
            torch.equal(a, b) for a, b in zip(leaves(other(x)), leaves(ours(x)), strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS + NN_CELLS)
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


@pytest.mark.parametrize("kind", LAYERS + NN_CELLS)
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


@pytest.mark.parametrize("kind", LAYERS + NN_CELLS)
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


@pytest.mark.parametrize("kind", NN_CELLS)
def test_cell_compile_fullgraph(kind):
    ours, _ = pair(kind, 5, 7)
    x = torch.randn(2, 5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(leaves(compiled(x)), leaves(ours(x)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", LAYERS + NN_CELLS)
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
