"""lmkern.functional.embedding_bag and lmkern.nn.EmbeddingBag against torch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import reference
from lmkern.functional import embedding_bag
from lmkern.ops.backend import kernels_of, takes_cuda
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MODES = ["sum", "mean", "max"]
# Empty bags at both ends and inside; bags of 1, 4, 13, 2.
OFFSETS = torch.tensor([0, 0, 1, 5, 5, 18, 20])


def ids_of(shape=(20,), rows: int = 11) -> torch.Tensor:
    return torch.randint(0, rows, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}, {"include_last_offset": True}], ids=str)  # fmt: skip
def test_oracle(isa, options, mode, dtype):
    ids, offsets = ids_of(), OFFSETS
    assert_oracle(
        lambda w: embedding_bag(ids, w, offsets, mode=mode, **options),
        lambda w: F.embedding_bag(ids, w, offsets, mode=mode, **options),
        [torch.randn(11, 41).to(dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (9, 7, 41, 111), (700, 3, 500, 59), (50, 1, 2000, 1100)], ids=str)  # fmt: skip
def test_oracle_sizes(isa, size, mode, index, dtype):
    rows, bags, length, width = size
    ids = ids_of((bags, length), rows).to(index)
    assert_oracle(
        lambda w: embedding_bag(ids, w, mode=mode),
        lambda w: F.embedding_bag(ids, w, mode=mode),
        [torch.randn(rows, width).to(dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [-1, 3])
def test_per_sample_weights(isa, padding, mode, dtype):
    # torch has them for sums only: the reference, which the next test holds to torch, states the rest.
    ids = ids_of()
    assert_oracle(
        lambda w, s: embedding_bag(
            ids, w, OFFSETS, mode=mode, per_sample_weights=s,
            padding_idx=None if padding < 0 else padding,
        ),
        lambda w, s: reference.embedding_bag(ids, w, OFFSETS, s, mode, padding),
        [torch.randn(11, 59).to(dtype), torch.randn(20).to(dtype)],
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 70), st.lists(st.integers(0, 9), max_size=12),
    st.sampled_from(MODES), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
    st.booleans(), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_options(
    rows, width, lengths, mode, weighted, padded, by_freq, sparse, last, narrow, random
):
    index = torch.int32 if narrow else torch.int64
    count = sum(lengths)
    ids = torch.tensor([random.randrange(rows) for _ in range(count)], dtype=index)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(index)
    offsets = ends if last else ends[:-1]
    if not last and not lengths:
        ids = ids[:0]
    weight = torch.randn(rows, width, dtype=torch.float64)
    samples = torch.randn(len(ids), dtype=torch.float64) if weighted else None
    padding = random.randrange(rows) if padded else None
    leaves = [
        [t.clone().requires_grad_() for t in (weight, samples) if t is not None] for _ in "ab"
    ]
    a, b = (((*leaf, None))[:2] for leaf in leaves)
    options = {"mode": mode, "include_last_offset": last, "padding_idx": padding}
    ours = embedding_bag(
        ids, a[0], offsets, scale_grad_by_freq=by_freq, sparse=sparse, per_sample_weights=a[1],
        **options,
    )  # fmt: skip
    expected = reference.embedding_bag(
        ids, b[0], offsets, b[1], mode, -1 if padding is None else padding, by_freq, last
    )
    torch.testing.assert_close(ours, expected)
    g = torch.randn_like(expected)
    ours.backward(g)
    expected.backward(g)
    assert a[0].grad.is_sparse == sparse and (not sparse or a[0].grad.is_coalesced())
    torch.testing.assert_close(a[0].grad.to_dense(), b[0].grad)
    if weighted:
        torch.testing.assert_close(a[1].grad, b[1].grad)
    # torch's scale_grad_by_freq divides by the count of another index (indices_data[i] in
    # EmbeddingBag.cpp, where i numbers the distinct ones), so it is not compared.
    if (mode == "sum" or not weighted) and not by_freq:
        theirs, s = weight.clone().requires_grad_(), samples
        s = None if s is None else s.clone().requires_grad_()
        out = F.embedding_bag(ids, theirs, offsets, per_sample_weights=s, **options)
        torch.testing.assert_close(ours, out)
        out.backward(g)
        torch.testing.assert_close(a[0].grad.to_dense(), theirs.grad)
        if s is not None:
            torch.testing.assert_close(a[1].grad, s.grad)


def test_of_equal_maxima_the_first_gets_the_gradient(isa):
    weight = torch.tensor([[1.0, 2.0], [1.0, 3.0], [0.0, 3.0]], requires_grad=True)
    samples = torch.tensor([1.0, 1.0, 2.0, -1.0], requires_grad=True)
    ids, offsets = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 3])
    embedding_bag(ids, weight, offsets[:1], mode="max").sum().backward()
    assert weight.grad.tolist() == [[1, 0], [0, 1], [0, 0]]
    weight.grad = None
    out = embedding_bag(ids, weight, offsets, mode="max", per_sample_weights=samples)
    assert out.tolist() == [[1, 6], [-1, -2]]
    out.sum().backward()
    assert weight.grad.tolist() == [[0, -1], [0, 0], [0, 2]]
    assert samples.grad.tolist() == [1, 0, 3, 3]


def test_what_is_padding_or_in_no_bag_is_not_read(isa):
    weight = torch.randn(5, 9)
    weight[2], weight[4] = float("nan"), float("inf")
    ids = torch.tensor([0, 2, 1, 2, 4])
    for mode in MODES:
        leaf = weight.clone().requires_grad_()
        samples = torch.ones(5, requires_grad=True)
        out = embedding_bag(
            ids, leaf, torch.tensor([0, 3, 4]), mode=mode, padding_idx=2,
            per_sample_weights=samples, include_last_offset=True,
        )  # fmt: skip
        assert out.isfinite().all() and torch.equal(out[1], torch.zeros(9))
        out.sum().backward()
        assert leaf.grad[[2, 3, 4]].eq(0).all() and leaf.grad.isfinite().all()
        assert samples.grad[[1, 3, 4]].eq(0).all() and samples.grad.isfinite().all()


def test_same_bits_for_any_thread_count():
    ids = torch.randint(0, 500, (7, 900)) ** 2 // 500
    weight, before = torch.randn(500, 300), torch.get_num_threads()
    for mode in MODES:
        results = []
        try:
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                leaf, samples = weight.clone().requires_grad_(), torch.ones(7, 900).requires_grad_()
                out = embedding_bag(ids, leaf, mode=mode, per_sample_weights=samples)
                out.backward(torch.linspace(-1, 1, 7 * 300).view(7, 300))
                results.append(
                    torch.cat([out.flatten(), leaf.grad.flatten(), samples.grad.flatten()])
                )
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_layouts():
    weight = torch.randn(41, 40).t()[::2].requires_grad_()
    ids, g = ids_of((6, 5), 20), torch.randn(1, 41).expand(5, 41)
    ours, theirs = (f(ids.t(), weight, mode="mean") for f in (embedding_bag, F.embedding_bag))
    torch.testing.assert_close(ours, theirs)
    a, b = (torch.autograd.grad(o, weight, g)[0] for o in (ours, theirs))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_empty(mode):
    weight = torch.randn(5, 3, requires_grad=True)
    for ids, offsets, bags in [
        (torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 2),
        (torch.tensor([1]), torch.zeros(0, dtype=torch.int64), 0),
        (torch.zeros(3, 0, dtype=torch.int64), None, 3),
        (torch.zeros(0, 4, dtype=torch.int64), None, 0),
    ]:
        weight.grad = None
        out = embedding_bag(ids, weight, offsets, mode=mode)
        assert torch.equal(out, torch.zeros(bags, 3))
        out.sum().backward()
        assert torch.equal(weight.grad, torch.zeros(5, 3))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    samples = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ids, offsets = torch.tensor([1, 5, 1, 0, 2]), torch.tensor([0, 3, 3])

    def f(w, s=None):
        return embedding_bag(ids, w, offsets, mode=mode, per_sample_weights=s, padding_idx=0)

    assert torch.autograd.gradcheck(f, [weight]) and torch.autograd.gradcheck(f, [weight, samples])
    assert torch.autograd.gradgradcheck(f, [weight])
    assert torch.autograd.gradgradcheck(f, [weight, samples])


def test_kernels_are_called(monkeypatch):
    called = []
    layer, samples = lmkern.nn.EmbeddingBag(5, 7, mode="sum"), torch.ones(2, 2, requires_grad=True)
    backward = "sorted_backward" if takes_cuda(samples) else "backward"
    for name in ("forward", backward, "weights_backward"):
        kernels = kernels_of(samples)
        kernel = getattr(kernels, f"embedding_bag_{name}")
        monkeypatch.setattr(
            kernels,
            f"embedding_bag_{name}",
            lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1],
        )
    layer(torch.tensor([[1, 2], [0, 0]]), per_sample_weights=samples).sum().backward()
    assert called == ["forward", backward, "weights_backward"]


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    weight, ids, samples = torch.randn(6, 3), torch.tensor([1, 5, 1, 0]), torch.randn(4)
    op, last = torch.ops.lmkern, {"sum": False, "mean": True, "max": False}[mode]
    bags = (ids, torch.tensor([0, 2, 4]), samples, last, MODES.index(mode), 0)
    torch.library.opcheck(op.embedding_bag_forward.default, (weight, *bags, True))
    out, winners = op.embedding_bag_forward(weight, *bags, True)
    torch.library.opcheck(
        op.embedding_bag_backward.default, (out, winners, *bags, 6, False)
    )  # fmt: skip
    torch.library.opcheck(
        op.embedding_bag_weights_backward.default, (out, winners, weight, *bags)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "sparse"), [*((m, False) for m in MODES), ("sum", True), ("mean", True)]
)
def test_compile_fullgraph(mode, sparse):
    start, ids, offsets = torch.randn(6, 3), torch.tensor([1, 5, 1, 0]), torch.tensor([0, 3])
    grads = []
    for compiled in (True, False):
        weight = start.clone().requires_grad_()

        def f(w):
            return embedding_bag(ids, w, offsets, mode=mode, sparse=sparse).square().sum()

        run = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
        run(weight).backward()
        grads.append(weight.grad.to_dense())
    torch.testing.assert_close(*grads)


def test_functorch():
    weight, batch = torch.randn(6, 3), torch.tensor([[[1, 5], [1, 0]], [[2, 2], [3, 4]]])
    mapped = torch.func.vmap(lambda w: embedding_bag(batch[0], w))(torch.stack([weight, -weight]))
    assert torch.equal(mapped, torch.stack([embedding_bag(batch[0], w) for w in (weight, -weight)]))


def test_nested_input():
    bags = [torch.tensor([1, 2, 3]), torch.tensor([0])]
    nested = torch.nested.nested_tensor(bags, layout=torch.jagged)
    weight = torch.randn(6, 3)
    torch.testing.assert_close(embedding_bag(nested, weight), F.embedding_bag(nested, weight))


def test_max_norm():
    ours, theirs = (
        torch.randn(11, 7, generator=torch.Generator().manual_seed(0)) * 3 for _ in "ab"
    )
    ids = ids_of()
    torch.testing.assert_close(
        embedding_bag(ids, ours, OFFSETS, max_norm=2.0, norm_type=1.0),
        F.embedding_bag(ids, theirs, OFFSETS, max_norm=2.0, norm_type=1.0),
    )
    torch.testing.assert_close(ours, theirs)


def test_layer_is_torchs_but_for_the_bags():
    ours, theirs = (inspect.signature(m.EmbeddingBag).parameters for m in (lmkern.nn, torch.nn))
    assert [(p.name, p.default) for p in theirs.values()] == [
        (p.name, p.default) for p in ours.values() if p.name in theirs
    ]
    options = {"mode": "sum", "padding_idx": -2, "max_norm": 1.0, "include_last_offset": True}
    models = []
    for module in (lmkern.nn, torch.nn):
        torch.manual_seed(1)
        models.append(module.EmbeddingBag(10, 4, **options))
    assert torch.equal(models[0].weight, models[1].weight) and repr(models[0]) == repr(models[1])
    ids, samples = torch.tensor([1, 8, 3, 1]), torch.randn(4)
    outs = [m(ids, torch.tensor([0, 3, 4]), samples) for m in models]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.sum().backward()
    torch.testing.assert_close(models[0].weight.grad, models[1].weight.grad)
    table = torch.randn(5, 2)
    layer = lmkern.nn.EmbeddingBag.from_pretrained(table, mode="max")
    assert torch.equal(layer(torch.tensor([[4, 0]])), table[[4, 0]].amax(0, keepdim=True))


@pytest.mark.usefixtures("fallback_allowed")
def test_without_a_kernel():
    weight = torch.randn(5, 3).to(torch.float64).requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        out = embedding_bag(torch.tensor([[1, 2]]), dual, mode="sum")
        assert torch.autograd.forward_ad.unpack_dual(out).tangent.tolist() == [[2, 2, 2]]


I = torch.tensor


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((I([[1, 10]]),), {}, IndexError, r"index 10 at position \[0, 1\] is out of range for V = 10"),
        ((I([1, -1]), I([0])), {}, IndexError, r"index -1 at position \[1\]"),
        ((I([1]),), {}, ValueError, r"offsets must be given with input \[N\], and only then"),
        ((I([[1]]), I([0])), {}, ValueError, r"offsets must be given with input \[N\], and only then"),
        ((I([[[1]]]),), {}, ValueError, r"input must be \[B, L\] or \[N\], got \[1, 1, 1\]"),
        ((I([1.0]), I([0])), {}, TypeError, "input must be int32 or int64, got torch.float32"),
        ((I([1, 2]), I([0.0])), {}, TypeError, "offsets must be int32 or int64, got float32"),
        ((I([1, 2]), I([[0]])), {}, ValueError, r"offsets must be \[B\], got \[1, 1\]"),
        ((I([1]), I([], dtype=torch.int64)), {"include_last_offset": True}, ValueError, r"offsets must be \[B \+ 1\], got \[0\]"),
        ((I([[1, 2]]),), {"mode": "min"}, ValueError, "mode must be 'sum', 'mean' or 'max', got 'min'"),
        ((I([[1, 2]]),), {"padding_idx": 10}, ValueError, r"padding_idx must be in \[-10, 10\), got 10"),
        ((I([[1, 2]]),), {"per_sample_weights": I([1.0, 2.0])}, ValueError, r"per_sample_weights must be like input = \[1, 2\], got \[2\]"),
        ((I([[1, 2]]),), {"per_sample_weights": I([[1, 2]])}, TypeError, "per_sample_weights must be float32, got int64"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(arguments, options, error, match):
    ids, *offsets = arguments
    for grad in (False, True):
        with pytest.raises(error, match=match) as caught:
            embedding_bag(ids, torch.zeros(10, 4, requires_grad=grad), *offsets, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offsets", "match", "at"),
    [
        ([1], r"offsets\[0\] must be 0, got 1", 0),
        ([0, 2, 1], "offsets must not decrease, got 2 before 1 at position 2", 2),
        ([0, 3], "offsets must not exceed N = 2, got 3", 1),
    ],
    ids=["begin", "decrease", "end"],
)
def test_bad_offsets(offsets, match, at):
    weight, error = torch.zeros(10, 4), ValueError
    if takes_cuda(weight):  # nobody reads them before the kernel does
        match = f"not exceed N = 2, got {offsets[at]} at position \\[{at}\\]"
        error = IndexError
    with pytest.raises(error, match=match):
        embedding_bag(torch.tensor([1, 2]), weight, torch.tensor(offsets))
