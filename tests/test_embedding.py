"""lmkern.functional.embedding and lmkern.nn.Embedding against torch."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern.functional import embedding
from lmkern.ops.backend import kernels_of, takes_cuda
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (4, 7), (2, 3, 4), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}, {"scale_grad_by_freq": True}], ids=str)  # fmt: skip
def test_oracle(isa, shape, dtype, options):
    weight = torch.randn(11, 41).to(dtype)
    ids = torch.randint(0, 11, shape)
    assert_oracle(
        lambda w: embedding(ids, w, **options), lambda w: F.embedding(ids, w, **options), [weight]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 5), (70, 300, 5000), (3000, 59, 2000)], ids=str)
def test_oracle_sizes(isa, size, index, dtype):
    rows, width, count = size
    ids = torch.randint(0, rows, (count,), dtype=index)
    assert_oracle(
        lambda w: embedding(ids, w),
        lambda w: F.embedding(ids, w),
        [torch.randn(rows, width).to(dtype)],
    )


def test_hot_row(isa):
    ids = torch.zeros(3000, dtype=torch.int64)
    assert_oracle(lambda w: embedding(ids, w), lambda w: F.embedding(ids, w), [torch.randn(5, 64)])


def test_forward_copies_bits():
    weight = torch.randn(9, 5)
    weight[3] = float("nan")
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(embedding(ids, weight).view(torch.int32), weight[ids].view(torch.int32))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 90), st.lists(st.integers(0, 10**9), max_size=60))
def test_any_size(rows, width, ids):
    index = torch.tensor([i % rows for i in ids], dtype=torch.int64)
    weight = torch.randn(rows, width, requires_grad=True)
    out, expected = embedding(index, weight), F.embedding(index, weight)
    assert torch.equal(out, expected)
    g = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(o, weight, g)[0] for o in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_same_bits_for_any_thread_count():
    ids = torch.randint(0, 500, (4000,))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            weight = torch.ones(500, 96, requires_grad=True)
            g = torch.randn(4000, 96, generator=torch.Generator().manual_seed(0))
            embedding(ids, weight).backward(g)
            results.append(weight.grad)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_broadcast_gradient_and_strided_weight():
    weight = torch.randn(41, 20).t().requires_grad_()
    ids = torch.randint(0, 20, (6, 3))
    ours, theirs = embedding(ids, weight), F.embedding(ids, weight)
    assert torch.equal(ours, theirs)
    g = torch.randn(1, 1, 41).expand(6, 3, 41)
    a, b = (torch.autograd.grad(o, weight, g)[0] for o in (ours, theirs))
    torch.testing.assert_close(a, b)
    rows = torch.randn(20, 60)[:, ::3].detach()
    assert torch.equal(embedding(ids, rows), rows[ids])
    assert torch.equal(embedding(ids.t(), rows), rows[ids.t()])


def test_kernels_are_called(monkeypatch):
    called, layer, ids = [], lmkern.nn.Embedding(5, 7), torch.tensor([1, 2])
    backward = "embedding_sorted_backward" if takes_cuda(ids) else "embedding_backward"
    for name in ("embedding_forward", backward):
        kernels = kernels_of(ids)
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, n=name, k=kernel: (called.append(n), k(*a))[1]
        )
    layer(ids).sum().backward()
    assert called == ["embedding_forward", backward]


def test_weight_may_change_between_forward_and_backward():
    table = lmkern.nn.Embedding(5, 3)
    first, second = table(torch.tensor([1])), table(torch.tensor([2]))
    first.sum().backward()
    with torch.no_grad():
        table.weight.add_(1)
    second.sum().backward()
    assert table.weight.grad.sum(1).tolist() == [0, 3, 3, 0, 0]


def test_gradcheck():
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 5], [1, 0]])
    assert torch.autograd.gradcheck(lambda w: embedding(ids, w), [weight])
    for options in ({}, {"padding_idx": 1}):
        assert torch.autograd.gradgradcheck(lambda w, o=options: embedding(ids, w, **o), [weight])


def test_opcheck():
    weight, ids = torch.randn(6, 3), torch.tensor([[1, 5], [1, 0]])
    for norm in ((math.inf, 2.0), (1.0, 3.0)):
        torch.library.opcheck(torch.ops.lmkern.embedding_forward.default, (weight, ids, *norm))
    torch.library.opcheck(torch.ops.lmkern.embedding_renorm_.default, (weight, ids, 1.0, 2.0))
    out = torch.ops.lmkern.embedding_forward(weight, ids, math.inf, 2.0)
    torch.library.opcheck(torch.ops.lmkern.embedding_backward.default, (out, ids, 6, -1, False))


def test_compile_fullgraph():
    weight, ids = torch.randn(6, 3, requires_grad=True), torch.tensor([[1, 5], [1, 0]])
    compiled = torch.compile(
        lambda w: embedding(ids, w).square().sum(), fullgraph=True, backend="aot_eager"
    )
    (ours,) = torch.autograd.grad(compiled(weight), weight)
    (theirs,) = torch.autograd.grad(F.embedding(ids, weight).square().sum(), weight)
    torch.testing.assert_close(ours, theirs)


def test_functorch():
    weight = torch.randn(6, 3)
    batch = torch.tensor([[1, 5], [1, 0]])
    assert torch.equal(torch.func.vmap(lambda i: embedding(i, weight))(batch), weight[batch])


def test_layer_is_torchs_but_for_the_lookup():
    ours, theirs = (inspect.signature(m.Embedding).parameters for m in (lmkern.nn, torch.nn))
    extras = [name for name in ours if name not in theirs]
    assert [(p.name, p.default) for p in theirs.values()] == [
        (p.name, p.default) for p in ours.values() if p.name in theirs
    ]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in extras)
    torch.manual_seed(1)
    ours = lmkern.nn.Embedding(10, 4, padding_idx=-2)
    torch.manual_seed(1)
    theirs = torch.nn.Embedding(10, 4, padding_idx=-2)
    assert torch.equal(ours.weight, theirs.weight) and list(ours.state_dict()) == ["weight"]
    assert ours.padding_idx == theirs.padding_idx and repr(ours) == repr(theirs)
    ids = torch.tensor([[1, 8], [3, 1]])
    ours(ids).sum().backward()
    theirs(ids).sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    table = torch.randn(5, 2)
    assert torch.equal(lmkern.nn.Embedding.from_pretrained(table)(torch.tensor([4])), table[4:])


@pytest.mark.parametrize(
    ("ids", "weight", "error", "match"),
    [
        (torch.tensor([[1, 2], [3, 10]]), torch.zeros(10, 4), IndexError, r"index 10 at position \[1, 1\] is out of range for V = 10"),
        (torch.tensor([-1]), torch.zeros(10, 4), IndexError, r"index -1 at position \[0\]"),
        (torch.tensor(7), torch.zeros(5, 4), IndexError, r"index 7 at position \[\] is out of range for V = 5"),
        (torch.tensor([1.0]), torch.zeros(10, 4), TypeError, "input must be int32 or int64, got torch.float32"),
        (torch.tensor([1]), torch.zeros(10), ValueError, r"weight must be \[V, D\], got \[10\]"),
        ([1], torch.zeros(10, 4), TypeError, "input must be a Tensor, got list"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(10, 4), ValueError, r"input must be on \S+ like weight"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(ids, weight, error, match):
    with pytest.raises(error, match=match) as caught:
        embedding(ids, weight)
    assert "\n" not in str(caught.value)


def test_bad_padding_idx():
    with pytest.raises(ValueError, match=r"padding_idx must be in \[-10, 10\), got 10"):
        embedding(torch.tensor([1]), torch.zeros(10, 4), padding_idx=10)
