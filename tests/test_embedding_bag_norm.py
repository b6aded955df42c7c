"""max_norm_mode="functional" of lmkern.functional.embedding_bag: scaled rows, the weight left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import reference
from lmkern.functional import embedding_bag
from oracle import assert_oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MODES = ["sum", "mean", "max"]


def table(rows: int = 11, width: int = 41, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different norms."""
    return (torch.randn(rows, width) * torch.logspace(-2, 1, rows)[:, None]).to(dtype)


def scaled(ids, weight, offsets=None, max_norm=1.0, norm_type=2.0, **options):
    return embedding_bag(
        ids, weight, offsets, max_norm, norm_type, max_norm_mode="functional", **options
    )


def plain(ids, weight, offsets=None, max_norm=1.0, norm_type=2.0, padding_idx=-1, **options):
    rows = reference.clip_norm(weight, max_norm, norm_type)
    return reference.embedding_bag(ids, rows, offsets, padding_idx=padding_idx, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0])
def test_oracle(isa, norm_type, mode, dtype):
    weight, ids = table(dtype=dtype), torch.tensor([[3, 10, 3], [10, 0, 5], [7, 7, 7]])
    before = weight.clone()
    options = {"mode": mode, "norm_type": norm_type, "padding_idx": 5}
    assert_oracle(lambda w: scaled(ids, w, **options), lambda w: plain(ids, w, **options), [weight])
    assert torch.equal(weight, before)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 30), st.lists(st.integers(0, 10**9), max_size=30),
    st.sampled_from(MODES), st.floats(0.01, 20.0), st.booleans(), st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_any_options(rows, width, ids, mode, max_norm, padded, weighted, by_freq, sparse):
    index = torch.tensor([i % rows for i in ids], dtype=torch.int64)
    offsets = torch.tensor([0, len(ids) // 3, len(ids) // 3, len(ids) // 2])
    samples = torch.rand(len(ids), dtype=torch.float64).requires_grad_() if weighted else None
    results = []
    for f in (scaled, plain):
        torch.manual_seed(1)
        weight = table(rows, width, torch.float64).requires_grad_()
        padding = rows // 2 if padded else None if f is scaled else -1
        extra = {"sparse": sparse} if f is scaled else {}
        out = f(
            index, weight, offsets, max_norm, mode=mode, padding_idx=padding,
            per_sample_weights=samples, scale_grad_by_freq=by_freq, **extra,
        )  # fmt: skip
        wanted = [weight] + [samples] * weighted
        grads = torch.autograd.grad(out.pow(3).sum(), wanted)
        results.append([out.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)])
        assert grads[0].is_sparse == (f is scaled and sparse)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    weight, ids = table(6, 3, torch.float64).requires_grad_(), torch.tensor([[2, 5], [2, 0]])
    samples = torch.rand(2, 2, dtype=torch.float64).requires_grad_()

    def f(w, s):
        return scaled(ids, w, max_norm=0.5, mode=mode, per_sample_weights=s)

    assert torch.autograd.gradcheck(f, [weight, samples])
    assert torch.autograd.gradgradcheck(f, [weight, samples])


@pytest.mark.parametrize("sparse", [False, True])
def test_compile_fullgraph(sparse):
    start, ids = table(6, 3), torch.tensor([[1, 5], [1, 0]])
    results = []
    for compiled in (True, False):
        weight = start.clone().requires_grad_()

        def f(w):
            return scaled(ids, w, sparse=sparse, mode="mean").square().sum()

        run = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
        run(weight).backward()
        results.append(weight.grad.to_dense())
    torch.testing.assert_close(results[0], results[1])


def test_meta_and_layer():
    layer = lmkern.nn.EmbeddingBag(11, 7, max_norm=0.5, mode="sum", max_norm_mode="functional")
    ids = torch.tensor([[1], [3]])
    for other in (layer, copy.deepcopy(layer)):
        before = other.weight.detach().clone()
        assert (other(ids).norm(dim=1) <= 0.5 + 1e-6).all() and torch.equal(other.weight, before)
    assert layer.to("meta")(ids.to("meta")).shape == (2, 7)
    assert lmkern.nn.EmbeddingBag(11, 7).max_norm_mode == "inplace"


def test_bad_arguments():
    with pytest.raises(
        IndexError, match=r"index 12 at position \[1, 0\] is out of range for V = 11"
    ):
        scaled(torch.tensor([[1, 2], [12, 3]]), table())
    with pytest.raises(ValueError, match="embedding_bag: max_norm_mode must be 'inplace' or 'functional', got 'x'"):  # fmt: skip
        embedding_bag(torch.tensor([[1]]), table(), max_norm_mode="x")
