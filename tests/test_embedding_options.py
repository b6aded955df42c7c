"""max_norm and sparse gradients of lmkern.functional.embedding against torch."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import reference
from lmkern.functional import embedding
from oracle import EPSILON, assert_oracle, relative_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NORMS = [2.0, 1.0, 3.0, 0.5, 0.0, -1.0, math.inf, -math.inf]


def table(rows: int = 11, width: int = 41, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different norms."""
    return (torch.randn(rows, width) * torch.logspace(-2, 1, rows)[:, None]).to(dtype)


def middle(weight: torch.Tensor, norm_type: float) -> float:
    """A max_norm that some rows exceed."""
    return torch.linalg.vector_norm(weight.double(), norm_type, 1).sort().values[3:5].mean().item()


# ---- max_norm in place ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_renormalised_in_place_as_torch(isa, device, norm_type, dtype):
    if device == "cuda" and norm_type not in (1.0, 2.0):
        pytest.skip("torch takes the power of the elements there, not of their magnitudes")
    weight = table(dtype=dtype)
    ids = torch.tensor([[3, 10, 3], [10, 0, 5]])  # 10 twice: it is scaled once
    max_norm = middle(weight, norm_type)
    exact, ours, theirs = weight.double(), weight.clone(), weight.clone()
    F.embedding(ids, exact, max_norm=max_norm, norm_type=norm_type)
    out = embedding(ids, ours, max_norm=max_norm, norm_type=norm_type)
    F.embedding(ids, theirs, max_norm=max_norm, norm_type=norm_type)
    assert torch.equal(out, ours[ids])
    limit = 2 * relative_error(theirs, exact) + EPSILON[dtype]
    assert relative_error(ours, exact) <= limit
    untouched = [v for v in range(11) if v not in ids]
    assert torch.equal(ours[untouched], weight[untouched])


def test_renormalisation_counts_as_a_change_of_the_weight():
    weight = table().requires_grad_()
    y = weight.square().sum()  # saves the weight
    before = weight._version
    embedding(torch.tensor([10]), weight, max_norm=1.0)
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        inference = table()
        embedding(torch.tensor([10]), inference, max_norm=1.0)
        assert inference[10].norm() <= 1.0 + 1e-5


def test_renormalised_in_place_whatever_the_layout():
    base = table(41, 11)
    for view in (base.t(), base[:, ::2], base[1::2]):
        ours, theirs = view.clone(memory_format=torch.preserve_format), view.clone()
        embedding(torch.arange(5), ours, max_norm=0.1)
        F.embedding(torch.arange(5), theirs, max_norm=0.1)
        torch.testing.assert_close(ours, theirs)
    wide = torch.ones(3, 20)
    embedding(torch.tensor([1]), wide[:, ::2], max_norm=1.0)
    assert wide[1, 1::2].eq(1).all() and wide[1, ::2].lt(1).all()


def test_large_elements_and_zero_rows(isa):
    weight = torch.tensor([[1e30, 1e30], [0.0, 0.0], [1e-30, 0.0]])
    out = embedding(torch.arange(3), weight.clone(), max_norm=1.0)
    torch.testing.assert_close(out[0], torch.full((2,), 0.5**0.5))  # its squares overflow
    assert torch.equal(out[1:], weight[1:])


def test_a_layer_with_max_norm_trains_as_torchs():
    torch.manual_seed(1)
    ours = lmkern.nn.Embedding(20, 7, padding_idx=3, max_norm=1.5)
    torch.manual_seed(1)
    theirs = torch.nn.Embedding(20, 7, padding_idx=3, max_norm=1.5)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (ours, theirs)]
    for _ in range(5):
        ids = torch.randint(0, 20, (4, 6))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(ids).square().sum() + model(ids[:1]).sum()).backward()
            optimizer.step()
        torch.testing.assert_close(ours.weight, theirs.weight)


# ---- max_norm on the fly ----------------------------------------------------------------------


def scaled(weight: torch.Tensor, ids: torch.Tensor, **options: float) -> torch.Tensor:
    return embedding(ids, weight, max_norm_mode="functional", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_scaled_lookup_and_its_gradient(isa, norm_type, dtype):
    weight, ids = table(dtype=dtype), torch.tensor([[3, 10, 3], [10, 0, 5]])
    max_norm, before = middle(weight, norm_type), weight.clone()
    assert_oracle(
        lambda w: scaled(w, ids, max_norm=max_norm, norm_type=norm_type),
        lambda w: reference.embedding(ids, w, -1, False, max_norm, norm_type),
        [weight],
    )
    assert torch.equal(weight, before)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"norm_type": 3.0}, {"norm_type": 1.0}], ids=str)  # fmt: skip
def test_scaled_lookup_differentiates(options):
    weight = table(6, 3, torch.float64).requires_grad_()
    ids = torch.tensor([[2, 5], [2, 0]])
    assert torch.autograd.gradcheck(lambda w: scaled(w, ids, max_norm=0.5, **options), [weight])
    assert torch.autograd.gradgradcheck(lambda w: scaled(w, ids, max_norm=0.5, **options), [weight])


def test_scaled_lookup_of_a_weight_that_changes_is_refused():
    weight = table().requires_grad_()
    out = scaled(weight, torch.tensor([10]), max_norm=1.0)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 70), st.lists(st.integers(0, 10**9), max_size=30),
    st.sampled_from(NORMS), st.floats(0.01, 20.0), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_options(rows, width, ids, norm_type, max_norm, by_freq, inplace):
    index = torch.tensor([i % rows for i in ids], dtype=torch.int64)
    mode = "inplace" if inplace else "functional"
    leaves = [table(rows, width, torch.float64).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    if leaves[0].is_cuda and inplace and norm_type != 1.0:
        # Of others torch takes the power of the elements there, not of their magnitudes.
        norm_type = 2.0
    ours = embedding(index, leaves[0], rows - 1, max_norm, norm_type, by_freq, max_norm_mode=mode)
    theirs = reference.embedding(
        index, leaves[1], rows - 1, by_freq, max_norm, norm_type, inplace=inplace
    )
    g = torch.randn_like(ours)
    ours.backward(g)
    theirs.backward(g)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(leaves[0], leaves[1])


# ---- sparse gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1, "scale_grad_by_freq": True}], ids=str)  # fmt: skip
def test_sparse_gradient_is_the_dense_one(isa, options, index, dtype):
    ids = torch.randint(0, 3000, (7, 99), dtype=index).clamp(max=2999 - 40)
    ids[0, :50] = 3
    grads = []
    for sparse in (True, False):
        weight = torch.randn(3000, 59).to(dtype).requires_grad_()
        out = embedding(ids, weight, sparse=sparse, **options)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype))
        grads.append(weight.grad)
    ours, dense = grads
    assert ours.is_sparse and ours.is_coalesced() and ours.dtype == dtype
    found = ours.indices()
    assert found.dtype == torch.int64 and found.shape[0] == 1
    assert torch.equal(found[0], ids[ids != options.get("padding_idx")].unique().long())
    assert torch.equal(ours.to_dense(), dense)
    torch.sparse_coo_tensor(found, ours.values(), ours.shape, check_invariants=True)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)], ids=str)
def test_sparse_gradient_of_any_shape(shape):
    weight = torch.randn(11, 5, requires_grad=True)
    ids = torch.randint(0, 11, shape)
    embedding(ids, weight, sparse=True, max_norm=1.0, max_norm_mode="functional").sum().backward()
    dense = weight.detach().clone().requires_grad_()
    reference.embedding(ids, dense, -1, False, 1.0).sum().backward()
    assert weight.grad.is_coalesced()
    torch.testing.assert_close(weight.grad.to_dense(), dense.grad)


def test_sparse_gradients_accumulate_and_train():
    models = [m.Embedding(30, 6, sparse=True) for m in (lmkern.nn, torch.nn)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SparseAdam(m.parameters()) for m in models]
    for _ in range(3):
        ids = torch.randint(0, 30, (2, 9))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(ids[0]).square().sum() + model(ids[1]).sum()).backward()
            model(ids).sum().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_double_backward_with_sparse():
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 5, 1])
    (first,) = torch.autograd.grad(
        embedding(ids, weight, sparse=True).pow(3).sum(), weight, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    expected = weight.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(
        F.embedding(ids, expected).pow(3).sum(), expected, create_graph=True
    )
    torch.testing.assert_close(
        second.to_dense(), torch.autograd.grad(first.square().sum(), expected)[0]
    )


# ---- everything -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}, {"max_norm": 1.0, "max_norm_mode": "functional", "norm_type": 3.0}], ids=str)  # fmt: skip
def test_compile_fullgraph(options):
    start, ids = table(6, 3), torch.tensor([[1, 5], [1, 0]])
    results = []
    for compiled in (True, False):
        weight = start.clone().requires_grad_()

        def f(w):
            return embedding(ids, w, **options).square().sum()

        run = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
        run(weight).backward()
        results.append((weight.detach(), weight.grad.to_dense()))
    torch.testing.assert_close(results[0], results[1])


def test_functorch():
    weight, batch = table(6, 3), torch.tensor([[1, 5], [1, 0]])
    options = {"max_norm": 0.5, "max_norm_mode": "functional"}
    assert torch.equal(
        torch.func.vmap(lambda i: embedding(i, weight, **options))(batch),
        reference.embedding(batch, weight, -1, False, 0.5),
    )
    grads = torch.func.vmap(
        torch.func.grad(lambda w, i: embedding(i, w, **options).square().sum()), (None, 0)
    )(weight, batch)
    for g, ids in zip(grads, batch, strict=True):
        leaf = weight.clone().requires_grad_()
        embedding(ids, leaf, **options).square().sum().backward()
        torch.testing.assert_close(g, leaf.grad)


def test_layer_options_survive_copies():
    layer = lmkern.nn.Embedding(6, 3, max_norm=1.0, max_norm_mode="functional", sparse=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = other.weight.detach().clone()
        out = other(torch.tensor([1, 2]))
        out.sum().backward()
        assert torch.equal(other.weight, before) and other.weight.grad.is_coalesced()
        assert out.norm(dim=1).max() <= 1 + 1e-5
    pretrained = lmkern.nn.Embedding.from_pretrained(table(), max_norm=1.0, padding_idx=2)
    assert pretrained.max_norm_mode == "inplace" and not pretrained.weight.requires_grad


def test_bad_max_norm_mode():
    with pytest.raises(ValueError, match="max_norm_mode must be 'inplace' or 'functional', got 1"):
        embedding(torch.tensor([1]), torch.zeros(10, 4), max_norm_mode=1)


@pytest.mark.usefixtures("fallback_allowed")
@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}], ids=str)
def test_without_a_kernel(options):
    ours, ids = torch.randn(5, 3, dtype=torch.complex64), torch.tensor([1, 2, 1])
    theirs = ours.clone()
    assert torch.equal(embedding(ids, ours, **options), F.embedding(ids, theirs, **options))
    assert torch.equal(ours, theirs)
