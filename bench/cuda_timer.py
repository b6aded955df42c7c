"""Time on a GPU, and what the GPU can do: the other clock of the harness."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch

import harness

Run = Callable[[], Any]


class CudaTimer:
    """Seconds of GPU time, by events. What lies in L2 is overwritten before each run."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = max(64 << 20, 2 * getattr(properties, "L2_cache_size", 32 << 20))
        self.flush = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, run: Run) -> float:
        start, stop = self.events
        # While it is overwritten, which takes tens of microseconds, the CPU launches what follows.
        self.flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def prepare(self, contenders: dict[str, Run]) -> tuple[dict[str, Run], dict[str, Any]]:
        """The contenders as CUDA graphs, so that the CPU's part in a launch is out of the comparison;
        as they are, if one of them can't be captured."""
        graphs: dict[str, Run] = {}
        stream = torch.cuda.current_stream()
        for name, run in contenders.items():
            try:
                graphs[name] = _captured(run)
            except Exception as error:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
                torch.cuda.synchronize()
                why = " ".join(f"{name}: {type(error).__name__}: {error}".split())
                return contenders, {"timing": "events", "not_captured": why[:200]}
        return graphs, {"timing": "graph"}


def _captured(run: Run) -> Run:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(graph: Any = graph, kept: Any = kept) -> None:  # kept: memory that the graph writes
        graph.replay()

    replay()
    torch.cuda.synchronize()
    return replay


def ceilings(quick: bool = False) -> dict[str, float]:
    """What the GPU reaches now: bytes/s (read + written) of a copy, FLOP/s of matrix products."""
    timer, rounds = CudaTimer(), 3 if quick else 20
    rates = {"copy": _copy_rate(timer, 1 << 22 if quick else 1 << 28, rounds)}
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype in (
        ("bfloat16", torch.bfloat16), ("float16", torch.float16),
        ("tf32", torch.float32), ("float32", torch.float32),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        rates[name] = _product_rate(timer, 512 if quick else 8192, dtype, rounds // 2)
    torch.backends.cuda.matmul.allow_tf32 = before
    return rates


def _copy_rate(timer: CudaTimer, count: int, rounds: int) -> float:
    source = torch.ones(count, device="cuda")
    target = torch.empty_like(source)
    return 2 * 4 * count / min(timer(lambda: target.copy_(source)) for _ in range(rounds))


def _product_rate(timer: CudaTimer, n: int, dtype: torch.dtype, rounds: int) -> float:
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(2):
        torch.mm(a, b, out=out)
    return 2 * n**3 / min(timer(lambda: torch.mm(a, b, out=out)) for _ in range(rounds or 1))


def gpu_facts() -> dict[str, Any]:
    """The GPU, its driver and the clocks as found."""
    facts: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout.splitlines()[0].split(", ")  # fmt: skip
        facts |= dict(zip(query.split(","), found, strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        facts["driver_version"] = f"unknown: {type(error).__name__}"
    return facts


def cpu_ceilings() -> dict[str, float]:
    """Stand-ins for a dry run without a GPU."""
    rate = harness.fma_ceiling(1)
    names = ("bfloat16", "float16", "tf32", "float32")
    return {"copy": harness.copy_ceiling(4)} | dict.fromkeys(names, rate)
