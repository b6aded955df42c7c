"""The trainer: against a plain loop, in pieces, on several processes, and its logs."""

import itertools
import math
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from lm_helpers import VOCAB, fit, log_rows, python_environment, tiny_config, tiny_data, tiny_model
from lmkern.data import IGNORE, Batch
from lmkern.models import load_pretrained
from lmkern.train import TrainConfig, Trainer, Updater, evaluate
from lmkern.train.config import learning_rate
from lmkern.train.updater import make_optimizer

pytestmark = pytest.mark.cpu_only("runs commands and trainers that choose their device")

each_family = pytest.mark.parametrize("family", ["gpt", "lstm"])


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps device and precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@each_family
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_is_what_a_plain_loop_does(family, optimizer, tmp_path):
    options = {"optimizer": optimizer, "learning_rate": 0.02, "weight_decay": 0.3, "momentum": 0.9}
    data = tiny_data(train=100)  # the LSTM's streams start over after 5 steps
    model, result = fit(family, tmp_path, data, **options)
    config = tiny_config(**options)
    plain = tiny_model(family)
    decayed = [p for p in plain.parameters() if p.ndim >= 2]
    others = [p for p in plain.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": 0.3},
        {"params": others, "weight_decay": 0.0},
    ]
    if optimizer == "sgd":
        stepper = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    else:
        stepper = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    sampler = Updater(tiny_model(family), data, config).sampler
    state = None
    for step in range(config.max_steps):
        batch = sampler.batch(step, 0, config.batch_size)
        if family == "lstm" and batch.reset:
            state = None
        logits, state = plain(batch.inputs, state)
        loss = F.cross_entropy(logits.transpose(1, 2), batch.targets)
        state = None if state is None else tuple(part.detach() for part in state)
        stepper.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), config.grad_clip)
        for group in stepper.param_groups:
            group["lr"] = learning_rate(config, step)
        stepper.step()
        row = log_rows(tmp_path)[step]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-3, atol=1e-5)
    assert result.step == 8 and result.interrupted is None


@each_family
@pytest.mark.parametrize("backend", ["lmkern", "torch"])
def test_the_loss_goes_down(family, backend, tmp_path):
    _, result = fit(family, tmp_path, backend=backend, max_steps=150, learning_rate=0.03)
    # Three equally likely successors: the floor is log(3) = 1.10; at first it is log(11) = 2.40.
    assert log_rows(tmp_path)[0]["loss"] > 2.2
    assert 1.0 < result.val_loss < 1.5
    assert result.best_val_loss <= result.val_loss


@each_family
def test_accumulation_equals_one_big_batch(family, tmp_path):
    def trained(**options):
        torch.manual_seed(0)
        updater = Updater(tiny_model(family), tiny_data(), tiny_config(**options))
        losses = [updater.update()[0] for _ in range(25)]  # past the end of a stream
        return updater.model, losses

    big, big_losses = trained(batch_size=6)
    for batch_size, accumulation in ((2, 3), (3, 2), (1, 6)):
        small, losses = trained(batch_size=batch_size, gradient_accumulation=accumulation)
        assert losses == pytest.approx(big_losses, rel=1e-3)
        for name, parameter in big.named_parameters():
            torch.testing.assert_close(parameter, small.get_parameter(name), rtol=2e-3, atol=2e-4)


def test_accumulation_is_normalised_by_tokens():
    updater = Updater(tiny_model("gpt"), tiny_data(), tiny_config(gradient_accumulation=3))
    tokens = torch.randint(VOCAB, (6, 8))
    targets = tokens[:, 1:].clone()
    targets[1, 2:] = IGNORE
    targets[5, :] = IGNORE
    batches = [Batch(tokens[a:b, :-1], targets[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    count = sum(batch.num_tokens for batch in batches)
    updater.accumulate_gradient(batches, count)
    gradients = {name: p.grad.clone() for name, p in updater.model.named_parameters()}
    updater.model.zero_grad()
    logits, _ = updater.model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
    for name, parameter in updater.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_learning_rate():
    config = TrainConfig(
        max_steps=20, warmup_steps=4, learning_rate=1.0, min_learning_rate=0.2, schedule="cosine"
    )
    rates = [learning_rate(config, step) for step in range(22)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.6)  # half way
    assert rates[20] == rates[21] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[4:21]))
    constant = TrainConfig(max_steps=20, warmup_steps=0, schedule="constant", learning_rate=0.5)
    assert {learning_rate(constant, step) for step in range(30)} == {0.5}
    # Zaremba et al. 2014: four passes at the full rate, then half of the one before, each.
    epoch = TrainConfig(warmup_steps=0, schedule="epoch", learning_rate=1.0, decay_start=4)
    assert [learning_rate(epoch, step, 3) for step in range(21)] == [
        *([1.0] * 12), *([0.5] * 3), *([0.25] * 3), *([0.125] * 3)
    ]  # fmt: skip


def test_only_matrices_decay():
    model = tiny_model("gpt", bias=True)
    decayed, others = make_optimizer(model, tiny_config(weight_decay=0.25)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in others["params"]} == {1}
    count = len(decayed["params"]) + len(others["params"])
    assert count == len(list(model.parameters()))


def test_evaluation_carries_state_only_where_asked():
    data = tiny_data(val=50)
    tokens = torch.from_numpy(data.val.astype(np.int64))[None]
    lstm, gpt = tiny_model("lstm").eval(), tiny_model("gpt").eval()
    with torch.no_grad():
        whole = F.cross_entropy(lstm(tokens[:, :-1])[0][0], tokens[0, 1:])
        windows = [tokens[:, i : i + 11] for i in range(0, 49, 10)]
        sums = [F.cross_entropy(gpt(w[:, :-1])[0][0], w[0, 1:], reduction="sum") for w in windows]
    carried = evaluate(lstm, data.val, sequence_length=10, batch_size=1, carries_state=True)
    assert carried.tokens == 49
    assert carried.loss == pytest.approx(whole.item(), rel=1e-5)
    assert carried.perplexity == pytest.approx(math.exp(whole), rel=1e-5)
    cut = evaluate(gpt, data.val, sequence_length=10, batch_size=3, carries_state=False)
    assert cut.loss == pytest.approx((sum(sums) / 49).item(), rel=1e-5)
    assert cut.tokens == 49


def test_evaluation_is_deterministic_and_leaves_the_mode():
    model = tiny_model("lstm", dropout=0.5).train()
    before = torch.random.get_rng_state()
    results = {
        evaluate(model, tiny_data().val, sequence_length=9, batch_size=2, carries_state=True)
        for _ in range(2)
    }
    assert len(results) == 1 and model.training
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"beta2": 1.0}, "beta2"),
        ({"momentum": 1.0}, "momentum"),
        ({"epochs": 0}, "epochs"),
        ({"lr_decay": -0.5}, "lr_decay"),
        ({"nonmono": -1}, "nonmono"),
        ({"eval_every": -1}, "eval_every"),
        ({"seed": -1}, "seed"),
        ({"sequence_length": 0}, "sequence_length"),
    ],
)
def test_train_config_is_checked(options, word):
    with pytest.raises(ValueError, match=word):
        tiny_config(**options)


def test_data_that_does_not_fit_is_refused():
    def refuses(match, family="gpt", data=None, **options):
        with pytest.raises(ValueError, match=match):
            Updater(tiny_model(family), data or tiny_data(), tiny_config(**options))

    refuses("sequence_length must be at most .* block_size = 12, got 13", sequence_length=13)
    refuses("tiny: the training part has 7 tokens, at least 8", data=tiny_data(train=7))
    refuses("tiny: the training part has 3 tokens", "lstm", data=tiny_data(train=3))
    refuses("tiny: the validation part has 1 tokens", data=tiny_data(val=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    refuses("fp16 needs a GPU", mixed_precision="fp16")


@each_family
@pytest.mark.parametrize("backend", ["lmkern", "torch"])
def test_bfloat16(family, backend, tmp_path):
    options = {"max_steps": 40, "learning_rate": 0.005, "backend": backend}
    _, expected = fit(family, tmp_path / "float32", **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    model = tiny_model(family, backend)
    computed = set()
    layer = model.blocks[0].mlp.out if family == "gpt" else model.layers[0]
    layer.register_forward_hook(
        lambda module, args, y: computed.add((y[0] if isinstance(y, tuple) else y).dtype)
    )
    config = tiny_config(mixed_precision="bf16", max_steps=40, learning_rate=0.005)
    result = Trainer(model, tiny_data(), config, tmp_path / "bf16", quiet=True).fit()
    assert computed == {torch.bfloat16}
    assert result.val_loss == pytest.approx(expected.val_loss, abs=0.03)
    assert result.val_loss != expected.val_loss
    loaded = load_pretrained(result.checkpoint, backend=backend)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit("lstm", tmp_path, tensorboard=True, log_every=2, max_steps=4)
    fit("lstm", tmp_path, tensorboard=True, log_every=2, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 3, 4, 6, 8]
    expected = [row["val_loss"] for row in log_rows(tmp_path) if "val_loss" in row]
    assert [e.value for e in events.Scalars("val_loss")] == pytest.approx(expected)


def test_progress_is_quiet_or_plain_lines(tmp_path, capsys):
    model = tiny_model("lstm")
    Trainer(model, tiny_data(), tiny_config(log_every=4), tmp_path).fit()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["3/8", "4/8", "6/8", "8/8"]
    assert all("tokens/s" in line for line in lines)
    fit("lstm", tmp_path / "quiet")
    assert capsys.readouterr().out == ""


DISTRIBUTED = """
import sys, torch
from lm_helpers import *
from lmkern.train import Trainer
for family in ("gpt", "lstm"):
    for max_steps, resume in ((4, False), (7, True)):
        options = dict(batch_size=2, gradient_accumulation=2, max_steps=max_steps, eval_every=4)
        config = tiny_config(resume=resume, schedule="constant", **options)
        Trainer(tiny_model(family), tiny_data(), config, sys.argv[1] + "/" + family).fit()
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one_with_twice_the_batches(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = []
    for rank in ("0", "1"):
        environment = python_environment(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            ACCELERATE_USE_CPU="true",
        )
        command = [sys.executable, "-c", DISTRIBUTED, str(tmp_path / "two")]
        workers.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    options = {"batch_size": 2, "gradient_accumulation": 4, "max_steps": 7}
    for family in ("gpt", "lstm"):
        one, _ = fit(family, tmp_path / family, schedule="constant", eval_every=4, **options)
        checkpoint = tmp_path / "two" / family / "checkpoints" / "step-00000007"
        two = load_pretrained(checkpoint, backend="torch")
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(parameter, two.get_parameter(name), rtol=1e-3, atol=1e-4)
        losses = [
            [row["loss"] for row in log_rows(p / family)] for p in (tmp_path, tmp_path / "two")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert (checkpoint / "rank-1.safetensors").exists()
