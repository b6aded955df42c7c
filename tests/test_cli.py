"""The command line: help, configuration, every command, every error as one line."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lm_helpers import python_environment, run_python
from lmkern.cli import main
from lmkern.train import Updater

pytestmark = pytest.mark.cpu_only("runs commands and trainers that choose their device")

TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 60
TINY = {
    "gpt": ["--gpt.n_layer", "1", "--gpt.n_embd", "12", "--gpt.n_head", "2"],
    "lstm": ["--model", "lstm", "--lstm.hidden_size", "12", "--lstm.embedding_dim", "6"],
}
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with input.txt, the current one, with its own token cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMKERN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "input.txt").write_text(TEXT)
    return tmp_path


def train_arguments(*more, family="gpt", steps=6):
    arguments = ["train", "--data.path", "input.txt", "--train.max_steps", str(steps)]
    arguments += ["--train.device", "cpu", "--train.log_every", "2", "--train.eval_every", "4"]
    return [*arguments, *TINY[family], *more]


def fails(capsys, arguments, code, *words):
    """Runs the command, expects exit code `code` and one line on stderr with all `words`."""
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("lmkern: error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error


def test_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "train", "eval", "generate", "info"))
    assert main([]) == 2
    for command in ("demo", "train", "eval", "generate", "info"):
        assert main([command, "--help"]) == 0
        assert f"lmkern {command}" in capsys.readouterr().out


def test_train_help_documents_every_option(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for piece in (
        "--gpt.n_layer N_LAYER number of transformer blocks. (type: int, default: 4)",
        "updates between two checkpoints; 0: one pass over the training text. (type: int, default: 250)",
        "a UTF-8 text file; or a directory with train.txt",
        "--lstm.tie_weights",
        "examples: lmkern train --data.path input.txt",
    ):
        assert piece in text
    # An undocumented option would show its type right after its name.
    assert not re.findall(r"--\w+\.\w+ [A-Z_]+ \(type", text)


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_train_eval_generate(family, workplace, capsys):
    assert main(train_arguments("--out_dir", "run", family=family)) == 0
    output = capsys.readouterr().out
    assert "step 6/6" in output and "best validation loss" in output
    best = float(re.search(r"best validation loss ([\d.]+)", output)[1])

    assert main(["eval", "--checkpoint", "run", "--device", "cpu"]) == 0
    facts = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert float(facts["loss"]) == pytest.approx(best, abs=2e-4)
    assert float(facts["perplexity"]) == pytest.approx(
        2.718281828 ** float(facts["loss"]), rel=1e-3
    )
    (workplace / "other.txt").write_text(TEXT[:500])
    arguments = ["eval", "--checkpoint", "run", "--data.path", "other.txt", "--data.part", "all"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "other.txt (all, 499 tokens)" in capsys.readouterr().out

    arguments = ["generate", "--checkpoint", "run", "--prompt", "the ", "--device", "cpu"]
    arguments += ["--max_new_tokens", "50", "--seed", "1", "--top_k", "5", "--top_p", "0.9"]
    samples = []
    for backend in ("lmkern", "torch"):
        assert main([*arguments, "--backend", backend]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0].startswith("the ") and len(samples[0]) == 4 + 50 + 1
    assert samples[0] == samples[1]


def test_byte_level_bpe(workplace, capsys):
    assert main(train_arguments("--data.tokenizer", "bpe", "--data.vocab_size", "270")) == 0
    assert "of 270 kinds" in capsys.readouterr().out
    arguments = ["generate", "--checkpoint", "out", "--prompt", "日本", "--max_new_tokens", "5"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("日本")


def test_yaml_with_overrides_and_resume(workplace, capsys):
    config = {
        "model": "lstm",
        "out_dir": "run",
        "data": {"path": "input.txt"},
        "lstm": {"hidden_size": 7, "embedding_dim": 5, "num_layers": 1},
        "train": {"max_steps": 999, "learning_rate": 1e-3, "device": "cpu", "batch_size": 3},
    }
    (workplace / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", "--config", "run.yaml", "--train.max_steps", "4"]
    assert main([*arguments, "--lstm.hidden_size", "8"]) == 0
    assert "step 4/4" in capsys.readouterr().out
    fails(capsys, [*arguments, "--lstm.hidden_size", "8"], 1, "run already holds checkpoints")
    again = ["train", "--config", "run/run.json", "--train.resume", "true"]
    assert main([*again, "--train.max_steps", "6"]) == 0
    output = capsys.readouterr().out
    assert "resumed from run/checkpoints/step-00000004" in output and "step 6/6" in output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 3}", ["train", "steps"]),
        ("colour: red", ["colour"]),
        ("train: {max_steps: many}", ["train.max_steps", "many"]),
        ("model: cnn", ["model", "cnn"]),
        ("train: {resume: perhaps}", ["train.resume", "perhaps"]),
        ("gpt: {vocab_size: 10}", ["vocab_size"]),
        ("train: [", ["config"]),
        ("train: {batch_size: 0}", ["batch_size must be >= 1, got 0"]),
        ("gpt: {n_head: 3}", ["n_embd must be a multiple of n_head, got 128 and 3"]),
        ("data: {val_fraction: 2.0}", ["val_fraction", "2.0"]),
    ],
)
def test_wrong_yaml(text, words, workplace, capsys):
    (workplace / "run.yaml").write_text(text)
    fails(capsys, ["train", "--config", "run.yaml"], 2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], ["no command 'fly'"]),
        (["train", "--wings", "2"], ["--wings"]),
        (["train", "--train.max_steps", "1.5"], ["train.max_steps", "1.5"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["eval"], ["checkpoint"]),
        (["eval", "--checkpoint", "x", "--batch_size", "0"], ["--batch_size"]),
        (["demo", "--seconds", "-1"], ["--seconds"]),
        (["info", "--all"], ["--all"]),
    ],
)
def test_wrong_options(arguments, words, capsys):
    fails(capsys, arguments, 2, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["input.txt: no such file"]),
        (b"", ["input.txt: the file is empty"]),
        (b"abc\xff", ["input.txt: not UTF-8: byte 0xff at offset 3"]),
        (b"only thirty characters of text", ["the training part has 27 tokens, at least 65"]),
        (b"x", ["input.txt: too short to split"]),
    ],
)
def test_bad_text(content, words, workplace, capsys):
    path = workplace / "input.txt"
    path.unlink() if content is None else path.write_bytes(content)
    fails(capsys, train_arguments(), 1, *words)


def test_bad_checkpoints_and_prompts(workplace, capsys):
    assert main(train_arguments("--out_dir", "run")) == 0
    capsys.readouterr()
    for command in ("eval", "generate"):
        fails(capsys, [command, "--checkpoint", "nowhere"], 1, "nowhere: no checkpoint here")

    def generate(*more):
        return ["generate", "--checkpoint", "run", "--device", "cpu", *more]

    fails(capsys, generate("--prompt", "Q"), 1, "--prompt: character 'Q' (U+0051) at position 0")
    fails(capsys, generate("--prompt", ""), 1, "--prompt")
    fails(capsys, generate("--temperature", "-1"), 1, "temperature")
    fails(capsys, generate("--top_p", "2"), 1, "top_p")
    fails(capsys, generate("--max_new_tokens", "-2"), 1, "max_new_tokens")
    (workplace / "input.txt").write_text("Ω" * 200)
    fails(capsys, ["eval", "--checkpoint", "run"], 1, "input.txt: ", "Ω", "U+03A9")
    (newest,) = (workplace / "run" / "checkpoints").glob("step-00000006")
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    fails(capsys, ["eval", "--checkpoint", str(newest)], 1, "model.safetensors", "not a complete")
    (newest / "model.safetensors").unlink()
    fails(capsys, ["eval", "--checkpoint", str(newest)], 1, "model.safetensors: no such file")


def test_full_disk_is_one_line(workplace, capsys, monkeypatch):
    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    fails(capsys, train_arguments(), 1, "checkpoint of step 4 not saved", "No space left")
    assert list((workplace / "out" / "checkpoints").iterdir()) == []


def test_diverging_run_is_one_line(workplace, capsys):
    more = ["--train.learning_rate", "1e30", "--train.optimizer", "sgd", "--train.grad_clip", "0"]
    fails(capsys, train_arguments(*more, "--train.warmup_steps", "0"), 1, "at step ", "lower")


def test_ctrl_c_saves_and_exits(workplace):
    arguments = train_arguments("--train.log_every", "1", "--train.save_every", "9999", steps=99999)
    process = subprocess.Popen(
        [sys.executable, "-m", "lmkern.cli", *arguments],
        env=python_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    last = output.splitlines()[-1]
    assert re.match(r"stopped by SIGINT after step \d+, saved out/checkpoints/step-\d+; ", last)
    assert "--train.resume=true" in last and "Traceback" not in errors
    steps = int(re.search(r"after step (\d+)", last)[1]) + 2
    arguments = train_arguments("--train.resume", "true", steps=steps)
    assert main(arguments) == 0


def test_second_ctrl_c_stops_at_once(workplace):
    code = """
import signal, sys
from lmkern import cli
from lmkern.train import Updater
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def twice(self, *arguments):  # to this thread: two for the process may become one
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
Updater.update = twice
sys.exit(cli.main(sys.argv[1:]))
"""
    done = run_python(code, *train_arguments())
    assert (done.returncode, done.stderr) == (130, "lmkern: error: interrupted\n")


def test_info(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and any("torch" in line for line in lines)


@pytest.mark.parametrize("package", ["jsonargparse", "tokenizers"])
def test_missing_extra_is_named(package):
    code = f"""
import sys
sys.modules[{package!r}] = None
from lmkern import cli
assert cli.main(["--help"]) == 0 and cli.main(["info"]) == 0
sys.exit(cli.main(["train"]))
"""
    done = run_python(code)
    expected = rf"lmkern: error: `lmkern \w+` needs {package}: pip install lmkern\[train\]\n"
    assert done.returncode == 1 and re.fullmatch(expected, done.stderr), done.stderr


def test_closed_pipe_is_quiet(workplace):
    assert main(train_arguments("--train.max_steps", "2")) == 0
    arguments = ["generate", "--checkpoint", "out", "--max_new_tokens", "20000", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmkern.cli", *arguments],
        env=python_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 1
    process.stderr.close()


def test_demo(workplace, monkeypatch, capsys):
    monkeypatch.setattr("lmkern.data.corpus.builtin_text", lambda: TEXT + "The end\n")
    assert main(["demo", "--seconds", "0.3", "--out_dir", "pictures"]) == 0
    output = capsys.readouterr().out
    assert (workplace / "pictures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"^(gpt|lstm) +[\d.]+ +[\d.]+ +[\d,]+ +[\d,]+ +[\d.]+x$", output, re.M)
    assert rows == ["gpt", "lstm"]
    assert output.count("--- sample from the") == 2
    assert sorted(path.name for path in (workplace / "pictures").iterdir()) == ["loss.png"]


def parsed(name, *more):
    """What `lmkern train --config configs/NAME` would train, seen just before it would."""
    seen = {}

    def stop(model, data, config, out_dir, **options):
        seen.update(model=model, config=config, data=data)
        raise RuntimeError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmkern.train.Trainer", stop)
        assert main(["train", "--config", str(CONFIGS / name), *more]) == 1
    return seen


def test_shipped_configs(workplace):
    seen = parsed("shakespeare-char.yaml", "--train.max_steps", "7")
    size, how = seen["model"].config, seen["config"]
    assert (size.n_layer, size.n_head, size.n_embd, size.block_size) == (4, 4, 128, 64)
    assert (size.dropout, size.bias) == (0.0, False)
    assert (how.max_steps, how.batch_size, how.warmup_steps) == (7, 12, 100)
    assert (how.learning_rate, how.min_learning_rate, how.beta2) == (1e-3, 1e-4, 0.99)
    assert (how.weight_decay, how.grad_clip, how.eval_every) == (0.1, 1.0, 250)
    gpt = seen["model"].num_parameters
    lstm = parsed("shakespeare-char-lstm.yaml")["model"].num_parameters
    assert abs(lstm / gpt - 1) < 0.05
    seen = parsed("shakespeare-bpe-awd.yaml", "--data.vocab_size", "300")
    size, how = seen["model"].config, seen["config"]
    assert seen["model"].head.weight is seen["model"].embedding.weight
    assert size.variational and min(size.weight_drop, size.rate("hidden"), size.activation_reg) > 0
    assert (how.optimizer, how.averaging) == ("sgd", "nonmonotonic")


needs_data = pytest.mark.skipif(
    "LMKERN_DATA" not in os.environ,
    reason="set LMKERN_DATA to a directory with tinyshakespeare.txt",
)


@needs_data
def test_tinyshakespeare_is_split_as_nanogpt_does(workplace):
    path = str(Path(os.environ["LMKERN_DATA"]) / "tinyshakespeare.txt")
    data = parsed("shakespeare-char.yaml", "--data.path", path)["data"]
    # The figures nanoGPT's prepare.py prints.
    assert (len(data.train), len(data.val)) == (1_003_854, 111_540)
    assert data.tokenizer.vocab_size == 65


@needs_data
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shakespeare-char.yaml", 1.88),  # published
        ("shakespeare-char-lstm.yaml", 1.60),
        ("shakespeare-bpe-awd.yaml", 3.48),  # per BPE token
    ],
)
def test_the_expected_loss_is_reached(name, expected, workplace, capsys):
    path = str(Path(os.environ["LMKERN_DATA"]) / "tinyshakespeare.txt")
    arguments = ["train", "--config", str(CONFIGS / name), "--data.path", path]
    assert main(arguments) == 0
    best = float(re.search(r"best validation loss ([\d.]+)", capsys.readouterr().out)[1])
    assert best < expected + 0.03


@needs_data
@pytest.mark.long
def test_awd_lstm_learns_the_same_on_both_backends(workplace):
    path = str(Path(os.environ["LMKERN_DATA"]) / "tinyshakespeare.txt")
    curves = []
    for backend in ("lmkern", "torch"):
        seen = parsed("shakespeare-bpe-awd.yaml", "--data.path", path, "--backend", backend)
        updater = Updater(seen["model"], seen["data"], seen["config"])
        torch.manual_seed(1)
        curves.append([updater.update()[0] for _ in range(100)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < 6.0 < 6.8 < curves[0][0]
