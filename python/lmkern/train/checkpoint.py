"""Checkpoints: one directory per saved step, complete or absent.

`<out_dir>/checkpoints/step-00000250/` holds
    model.safetensors, config.json   the model, as `from_pretrained` reads it
    tokenizer.json                   where the data has a tokenizer
    iterate.safetensors              where parameters are averaged (then the model holds the
                                     averages): those that the next step starts from
    optimizer.safetensors            `<parameter>.<buffer>` of the optimizer
    rank-0.safetensors               random generators and recurrent state, one file per process
    trainer.json                     step, validation losses, configuration
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from ..files import (
    atomic_directory,
    read_json,
    read_tensors,
    remove_directory,
    write_json,
    write_tensors,
)
from ..models import LanguageModel
from ..models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from .average import WeightAverage

VERSION = 2
META_FILE = "trainer.json"
TOKENIZER_FILE = "tokenizer.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
_ITERATE_FILE = "iterate.safetensors"
_NAME = re.compile(r"step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds besides the weights, read into CPU memory."""

    path: Path
    step: int
    meta: dict[str, Any]
    optimizer: dict[str, Tensor]
    iterate: dict[str, Tensor]
    rank: dict[str, Tensor]

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS_FILE


def checkpoint_root(out_dir: Path) -> Path:
    return out_dir / "checkpoints"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, oldest first."""
    if not root.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def save_checkpoint(
    root: Path,
    step: int,
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    optimizer: dict[str, Tensor],
    ranks: Sequence[dict[str, Tensor]],
    meta: dict[str, Any],
    average: WeightAverage | None = None,
) -> Path:
    """Writes the checkpoint of `step` and returns its directory.

    Raises:
        OSError: it could not be written, for instance because the disk is full; then nothing of
            it is left and older checkpoints are as they were.
    """
    path = root / f"step-{step:08d}"
    averaged = None if average is None else average.count
    head = {"version": VERSION, "step": step, "averaged": averaged}
    try:
        with atomic_directory(path) as temporary:
            if average is not None:
                write_tensors(temporary / _ITERATE_FILE, average.parameters)
            with nullcontext() if average is None else average.applied():
                model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save(temporary / TOKENIZER_FILE)
            write_tensors(temporary / _OPTIMIZER_FILE, optimizer)
            for i, tensors in enumerate(ranks):
                write_tensors(temporary / f"rank-{i}.safetensors", tensors)
            write_json(temporary / META_FILE, {**head, **meta})
    except OSError as error:
        older = [p for _, p in list_checkpoints(root)]
        last = f"the last one is {older[-1]}" if older else "there is no older one"
        reason = error.strerror or str(error)
        raise OSError(f"checkpoint of step {step} not saved to {root}: {reason}; {last}") from error
    return path


def prune(root: Path, keep_last: int, keep_step: int | None) -> None:
    """Removes all checkpoints but the `keep_last` newest and the one of `keep_step`."""
    for step, path in list_checkpoints(root)[:-keep_last]:
        if step != keep_step:
            remove_directory(path)


def read_checkpoint(path: Path, rank: int = 0) -> Checkpoint:
    """Reads one checkpoint directory.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged or of another version.
    """
    meta = read_json(path / META_FILE)
    if meta.get("version") != VERSION:
        raise ValueError(
            f"{path / META_FILE}: version must be {VERSION}, got {meta.get('version')!r}"
        )
    # Read here so that a damaged file is found while there is still an older checkpoint to take.
    read_tensors(path / WEIGHTS_FILE)
    return Checkpoint(
        path=path,
        step=int(meta["step"]),
        meta=meta,
        optimizer=read_tensors(path / _OPTIMIZER_FILE),
        iterate={} if meta["averaged"] is None else read_tensors(path / _ITERATE_FILE),
        rank=read_tensors(path / f"rank-{rank}.safetensors"),
    )


def newest_checkpoint(root: Path, rank: int = 0) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Raises:
        ValueError: there are checkpoints, and every one is damaged.
    """
    found = list_checkpoints(root)
    for _, path in reversed(found):
        try:
            return read_checkpoint(path, rank)
        except (FileNotFoundError, ValueError) as error:
            print(f"skipping a damaged checkpoint: {error}", file=sys.stderr)
    if found:
        raise ValueError(f"{root}: all {len(found)} checkpoints are damaged")
    return None


def resolve_model_directory(path: Path) -> Path:
    """The model directory that `path` means: itself, or the best checkpoint of a run.

    Raises:
        FileNotFoundError: `path` is neither.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    for root in (checkpoint_root(path), path):
        found = dict(list_checkpoints(root))
        if not found:
            continue
        newest = found[max(found)]
        best: Any = read_json(newest / META_FILE).get("best_step")
        return found.get(best, newest)
    raise FileNotFoundError(
        f"{path}: no checkpoint here (expected {CONFIG_FILE}, or checkpoints/step-*)"
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str]
) -> dict[str, Tensor]:
    """The optimizer's buffers as `<parameter>.<buffer>`; `names` gives every parameter's name."""
    return {
        f"{names[parameter]}.{key}": value
        for parameter, buffers in optimizer.state.items()
        for key, value in buffers.items()
        if value is not None
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: dict[Tensor, str]
) -> None:
    """Undoes `optimizer_tensors`; hyperparameters stay those of `optimizer`.

    Raises:
        ValueError: the buffers are of another model.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index = {names[parameter]: i for i, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in index:
            raise ValueError(
                f"the checkpoint's optimizer has a parameter {name!r} of another model"
            )
        # torch's fused optimizers trust these sizes, and write past the end of a short buffer.
        expected = parameters[index[name]].shape
        if key != "step" and tensor.shape != expected:
            raise ValueError(
                f"the checkpoint's optimizer buffer {full_name!r} must have shape "
                f"{list(expected)}, got {list(tensor.shape)}"
            )
        state.setdefault(index[name], {})[key] = tensor
    buffers = {frozenset(entry) for entry in state.values()}
    if state and (len(state) != len(parameters) or len(buffers) != 1):
        raise ValueError("the checkpoint's optimizer lacks buffers of some parameters")
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def random_tensors() -> dict[str, Tensor]:
    """The states of torch's, NumPy's and Python's global generators as tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, python_gauss = random.getstate()
    tensors = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": torch.from_numpy(np.append(keys, [position, has_gauss]).astype(np.int64)),
        "rng.numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "rng.python": torch.tensor([version, *words], dtype=torch.int64),
        "rng.python_gauss": torch.tensor(
            [] if python_gauss is None else [python_gauss], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Puts the global generators back into the states of `random_tensors`."""
    torch.set_rng_state(tensors["rng.torch"])
    words = tensors["rng.numpy"].tolist()
    np.random.set_state(
        (
            "MT19937",
            np.array(words[:-2], dtype=np.uint32),
            words[-2],
            words[-1],
            tensors["rng.numpy_gauss"].item(),
        )
    )
    version, *python_words = tensors["rng.python"].tolist()
    gauss = tensors["rng.python_gauss"].tolist()
    random.setstate((version, tuple(python_words), gauss[0] if gauss else None))
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
