"""Batch order as a pure function of (seed, step): nothing to save, nothing to replay.

Both samplers number the rows of a step's *global* batch (all micro-batches of all processes) and
hand out a slice of it, so the data of a step does not depend on how it is split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# torch.nn.functional.cross_entropy skips targets of this value.
IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """inputs, targets: [B, T] int64 (a target may be IGNORE); reset: forget the carried state."""

    inputs: Tensor
    targets: Tensor
    reset: bool = True

    @property
    def num_tokens(self) -> int:
        """Targets that count in the loss."""
        return int((self.targets != IGNORE).sum())


class Sampler(Protocol):
    """What the trainer asks for: rows [first, last) of the global batch of `step` (from 0).

    steps_per_epoch: steps that read as many tokens as the text has.
    """

    steps_per_epoch: int

    def batch(self, step: int, first: int, last: int) -> Batch: ...


class RandomWindows:
    """Windows of `length` tokens at random places, for models without carried state.

    The places of step n are the n-th block of a counter-based generator (Philox keyed by the
    seed), taken from its raw output: NumPy promises that stream for ever, unlike `integers`.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int, seed: int) -> None:
        self.tokens = tokens
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.num_places = len(tokens) - length
        if self.num_places < 1:
            raise ValueError(_too_short(len(tokens), length))
        self.steps_per_epoch = -(-(len(tokens) - 1) // (length * batch_size))

    def batch(self, step: int, first: int, last: int) -> Batch:
        # The step is the counter's highest word: no two steps ever share a block.
        generator = np.random.Philox(key=self.seed, counter=[0, 0, 0, step])
        uniform = (generator.random_raw(self.batch_size) >> np.uint64(11)) * 2.0**-53
        places = (uniform * self.num_places).astype(np.int64)[first:last]
        return _windows(self.tokens, places, self.length)


class Streams:
    """`batch_size` contiguous readers ("lanes") over the text, for truncated BPTT.

    Lane i reads the i-th of `batch_size` equal stretches; step n reads every lane's n-th window
    of `length` tokens (the last one may be shorter). At the end all lanes start over, with the
    state reset. Up to `batch_size - 1` tokens at the very end of the text are not read.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int) -> None:
        self.tokens = tokens
        self.length = length
        self.batch_size = batch_size
        self.lane = (len(tokens) - 1) // batch_size
        if self.lane < 1:
            raise ValueError(_too_short(len(tokens), batch_size))
        self.steps_per_epoch = -(-self.lane // length)

    def batch(self, step: int, first: int, last: int) -> Batch:
        begin = step % self.steps_per_epoch * self.length
        places = np.arange(first, last) * self.lane + begin
        batch = _windows(self.tokens, places, min(self.length, self.lane - begin))
        return Batch(batch.inputs, batch.targets, reset=begin == 0)


def evaluation_batches(
    tokens: np.ndarray,
    length: int,
    batch_size: int,
    carries_state: bool,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """A fixed sequence of batches that predicts every token but the first exactly once.

    With `carries_state` the text is cut into `batch_size` lanes, read window by window; without,
    into windows of `length` tokens, of which `max_batches` takes evenly spaced ones.

    Raises:
        ValueError: fewer than 2 tokens.
    """
    predicted = len(tokens) - 1
    if predicted < 1:
        raise ValueError(_too_short(len(tokens), 1))
    if carries_state:
        # No lane shorter than one window: many short ones would start without context.
        lanes = max(1, min(batch_size, predicted // length))
        lane = -(-predicted // lanes)
        for i, begin in enumerate(range(0, lane, length)):
            if max_batches is not None and i >= max_batches:
                return
            places = np.arange(lanes) * lane + begin
            yield _padded(tokens, places, min(length, lane - begin), reset=begin == 0)
        return
    places = np.arange(0, predicted, length)
    if max_batches is not None and max_batches * batch_size < len(places):
        chosen = np.linspace(0, len(places) - 1, max_batches * batch_size).astype(np.int64)
        places = places[chosen]
    for begin in range(0, len(places), batch_size):
        yield _padded(tokens, places[begin : begin + batch_size], length, reset=True)


def _windows(tokens: np.ndarray, places: np.ndarray, length: int) -> Batch:
    """Rows tokens[p : p + length] and, as targets, the same one token later."""
    rows = np.asarray(tokens[places[:, None] + np.arange(length + 1)], dtype=np.int64)
    rows_tensor = torch.from_numpy(rows)
    return Batch(rows_tensor[:, :-1], rows_tensor[:, 1:])


def _padded(tokens: np.ndarray, places: np.ndarray, length: int, reset: bool) -> Batch:
    """As `_windows`, but what lies beyond the end of the text is read as 0 and not counted."""
    index = places[:, None] + np.arange(length + 1)
    inside = index < len(tokens)
    rows = np.where(inside, tokens[np.minimum(index, len(tokens) - 1)], 0).astype(np.int64)
    targets = np.where(inside, rows, IGNORE)
    return Batch(torch.from_numpy(rows[:, :-1]), torch.from_numpy(targets[:, 1:]), reset)


def _too_short(have: int, length: int) -> str:
    return f"has {have} tokens, at least {length + 1} are needed"
