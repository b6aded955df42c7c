"""lmkern.optim: what a step computes, against torch.optim and float64; inputs of every kind."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern import _C
from lmkern.optim import SGD, Adagrad, AdamW, SparseAdam
from optim_helpers import (
    DTYPES,
    decayed_adam,
    dense,
    name,
    random_gradients,
    rowwise_adagrad,
    run,
    sparse,
)
from oracle import EPSILON, relative_error

SIZES = [(9, 41, 7), (41, 59, 9), (7, 111, 7), (300, 1, 41), (50, 16, 1), (70, 513, 40)]
CASES = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "maximize": True}),
    (Adagrad, {"lr": 0.1}),
    (Adagrad, {"lr": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 0.3, "eps": 1e-3}),
    (Adagrad, {"lr": 0.1, "maximize": True}),
    (SparseAdam, {"lr": 0.01}),
    (SparseAdam, {"lr": 0.01, "betas": (0.5, 0.8), "eps": 0.1, "maximize": True}),
]
ALL = [
    (SGD, {}),
    (SGD, {"weight_decay": 0.1}),
    (Adagrad, {}),
    (Adagrad, {"rowwise": True}),
    (SparseAdam, {}),
    (AdamW, {}),
]


def theirs(optimizer):
    return getattr(torch.optim, optimizer.__name__)


def assert_error(ours, peer, exact):
    limit = EPSILON[ours.dtype] + (2 * relative_error(peer, exact) if peer is not None else 0)
    assert relative_error(ours, exact) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("optimizer", "options"), CASES, ids=name)
def test_oracle(isa, optimizer, options, size, dtype):
    rows, width, touched = size
    start = torch.randn(rows, width).to(dtype)
    gradients = [(at, g.to(dtype).double()) for at, g in random_gradients(rows, [width], touched)]
    ours, mine = run(optimizer, start, gradients, **options)
    exact, torchs = run(theirs(optimizer), start.double(), gradients, **options)
    peer, _ = run(theirs(optimizer), start, gradients, **options)
    assert_error(ours, peer, exact)
    for state, expected in zip(mine.state.values(), torchs.state.values(), strict=True):
        assert list(state) == list(expected) and state["step"] == expected["step"]
        assert type(state["step"]) is type(expected["step"])
        for key in set(state) - {"step"}:
            assert state[key].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_error(state[key], None, expected[key])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_adamw(isa, size, dtype):
    rows, width, touched = size
    start, rates = torch.randn(rows, width).to(dtype), [0.1, 0.01, 0.05, 0.02]
    gradients = [(at, g.to(dtype).double()) for at, g in random_gradients(rows, [width], touched)]
    ours, _ = run(AdamW, start, gradients, rates=rates, weight_decay=0.3)
    exact = decayed_adam(start, gradients, rates, 0.3)
    assert_error(ours, None, exact) if dtype.itemsize > 2 else torch.testing.assert_close(
        ours, exact.to(dtype), atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize("layout", [sparse, dense], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "eps": 0.1, "betas": (0.5, 0.8)}, {"maximize": True}], ids=name)  # fmt: skip
def test_adamw_is_torchs_where_every_row_is_touched(isa, options, dtype, layout):
    start, gradients = torch.randn(9, 41).to(dtype), random_gradients(9, [41], 9)
    gradients = [(at, g.to(dtype).double()) for at, g in gradients]
    ours, _ = run(AdamW, start, gradients, layout, lr=0.02, **options)
    exact, _ = run(torch.optim.AdamW, start.double(), gradients, dense, lr=0.02, **options)
    peer, _ = run(torch.optim.AdamW, start, gradients, dense, lr=0.02, **options)
    assert_error(ours, peer, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (9, 41), (3, 4, 5), (0,), (5, 0), (0, 5)], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (SGD, {"weight_decay": 0.3}),
        (Adagrad, {"weight_decay": 0.3, "lr_decay": 0.1}),
        (AdamW, {"weight_decay": 0.3}),
    ],
    ids=name,
)
def test_dense_gradient_is_torchs(isa, optimizer, options, shape, dtype):
    start = torch.randn(shape).to(dtype)
    gradients = [torch.randn(shape).to(dtype) for _ in range(3)]
    results = []
    for kind, wide in ((optimizer, False), (theirs(optimizer), True), (theirs(optimizer), False)):
        p = torch.nn.Parameter(start.double() if wide else start.clone())
        instance = kind([p], lr=0.1, **options)
        for g in gradients:
            p.grad = g.to(p.dtype)
            instance.step()
        results.append(p.detach())
    assert_error(results[0], results[2], results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [sparse, dense], ids=["sparse", "dense"])
@pytest.mark.parametrize("shape", [(9, 41), (7, 3, 5), (6,)], ids=str)
def test_rowwise_adagrad(isa, shape, layout, dtype):
    touched = 5 if layout is sparse else shape[0]
    start, gradients = torch.randn(shape).to(dtype), random_gradients(shape[0], shape[1:], touched)
    ours, optimizer = run(Adagrad, start, gradients, layout, lr=0.1, eps=1e-3, rowwise=True)
    assert_error(ours, None, rowwise_adagrad(start, gradients, 0.1, 1e-3))
    assert next(iter(optimizer.state.values()))["sum"].shape == shape[:1]


def test_rowwise_adagrad_in_16_bits(isa):
    start, gradients = torch.randn(9, 41), random_gradients(9, [41], 5)
    exact = rowwise_adagrad(start, gradients, 0.1, 1e-10)
    for dtype in DTYPES[2:]:
        ours, _ = run(Adagrad, start.to(dtype), gradients, lr=0.1, rowwise=True)
        torch.testing.assert_close(ours, exact.to(dtype), atol=0.02, rtol=0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 70), st.floats(0, 1), st.sampled_from(ALL), st.booleans())
def test_any_size_and_the_reference(rows, width, fraction, case, with_decay):
    """The kernels, against the plain torch operations that run where there is no kernel."""
    optimizer, options = case
    if with_decay and "rowwise" not in options and optimizer in (SGD, AdamW):
        options = {**options, "weight_decay": 0.5}
    start = torch.randn(rows, width, dtype=torch.float64)
    gradients = random_gradients(rows, [width], round(fraction * rows), seed=rows)
    ours, _ = run(optimizer, start, gradients, lr=0.1, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmkern.ops.embedding_optimizer, "use_kernel", lambda *_, **__: False)
        plain, _ = run(optimizer, start, gradients, lr=0.1, **options)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.cpu_only
@pytest.mark.parametrize(("optimizer", "options"), ALL, ids=name)
def test_kernels_are_called(monkeypatch, optimizer, options):
    called = []
    for rule in ("embedding_sgd", "embedding_adagrad", "embedding_adam"):
        kernel = getattr(_C, rule)
        monkeypatch.setattr(_C, rule, lambda *a, n=rule, k=kernel: (called.append(n), k(*a))[1])
    _, instance = run(optimizer, torch.randn(5, 7), random_gradients(5, [7], 2, steps=1), **options)
    rule = {SGD: "sgd", Adagrad: "adagrad"}.get(optimizer, "adam")
    owes = instance.param_groups[0].get("weight_decay", 0) > 0
    assert called == [f"embedding_{rule}"] + ["embedding_sgd"] * owes


@pytest.mark.parametrize(("optimizer", "options"), ALL, ids=name)
def test_untouched_rows_keep_their_bits(optimizer, options):
    parameter = torch.nn.Parameter(torch.randn(50, 41))
    parameter.data[3] = float("inf")
    before = parameter.detach().clone()
    instance = optimizer([parameter], **options)
    parameter.grad = sparse(parameter, (torch.tensor([44, 7]), torch.randn(2, 41)))
    instance.step()
    changed = (parameter != before).any(1).nonzero().flatten().tolist()
    assert changed == [7, 44]
    for key, value in instance.state[parameter].items():
        if key != "step":
            assert value.reshape(50, -1).any(1).nonzero().flatten().tolist() == [7, 44]


@pytest.mark.parametrize(("optimizer", "options"), ALL, ids=name)
def test_hot_rows_of_an_embedding(optimizer, options):
    """Repeated ids are summed before the rule, which is not linear; padding stays."""
    ids = torch.tensor([[3, 3, 3, 0], [8, 3, 5, 0]])
    tables = []
    for sparse_gradient in (True, False):
        torch.manual_seed(1)
        table = torch.nn.Embedding(9, 41, padding_idx=0, sparse=sparse_gradient)
        instance = optimizer(table.parameters(), **options)
        for _ in range(2):  # the gradient of two backward passes
            (table(ids) * torch.arange(8.0).view(2, 4, 1)).sum().backward()
        if not sparse_gradient:
            table.weight.grad = table.weight.grad.to_sparse(1)
        instance.step()
        assert not table.weight[0].any()
        tables.append(table.weight.detach())
    torch.testing.assert_close(*tables)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 41, 50), (300, 59, 3000), (70000, 3, 400)], ids=str)
@pytest.mark.parametrize("optimizer", [SGD, Adagrad, SparseAdam])
def test_repeated_rows(isa, optimizer, size, dtype):
    """Gradients in the order of the ids, some rows with hundreds: as torch, which sums them first."""
    rows, width, count = size
    start = torch.randn(rows, width).to(dtype)
    gradients = [
        (
            rows - (torch.rand(count) ** -1.5).long().clamp(max=rows),
            torch.randn(count, width).to(dtype),
        )
        for _ in range(3)
    ]
    ours, _ = run(optimizer, start, gradients, lr=0.1)
    exact, _ = run(theirs(optimizer), start.double(), gradients, lr=0.1)
    peer, _ = run(theirs(optimizer), start, gradients, lr=0.1)
    assert_error(ours, peer, exact)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize(("optimizer", "options"), ALL, ids=name)
def test_same_bits_for_any_thread_count(optimizer, options, repeated):
    start, gradients = torch.randn(2000, 96), random_gradients(2000, [96], 1500)
    if repeated:
        gradients = [(rows % 700, g) for rows, g in gradients]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            weight, instance = run(optimizer, start, gradients, **options)
            state = next(iter(instance.state.values()), {})
            results.append([weight, *(v for k, v in state.items() if k != "step")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("optimizer", "options"), ALL, ids=name)
@pytest.mark.parametrize("kind", ["transposed", "rows of a wider table", "every third", "permuted"])
def test_strided_parameters(kind, optimizer, options):
    shape = (9, 4, 5) if kind == "permuted" else (9, 20)
    base = {
        "transposed": lambda: torch.randn(20, 9).t(),
        "rows of a wider table": lambda: torch.randn(9, 33)[:, 5:25],
        "every third": lambda: torch.randn(9, 60)[:, ::3],
        "permuted": lambda: torch.randn(4, 9, 5).transpose(0, 1),
    }[kind]()
    gradients = random_gradients(9, shape[1:], 4)
    expected, _ = run(optimizer, base.contiguous(), gradients, **options)
    parameter = base.detach().requires_grad_()
    instance = optimizer([parameter], **options)
    for g in gradients:
        parameter.grad = sparse(parameter, g)
        instance.step()
    instance.catch_up()
    assert parameter.stride() == base.stride() and parameter.data_ptr() == base.data_ptr()
    assert torch.equal(parameter.detach(), expected)


@pytest.mark.cpu_only("a GPU has no memory that nothing touches")
def test_offsets_beyond_32_bits():
    """Rows at the end of 4 GiB that are never touched, and so never become memory."""
    weight = torch.empty((1 << 20) + 1, 2048, dtype=torch.bfloat16)
    rows = torch.tensor([0, 1 << 20])
    weight[rows] = 1.0
    _C.embedding_sgd(weight, rows, torch.ones(2, 2048, dtype=torch.bfloat16), 1.0, None, 1.0, 0.5)
    assert (weight[rows] == 0.5).all()


@pytest.mark.parametrize(("optimizer", "options"), ALL, ids=name)
def test_signature_is_torchs(optimizer, options):
    ours, torchs = (inspect.signature(o).parameters for o in (optimizer, theirs(optimizer)))
    assert list(ours)[: len(torchs)] == list(torchs)
    assert all(ours[p].default == q.default and ours[p].kind == q.kind for p, q in torchs.items())
    assert set(list(ours)[len(torchs) :]) <= {"rowwise"}
