"""Averaged parameters, and what a run counts in passes over the text."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from lm_helpers import (
    assert_same_weights,
    fit,
    log_rows,
    tiny_config,
    tiny_data,
    tiny_model,
)
from lmkern.files import read_json
from lmkern.models import load_pretrained
from lmkern.train import Trainer, Updater, evaluate
from lmkern.train.average import WeightAverage, is_stuck

pytestmark = pytest.mark.cpu_only("runs commands and trainers that choose their device")

SGD = {"optimizer": "sgd", "learning_rate": 2.0, "schedule": "constant", "warmup_steps": 0}


@pytest.fixture(autouse=True)
def fresh_accelerate(one_thread):
    """accelerate keeps device and precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_it_is_the_mean_and_leaves_the_parameters():
    weight = torch.nn.Parameter(torch.zeros(5))
    average = WeightAverage({"weight": weight})
    with average.applied():
        assert torch.equal(weight, torch.zeros(5))
    seen = []
    for _ in range(7):
        with torch.no_grad():
            weight.copy_(torch.randn(5))
        average.update()
        seen.append(weight.detach().clone())
    with average.applied():
        torch.testing.assert_close(weight.detach(), torch.stack(seen).mean(0))
    assert torch.equal(weight, seen[-1])


def test_with_sgd_it_is_torchs_asgd():
    """torch starts its mean one step later: the first of its steps is overwritten."""
    start = torch.randn(4, 3)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    sgd = torch.optim.SGD([ours], lr=0.1)
    asgd = torch.optim.ASGD([theirs], lr=0.1, lambd=0.0, t0=0.0)
    average = None
    for step in range(9):
        for optimizer, weight in ((sgd, ours), (asgd, theirs)):
            optimizer.zero_grad()
            (weight.sin() ** 2).sum().backward()
            optimizer.step()
        if step == 0:
            average = WeightAverage({"w": ours})
        else:
            average.update()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(average.tensors["w"], asgd.state[theirs]["ax"])


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_the_trigger_is_awd_lstms(patience):
    losses = [5.0, 4.0, 3.0, 3.5, 2.9, 3.1, 3.2, 2.8, 3.0, 3.3, 3.4, 3.6, 2.0, 3.0]
    history = []
    for loss in losses:  # main.py of awd-lstm-lm
        expected = len(history) > patience and loss > min(history[:-patience])
        history.append(loss)
        assert is_stuck(history, patience) == expected, history
    assert is_stuck(losses[:11], patience)
    assert [is_stuck([2.0, 1.0, 1.5][:n], 0) for n in (1, 2, 3)] == [False, False, True]


def test_evaluation_and_checkpoints_have_the_average(tmp_path):
    config = tiny_config(averaging="always", eval_every=8, save_every=8, **SGD)
    plain = Updater(tiny_model("lstm"), tiny_data(), tiny_config(**SGD))
    torch.manual_seed(config.seed)
    steps = []
    for _ in range(8):
        plain.update()
        steps.append({name: p.detach().clone() for name, p in plain.model.named_parameters()})
    model = tiny_model("lstm")
    result = Trainer(model, tiny_data(), config, tmp_path, quiet=True).fit()
    assert_same_weights(model, plain.model)  # averaging does not change the training itself
    saved = load_pretrained(result.checkpoint, backend="torch")
    for name, parameter in saved.named_parameters():
        mean = torch.stack([step[name] for step in steps]).mean(0)
        torch.testing.assert_close(parameter, mean, rtol=1e-5, atol=1e-6)
    how = {"sequence_length": 7, "batch_size": 3, "carries_state": True}
    assert evaluate(saved, tiny_data().val, **how).loss == result.val_loss
    assert evaluate(model, tiny_data().val, **how).loss != result.val_loss
    last = load_file(result.checkpoint / "iterate.safetensors")
    assert all(torch.equal(last[name], p) for name, p in model.named_parameters())


def test_a_triggered_average_is_resumed_to_the_bit(tmp_path):
    options = {**SGD, "learning_rate": 8.0, "eval_every": 1, "save_every": 99, "nonmono": 1}
    options["averaging"] = "nonmonotonic"
    whole, expected = fit("lstm", tmp_path / "whole", max_steps=12, **options)
    losses = [row["val_loss"] for row in log_rows(tmp_path / "whole")]
    stuck = [is_stuck(losses[:n], 1) for n in range(1, 13)]
    begin = stuck.index(True) + 1
    assert 2 < begin < 9
    meta = read_json(expected.checkpoint / "trainer.json")
    assert meta["averaged"] == 12 - begin and meta["val_losses"] == losses
    for stop in (begin - 1, begin, begin + 2):
        out_dir = tmp_path / f"{stop}"
        fit("lstm", out_dir, max_steps=stop, **options)
        model, result = fit("lstm", out_dir, max_steps=12, resume=True, **options)
        assert_same_weights(model, whole)
        assert result.val_loss == expected.val_loss
        for name in ("model", "iterate"):
            files = [r.checkpoint / f"{name}.safetensors" for r in (result, expected)]
            assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="averaging was 'nonmonotonic', now it is 'no'"):
        fit("lstm", out_dir, resume=True, **{**options, "averaging": "no"})


def test_a_run_can_be_counted_in_epochs(tmp_path):
    data = tiny_data(train=100)  # 33 tokens a lane: 5 windows of 7
    options = {**SGD, "schedule": "epoch", "lr_decay": 0.25, "decay_start": 2}
    _, result = fit("lstm", tmp_path, data, epochs=4, eval_every=0, save_every=0, **options)
    rows = log_rows(tmp_path)
    assert result.step == len(rows) == 20
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, 15, 20]
    rates = [row["learning_rate"] for row in rows]
    assert rates == [2.0] * 10 + [0.5] * 5 + [0.125] * 5
    windows = Updater(tiny_model("gpt"), data, tiny_config(epochs=2, batch_size=2)).config
    assert windows.max_steps == 2 * math.ceil(99 / 14)


def test_a_loss_per_sequence_has_gradients_as_long():
    norms = {}
    for loss_per in ("token", "sequence"):
        updater = Updater(tiny_model("lstm"), tiny_data(), tiny_config(loss_per=loss_per))
        loss, norms[loss_per], tokens = updater.update()
        assert (tokens, loss) == (21, pytest.approx(2.4, abs=0.2))  # still told per token
    assert norms["sequence"] == pytest.approx(7 * norms["token"], rel=1e-5)
