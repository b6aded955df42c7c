"""The CUDA kernels of embeddings and bags, on the emulator: against float64, in every mode and under every
schedule. (`--device simt` runs the layers' own tests on them.)

Values are small integers where sums can be exact: then the only rounding is the last, and results are
compared bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from emulator_helpers import MODULES, SCHEDULES, emulated
from lmkern import reference
from lmkern.ops import embedding as ops
from lmkern.ops import embedding_bag as bag_ops

pytestmark = pytest.mark.cpu_only("the emulator has its own modules")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 59, 111, 128]
NO_NORM = (math.inf, 2.0)
# of a result that was rounded more than once
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


@pytest.fixture(params=MODULES)
def kernels(request, monkeypatch):
    yield from emulated(request.param, monkeypatch, ops, bag_ops)


@pytest.fixture
def plain(monkeypatch):
    """Without the search for races, for what is larger."""
    yield from emulated("_C_simt", monkeypatch, ops, bag_ops)


def whole(*shape, dtype=torch.float32):
    return torch.randint(-4, 5, shape).to(dtype)


def in_every_schedule(kernels, run):
    """The results, which no schedule may change in a bit."""
    results = []
    for schedule in SCHEDULES:
        kernels.set_schedule(*schedule)
        results.append(run())
    for result in results[1:]:
        assert torch.equal(result, results[0])
    return results[0]


def assert_close(actual, exact, dtype):
    torch.testing.assert_close(
        actual.double(), exact.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


# ---- lookup


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_lookup_copies_bits(kernels, width, dtype):
    for rows, count, index in ((1, 1, torch.int32), (9, 41, torch.int64), (300, 70, torch.int32)):
        weight, ids = torch.randn(rows, width).to(dtype), torch.randint(0, rows, (count,)).to(index)
        assert torch.equal(ops._forward(weight, ids, *NO_NORM), weight[ids])
    assert ops._forward(weight, ids[:0], *NO_NORM).shape == (0, width)
    assert ops._forward(weight, ids[:6].view(3, 2), *NO_NORM).shape == (3, 2, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "first"), [(128, 1), (130, 2), (132, 4), (129, 0)])
def test_lookup_in_rows_that_begin_anywhere(kernels, stride, first, dtype):
    weight = torch.randn(5, stride).to(dtype).flatten()[first : first + 4 * stride]
    weight = weight.view(4, stride)[:, :96]
    ids = torch.tensor([3, 0, 0, 2])
    assert torch.equal(ops._forward(weight, ids, *NO_NORM), weight[ids])


@pytest.mark.parametrize("p", [2.0, 1.0, 0.0, 3.0, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(kernels, dtype, p):
    weight, ids = torch.randn(9, 59).to(dtype), torch.tensor([3, 1, 3, 8, 0, 1])
    weight[0] = 0
    limit = float(torch.linalg.vector_norm(weight.double(), p, 1)[[1, 3, 8]].median())
    exact = weight.double().clone()
    torch.embedding_renorm_(exact, ids, limit, p)
    assert_close(ops._forward(weight, ids, limit, p), exact[ids], dtype)
    ops._renorm(weight, ids, limit, p)
    assert_close(weight, exact, dtype)


def test_norm_of_nan_scales_nothing(kernels):
    weight = torch.ones(2, 40)
    weight[1, 7] = math.nan
    for p in (2.0, math.inf, -math.inf):
        out = ops._forward(weight, torch.tensor([0, 1]), 0.5, p)
        assert out[1].nansum() == 39 and out[0, 0] < 1


# ---- gradient of the lookup


def lists(rows):
    """Ids by which runs end everywhere: chunks of a short list are 8 positions long."""
    generator = torch.Generator().manual_seed(0)
    zipf = (rows * torch.rand(200, generator=generator) ** 6).long()
    lengths = torch.tensor([1, 7, 8, 16, 17, 9, 24, 2, 40, 15, 1, 23])
    for first in range(3):
        yield torch.arange(first, first + len(lengths)).repeat_interleave(lengths) % rows
    yield from (zipf, zipf[:1], zipf[:41], torch.full((130,), rows - 1), zipf[:0])
    yield torch.tensor([0] * 8 + [1] * 16 + [2] * 24)
    yield torch.randperm(rows, generator=generator)


def exact_gradient(d_out, ids, rows, padding_idx=-1, by_freq=False):
    counted = ids[ids != padding_idx]
    terms = d_out.reshape(-1, d_out.shape[-1]).double()[ids != padding_idx]
    gradient = torch.zeros(rows, d_out.shape[-1], dtype=torch.float64).index_add_(0, counted, terms)
    counts = torch.bincount(counted, minlength=rows).clamp(min=1).unsqueeze(1)
    return gradient / counts if by_freq else gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradient(kernels, width, dtype):
    rows = 23
    for ids in lists(rows):
        ids = ids[torch.randperm(len(ids))]
        d_out = whole(len(ids), width, dtype=dtype)
        exact = exact_gradient(d_out, ids, rows)
        index = ids.to(torch.int32 if width % 2 else torch.int64)
        assert torch.equal(ops._backward(d_out, index, rows, -1, False), exact.to(dtype))
        sparse = ops.sparse_gradient(d_out, index, rows, -1, False, 2.0)
        assert sparse.is_coalesced() and torch.equal(sparse.to_dense(), (2 * exact).to(dtype))
        assert torch.equal(sparse.indices()[0], ids.unique())


@pytest.mark.parametrize("by_freq", [False, True])
@pytest.mark.parametrize("padding_idx", [0, 5, 22])
def test_gradient_options(kernels, padding_idx, by_freq):
    for ids in lists(23):
        d_out = whole(len(ids), 12)
        exact = exact_gradient(d_out, ids, 23, padding_idx, by_freq)
        assert_close(ops._backward(d_out, ids, 23, padding_idx, by_freq), exact, torch.float32)
        sparse = ops.sparse_gradient(d_out, ids, 23, padding_idx, by_freq)
        assert_close(sparse.to_dense(), exact, torch.float32)
        assert torch.equal(sparse.indices()[0], ids[ids != padding_idx].unique())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_has_the_same_bits_in_every_schedule(kernels, dtype):
    for ids in lists(23):
        d_out = torch.randn(len(ids), 40).to(dtype)
        gradient = in_every_schedule(
            kernels, lambda i=ids, d=d_out: ops._backward(d, i, 23, -1, False)
        )
        assert_close(gradient, exact_gradient(d_out, ids, 23), dtype)


@pytest.mark.parametrize("count", [8193, 65537, 262145])
def test_gradient_of_longer_lists(plain, count):
    ids = (50 * torch.rand(count) ** 4).long()
    ids[: count // 3] = 7
    d_out = whole(count, 1)
    exact = exact_gradient(d_out, ids, 50)
    assert torch.equal(ops._backward(d_out, ids, 50, -1, False).double(), exact)


# ---- bags

OFFSETS = torch.tensor([0, 0, 1, 5, 5, 46, 48])  # empty ones at both ends and inside


def bags_of(kind, index, samples, mode, padding_idx):
    if kind == "rows":
        return (
            torch.randint(0, 9, (6, 11)).to(index),
            None,
            samples((6, 11)),
            False,
            mode,
            padding_idx,
        )
    ids = torch.randint(0, 9, (48,))
    ids[20:] = 4
    offsets = OFFSETS.to(torch.int32 if kind == "narrow" else torch.int64)
    if kind == "last":
        offsets = offsets[:-1]
    return ids.to(index), offsets, samples((48,)), kind == "last", mode, padding_idx


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("padding_idx", [-1, 4])
@pytest.mark.parametrize("mode", [0, 1, 2], ids=bag_ops.MODES)
@pytest.mark.parametrize("kind", ["rows", "offsets", "narrow", "last"])
def test_bags(kernels, kind, mode, padding_idx, weighted):
    for dtype, width, by_freq in (
        (torch.float32, 12, False), (torch.bfloat16, 16, True), (torch.float16, 7, False),
        (torch.float64, 59, True),
    ):  # fmt: skip

        def samples(shape, dtype=dtype):
            return torch.randn(shape).to(dtype) if weighted else None

        weight = torch.randn(9, width).to(dtype)
        bags = bags_of(kind, torch.int32 if width % 2 else torch.int64, samples, mode, padding_idx)
        ids, offsets, s, last, *_ = bags
        out, winners = bag_ops._forward(weight, *bags, True)
        w = weight.double().requires_grad_()
        s64 = None if s is None else s.double().requires_grad_()
        exact = reference.embedding_bag(
            ids, w, offsets, s64, bag_ops.MODES[mode], padding_idx, by_freq, last
        )
        assert_close(out, exact.detach(), dtype)
        g = torch.randn_like(out)
        wanted = [w] if s64 is None else [w, s64]
        d_weight, *d_samples = torch.autograd.grad(exact, wanted, g.double())
        options = (9, by_freq)
        ours = bag_ops._backward(g, winners, *bags, *options)
        assert_close(ours, d_weight, dtype)
        sparse = bag_ops._gradient(g, winners, bags, *options, True, None)
        assert torch.equal(sparse.to_dense(), ours)
        # The rows of what lies in a bag, all of which occur in `ids` before the last offset.
        inside = ids.flatten()[: int(offsets[-1])] if last else ids.flatten()
        assert sparse.indices()[0].tolist() == inside[inside != padding_idx].unique().tolist()
        if weighted:
            ours = bag_ops._weights_backward(g, winners, weight, *bags)
            torch.testing.assert_close(
                ours.double(), d_samples[0], rtol=TOLERANCE[dtype], atol=60 * TOLERANCE[dtype] / 8
            )


@pytest.mark.parametrize("mode", [0, 1, 2], ids=bag_ops.MODES)
def test_bags_have_the_same_bits_in_every_schedule(kernels, mode):
    weight, g = torch.randn(9, 40), torch.randn(7, 40)
    bags = bags_of("offsets", torch.int64, torch.randn, mode, -1)
    out, winners = bag_ops._forward(weight, *bags, True)
    assert torch.equal(
        out, in_every_schedule(kernels, lambda: bag_ops._forward(weight, *bags, True)[0])
    )
    in_every_schedule(kernels, lambda: bag_ops._backward(g, winners, *bags, 9, False))
    in_every_schedule(kernels, lambda: bag_ops._weights_backward(g, winners, weight, *bags))


def test_no_bags_and_no_terms(kernels):
    weight, none = torch.randn(3, 5), torch.zeros(0, dtype=torch.int64)
    for mode in range(3):
        for offsets, count in ((none, 0), (torch.zeros(4, dtype=torch.int64), 4)):
            bags = (none, offsets, None, False, mode, -1)
            out, winners = bag_ops._forward(weight, *bags, True)
            assert torch.equal(out, torch.zeros(count, 5))
            gradient = bag_ops._backward(out, winners, *bags, 3, False)
            assert torch.equal(gradient, torch.zeros(3, 5))
        # Positions that are in no bag have no gradient.
        bags = (torch.tensor([1, 2]), none, None, False, mode, -1)
        out, winners = bag_ops._forward(weight, *bags, True)
        assert bag_ops._gradient(out, winners, bags, 3, False, True, None)._nnz() == 0


# ---- what is out of range


@pytest.mark.parametrize("bad", [10, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_a_bad_index_is_recorded_and_the_nearest_row_taken(kernels, index, bad):
    weight, ids = torch.randn(10, 7), torch.tensor([[1, 2], [3, bad]], dtype=index)
    message = f"index {bad} at position [1, 1] is out of range for V = 10"
    nearest = weight[ids.clamp(0, 9)]
    assert torch.equal(ops._forward(weight, ids, *NO_NORM), nearest)
    assert kernels.take_index_error() == "embedding: " + message
    assert kernels.take_index_error() is None
    ops._forward(weight, ids, 1.0, 2.0)
    assert kernels.take_index_error() == "embedding: " + message
    # No row is scaled, or given a gradient, in its place.
    before = weight.clone()
    ops._renorm(weight, ids[1:, 1:].contiguous(), 0.1, 2.0)
    assert torch.equal(weight, before)
    assert (
        kernels.take_index_error()
        == f"embedding: index {bad} at position [0, 0] is out of range for V = 10"
    )
    d_out = torch.ones(2, 2, 7)
    gradient = ops._backward(d_out, ids, 10, -1, False)
    assert gradient.sum(1).tolist() == [0, 7, 7, 7, 0, 0, 0, 0, 0, 0]
    assert kernels.take_index_error() == "embedding: " + message
    assert ops.sparse_gradient(d_out, ids, 10, -1, False)._nnz() == 3
    assert kernels.take_index_error() == "embedding: " + message
    for mode in range(3):
        bags = (ids, None, torch.ones(2, 2), False, mode, -1)
        out, winners = bag_ops._forward(weight, *bags, True)
        assert kernels.take_index_error() == "embedding_bag: " + message
        bag_ops._weights_backward(out, winners, weight, *bags)
        assert kernels.take_index_error() == "embedding_bag: " + message


def test_one_of_many_bad_indices_is_recorded(kernels):
    ids = torch.arange(50, 150)
    for schedule in SCHEDULES:
        kernels.set_schedule(*schedule)
        out = ops._forward(torch.randn(60, 3), ids, *NO_NORM)
        words = kernels.take_index_error().split()
        index, position = int(words[2]), int(words[5].strip("[]"))
        assert index == position + 50 >= 60 and torch.isfinite(out).all()
    ops._forward(torch.randn(60, 3), ids[:10], *NO_NORM)


def test_no_rows_at_all(kernels):
    message = r"input must be empty for V = 0, got \[2\]"
    with pytest.raises(IndexError, match=message):
        ops._forward(torch.zeros(0, 3), torch.tensor([0, 1]), *NO_NORM)
    empty = torch.zeros(0, dtype=torch.int64)
    assert ops._forward(torch.zeros(0, 3), empty, *NO_NORM).shape == (0, 3)
    assert ops._backward(torch.zeros(0, 3), empty, 0, -1, False).shape == (0, 3)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("offsets", "bad", "at"),
    [([1, 2], 1, 0), ([0, 3, 2, 4], 2, 2), ([0, 9], 9, 1), ([0, -3, 2], -3, 1), ([-1, 2], -1, 0), ([0, 2**40], 2**40, 1)],
)  # fmt: skip
def test_bad_offsets_are_recorded_and_stay_in_bounds(kernels, offsets, bad, at, last):
    weight, ids, offsets = torch.randn(9, 8), torch.randint(0, 9, (5,)), torch.tensor(offsets)
    for mode in range(3):
        bags = (ids, offsets, torch.randn(5), last, mode, 2)
        out, winners = bag_ops._forward(weight, *bags, True)
        message = kernels.take_index_error()
        assert message.startswith(
            "embedding_bag: offsets must begin with 0, not decrease and not exceed N = 5"
        )
        assert message.endswith(f"got {bad} at position [{at}]")
        bag_ops._backward(out, winners, *bags, 9, True)
        bag_ops._gradient(out, winners, bags, 9, True, True, None)
        bag_ops._weights_backward(out, winners, weight, *bags)


def test_arguments_that_do_not_fit(plain):
    ids, rows = torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32)
    d_out, gradient, room = torch.zeros(2, 4), torch.zeros(3, 4), ops.workspace(ids, 0)
    for arguments, message in (
        ((d_out, ids, ids, gradient, room), "rows must be int32, got int64"),
        ((d_out, rows, rows, gradient, room), "order must be int64, got int32"),
        ((d_out, rows, ids[:1], gradient, room), r"order must be \[N\] = \[2\], got \[1\]"),
        ((d_out[:1], rows, ids, gradient, room), r"rows must be \[N\] = \[1\], got \[2\]"),
        ((d_out, rows, ids, gradient[:, :2], room), "d_weight must be contiguous"),
        ((d_out, rows, ids, gradient, gradient[0]), "workspace must be uint8, got float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            plain.embedding_sorted_backward(*arguments, False, 1.0)
    rows, ids = rows.repeat(20), ids.repeat(20)
    with pytest.raises(ValueError, match="workspace must have 160 bytes, got 0"):
        plain.embedding_sorted_backward(torch.zeros(40, 4), rows, ids, gradient, room, False, 1.0)
