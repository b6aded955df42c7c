"""State of lmkern.optim: to torch.optim and back, resumed runs, states that do not fit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from lmkern.optim import SGD, Adagrad, AdamW, SparseAdam
from optim_helpers import (
    DTYPES,
    EVERY,
    continued,
    dense,
    name,
    random_gradients,
    run,
    sparse,
)


def resumed(optimizer, before, options):
    """A new optimizer with the parameter and the saved state of another."""
    (old,) = before.param_groups[0]["params"]
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    parameter = torch.nn.Parameter(old.detach().clone())
    after = optimizer([parameter], **options)
    after.load_state_dict(torch.load(file, weights_only=True))
    return after, parameter


@pytest.mark.parametrize("direction", ["from torch", "to torch", "both"])
@pytest.mark.parametrize(("optimizer", "options"), EVERY, ids=name)
def test_state_goes_to_torch_and_back(optimizer, options, direction):
    """Three steps of one, three of the other: as six of torch's. Every step touches every row, because
    of rows without a gradient torch.optim.AdamW changes the moments, and we do not."""
    theirs = getattr(torch.optim, optimizer.__name__)
    first, second = {
        "from torch": (theirs, optimizer),
        "to torch": (optimizer, theirs),
        "both": (optimizer, optimizer),
    }[direction]
    start, gradients = torch.randn(9, 41), random_gradients(9, [41], 9, steps=6)
    layout = {theirs: dense if optimizer is AdamW else sparse, optimizer: sparse}
    expected, uninterrupted = run(theirs, start, gradients, layout[theirs], **options)
    _, before = run(first, start, gradients[:3], layout[first], **options)
    after, parameter = resumed(second, before, {"lr": 7.0})
    continued(after, gradients[3:], layout[second])
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6)
    ours, torchs = after.state_dict(), uninterrupted.state_dict()
    assert torchs["param_groups"][0].items() <= ours["param_groups"][0].items()
    assert ours["state"].keys() == torchs["state"].keys()
    for number, state in torchs["state"].items():
        torch.testing.assert_close(ours["state"][number], state, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["load_state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("optimizer", "options"), [*EVERY, (Adagrad, {"lr": 0.1, "rowwise": True})], ids=name
)
def test_a_resumed_run_has_the_same_bits(optimizer, options, dtype, how):
    start, gradients = torch.randn(9, 41).to(dtype), random_gradients(9, [41], 4, steps=6)
    # The uninterrupted run catches up at the same place: one factor rounds otherwise than two.
    _, reference = run(optimizer, start, gradients[:3], **options)
    continued(reference, gradients[3:])
    _, before = run(optimizer, start, gradients[:3], **options)
    if how == "load_state_dict":
        after, _ = resumed(optimizer, before, options)
    elif how == "pickle":
        after = pickle.loads(pickle.dumps(before))
    else:
        after = copy.deepcopy(before)
    continued(after, gradients[3:])
    (ours,), (expected,) = (o.param_groups[0]["params"] for o in (after, reference))
    assert torch.equal(ours, expected)
    for state, saved in zip(after.state.values(), reference.state.values(), strict=True):
        assert all(
            v == saved[k] if k == "step" else v.dtype == saved[k].dtype and torch.equal(v, saved[k])
            for k, v in state.items()
        )


def test_load_hooks_see_what_is_loaded():
    _, before = run(AdamW, torch.randn(5, 3).bfloat16(), random_gradients(5, [3], 5))
    after = AdamW([torch.nn.Parameter(torch.zeros(5, 3).bfloat16())])
    seen = []

    def replace(_, state):
        state["state"] = {0: {**state["state"][0], "exp_avg": torch.full((5, 3), 1 + 2**-20)}}
        return state

    after.register_load_state_dict_pre_hook(replace)
    after.register_load_state_dict_post_hook(lambda o: seen.append(next(iter(o.state.values()))))
    after.load_state_dict(before.state_dict())
    assert (seen[0]["exp_avg"] == 1 + 2**-20).all()


@pytest.mark.parametrize(
    ("optimizer", "ours", "theirs", "match"),
    [
        (SGD, {}, {"momentum": 0.9}, "momentum=0.9 is not supported"),
        (AdamW, {}, {"amsgrad": True}, "amsgrad=True is not supported"),
        (
            Adagrad,
            {"rowwise": True},
            {},
            r"sum of parameter 0 of group 0 must be \[5\], got \[5, 3\]",
        ),
    ],
    ids=name,
)
def test_states_that_do_not_fit(optimizer, ours, theirs, match):
    peer = getattr(torch.optim, optimizer.__name__)
    _, before = run(peer, torch.ones(5, 3), random_gradients(5, [3], 5), dense, **theirs)
    after = optimizer([torch.nn.Parameter(torch.ones(5, 3))], lr=0.5, **ours)
    with pytest.raises(ValueError, match=match):
        after.load_state_dict(before.state_dict())
    assert not after.state and after.param_groups[0]["lr"] == 0.5


def test_states_of_another_model():
    _, before = run(SparseAdam, torch.ones(5, 3), random_gradients(5, [3], 5))
    after = SparseAdam([torch.nn.Parameter(torch.ones(6, 3))])
    with pytest.raises(
        ValueError, match=r"exp_avg of parameter 0 .* must be \[6, 3\], got \[5, 3\]"
    ):
        after.load_state_dict(before.state_dict())
    saved = before.state_dict()
    del saved["state"][0]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"exp_avg_sq of parameter 0 .* got None"):
        before.load_state_dict(saved)
