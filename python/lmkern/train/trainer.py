"""The training loop.

Everything a step depends on is either a function of the step (learning rate, data) or in the
checkpoint (parameters, optimizer, generators, recurrent state), so that a run killed at any
moment and resumed ends with the same bits as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..data.corpus import TokenData
from ..files import remove_stale, write_json
from ..models import LanguageModel
from ..models.pretrained import load_weights
from .average import is_stuck
from .checkpoint import (
    Checkpoint,
    checkpoint_root,
    list_checkpoints,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    prune,
    random_tensors,
    restore_random,
    save_checkpoint,
)
from .config import TrainConfig
from .evaluate import Evaluation, evaluate
from .log import Progress, StepLog
from .stop import StopSignals
from .updater import Updater, make_accelerator

# What decides which numbers a step sees: a resumed run must not change it.
_FIXED_ON_RESUME = (
    "batch_size",
    "gradient_accumulation",
    "sequence_length",
    "optimizer",
    "averaging",
    "seed",
    "mixed_precision",
)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    step: updates done; losses in nats per token, None where not measured; checkpoint: the last
    one saved; interrupted: the signal that stopped the run before its end, if one did.
    """

    step: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    checkpoint: Path | None
    interrupted: str | None


class Trainer:
    """Trains a language model on a tokenized corpus.

    Args:
        model: any model of `lmkern.models`; it is moved to the device and trained in place.
        data: training and validation tokens.
        config: how to train.
        out_dir: receives checkpoints/, log.jsonl and tensorboard/.
        run_config: recorded in out_dir/run.json and every checkpoint, for people, for
            `--config out_dir/run.json` and for `lmkern eval`.
        quiet: print nothing.

    Raises:
        ValueError: the data is too short, or does not fit the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        data: TokenData,
        config: TrainConfig,
        out_dir: str | Path,
        *,
        run_config: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.out_dir = Path(out_dir)
        self.root = checkpoint_root(self.out_dir)
        self.run_config = run_config or {}
        self.data = data
        self.model = model
        self.accelerator = make_accelerator(
            config,
            log_with="tensorboard" if config.tensorboard else None,
            project_dir=self.out_dir,
        )
        self.updater = Updater(model, data, config, self.accelerator)
        self.config = self.updater.config
        self.is_main = self.accelerator.is_main_process
        self.quiet = quiet or not self.is_main
        self.val_losses: list[float] = []
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self.checkpoint: Path | None = None

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.updater.step

    @property
    def val_loss(self) -> float | None:
        """Of the last evaluation."""
        return self.val_losses[-1] if self.val_losses else None

    def fit(self) -> TrainResult:
        """Trains until `max_steps`, or until SIGINT or SIGTERM asks to stop after the step.

        Raises:
            FileExistsError: out_dir holds checkpoints and `resume` is false.
            FileNotFoundError: `resume` is true and there is none.
            ValueError: the checkpoint is of another model, corpus or batch geometry.
            FloatingPointError: the loss or the gradient is not finite; nothing is saved.
            OSError: a file could not be written; earlier checkpoints are intact.
        """
        self._start()
        config = self.config
        train_loss = None
        stopped_by = None
        with self._logs() as (log, progress), StopSignals() as stop:
            while self.step < config.max_steps and stopped_by is None:
                row = self._timed_update()
                train_loss = row["loss"]
                is_last = self.step == config.max_steps
                improved = False
                if is_last or self.step % config.eval_every == 0:
                    improved = self._evaluate(row)
                if log is not None:
                    log.write(row)
                progress.update(row)
                self._track(row)
                stopped_by = self._agreed(stop.received)
                due = self.step % config.save_every == 0
                if is_last or improved or due or stopped_by is not None:
                    if log is not None:
                        log.sync()
                    self.save()
            if self.step == config.max_steps:
                stopped_by = None
            if stopped_by is not None:
                progress.note(
                    f"stopped by {stopped_by} after step {self.step}, saved {self.checkpoint}; "
                    "go on with the same command and --train.resume=true"
                )
        return TrainResult(
            step=self.step,
            train_loss=train_loss,
            val_loss=self.val_loss,
            best_val_loss=self.best_val_loss,
            best_step=self.best_step,
            checkpoint=self.checkpoint,
            interrupted=stopped_by,
        )

    def save(self) -> Path | None:
        """Saves a checkpoint of the current step, then removes old ones.

        Raises:
            OSError: it could not be written; older checkpoints are intact.
        """
        ranks = [self._rank_tensors()]
        if self.accelerator.num_processes > 1:
            ranks = gather_object(ranks)
        if self.is_main:
            scaler = self.accelerator.scaler
            average = self.updater.average
            self.checkpoint = save_checkpoint(
                self.root,
                self.step,
                self.model,
                self.data.tokenizer,
                optimizer_tensors(self.updater.optimizer.optimizer, self._names),
                ranks,
                {
                    "val_losses": self.val_losses,
                    "best_val_loss": self.best_val_loss,
                    "best_step": self.best_step,
                    "num_processes": self.accelerator.num_processes,
                    "data_key": self.data.key,
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "train": dataclasses.asdict(self.config),
                    "run": self.run_config,
                },
                average,
            )
            prune(self.root, self.config.keep_last, self.best_step)
        return self.checkpoint

    def evaluate(self) -> Evaluation:
        """Loss on the validation tokens; every process computes all of it."""
        with self.updater.averaged():
            return evaluate(
                self.model,
                self.data.val,
                sequence_length=self.updater.sequence_length,
                batch_size=self.config.batch_size,
                carries_state=self.model.carries_state,
                max_batches=self.config.eval_batches or None,
            )

    @property
    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _start(self) -> None:
        """Seeds the generators, or takes everything from the newest checkpoint."""
        resume = self.config.resume
        rank = self.accelerator.process_index
        if self.is_main:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            remove_stale(self.root)
        self.accelerator.wait_for_everyone()
        if resume is False and list_checkpoints(self.root):
            raise FileExistsError(
                f"{self.out_dir} already holds checkpoints: go on with --train.resume=true, "
                "or choose another out_dir"
            )
        checkpoint = None if resume is False else newest_checkpoint(self.root, rank)
        if checkpoint is not None:
            self._restore(checkpoint)
            if self.is_main:
                # The run before may have died between saving this one and removing old ones.
                prune(self.root, self.config.keep_last, self.best_step)
        elif resume is True:
            raise FileNotFoundError(f"{self.root}: no checkpoint to resume from")
        if self.is_main and self.run_config:
            write_json(self.out_dir / "run.json", self.run_config)
        # Last of all: nothing between here and the first step may draw a number.
        if checkpoint is not None:
            restore_random(checkpoint.rank)
            return
        seed = self.config.seed + rank
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Takes over everything but the generators' states."""
        meta = checkpoint.meta
        num_processes = self.accelerator.num_processes
        now = {**dataclasses.asdict(self.config), "num_processes": num_processes}
        then = {**meta["train"], "num_processes": meta["num_processes"]}
        for name in (*_FIXED_ON_RESUME, "num_processes"):
            if now[name] != then[name]:
                raise ValueError(
                    f"cannot resume {checkpoint.path}: {name} was {then[name]!r}, "
                    f"now it is {now[name]!r}"
                )
        if meta["data_key"] != self.data.key:
            raise ValueError(
                f"cannot resume {checkpoint.path}: it was trained on another text or tokenizer"
            )
        load_weights(self.model, checkpoint.weights)
        if meta["averaged"] is not None:
            # The model's file has the averages; the parameters themselves are beside it.
            self.updater.start_averaging()
            assert self.updater.average is not None
            self.updater.average.load(checkpoint.iterate, meta["averaged"])
        optimizer = self.updater.optimizer.optimizer
        load_optimizer_tensors(optimizer, checkpoint.optimizer, self._names)
        if self.accelerator.scaler is not None and meta["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(meta["scaler"])
        for i in range(len(self.updater.states)):
            count = sum(name.startswith(f"state.{i}.") for name in checkpoint.rank)
            if count:
                device = self.accelerator.device
                self.updater.states[i] = tuple(
                    checkpoint.rank[f"state.{i}.{j}"].to(device) for j in range(count)
                )
        self.updater.step = checkpoint.step
        self.val_losses = list(meta["val_losses"])
        self.best_val_loss = meta["best_val_loss"]
        self.best_step = meta["best_step"]
        self.checkpoint = checkpoint.path

    def _rank_tensors(self) -> dict[str, Tensor]:
        """What belongs to this process alone: generators and recurrent state."""
        tensors = random_tensors()
        for i, state in enumerate(self.updater.states):
            for j, tensor in enumerate(state or ()):
                tensors[f"state.{i}.{j}"] = tensor.cpu()
        return tensors

    def _timed_update(self) -> dict[str, Any]:
        begin = time.perf_counter()
        rate = self.updater.learning_rate
        try:
            loss, norm, tokens = self.updater.update()
        except FloatingPointError as error:
            raise self._not_finite(str(error)) from None
        return {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            # JSON has no infinity; fp16 training may overflow now and then.
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens_per_second": round(tokens / (time.perf_counter() - begin), 1),
        }

    def _evaluate(self, row: dict[str, Any]) -> bool:
        """Adds the validation loss to `row`; returns whether it is the best so far."""
        result = self.evaluate()
        if not math.isfinite(result.loss):
            raise self._not_finite(f"validation loss is {result.loss} at step {self.step}")
        row["val_loss"] = result.loss
        row["val_perplexity"] = result.perplexity
        self.val_losses.append(result.loss)
        waiting = self.config.averaging == "nonmonotonic" and self.updater.average is None
        if waiting and is_stuck(self.val_losses, self.config.nonmono):
            self.updater.start_averaging()
        if self.best_val_loss is not None and result.loss >= self.best_val_loss:
            return False
        self.best_val_loss, self.best_step = result.loss, self.step
        return True

    def _not_finite(self, what: str) -> FloatingPointError:
        kept = f"the last checkpoint is {self.checkpoint}" if self.checkpoint else "nothing saved"
        return FloatingPointError(f"{what}; {kept}; try a lower learning_rate")

    def _agreed(self, signal_name: str | None) -> str | None:
        """A signal that reached any process stops all of them at the same step."""
        if self.accelerator.num_processes == 1:
            return signal_name
        if self.updater.summed(float(signal_name is not None)) == 0.0:
            return None
        return signal_name or "a signal to another process"

    @contextmanager
    def _logs(self) -> Iterator[tuple[StepLog | None, Progress]]:
        config = self.config
        if config.tensorboard:
            options = {"tensorboard": {"purge_step": self.step + 1}}
            self.accelerator.init_trackers("tensorboard", init_kwargs=options)
        log = StepLog(self.out_dir / "log.jsonl", self.step) if self.is_main else None
        progress = Progress(self.step, config.max_steps, config.log_every, self.quiet)
        if self.step:
            progress.note(f"resumed from {self.checkpoint}")
        try:
            yield log, progress
        finally:
            progress.close()
            if log is not None:
                log.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _track(self, row: dict[str, Any]) -> None:
        if "val_loss" in row or self.step % self.config.log_every == 0:
            values = {key: value for key, value in row.items() if value is not None}
            del values["step"]
            self.accelerator.log(values, step=self.step)
