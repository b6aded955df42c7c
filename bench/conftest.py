"""Options, machine description and the printed table of `make bench`."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

import harness
import lmkern

ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lmkern benchmarks")
    group.addoption("--seconds", type=float, default=2.0, help="time for each case")
    group.addoption(
        "--no-compile", action="store_true", help="leave torch.compile out of the peers"
    )


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

    def run(case: harness.Case) -> None:
        if request.config.getoption("--no-compile"):
            case.peers.pop("compile", None)
        row = harness.measure(case, request.config.getoption("--seconds"))
        ROWS.append(row)
        benchmark.extra_info.update(row)
        benchmark.pedantic(case.ours, rounds=5)

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    out = terminalreporter.write_line
    info = lmkern.info()
    out("")
    out(f"lmkern {info['lmkern']} ({info['isa']}), torch {info['torch']}, {cpu_name()}")
    out("ratio: the best peer's time / ours (above 1 we are faster), median of interleaved rounds")
    out("of ceiling: our rate / the FMA or copy rate measured beside the case")
    out("")
    out(f"{'case':<46} thr {'ms':>9} {'ratio':>6}  {'best peer':<9} {'rate':>12} of ceiling")
    for row in ROWS:
        unit = "GFLOP/s" if row["unit"] == "FLOP/s" else "GB/s"
        out(
            f"{row['case']:<46} {row['threads']:>3} {row['milliseconds']:>9.3f} {row['ratio']:>6.2f}  "
            f"{row['best_peer']:<9} {row['rate'] / 1e9:>7.1f} {unit:<7} {row['fraction']:>6.0%}"
        )
