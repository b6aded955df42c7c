"""What lmkern.convert leaves and why, what it is told to take, what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lmkern
from convert_helpers import H, I, all_types, is_ours

pytestmark = pytest.mark.cpu_only("expects every kind of layer to have a kernel")


class OwnForward(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class OwnMethod(nn.LSTM):
    def first(self) -> int:
        return 1


class OwnConstructor(nn.Embedding):
    """Nothing but a constructor."""

    def __init__(self, size: int) -> None:
        super().__init__(size, H)


def replaced_forward() -> nn.Module:
    layer = nn.GRU(I, H)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def lazy() -> nn.Module:
    layer = nn.GRUCell(I, H)
    layer.weight_hh = nn.UninitializedParameter()
    return layer


def changed_shape() -> nn.Module:
    layer = nn.Embedding(I, H)
    layer.weight = nn.Parameter(torch.zeros(I + 1, H))
    return layer


class Subclassed(torch.Tensor):
    pass


def tensor_subclass() -> nn.Module:
    layer = nn.Embedding(I, H)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclassed))
    return layer


def quantized() -> nn.Module:
    from torch.ao.nn.quantized.dynamic import LSTM

    return LSTM(I, H)


def quantization_aware() -> nn.Module:
    from torch.ao.nn.qat import Embedding
    from torch.ao.quantization import float_qparams_weight_only_qconfig

    return Embedding(I, H, qconfig=float_qparams_weight_only_qconfig)


@pytest.mark.parametrize(
    "factory, reason",
    [
        (lambda: OwnForward(I, H), "OwnForward overrides forward"),
        (lambda: OwnMethod(I, H), "OwnMethod defines first"),
        (replaced_forward, "its forward was replaced on the object"),
        (lazy, "its parameters are not initialised yet"),
        (changed_shape, f"weight must be [{I}, {H}], got [{I + 1}, {H}]"),
        (tensor_subclass, "weight is a Subclassed"),
        (lambda: nn.Embedding(I, H, dtype=torch.complex64), "no kernel for torch.complex64"),
        (lambda: nn.RNNCell(0, H, nonlinearity="relu"), None),
        (lambda: torch.jit.script(nn.LSTMCell(I, H)), "it is TorchScript"),
        (quantized, "torch.ao.nn.quantized.dynamic.modules.rnn.LSTM is not torch.nn.LSTM"),
        (quantization_aware, "Embedding overrides forward"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize.*:UserWarning")
def test_left_with_a_reason(factory, reason):
    model = nn.ModuleDict({"a": factory(), "b": nn.RNNCell(I, H)})
    cls = type(model["a"])
    report = lmkern.convert(model)
    assert [layer.reason for layer in report.left] == ([] if reason is None else [reason])
    if reason is not None:
        assert type(model["a"]) is cls and report.left[0].names == ("a",)
        assert f"a: left, {reason}" in str(report)
    assert is_ours(model["b"])
    lmkern.revert(model)
    assert type(model["a"]) is cls


def test_a_subclass_with_only_a_constructor_is_swapped_and_comes_back():
    model = nn.Sequential(OwnConstructor(I))
    assert lmkern.convert(model).swapped[0].kind == "OwnConstructor"
    assert is_ours(model[0])
    lmkern.revert(model)
    assert type(model[0]) is OwnConstructor


def test_layers_of_lmkern_are_not_touched():
    model = nn.Sequential(lmkern.nn.LSTM(I, H), nn.Flatten())
    report = lmkern.convert(model)
    assert not report.swapped and not report.left
    assert str(report) == "lmkern.convert: no layer of a kind that lmkern.nn has"
    assert lmkern.revert(model) == [] and is_ours(model[0])


def test_a_left_encoder_layer_keeps_its_attention():
    if not hasattr(lmkern.nn, "MultiheadAttention"):
        pytest.skip("lmkern.nn has no MultiheadAttention")
    layer = nn.TransformerEncoderLayer(8, 2, 11)
    report = lmkern.convert(layer, exclude=nn.TransformerEncoderLayer)
    assert type(layer.self_attn) is nn.MultiheadAttention
    reasons = {entry.names[0]: entry.reason for entry in report.left}
    assert "TransformerEncoderLayer around it was left" in reasons["self_attn"]


def rnns() -> nn.ModuleDict:
    return nn.ModuleDict({
        "encoder": nn.Sequential(nn.LSTM(I, H), nn.GRU(I, H)),
        "decoder": nn.Sequential(nn.LSTM(I, H), nn.Embedding(I, H)),
    })  # fmt: skip


@pytest.mark.parametrize(
    "options, swapped",
    [
        ({}, ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]),
        ({"include": nn.LSTM}, ["encoder.0", "decoder.0"]),
        ({"include": nn.modules.rnn.RNNBase}, ["encoder.0", "encoder.1", "decoder.0"]),
        ({"include": "encoder"}, ["encoder.0", "encoder.1"]),
        ({"include": ["*.0", nn.Embedding]}, ["encoder.0", "decoder.0", "decoder.1"]),
        ({"exclude": "decoder"}, ["encoder.0", "encoder.1"]),
        ({"include": nn.LSTM, "exclude": ["encoder.0"]}, ["decoder.0"]),
        ({"include": [], "exclude": nn.Linear}, []),
    ],
)
def test_include_and_exclude(options, swapped):
    model = rnns()
    report = lmkern.convert(model, **options)
    assert [n for n, m in model.named_modules() if is_ours(m)] == swapped
    assert [layer.names[0] for layer in report.swapped] == swapped
    assert len(report.left) == 4 - len(swapped)
    assert {layer.reason for layer in report.left} <= {"excluded", "not included"}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: lmkern.convert("model"), TypeError, "convert: model must be a torch.nn.Module"),
        (lambda m: lmkern.revert(None), TypeError, "revert: model must be a torch.nn.Module"),
        (lambda m: lmkern.convert(m, include="nope.*"), ValueError, "include must name modules"),
        (lambda m: lmkern.convert(m, exclude=[nn.LSTM, "nope"]), ValueError, "got 'nope'"),
        (lambda m: lmkern.convert(m, include=nn.Conv1d), ValueError, "got Conv1d"),
        (lambda m: lmkern.convert(m, include=[3]), TypeError, "names or types of modules, got 3"),
        (lambda m: lmkern.convert(m, exclude=int), TypeError, "names or types of modules"),
    ],
)
def test_bad_arguments_change_nothing(call, error, message):
    model = rnns()
    types = all_types(model)
    with pytest.raises(error, match=message):
        call(model)
    assert all_types(model) == types


def test_report_reads_well():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.GRU(I, H) for _ in range(6)])})
    model["embed"], model["rnn"] = nn.Embedding(I, H), replaced_forward()
    model["head"] = model["embed"]
    assert str(lmkern.convert(model)) == "\n".join([
        "lmkern.convert: swapped 7, left 1",
        "  GRU: layers.0, layers.1, layers.2, layers.3 and 2 more",
        "  Embedding: embed (also head)",
        "  GRU: rnn: left, its forward was replaced on the object",
    ])  # fmt: skip
    assert "LSTM: the model itself" in str(lmkern.convert(nn.LSTM(I, H)))
