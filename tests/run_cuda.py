"""`make test-cuda`: everything that can only be tested on a GPU, in one command and less than ten minutes.

First the golden tests of the kernels' building blocks; then, beside each other, the test suite with
`--device cuda` in several processes and, where it exists, compute-sanitizer's memcheck, racecheck and
synccheck on a little of every kernel. Files of tests whose packages are not installed are
left out and named. What each step printed is in out/test-cuda/.

    make test-cuda ARGS='-k recurrent'
    make test-cuda LMKERN_PYTHON=python3       (one that has a wheel of lmkern, and pytest)
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LOGS = ROOT / "out" / "test-cuda"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
LOST_CONTEXT = 3  # conftest.py's exit code when nothing works any more on the GPU


@dataclass
class Job:
    """A process of a step, its output in a file."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    seconds: float = 0.0
    state: str = "not run"
    environment: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)  # of tests, after the command

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"

    def start(self) -> None:
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*self.command, *self.files], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | self.environment, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """With what it has started."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def following(self) -> Job | None:
        """The files after the one in which the GPU's context was lost."""
        found = re.search(r"context is lost since ([^:\s]+)::", self.text())
        rest = self.files[self.files.index(found[1]) + 1 :] if found else []
        return replace(self, name=f"{self.name}-", process=None, files=rest) if rest else None

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run(jobs: list[Job], until: float) -> None:
    """Run them beside each other until all are done, or until that time (time.monotonic). Where one lost the
    GPU's context, another goes on, and joins them."""
    begin = time.monotonic()
    for job in jobs:
        job.start()
    waiting = list(jobs)
    while waiting:
        for job in list(waiting):
            assert job.process is not None
            code = job.process.poll()
            if code is None and time.monotonic() > until:
                job.kill()
                job.state = "out of time"
            elif code is not None:
                job.state = {0: "ok", 5: "no tests"}.get(
                    code, f"failed ({code})"
                )  # 5: pytest's, by -k
            else:
                continue
            job.seconds = time.monotonic() - begin
            waiting.remove(job)
            if code == LOST_CONTEXT and (following := job.following()):
                jobs.append(following)
                waiting.append(following)
                following.start()
        time.sleep(0.1)


def missing_packages(path: Path) -> list[str]:
    """Packages that a file of tests imports at its top, or that its helpers do, but are not installed."""
    missing = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        for name in (n.partition(".")[0] for n in names):
            helper = TESTS / f"{name}.py"
            if helper.exists():
                missing += missing_packages(helper)
            elif any((ROOT / folder / f"{name}.py").exists() for folder in ("bench", "cmake")):
                pass
            elif importlib.util.find_spec(name) is None:
                missing.append(name)
    return missing


def shards(files: list[Path], count: int) -> list[list[Path]]:
    """The files dealt out by size, so that all take about as long."""
    hands: list[list[Path]] = [[] for _ in range(count)]
    for path in sorted(files, key=lambda p: -p.stat().st_size):
        min(hands, key=lambda hand: sum(p.stat().st_size for p in hand)).append(path)
    return [hand for hand in hands if hand]


def suite(device: str, words: str, processes: int) -> list[Job]:
    chosen = []
    for path in sorted(TESTS.glob("test_*.py")):
        if missing := missing_packages(path):
            print(f"left out: {path.name} (needs {', '.join(sorted(set(missing)))})")
        else:
            chosen.append(path)
    hands = shards(chosen, processes)
    threads = str(max(1, (os.cpu_count() or 1) // len(hands)))
    options = [
        "-q",
        "-m",
        "not long",
        "--continue-on-collection-errors",
        "--device",
        device,
        *(["-k", words] if words else []),
    ]
    return [
        Job(
            f"suite-{n}",
            [sys.executable, "-m", "pytest", *options],
            environment={"OMP_NUM_THREADS": threads},
            files=[str(p.relative_to(ROOT)) for p in hand],
        )
        for n, hand in enumerate(hands)
    ]


def sanitizers(device: str) -> list[Job]:
    found = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if found is None:
        print("compute-sanitizer: not installed, left out")
        return []
    # torch asks whether things work by trying: errors of the API are no findings.
    options = ["--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20"]
    small = [sys.executable, str(TESTS / "cuda_small.py"), device]
    return [Job(f"sanitizer-{t}", [found, "--tool", t, *options, *small]) for t in SANITIZER_TOOLS]


def summary(job: Job) -> str:
    """The last line of pytest or of compute-sanitizer that counts something."""
    counted = re.findall(r"^.*(?:passed|failed|error|ERROR SUMMARY|right).*$", job.text(), re.M)
    return counted[-1].strip(" =") if counted else ""


def conclude(jobs: list[Job], lines: int = 25) -> bool:
    """Print how it went, and what failed; true if nothing did."""
    for job in jobs:
        print(f"{job.name:<20} {job.state:<12} {job.seconds:>4.0f} s  {summary(job)}", flush=True)
    bad = [job for job in jobs if job.state not in ("ok", "no tests")]
    for job in bad:
        failures = re.findall(r"^(?:FAILED|ERROR) .*$", job.text(), re.M) or job.text().splitlines()
        print(f"---- {job.log.relative_to(ROOT)}")
        print("\n".join(failures[-lines:]))
    return not bad


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make test-cuda", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=570.0, help="time for all, default 570")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="only such tests of the suite")
    parser.add_argument("--device", default="cuda", help="for trying it out: cpu, simt")
    parser.add_argument(
        "--processes", type=int, default=0, help="of the suite; default: by CPU cores"
    )
    options = parser.parse_args(argv)
    until = time.monotonic() + options.seconds
    LOGS.mkdir(parents=True, exist_ok=True)
    goldens = [Job("selftest", [sys.executable, "-m", "lmkern.cli", "selftest"])]
    if options.device == "simt":
        goldens[0].environment["LMKERN_SIMT"] = "1"
    if options.device == "cpu":
        goldens = []
    run(goldens, until)
    right = conclude(goldens)
    jobs = sanitizers(options.device)
    jobs += suite(
        options.device, options.k, options.processes or max(1, min(6, (os.cpu_count() or 1) // 2))
    )
    run(jobs, until)
    right = conclude(jobs) and right
    print("test-cuda: ok" if right else f"test-cuda: failed, see {LOGS.relative_to(ROOT)}/")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
