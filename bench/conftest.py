"""Options, machine description, the printed table of `make bench` and the table that is kept.

- some cases: make bench ARGS='-k "test_layers and gru and training"'
- and the compact file: make bench ARGS='--seconds 0.8 --table bench/results/cpu-NAME.json'
"""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
import lmkern

COMPILED = ("compile", "flex")  # peers that take a compiler, and its time
ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lmkern benchmarks")
    group.addoption("--seconds", type=float, default=2.0, help="time for each case")
    group.addoption(
        "--no-compile",
        action="store_true",
        help="leave torch.compile and FlexAttention out of the peers",
    )
    group.addoption(
        "--table",
        type=Path,
        metavar="PATH",
        help="write date, machine and all rows of this run to PATH, as bench/results/*.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error::lmkern.LmkernWarning")


def cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["lmkern"] = lmkern.info()
    machine_info["cpu_name"] = cpu_name()


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-thread")
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest):
    """Measure a Case, keep its row for the table, and hand pytest-benchmark our times."""
    without_compile = request.config.getoption("--no-compile")
    if not without_compile:
        # Compilations are counted for each code object, which cases share: after eight of them torch
        # would silently run the original.
        torch.compiler.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True

    def run(case: harness.Case) -> None:
        if without_compile:
            for peer in COMPILED:
                case.peers.pop(peer, None)
        row = harness.measure(case, request.config.getoption("--seconds"))
        ROWS.append(row)
        benchmark.extra_info.update(row)
        benchmark.pedantic(case.ours, rounds=5)

    return run


def write_table(path: Path, config: pytest.Config) -> None:
    arguments = f"--seconds {config.getoption('--seconds')}"
    arguments += " --no-compile" * config.getoption("--no-compile")
    selected = f", -k '{config.getoption('keyword')}'" if config.getoption("keyword") else ""
    table = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "lmkern": lmkern.info(),
        "note": "ratio: best peer's time / ours, median of interleaved rounds; "
        f"made by `make bench ARGS='{arguments}'`{selected}",
        "summary": harness.summarise(ROWS),
        "rows": ROWS,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(harness.rounded(table), indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ROWS:
        return
    out = terminalreporter.write_line
    info = lmkern.info()
    out("")
    out(f"lmkern {info['lmkern']} ({info['isa']}), torch {info['torch']}, {cpu_name()}")
    out("ratio: the best peer's time / ours (above 1 we are faster), median of interleaved rounds")
    out("of ceiling: our rate / the FMA, copy or read rate measured beside the case")
    out("")
    out(f"{'case':<54} thr {'ms':>9} {'ratio':>6}  {'best peer':<9} {'rate':>12} of ceiling")
    for row in ROWS:
        unit = "GFLOP/s" if row["unit"] == "FLOP/s" else "GB/s"
        out(
            f"{row['case']:<54} {row['threads']:>3} {row['milliseconds']:>9.3f} {row['ratio']:>6.2f}  "
            f"{row['best_peer']:<9} {row['rate'] / 1e9:>7.1f} {unit:<7} {row['fraction']:>6.0%}"
        )
    out("")
    out(f"{'topic':<32} thr cases  mean  worst   best  of ceiling")
    for group in harness.summarise(ROWS):
        low, high = group["fraction"]
        out(
            f"{group['topic']:<32} {group['threads']:>3} {group['cases']:>5} {group['ratio']:>5.2f} "
            f"{group['worst']:>6.2f} {group['best']:>6.2f}  {low:.0%} to {high:.0%}"
        )
    if path := config.getoption("--table"):
        write_table(path, config)
        out(f"written: {path}")
