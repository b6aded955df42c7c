"""lmkern.nn.quantize_embedding: error bounds, rows and bags against the tables they were made of."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import reference
from lmkern.functional import embedding_bag, quantized_embedding
from lmkern.nn import QuantizedEmbedding, quantize_embedding

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def table(rows: int = 11, width: int = 41, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different ranges and means."""
    w = torch.randn(rows, width) * torch.logspace(-2, 1, rows)[:, None]
    return (w + torch.randn(rows, 1)).to(dtype)


def assert_bound(layer, weight, out, ids):
    """Each element within scale / 2 of the weight's, and the rounding of the result."""
    exact = weight.double()[ids]
    bound = layer.error_bound.double()[ids][..., None] * (1 + 1e-6)
    rounding = max(torch.finfo(out.dtype).eps, 2**-23)  # minimum and scale are float32
    assert ((out.double() - exact).abs() <= bound + rounding * (exact.abs() + bound)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [1, 2, 7, 16, 41, 64, 111])
def test_every_element_is_within_half_a_scale(isa, width, bits, index, dtype):
    weight = table(11, width, dtype)
    layer = quantize_embedding(weight, bits)
    ids = torch.randint(11, (5, 9), dtype=index)
    out = layer(ids)
    assert out.dtype == dtype and out.shape == (5, 9, width)
    assert_bound(layer, weight, out, ids)
    torch.testing.assert_close(out, layer.dequantize()[ids])
    scale = (weight.double().amax(1) - weight.double().amin(1)) / (2**bits - 1)
    torch.testing.assert_close(layer.error_bound.double(), scale / 2, rtol=1e-6, atol=0.0)
    # The ends of a row's range are exact, but for rounding.
    every = layer(torch.arange(11)).double()
    tolerance = 2 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    for end in ("amin", "amax"):
        a, e = (getattr(t.double(), end)(1) for t in (every, weight))
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * 30)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 70), st.sampled_from([8, 4]), st.floats(-1e30, 1e30),
    st.floats(0.0, 1e30), st.lists(st.integers(0, 10**9), max_size=20),
)  # fmt: skip
def test_any_range(rows, width, bits, shift, spread, ids):
    weight = torch.randn(rows, width) * spread + shift
    layer = quantize_embedding(weight, bits)
    index = torch.tensor([i % rows for i in ids], dtype=torch.int64)
    assert_bound(layer, weight, layer(index), index)


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_and_large_rows(isa, bits):
    weight = torch.tensor([[0.1] * 9, [0.0] * 9, [-3e38] * 9, [1e38, -1e38] + [0.0] * 7])
    out = quantize_embedding(weight, bits)(torch.arange(4))
    assert torch.equal(out[:3], weight[:3])
    torch.testing.assert_close(out[3, :2], weight[3, :2])
    assert out.isfinite().all()


def test_many_rows_are_quantised_in_blocks(monkeypatch):
    weight = table(50, 7)
    whole = quantize_embedding(weight).weight
    monkeypatch.setattr("lmkern.reference.quantized_embedding.BLOCK", 20)
    assert torch.equal(quantize_embedding(weight).weight, whole)


def test_the_layout_is_torchs_of_8_bits():
    weight = table()
    theirs = torch.ops.quantized.embedding_bag_byte_prepack(weight)
    ours = quantize_embedding(weight).weight
    assert theirs.shape == ours.shape
    assert (theirs[:, :-8].int() - ours[:, :-8].int()).abs().max() <= 1
    out = quantized_embedding(torch.arange(11), theirs, 41)
    torch.testing.assert_close(out, torch.ops.quantized.embedding_bag_byte_unpack(theirs))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bags(isa, dtype, mode, bits):
    layer = lmkern.nn.EmbeddingBag(23, 41, mode=mode, padding_idx=3, dtype=dtype)
    ours = quantize_embedding(layer, bits)
    rows = ours.to(torch.float64).dequantize()
    ours.to(dtype)
    ids, samples = torch.randint(23, (7, 9)), torch.rand(7, 9).to(dtype)
    offsets = torch.tensor([0, 0, 10, 63])
    for args in ((ids,), (ids.flatten(), offsets), (ids, None, samples)):
        for some in ((), samples.flatten() if len(args) == 2 else ()):
            weights = args[2] if len(args) == 3 else some if len(some) else None
            out = ours(*args[:2], per_sample_weights=weights)
            exact = reference.embedding_bag(
                args[0], rows, *args[1:2], mode=mode, padding_idx=3,
                per_sample_weights=None if weights is None else weights.double(),
            )  # fmt: skip
            assert out.dtype == dtype
            eps = torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
            torch.testing.assert_close(out.double(), exact, rtol=2 * eps, atol=100 * eps)


def test_from_layers():
    plain = torch.nn.Embedding(23, 8, padding_idx=2, max_norm=1.0)
    before = plain.weight.detach().clone()
    layer = quantize_embedding(plain)
    assert torch.equal(plain.weight, before) and not layer.training and layer.mode is None
    assert_bound(layer, reference.clip_norm(before, 1.0, 2.0), layer(torch.arange(23)), torch.arange(23))  # fmt: skip
    bag = torch.nn.EmbeddingBag(23, 8, mode="sum", include_last_offset=True)
    layer = quantize_embedding(bag)
    ids, offsets = torch.randint(23, (9,)), torch.tensor([0, 4, 9])
    out = embedding_bag(ids, layer.dequantize(), offsets, mode="sum", include_last_offset=True)
    torch.testing.assert_close(layer(ids, offsets), out)


def test_state_and_dtype():
    layer = quantize_embedding(table(11, 41), 4)
    assert list(layer.state_dict()) == ["weight"] and not list(layer.parameters())
    other = QuantizedEmbedding(11, 41, 4)
    other.load_state_dict(layer.state_dict())
    ids = torch.arange(11)
    assert torch.equal(other(ids), layer(ids))
    half = copy.deepcopy(layer).bfloat16()  # of the result: scales stay as they are
    assert torch.equal(half(ids), layer(ids).bfloat16())
    assert torch.equal(half.double().error_bound, layer.error_bound)
    assert layer.table_bytes == 11 * (21 + 8) and "table_bytes=319" in repr(layer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        QuantizedEmbedding(11, 41, 8).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)], ids=str)
def test_shapes(shape):
    layer, ids = quantize_embedding(table()), torch.randint(11, shape)
    torch.testing.assert_close(layer(ids), layer.dequantize()[ids].view(*shape, 41))
    strided = copy.deepcopy(layer)
    strided.weight = torch.cat([strided.weight, strided.weight], 1)[:, : 41 + 8]
    assert torch.equal(strided(ids), layer(ids))


def test_opcheck_compile_and_functorch():
    layer, ids = quantize_embedding(table(), 4), torch.randint(11, (4, 5))
    torch.library.opcheck(
        torch.ops.lmkern.quantized_embedding.default, (layer.weight, 41, 4, ids, torch.float32)
    )
    torch.library.opcheck(
        torch.ops.lmkern.quantized_embedding_bag.default,
        (layer.weight, 41, 4, torch.float32, ids, None, None, False, 0, -1),
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), layer(ids))
    torch.testing.assert_close(torch.func.vmap(layer)(ids), layer(ids))


def test_it_is_not_trained():
    layer = quantize_embedding(table())
    with pytest.raises(
        RuntimeError, match="has no gradient; train the embedding, then quantise it"
    ):
        layer.requires_grad_()
    assert layer.requires_grad_(False) is layer
    bag = quantize_embedding(torch.nn.EmbeddingBag(5, 4, mode="sum"))
    samples = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="per_sample_weights must not require a gradient"):
        bag(torch.tensor([[1, 2]]), None, samples)


TABLE = quantize_embedding(torch.randn(5, 4)).weight
X = torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: quantize_embedding(torch.zeros(2, 3), 3), ValueError, "bits must be 8 or 4, got 3"),
        (lambda: quantize_embedding(torch.tensor([[1.0], [math.nan]])), ValueError, "row 1 must be finite"),
        (lambda: quantize_embedding(torch.tensor([[1.0, math.inf]])), ValueError, "row 0 must be finite"),
        (lambda: quantize_embedding(torch.tensor([[3e38, -3e38]])), ValueError, "row 0 must be finite, and its range below"),
        (lambda: quantize_embedding(torch.zeros(3)), ValueError, r"weight must be \[V, D\] of floating dtype, got \[3\]"),
        (lambda: quantize_embedding(torch.zeros(3, 3).int()), ValueError, "of floating dtype, got .* of torch.int32"),
        (lambda: quantize_embedding(torch.zeros(3, 0)), ValueError, "embedding_dim must be at least 1, got 0"),
        (lambda: quantize_embedding(torch.nn.Linear(2, 2)), TypeError, "source must be an Embedding, an EmbeddingBag or a Tensor, got Linear"),
        (lambda: quantize_embedding(torch.nn.EmbeddingBag(2, 2, mode="max")), ValueError, "mode must be 'sum' or 'mean', got 'max'"),
        (lambda: QuantizedEmbedding(2, 2, mode="max"), ValueError, "mode must be 'sum', 'mean' or None, got 'max'"),
        (lambda: QuantizedEmbedding(2, 2, 2), ValueError, "bits must be 8 or 4, got 2"),
        (lambda: quantized_embedding(X + 4, TABLE, 4), IndexError, r"index 5 at position \[0, 0\] is out of range for V = 5"),
        (lambda: quantized_embedding(X, TABLE, 5), ValueError, r"weight must be \[V, ceil\(D bits / 8\) \+ 8\] with D = 5, got \[5, 12\]"),
        (lambda: quantized_embedding(X, TABLE, 4, 3), ValueError, "bits must be 8 or 4, got 3"),
        (lambda: quantized_embedding(X, TABLE.float(), 4), TypeError, "weight must be uint8, got float32"),
        (lambda: quantized_embedding(X.float(), TABLE, 4), TypeError, "input must be int32 or int64, got torch.float32"),
        (lambda: quantized_embedding(X, TABLE, 4, mode="max"), ValueError, "mode must be 'sum', 'mean' or None, got 'max'"),
        (lambda: quantized_embedding(X, TABLE, 4, per_sample_weights=X), ValueError, "need a mode"),
        (lambda: quantized_embedding(X, TABLE, 4, mode="sum", per_sample_weights=X), TypeError, "per_sample_weights must be float32, got int64"),
        (lambda: quantized_embedding(X[0], TABLE, 4, mode="sum"), ValueError, "offsets must be given with input"),
        (lambda: quantized_embedding(X[0], TABLE, 4, mode="sum", offsets=X[0]), ValueError, r"offsets\[0\] must be 0, got 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
