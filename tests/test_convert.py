"""lmkern.convert and lmkern.revert: the same objects, other kernels."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lmkern
from convert_helpers import B, H, I, T, all_types, is_ours
from lmkern._layer_kinds import KINDS

pytestmark = pytest.mark.cpu_only("expects every kind of layer to have a kernel")


def sequence(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(*shape),)


# torch's layer, its inputs
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "lstm": (lambda: nn.LSTM(I, H), sequence(T, B, I)),
    "lstm-full": (
        lambda: nn.LSTM(I, H, 2, False, True, 0.5, True, proj_size=4, dtype=torch.float64).eval(),
        lambda: (torch.randn(B, T, I, dtype=torch.float64),),
    ),
    "gru": (lambda: nn.GRU(I, H, 2, bidirectional=True), sequence(T, B, I)),
    "rnn": (lambda: nn.RNN(I, H), sequence(T, B, I)),
    "rnn-relu": (lambda: nn.RNN(I, H, nonlinearity="relu", dropout=0.0), sequence(T, B, I)),
    "lstm-cell": (lambda: nn.LSTMCell(I, H), sequence(B, I)),
    "gru-cell": (lambda: nn.GRUCell(I, H, bias=False), sequence(B, I)),
    "rnn-cell": (lambda: nn.RNNCell(I, H, nonlinearity="relu"), sequence(B, I)),
    "embedding": (
        lambda: nn.Embedding(I, H, padding_idx=-1),
        lambda: (torch.randint(I, (B, T)),),
    ),
    "embedding-freq": (
        lambda: nn.Embedding(I, H, scale_grad_by_freq=True),
        lambda: (torch.randint(I, (B, T)),),
    ),
    "embedding-bag": (
        lambda: nn.EmbeddingBag(I, H, mode="max", padding_idx=2),
        lambda: (torch.randint(I, (B, T)),),
    ),
    "layer-norm": (lambda: nn.LayerNorm((T, 8), 1e-3, bias=False), sequence(B, T, 8)),
    "rms-norm": (lambda: nn.RMSNorm(8, dtype=torch.float64), sequence(B, 8)),
    "linear": (lambda: nn.Linear(I, H, bias=False), sequence(B, I)),
    "dropout": (lambda: nn.Dropout(0.0), sequence(B, I)),
    "gelu": (lambda: nn.GELU("tanh"), sequence(B, I)),
    "silu": (lambda: nn.SiLU(), sequence(B, I)),
    "loss": (
        lambda: nn.CrossEntropyLoss(torch.rand(H), ignore_index=1, label_smoothing=0.1),
        lambda: (torch.randn(B, H, requires_grad=True), torch.tensor([0, 1, 2])),
    ),
    "adaptive-softmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(I, 12, [3, 6], 2.0, head_bias=True),
        lambda: (torch.randn(4, I), torch.tensor([0, 4, 11, 2])),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, add_bias_kv=True, batch_first=True),
        lambda: (torch.randn(B, T, 8), torch.randn(B, 4, 6), torch.randn(B, 4, 5)),
    ),
    "attention-plain": (
        lambda: nn.MultiheadAttention(8, 2, bias=False, add_zero_attn=True),
        lambda: (torch.randn(T, B, 8),) * 3,
    ),
    "encoder-layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 11, 0.0, "gelu", norm_first=True),
        sequence(T, B, 8),
    ),
    "decoder-layer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 11, 0.0, layer_norm_eps=1e-3, batch_first=True),
        lambda: (torch.randn(B, T, 8), torch.randn(B, 4, 8)),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 11, 0.0, bias=False), 2, nn.LayerNorm(8), False
        ),
        sequence(T, B, 8),
    ),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 11, 0.0), 2),
        lambda: (torch.randn(T, B, 8), torch.randn(4, B, 8)),
    ),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 2, 11, 0.0, batch_first=True),
        lambda: (torch.randn(B, T, 8), torch.randn(B, 4, 8)),
    ),
}


def make(case: str) -> tuple[nn.Module, tuple[Any, ...]]:
    layer, inputs = (f() for f in LAYERS[case])
    if not hasattr(lmkern.nn, type(layer).__name__):
        pytest.skip(f"lmkern.nn has no {type(layer).__name__}")
    return layer, inputs


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value or () for t in tensors(part)]


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("case", LAYERS)
def test_each_layer_there_and_back(case):
    layer, inputs = make(case)
    model = nn.ModuleDict({"layer": layer})
    before, parameters = dict(layer.__dict__), dict(model.named_parameters())
    types, state, text = all_types(model), list(model.state_dict()), repr(model)
    expected = layer(*inputs)
    generator = torch.get_rng_state()

    report = lmkern.convert(model)

    assert torch.equal(torch.get_rng_state(), generator)
    assert model["layer"] is layer and is_ours(layer), str(report)
    assert "layer" in [name for swap in report.swapped for name in swap.names] and not report.left
    assert list(model.state_dict()) == state
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in after)
    assert not [k for k, v in layer.__dict__.items() if isinstance(v, torch.Tensor) and v.is_meta]
    assert_close(layer(*inputs), expected)

    assert "layer" in lmkern.revert(model)
    assert all_types(model) == types and repr(model) == text
    assert list(layer.__dict__) == list(before) or layer.__dict__.keys() == before.keys()
    for key, value in before.items():
        if not key.startswith("_flat_weight"):
            assert layer.__dict__[key] is value, key
    for a, b in zip(tensors(layer(*inputs)), tensors(expected), strict=True):
        assert torch.equal(a, b)
    assert lmkern.revert(model) == []


@pytest.mark.parametrize("case", LAYERS)
def test_training_goes_on_with_the_same_optimizer(case):
    theirs, inputs = make(case)
    if not list(theirs.parameters()):
        pytest.skip("nothing to train")
    theirs = theirs.train() if case != "lstm-full" else theirs  # its dropout draws other numbers
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (ours, theirs)]
    for step in range(4):
        if step == 2:
            lmkern.convert(ours)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            sum(t.square().sum() for t in tensors(model(*inputs))).backward()
            optimizer.step()
    assert is_ours(ours)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Adam divides by the size of a gradient: what is zero but for rounding moves by up to lr.
        assert (a - b).abs().max() <= (0.02 if "bias_k" in name or "in_proj_bias" in name else 1e-4)


def random_model(draw: random.Random, depth: int, shared: list[nn.Module]) -> nn.Module:
    leaf = draw.random()
    if depth == 0 or leaf < 0.3:
        if shared and draw.random() < 0.25:
            return draw.choice(shared)
        make_one = draw.choice([
            lambda: nn.LSTM(I, H, draw.choice([1, 2])),
            lambda: nn.GRU(I, H, bias=draw.random() < 0.5),
            lambda: nn.RNNCell(I, H),
            lambda: nn.Embedding(I, H, sparse=draw.random() < 0.3),
            lambda: nn.Linear(I, H),
            lambda: nn.LayerNorm(H),
        ])  # fmt: skip
        shared.append(make_one())
        return shared[-1]
    children = [random_model(draw, depth - 1, shared) for _ in range(draw.randint(1, 4))]
    kind = draw.choice([nn.ModuleList, lambda c: nn.Sequential(*c), keyed])
    shared.append(kind(children))
    return shared[-1]


def keyed(children: list[nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({f"k{i}": child for i, child in enumerate(children)})


@pytest.mark.parametrize("seed", range(25))
def test_random_models_are_swapped_completely_and_given_back(seed):
    model = random_model(random.Random(seed), 4, [])
    modules = list(model.modules())
    types = all_types(model)
    places = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    state = [(n, p.data_ptr()) for n, p in model.state_dict().items()]
    keys = [m.__dict__.keys() for m in modules]
    wanted = [m for m in modules if type(m).__name__ in KINDS]

    report = lmkern.convert(model)

    assert [n for n, m in model.named_modules() if is_ours(m)] == [
        layer.names[0] for layer in report.swapped
    ]
    assert {id(m) for m in model.modules() if is_ours(m)} == {id(m) for m in wanted}
    assert not report.left
    for layer in report.swapped:
        module = id(model.get_submodule(layer.names[0]))
        assert list(layer.names) == [name for name, other in places if other == module]
    assert places == [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    assert state == [(n, p.data_ptr()) for n, p in model.state_dict().items()]
    assert lmkern.convert(model).swapped == []

    assert lmkern.revert(model) == [layer.names[0] for layer in report.swapped]
    assert all_types(model) == types
    assert [m.__dict__.keys() for m in modules] == keys


def test_shared_modules_and_tied_weights_stay_shared_and_tied():
    model = nn.Module()
    model.embed, model.rnn = nn.Embedding(I, H), nn.LSTM(H, H)
    model.head = nn.Linear(H, I)
    model.head.weight = model.embed.weight
    model.decoder = nn.ModuleList([model.rnn, model.embed])
    report = lmkern.convert(model)
    assert model.decoder[0] is model.rnn and model.decoder[1] is model.embed
    assert model.head.weight is model.embed.weight
    assert [layer.names for layer in report.swapped] == [
        ("embed", "decoder.1"),
        ("rnn", "decoder.0"),
        ("head",),
    ]
    y, _ = model.rnn(model.embed(torch.randint(I, (T, B))))
    model.head(y).sum().backward()
    assert model.embed.weight.grad is model.head.weight.grad is not None


def test_mode_frozen_parameters_and_attributes_stay():
    layer = nn.LSTM(I, H, dtype=torch.bfloat16).eval()
    layer.weight_hh_l0.requires_grad_(False)
    layer.note = "mine"
    layer.register_buffer("steps", torch.zeros(()), persistent=False)
    lmkern.convert(layer)
    assert not layer.training and layer.note == "mine" and layer.steps is layer._buffers["steps"]
    assert not layer.weight_hh_l0.requires_grad and layer.weight_ih_l0.requires_grad
    assert layer(torch.randn(T, B, I, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    layer.note, layer.batch_first = "changed", True
    lmkern.revert(layer)
    assert layer.note == "changed" and layer.batch_first and type(layer) is nn.LSTM


def test_hooks_of_all_kinds_are_still_called():
    layer = nn.GRU(I, H)
    called: list[str] = []

    def record(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *args, **kwargs: called.append(name) or result

    layer.register_forward_pre_hook(record("pre"))
    layer.register_forward_hook(record("forward"))
    layer.register_full_backward_hook(record("backward"))
    layer.register_full_backward_pre_hook(record("backward pre"))
    layer.register_state_dict_pre_hook(record("state_dict pre"))
    layer.register_state_dict_post_hook(record("state_dict"))
    layer.register_load_state_dict_pre_hook(record("load pre"))
    layer.register_load_state_dict_post_hook(record("load"))
    handle = layer.register_forward_hook(lambda m, args, out: (out[0] * 0 + 7, out[1]))
    layer.weight_ih_l0.register_hook(record("gradient"))
    assert lmkern.convert(layer).swapped
    y, _ = layer(torch.randn(T, B, I, requires_grad=True))
    assert (y == 7).all()  # a hook's own output counts
    handle.remove()
    layer(torch.randn(T, B, I, requires_grad=True))[0].sum().backward()
    layer.load_state_dict(layer.state_dict())
    assert set(called) == {
        "pre", "forward", "backward", "backward pre", "state_dict pre", "state_dict",
        "load pre", "load", "gradient",
    }  # fmt: skip


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations_stay(when):
    theirs = nn.LSTM(I, H, 2)
    ours = copy.deepcopy(theirs)
    x = torch.randn(T, B, I)
    if when == "after":
        lmkern.convert(ours)
    for model in (ours, theirs):
        parametrize.register_parametrization(model, "weight_hh_l1", Doubled())
        parametrizations.weight_norm(model, "weight_ih_l0")
    if when == "before":
        assert lmkern.convert(ours).swapped
    assert isinstance(ours, lmkern.nn.LSTM) and parametrize.is_parametrized(ours, "weight_hh_l1")
    assert_close(ours(x), theirs(x))
    for model in (ours, theirs):
        model(x)[0].sum().backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    assert_close(copy.deepcopy(ours)(x), theirs(x))

    parametrize.remove_parametrizations(ours, "weight_ih_l0")
    assert lmkern.revert(ours) == [""]
    assert isinstance(ours, nn.LSTM) and parametrize.is_parametrized(ours, "weight_hh_l1")
    assert_close(ours(x), theirs(x))
    with torch.no_grad():
        ours.parametrizations.weight_hh_l1.original.zero_()
    assert not torch.equal(ours(x)[0], theirs(x)[0])
    parametrize.remove_parametrizations(ours, "weight_hh_l1")
    assert type(ours) is nn.LSTM


@pytest.mark.parametrize("how", ["weight_norm", "prune"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_pre_hook_computes(how):
    layer, x = nn.LSTM(I, H), torch.randn(T, B, I)
    if how == "weight_norm":
        nn.utils.weight_norm(layer, "weight_hh_l0")
    else:
        from torch.nn.utils import prune

        prune.l1_unstructured(layer, "weight_hh_l0", 0.5)
    expected = layer(x)
    lmkern.convert(layer)
    assert is_ours(layer)
    assert_close(layer(x), expected)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    ours = layer(x)
    lmkern.revert(layer)
    assert_close(layer(x), ours)


def copies(model: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {"copied": copy.deepcopy(model), "pickled": torch.load(file, weights_only=False)}


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copied_or_unpickled_model_can_be_reverted(how):
    model = nn.ModuleDict({"rnn": nn.LSTM(I, H), "cell": nn.GRUCell(I, H)})
    model["again"] = model["rnn"]
    x = torch.randn(T, B, I)
    expected = model["rnn"](x)
    lmkern.convert(model)
    other = copies(model)[how]
    assert is_ours(other["rnn"]) and other["again"] is other["rnn"]
    assert_close(other["rnn"](x), expected)
    assert lmkern.revert(other) == ["rnn", "cell"]
    assert is_ours(model["rnn"])
    assert [type(m) for m in other.values()] == [nn.LSTM, nn.GRUCell, nn.LSTM]
    with torch.no_grad():
        assert torch.equal(other["rnn"](x)[0], expected[0])
        other[
            "rnn"
        ].weight_ih_l0.zero_()  # the layer reads its own weights, not those it was copied from
        assert not torch.equal(other["rnn"](x)[0], expected[0])
    other.double()
    assert other["rnn"](x.double())[0].dtype == torch.float64


def test_revert_refuses_a_class_that_others_changed():
    model = nn.ModuleList([nn.GRU(I, H), nn.LSTM(I, H)])
    lmkern.convert(model)
    model[1].__class__ = type("Sharded", (lmkern.nn.LSTM,), {})
    with pytest.raises(ValueError, match=r"revert: 1 must be a lmkern.*LSTM .*got Sharded"):
        lmkern.revert(model)
    assert is_ours(model[0])


def test_under_compile_and_functional_call():
    model = nn.Sequential(nn.Embedding(I, I), nn.LSTM(I, H))
    tokens = torch.randint(I, (T, B))
    expected = model(tokens)
    early = torch.compile(model, backend="eager")
    early(tokens)
    lmkern.convert(model)
    assert_close(early(tokens), expected)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(tokens), expected)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert not torch.func.functional_call(model, zeros, tokens)[0].any()


def test_in_a_distributed_wrapper(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.GRU(I, H)))
        assert lmkern.convert(model).swapped[0].names == ("module.0",)
        model(torch.randn(T, B, I))[0].sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
