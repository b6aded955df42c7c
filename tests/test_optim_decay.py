"""Weight decay of lmkern.optim: what a row owes it pays exactly, whatever the schedule."""

from __future__ import annotations

import copy

import pytest
import torch

from lmkern.optim import SGD, AdamW
from optim_helpers import decayed_adam, random_gradients, run, sparse


@pytest.mark.parametrize(
    "kind", ["falling", "zero at first", "exactly gone", "negative", "growing"]
)
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_catch_up_is_exact_under_any_schedule(optimizer, kind):
    steps, weight_decay = 400, 0.7
    rates = {
        "falling": [0.5 * (1 - t / steps) for t in range(steps)],
        "zero at first": [0.5 * min(1, max(0, t - 5) / 9) for t in range(steps)],
        "exactly gone": [1 / 0.7 if t == 200 else 0.1 for t in range(steps)],
        "negative": [1.99 / 0.7 * (t % 2) for t in range(steps)],
        "growing": [4.5] * steps,
    }[kind]
    start, gradients = torch.randn(9, 5).double(), random_gradients(9, [5], 2, steps=steps)
    gradients = [(rows, g * 1e-3) for rows, g in gradients]
    ours, _ = run(optimizer, start, gradients, rates=rates, weight_decay=weight_decay)
    if optimizer is AdamW:
        expected = decayed_adam(start, gradients, rates, weight_decay)
    else:
        expected = start.clone()
        for (rows, g), lr in zip(gradients, rates, strict=True):
            expected *= 1 - lr * weight_decay
            expected[rows] -= lr * g
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-300)


def test_rows_that_are_never_touched_decay_exactly():
    """Dense decay, step by step in float64, against one factor at the end; float32 rounds once."""
    rates = [3e-4 * (1 + t % 7) for t in range(1000)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-7)):
        start = torch.randn(9, 41).to(dtype)
        gradients = [(torch.tensor([4]), torch.ones(1, 41, dtype=torch.float64))] * 1000
        ours, _ = run(AdamW, start, gradients, rates=rates, weight_decay=0.1)
        expected = start.double()
        for lr in rates:
            expected *= 1 - lr * 0.1
        others = [r for r in range(9) if r != 4]
        error = (ours[others].double() / expected[others] - 1).abs().max()
        assert error < tolerance


def test_a_decay_below_float32s_resolution_is_not_lost():
    """1 - 1e-9 is 1 in float32: a thousand such steps are a factor of 1 - 1e-6 all the same."""
    table = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = SGD([table], lr=1e-4, weight_decay=1e-5)
    for _ in range(1000):
        table.grad = sparse(table, (torch.tensor([0]), torch.zeros(1, 3)))
        optimizer.step()
    optimizer.catch_up()
    torch.testing.assert_close(table[1].detach(), torch.full((3,), 1 - 1e-6), rtol=1e-7, atol=0)


def test_weights_lag_until_they_are_touched_or_caught_up():
    table = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    optimizer = SGD([table], lr=0.1, weight_decay=1.0)

    def step(row):
        table.grad = sparse(table, (torch.tensor([row]), torch.zeros(1, 3)))
        optimizer.step()
        return table[:, 0].tolist()

    assert step(0) == pytest.approx([0.9, 1, 1, 1])
    assert step(1) == pytest.approx([0.9, 0.81, 1, 1])
    table.grad = None
    optimizer.step()  # as with torch: without a gradient, no decay
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert step(2) == pytest.approx([0.9, 0.81, 0.81, 1])
    optimizer.state_dict()
    assert table[:, 0].tolist() == pytest.approx([0.81] * 4)
    optimizer.catch_up()
    assert table[:, 0].tolist() == pytest.approx([0.81] * 4)
    optimizer.param_groups[0]["weight_decay"] = 1.0
    step(3)
    table.grad = torch.zeros(4, 3).double()
    optimizer.step()
    assert table[:, 0].tolist() == pytest.approx([0.81 * 0.81] * 4)


def test_loading_takes_the_weights_as_up_to_date():
    table = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = AdamW([table], lr=0.1, weight_decay=1.0)
    saved = copy.deepcopy(optimizer.state_dict())
    table.grad = sparse(table, (torch.tensor([0]), torch.ones(1, 3)))
    optimizer.step()
    with torch.no_grad():
        table.fill_(1.0)
    optimizer.load_state_dict(saved)
    optimizer.catch_up()
    assert (table == 1).all() and not optimizer.state
