"""What a run tells: log.jsonl with one row per step, and progress on the terminal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ..files import atomic_file


class StepLog:
    """Appends one JSON object per step; opening it drops the rows after `last_step`.

    A killed run has logged steps that its newest checkpoint does not know. They are done again
    after resuming, so their old rows (and a half-written last one) go.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [row for row in _rows(path) if row["step"] <= last_step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Forces the rows to the disk: done before a checkpoint, which must not outrun them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the process died
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class Progress:
    """A tqdm bar on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, step: int, max_steps: int, every: int, quiet: bool) -> None:
        self.max_steps = max_steps
        self.every = every
        self.quiet = quiet
        self._seconds_per_token: list[float] = []
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True)

    def update(self, row: dict[str, Any]) -> None:
        """Shows one step's row; evaluations always get a line of their own."""
        self._seconds_per_token.append(1.0 / row["tokens_per_second"])
        due = row["step"] % self.every == 0
        if self._bar is not None:
            self._bar.update(1)
        if not due and "val_loss" not in row:
            return
        # Steps have equally many tokens, so this is the rate since the last time.
        rate = len(self._seconds_per_token) / sum(self._seconds_per_token)
        self._seconds_per_token.clear()
        if self._bar is not None:
            self._bar.set_postfix({"loss": f"{row['loss']:.4f}", "tokens/s": f"{rate:,.0f}"})
        if self._bar is None or "val_loss" in row:
            self.note(_line(row, self.max_steps, rate))

    def note(self, text: str) -> None:
        """One line for people."""
        if self._bar is not None:
            self._bar.write(text)
        elif not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _line(row: dict[str, Any], max_steps: int, rate: float) -> str:
    text = (
        f"step {row['step']:>{len(str(max_steps))}}/{max_steps}  loss {row['loss']:.4f}  "
        f"lr {row['learning_rate']:.2e}  {rate:>9,.0f} tokens/s"
    )
    if "val_loss" in row:
        text += f"  validation loss {row['val_loss']:.4f} perplexity {row['val_perplexity']:.2f}"
    return text
