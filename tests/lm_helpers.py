"""Tiny models, corpora and runs shared by the tests of models, data, training and the CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmkern.data import TokenData
from lmkern.models import GPT, GPTConfig, LanguageModel, RecurrentLM, RecurrentLMConfig
from lmkern.train import TrainConfig, Trainer, TrainResult

BACKENDS = ("lmkern", "torch")
FAMILIES = ("gpt", "lstm", "lstm-tied")
VOCAB = 11
# Everything random that an AWD-LSTM has, at rates that leave something to learn with.
AWD: dict[str, Any] = {
    "tie_weights": True,
    "variational": True,
    "dropout_input": 0.2,
    "dropout_hidden": 0.15,
    "dropout_output": 0.1,
    "dropout_embedding": 0.1,
    "weight_drop": 0.3,
    "activation_reg": 2.0,
    "temporal_reg": 1.0,
}


def tiny_model(family: str, backend: Any = "torch", seed: int = 0, **options: Any) -> LanguageModel:
    """A model of a few thousand parameters, the same for the same seed."""
    torch.manual_seed(seed)
    if family == "gpt":
        sizes = {"vocab_size": VOCAB, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 18}
        return GPT(GPTConfig(**{**sizes, **options}), backend=backend)
    sizes = {"vocab_size": VOCAB, "embedding_dim": 9, "hidden_size": 13, "num_layers": 2}
    if family == "lstm-tied":
        sizes |= {"hidden_size": 9, "tie_weights": True}
    if family == "awd":
        sizes |= AWD
    return RecurrentLM(RecurrentLMConfig(**{**sizes, **options}), backend=backend)


def tiny_data(train: int = 403, val: int = 57, vocab_size: int = VOCAB) -> TokenData:
    """Tokens with something to learn: a noisy walk over the vocabulary."""
    steps = np.random.RandomState(0).randint(0, 3, size=train + val)
    tokens = (np.cumsum(steps) % vocab_size).astype(np.uint16)
    return TokenData(train=tokens[:train], val=tokens[train:], source="tiny")


def tiny_config(**options: Any) -> TrainConfig:
    """Eight steps, evaluated and saved every three."""
    defaults: dict[str, Any] = {
        "max_steps": 8,
        "batch_size": 3,
        "sequence_length": 7,
        "warmup_steps": 2,
        "eval_every": 3,
        "save_every": 3,
        "log_every": 100,
        "device": "cpu",
        "tensorboard": False,
    }
    return TrainConfig(**{**defaults, **options})


def fit(
    family: str,
    out_dir: Path,
    data: TokenData | None = None,
    backend: Any = "torch",
    **options: Any,
) -> tuple[LanguageModel, TrainResult]:
    """Trains a tiny model quietly; `options` change `tiny_config`."""
    model = tiny_model(family, backend)
    trainer = Trainer(model, data or tiny_data(), tiny_config(**options), out_dir, quiet=True)
    return model, trainer.fit()


def log_rows(out_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def assert_same_weights(first: LanguageModel, second: LanguageModel) -> None:
    """Fails unless all parameters have the same bits."""
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter that sees the tests and the package."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=python_environment(**environment),
        timeout=120,
    )


def python_environment(**extra: str) -> dict[str, str]:
    """One thread (more would only compete), and this process's import path."""
    here = Path(__file__).parent
    paths = [str(here), *(path for path in sys.path if path)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **extra}
