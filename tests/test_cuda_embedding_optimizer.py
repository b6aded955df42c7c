"""The CUDA kernels of the optimizers, on the emulator: against the reference in float64, in every mode and
under every schedule."""

from __future__ import annotations

import pytest
import torch

from emulator_helpers import MODULES, SCHEDULES, emulated
from lmkern import reference

pytestmark = pytest.mark.cpu_only("the emulator has its own modules")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RULES = ["sgd", "adagrad", "rowwise_adagrad", "adam"]


@pytest.fixture(params=MODULES)
def kernels(request, monkeypatch):
    yield from emulated(request.param, monkeypatch)


def state_of(rule, V, D, wide, generator):
    def new(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(wide)

    if rule == "sgd":
        return [], ()
    if rule == "adam":
        return [new(V, D), new(V, D)], (0.9, 0.99, 1e-3)
    return [new(V) if rule == "rowwise_adagrad" else new(V, D)], (0.1, 1e-3)


def run(kernels, rule, dtype, V, D, rows, owes=True):
    """What a step makes of the weight and of the state: kernel and float64 reference."""
    generator = torch.Generator().manual_seed(V + D)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    gradient = torch.randn(V if rows is None else len(rows), D, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    touched = torch.rand(V, generator=generator, dtype=torch.float64) / 10 + 0.9 if owes else None
    state, numbers = state_of(rule, V, D, wide, generator)
    name = "embedding_" + rule.replace("rowwise_", "")

    def step(module, convert):
        w, t = convert(weight), None if touched is None else touched.clone()
        s = [convert(x) for x in state]
        getattr(module, name)(w, rows, convert(gradient), -1.0, t, 0.9, 0.05, *s, *numbers)
        return [w, *s, *([] if t is None else [t])]

    return step(kernels, torch.clone), step(reference, lambda x: x.double())


def check(result, dtype):
    ours, exact = result
    for a, b in zip(ours, exact, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(
            a.dtype, 2 * torch.finfo(a.dtype).eps
        )
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("D", [1, 7, 59, 128])
def test_rows_against_float64(kernels, rule, dtype, D):
    rows = torch.tensor([0, 0, 2, 3, 3, 3, 3, 6, 8])
    check(run(kernels, rule, dtype, 9, D, rows), dtype)


@pytest.mark.parametrize("rule", RULES)
def test_all_rows(kernels, rule):
    for owes in (True, False):
        check(run(kernels, rule, torch.float32, 13, 12, None, owes), torch.float32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("D", [256, 257, 300, 777], ids=str)
def test_rows_of_several_segments(kernels, rule, D):
    """Without a debt several warps share a row."""
    for rows in (torch.tensor([0, 0, 2]), None):
        check(run(kernels, rule, torch.float32, 3, D, rows, owes=False), torch.float32)


@pytest.mark.parametrize("rule", RULES)
def test_same_bits_under_every_schedule(kernels, rule):
    rows = torch.tensor([1] * 20 + [2, 4])
    results = []
    for schedule in SCHEDULES:
        kernels.set_schedule(*schedule)
        results.append(run(kernels, rule, torch.float32, 5, 40, rows)[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_decay(kernels):
    weight, touched = torch.ones(4, 6), torch.tensor([1.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    kernels.embedding_sgd(weight, None, None, 1.0, touched, 1.0, 0.0)
    assert weight[:, 0].tolist() == [1.0, 2.0, 1.0, 0.5]
    assert touched.tolist() == [1.0] * 4


def test_a_row_out_of_range_is_named_and_skipped(kernels):
    weight = torch.ones(3, 4)
    rows = torch.tensor([1, 7])
    kernels.embedding_sgd(weight, rows, torch.ones(2, 4), 1.0, None, 1.0, 0.5)
    assert weight.tolist() == [[1.0] * 4, [0.5] * 4, [1.0] * 4]
    assert "index 7 at position [1] is out of range for V = 3" in kernels.take_index_error()


def test_unsorted_rows_are_sorted_first(kernels, monkeypatch):
    from lmkern.ops import embedding_optimizer as ops

    monkeypatch.setattr(ops, "kernels_of", lambda tensor: kernels)
    monkeypatch.setattr(ops, "takes_cuda", lambda tensor: True)
    weight, rows = torch.zeros(4, 3), torch.tensor([2, 0, 2])
    gradient = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 3).contiguous()
    ops.sgd_(ops.Table(weight, (4, 3), rows, gradient, step_size=1.0))
    assert weight[:, 0].tolist() == [-2.0, 0.0, -5.0, 0.0]
