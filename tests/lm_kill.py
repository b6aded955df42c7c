"""Kills training runs at many points with SIGKILL, resumes them, compares with a whole run.

    python lm_kill.py FAMILY DIRECTORY

Every run is a forked child of this script. A run that is to die counts its parameter updates and
its file operations (fsync, rename, replace), and kills itself at the n-th. Prints one JSON object:
how many points were tried, and the points after which something differed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from lm_helpers import tiny_config, tiny_data, tiny_model
from lmkern.train import Trainer
from lmkern.train import updater as updater_module

MAX_STEPS = 8


def train(family: str, out_dir: Path) -> None:
    options: dict[str, object] = {"gradient_accumulation": 2}
    if family == "awd":  # averaging begins in the middle of the run
        options |= {"optimizer": "sgd", "learning_rate": 8.0, "eval_every": 1}
        options |= {"averaging": "nonmonotonic", "nonmono": 1}
    model = tiny_model(family, "lmkern", dropout=0.2)
    config = tiny_config(max_steps=MAX_STEPS, resume="auto", **options)
    Trainer(model, tiny_data(), config, out_dir, run_config={"test": 1}, quiet=True).fit()


class Counter:
    """Wraps functions; the `limit`-th call of any of them kills the process before it acts."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.count = 0

    def wrap(self, owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            self.count += 1
            if self.count == self.limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counted)


def run_child(family: str, out_dir: Path, kind: str, limit: int | None) -> tuple[int, int]:
    """Trains in a child; returns its wait status and how many calls of `kind` it made."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        counter = Counter(limit)
        if kind == "update":
            counter.wrap(updater_module.Updater, "accumulate_gradient")
        else:
            for name in ("fsync", "rename", "replace"):
                counter.wrap(os, name)
        train(family, out_dir)
        os.write(write, str(counter.count).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    calls = int(os.read(read, 100) or b"0")
    os.close(read)
    return status, calls


def outcome(out_dir: Path) -> dict[str, object]:
    """All that must be the same: every byte of the last checkpoint, every row of the log."""
    last = out_dir / "checkpoints" / f"step-{MAX_STEPS:08d}"
    result: dict[str, object] = {path.name: path.read_bytes() for path in sorted(last.iterdir())}
    result["checkpoints"] = sorted(path.name for path in last.parent.iterdir())
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    for row in rows:
        del row["tokens_per_second"]
    result["log"] = rows
    return result


def main() -> None:
    family, directory = sys.argv[1], Path(sys.argv[2])
    train(family, directory / "warm-up")  # so that children inherit what is imported lazily
    whole = directory / "whole"
    points = []
    for kind, every in (("update", 1), ("file", 5)):
        status, calls = run_child(family, whole / kind, kind, None)
        assert status == 0 and calls > MAX_STEPS - 1, (status, calls)
        points += [(kind, n) for n in range(1, calls + 1, every)]
    expected = outcome(whole / "file")
    assert [row["step"] for row in expected["log"]] == list(range(1, MAX_STEPS + 1))
    assert outcome(whole / "update") == expected
    if family == "awd":
        count = json.loads(expected["trainer.json"])["averaged"]
        assert 0 < count < MAX_STEPS, count
    failures = []
    for kind, n in points:
        out_dir = directory / f"{kind}-{n}"
        status, _ = run_child(family, out_dir, kind, n)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            failures.append(f"{kind} {n}: was not killed, status {status}")
            continue
        status, _ = run_child(family, out_dir, kind, None)
        differing = [k for k, v in outcome(out_dir).items() if v != expected[k]]
        if status != 0 or differing:
            failures.append(f"{kind} {n}: status {status}, differs in {differing}")
    print(json.dumps({"points": len(points), "failures": failures}))


if __name__ == "__main__":
    main()
