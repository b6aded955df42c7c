"""Checkpoints: killed, interrupted, resumed, damaged, and no room for them."""

import errno
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError

from lm_helpers import (
    assert_same_weights,
    fit,
    log_rows,
    python_environment,
    run_python,
    tiny_config,
    tiny_data,
    tiny_model,
)
from lmkern.data import TokenData
from lmkern.files import read_json
from lmkern.models import load_pretrained
from lmkern.train import Trainer
from lmkern.train.checkpoint import (
    list_checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
    random_tensors,
    resolve_model_directory,
    restore_random,
)

pytestmark = pytest.mark.cpu_only("runs commands and trainers that choose their device")

each_family = pytest.mark.parametrize("family", ["gpt", "lstm"])


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps device and precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("family", ["gpt", "lstm", "awd"])
def test_killed_at_any_moment_and_resumed_is_bit_identical(family, tmp_path):
    driver = Path(__file__).with_name("lm_kill.py")
    done = subprocess.run(
        [sys.executable, str(driver), family, str(tmp_path)],
        capture_output=True,
        text=True,
        env=python_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["points"] >= 24 and result["failures"] == []


@each_family
def test_resume_in_the_same_process(family, tmp_path):
    options = {"schedule": "constant", "optimizer": "sgd", "learning_rate": 0.1}
    whole, _ = fit(family, tmp_path / "whole", max_steps=9, **options)
    fit(family, tmp_path / "parts", max_steps=5, **options)
    model, result = fit(family, tmp_path / "parts", max_steps=9, resume=True, **options)
    assert result.step == 9
    assert_same_weights(model, whole)
    _, result = fit(family, tmp_path / "parts", max_steps=9, resume=True, **options)
    assert (result.step, result.train_loss) == (9, None)  # there was nothing left to do
    with pytest.raises(FileExistsError, match="resume"):
        fit(family, tmp_path / "parts")
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        fit(family, tmp_path / "nothing", resume=True)
    assert fit(family, tmp_path / "nothing", resume="auto")[1].step == 8


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_size": 4}, "batch_size was 3, now it is 4"),
        ({"seed": 5}, "seed"),
        ({"sequence_length": 5}, "sequence_length"),
        ({"optimizer": "sgd"}, "optimizer"),
    ],
)
def test_resume_refuses_another_run(options, word, tmp_path):
    fit("lstm", tmp_path, max_steps=3)
    with pytest.raises(ValueError, match=word):
        fit("lstm", tmp_path, resume=True, **options)
    data = tiny_data()
    other = TokenData(data.train, data.val, source="other", key="other")
    with pytest.raises(ValueError, match="another text"):
        fit("lstm", tmp_path, other, resume=True)
    with pytest.raises(ValueError, match="not the weights of this GPT"):
        fit("gpt", tmp_path, resume=True)
    assert fit("lstm", tmp_path, resume=True, learning_rate=0.5, max_steps=5)[1].step == 5


def test_keeps_the_newest_and_the_best(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.7, 2.8])
    original = Trainer.evaluate

    def scripted(self):
        result = original(self)
        return type(result)(next(losses), 1.0, result.tokens)

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    _, result = fit("lstm", tmp_path, max_steps=12, eval_every=2, save_every=1, keep_last=3)
    steps = [step for step, _ in list_checkpoints(tmp_path / "checkpoints")]
    assert steps == [4, 10, 11, 12]
    assert (result.best_step, result.best_val_loss, result.val_loss) == (4, 1.0, 2.8)
    assert resolve_model_directory(tmp_path).name == "step-00000004"
    newest = tmp_path / "checkpoints" / "step-00000012"
    assert resolve_model_directory(newest) == newest
    assert read_json(newest / "trainer.json")["best_step"] == 4
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        resolve_model_directory(tmp_path / "nowhere")


def test_checkpoint_is_a_pretrained_model(tmp_path):
    model, result = fit("gpt", tmp_path, max_steps=3)
    assert_same_weights(model, load_pretrained(result.checkpoint, backend="torch"))


def test_damaged_and_unfinished_checkpoints_are_passed_over(tmp_path, capsys):
    whole, _ = fit("lstm", tmp_path / "whole")
    fit("lstm", tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    newest = list_checkpoints(root)[-1][1]
    content = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(content[:-7])
    (root / ".tmp-step-00000099-abc").mkdir()
    model, result = fit("lstm", tmp_path / "run", resume=True)
    assert result.step == 8
    assert_same_weights(model, whole)
    assert "skipping a damaged checkpoint" in capsys.readouterr().err
    assert not list(root.glob(".tmp*"))
    assert [row["step"] for row in log_rows(tmp_path / "run")] == list(range(1, 9))
    for _, path in list_checkpoints(root):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoints are damaged"):
        fit("lstm", tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["model", "optimizer", "rank-0", "trainer.json"])
def test_full_disk_keeps_the_previous_checkpoint(name, tmp_path, monkeypatch):
    import safetensors.torch

    import lmkern.files

    whole, _ = fit("lstm", tmp_path / "whole")
    original_save, original_json = safetensors.torch.save_file, lmkern.files.json.dumps

    def save_file(tensors, path, metadata):
        if name in path and "step-00000006" in path:
            Path(path).write_bytes(b"half of it")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        original_save(tensors, path, metadata)

    def dumps(value, **options):
        if name == "trainer.json" and isinstance(value, dict) and value.get("best_step") == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original_json(value, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    monkeypatch.setattr(lmkern.files.json, "dumps", dumps)
    with pytest.raises(OSError) as caught:
        fit("lstm", tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("checkpoint of step 6 not saved to ") and "\n" not in message
    assert "No space left on device; the last one is " in message and "step-00000003" in message
    root = tmp_path / "run" / "checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    model, _ = fit("lstm", tmp_path / "run", resume=True)
    assert_same_weights(model, whole)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_not_a_number_stops_before_anything_is_overwritten(what, tmp_path):
    model = tiny_model("lstm")
    trainer = Trainer(model, tiny_data(), tiny_config(), tmp_path, quiet=True)
    calls = []

    def poison(module, inputs, outputs):
        if module.training:
            calls.append(1)
            if len(calls) == 5:
                if what == "loss":
                    return outputs[0] * math.nan, outputs[1]
                outputs[0].register_hook(lambda gradient: gradient * math.inf)
        return outputs

    model.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=f"{what} is (nan|inf) at step 5; the last") as e:
        trainer.fit()
    assert "step-00000003" in str(e.value)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [3]
    assert [row["step"] for row in log_rows(tmp_path)] == [1, 2, 3, 4]


def test_random_state_round_trip():
    random.gauss(0, 1)
    np.random.normal()
    saved = random_tensors()

    def draws():
        return [random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(3).tolist()]

    first = draws()
    assert draws() != first
    restore_random(saved)
    assert draws() == first


def test_a_half_written_log_line_is_dropped(tmp_path):
    fit("lstm", tmp_path, max_steps=5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    fit("lstm", tmp_path, resume=True)
    assert [row["step"] for row in log_rows(tmp_path)] == list(range(1, 9))
    assert log_rows(tmp_path)[5]["loss"] != 1.0


def test_a_signal_saves_and_says_how_to_go_on(tmp_path):
    code = """
import os, signal, sys
from lm_helpers import *
from lmkern.train import Trainer, Updater
original = Updater.accumulate_gradient
def interrupted(self, *args):
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args)
Updater.accumulate_gradient = interrupted
print(Trainer(tiny_model("lstm"), tiny_data(), tiny_config(), sys.argv[1]).fit().interrupted)
"""
    done = run_python(code, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    last, interrupted = done.stdout.splitlines()[-2:]
    assert last.startswith("stopped by SIGTERM after step 5, saved ") and "resume" in last
    assert interrupted == "SIGTERM"
    model, _ = fit("lstm", tmp_path / "run", resume=True)
    assert_same_weights(model, fit("lstm", tmp_path / "whole")[0])


def test_optimizer_buffers_of_the_wrong_size_are_refused():
    """torch's fused AdamW would read and write past the end of a short buffer."""
    weight = torch.nn.Parameter(torch.randn(1000))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    names = {weight: "w"}
    good = optimizer_tensors(optimizer, names)
    load_optimizer_tensors(optimizer, good, names)
    with pytest.raises(ValueError, match=r"'w.exp_avg' must have shape \[1000\], got \[3\]"):
        load_optimizer_tensors(optimizer, {**good, "w.exp_avg": torch.zeros(3)}, names)
    with pytest.raises(ValueError, match="another model"):
        load_optimizer_tensors(optimizer, {"v.step": torch.zeros(())}, names)
