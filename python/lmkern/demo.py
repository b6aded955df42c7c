"""`lmkern demo`: two small models, trained, timed beside torch's layers, sampled and drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .data import DataConfig, TokenData, load_data
from .generate import generate
from .models import GPT, GPTConfig, LanguageModel, RecurrentLM, RecurrentLMConfig
from .models.pretrained import Backend
from .train import TrainConfig, Trainer, TrainResult, Updater

# The part of a model's time that goes into the comparison; the rest goes into training.
_COMPARISON = 0.3
_BURSTS = 5
_SAMPLE = 300


@dataclass(frozen=True)
class Speed:
    """tokens per second of a training step on each backend, and the median ratio of bursts."""

    lmkern: float
    torch: float
    ratio: float


def build(name: str, vocab_size: int, backend: Backend) -> tuple[LanguageModel, TrainConfig]:
    """The demo's model `name` ("gpt" or "lstm"), freshly initialised, and how to train it."""
    torch.manual_seed(1337)
    if name == "gpt":
        # nanoGPT's setting for a laptop's CPU.
        return GPT(GPTConfig(vocab_size=vocab_size), backend=backend), TrainConfig(
            batch_size=12, learning_rate=1e-3, warmup_steps=20
        )
    config = RecurrentLMConfig(vocab_size=vocab_size, hidden_size=256)
    return RecurrentLM(config, backend=backend), TrainConfig(
        batch_size=32,
        sequence_length=32,
        learning_rate=5e-3,
        min_learning_rate=5e-4,
        warmup_steps=20,
        weight_decay=0.0,
    )


def compare(name: str, data: TokenData, vocab_size: int, seconds: float) -> Speed:
    """Times training steps of the same model on both backends.

    Short bursts of steps alternate, so that a disturbance hits both, and the ratio is the median
    over pairs of bursts; within a pair, the order changes every time.
    """
    updaters: dict[Backend, Updater] = {}
    backends: tuple[Backend, Backend] = ("lmkern", "torch")
    for backend in backends:
        model, config = build(name, vocab_size, backend)
        updaters[backend] = Updater(model, data, config)
        updaters[backend].update()  # first-call work: threads, packed weights, workspaces
    one_step = max(_burst(updater, 1) for updater in updaters.values())
    steps = max(1, int(seconds / (2 * _BURSTS * one_step)))
    times: dict[Backend, list[float]] = {backend: [] for backend in backends}
    for i in range(_BURSTS):
        for backend in backends if i % 2 == 0 else backends[::-1]:
            times[backend].append(_burst(updaters[backend], steps))
    updater = updaters["lmkern"]
    tokens = steps * updater.config.batch_size * updater.sequence_length
    pairs = zip(times["torch"], times["lmkern"], strict=True)
    return Speed(
        lmkern=tokens / statistics.median(times["lmkern"]),
        torch=tokens / statistics.median(times["torch"]),
        ratio=statistics.median(theirs / ours for theirs, ours in pairs),
    )


def run_demo(seconds: float, out_dir: Path) -> int:
    """Runs the demo with about `seconds` per model; returns the exit code."""
    # A missing package is better found before a minute of training than after it.
    import matplotlib.figure  # noqa: F401

    out_dir.mkdir(parents=True, exist_ok=True)
    data = load_data(DataConfig())
    assert data.tokenizer is not None
    vocab_size = data.tokenizer.vocab_size
    print(
        f"text: {data.source}, {len(data.train) + len(data.val):,} characters, "
        f"{vocab_size} kinds; {torch.get_num_threads()} threads"
    )
    speeds: dict[str, Speed] = {}
    results: dict[str, TrainResult] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    samples: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="lmkern-demo-") as scratch_name:
        scratch = Path(scratch_name)
        for name in ("gpt", "lstm"):
            print(f"\n{name}: comparing backends", flush=True)
            speeds[name] = compare(name, data, vocab_size, _COMPARISON * seconds)
            model, config = build(name, vocab_size, "lmkern")
            trainer = _trainer(model, data, config, speeds[name], seconds, scratch / name)
            print(f"{name}: training {model.num_parameters:,} parameters", flush=True)
            results[name] = trainer.fit()
            if results[name].interrupted is not None:
                return 130
            curves[name] = [
                {
                    **json.loads(line),
                    "tokens_per_step": config.batch_size * trainer.updater.sequence_length,
                }
                for line in (trainer.out_dir / "log.jsonl").read_text().splitlines()
            ]
            prompt = torch.tensor(data.tokenizer.encode("The ").tolist())
            prompt = prompt.to(trainer.accelerator.device)[None]
            tokens = generate(model, prompt, _SAMPLE, temperature=0.8, top_k=40, seed=1)
            samples[name] = data.tokenizer.decode(tokens[0].tolist())
    for name, sample in samples.items():
        print(f"\n--- sample from the {name} " + "-" * 40 + f"\n{sample}")
    _draw(curves, out_dir / "loss.png")
    print("\nmodel  validation loss  perplexity   lmkern tokens/s  torch tokens/s  lmkern / torch")
    for name, speed in speeds.items():
        loss = results[name].val_loss
        assert loss is not None
        print(
            f"{name:<5}  {loss:>15.3f}  {math.exp(loss):>10.2f}  {speed.lmkern:>16,.0f}  "
            f"{speed.torch:>14,.0f}  {speed.ratio:>13.2f}x"
        )
    print(f"\nloss curves: {out_dir / 'loss.png'}")
    return 0


def _trainer(
    model: LanguageModel,
    data: TokenData,
    config: TrainConfig,
    speed: Speed,
    seconds: float,
    out_dir: Path,
) -> Trainer:
    """A trainer whose schedule ends after what is left of `seconds`, evaluations included."""
    tokens_per_step = config.batch_size * (config.sequence_length or model.context_size or 64)
    # A tenth is left for evaluations and saving.
    steps = max(10, int(0.9 * (1.0 - _COMPARISON) * seconds * speed.lmkern / tokens_per_step))
    config = dataclasses.replace(
        config,
        max_steps=steps,
        warmup_steps=min(config.warmup_steps, steps // 5),
        eval_every=-(-steps // 4),
        save_every=steps,
        log_every=-(-steps // 8),
        tensorboard=False,
    )
    return Trainer(model, data, config, out_dir)


def _burst(updater: Updater, steps: int) -> float:
    """Seconds that `steps` updates take."""
    if updater.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        updater.update()  # reads the loss, and so waits for the device
    return time.perf_counter() - begin


def _draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss (line) and validation loss (dots) over tokens, one colour per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, (name, rows) in enumerate(curves.items()):
        seen = [row["step"] * row["tokens_per_step"] / 1e6 for row in rows]
        axes.plot(seen, [row["loss"] for row in rows], color=f"C{i}", alpha=0.5, lw=1, label=name)
        dots = [
            (x, row["val_loss"]) for x, row in zip(seen, rows, strict=True) if "val_loss" in row
        ]
        axes.plot(*zip(*dots, strict=True), "o-", color=f"C{i}", label=f"{name}, validation")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
