"""The interleaved A/B harness: ours against each peer, in one process, round by round.

These are the rules, because machines drift by a factor of two within minutes:

- correctness is checked before anything is timed;
- in each round every contender runs once, in rotating order; the ratio of a peer is the median over
  rounds of its time divided by ours in the same round, and the *best* peer counts;
- the ceiling (FMA rate, copy or read bandwidth) is measured right beside the case; a GPU's, which do
  not drift so, once (cuda_timer.py).
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lmkern import _C

Run = Callable[[], Any]


@dataclass
class Case:
    """One row of the table. ``flops`` or ``bytes``: the work done, whichever bounds it.

    ``reads``: the bytes are all but only read, so that a copy's rate is no ceiling.
    ``topic``: the group in the summary; without it, the part of the name before the sizes.
    ``ceiling``: the rate to compare with, where it need not be measured.
    """

    name: str
    ours: Run
    peers: dict[str, Run]
    check: Callable[[], None]
    flops: float = 0.0
    bytes: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    topic: str = ""
    reads: bool = False
    ceiling: float = 0.0

    def __post_init__(self) -> None:
        self.topic = self.topic or re.split(r" [\w,]+=", self.name, maxsplit=1)[0]


def fma_ceiling(threads: int) -> float:
    """FLOP/s of float32 FMA chains that never leave registers, now, on this many threads."""
    return max(_C.peak_flops(threads, 300_000) for _ in range(3))


def copy_ceiling(megabytes: int = 64) -> float:
    """Bytes/s (read + written) of a copy between two live buffers larger than any cache we count on."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    best = min(wall_seconds(lambda: target.copy_(source)) for _ in range(6))
    return 2 * source.numel() * 4 / best


def read_ceiling(size: float) -> float:
    """Bytes/s of MKL's dot product and matrix-vector product, the faster, reading ``size`` bytes.

    They read as many as the case, over and over: where those fit a cache, so do the case's.
    """
    buffer = torch.ones(2, max(1, int(size) // 8192), 1024)
    vector = torch.ones(1024)
    runs = (
        lambda: torch.dot(buffer[0].view(-1), buffer[1].view(-1)),
        lambda: torch.mv(buffer.view(-1, 1024), vector),
    )
    best = min(wall_seconds(run) for _ in range(10) for run in runs)
    return buffer.numel() * 4 / best


def wall_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    case: Case,
    seconds: float,
    timer: Callable[[Run], float] = wall_seconds,
    prepare: Callable[[dict[str, Run]], tuple[dict[str, Run], dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Run one case for about ``seconds`` and return its row.

    ``timer``: seconds of one run. ``prepare``: the contenders in the form that is timed, and what the
    row says of it.
    """
    case.check()
    contenders = {"lmkern": case.ours, **case.peers}
    names = list(contenders)
    for run in contenders.values():  # first calls: compilation, allocation, page faults
        run()
        run()
    timing: dict[str, Any] = {}
    if prepare is not None:
        contenders, timing = prepare(contenders)
    slowest = sum(timer(run) for run in contenders.values())
    rounds = int(min(200, max(5, seconds / slowest)))
    if case.ceiling:
        ceiling = case.ceiling
    elif case.flops:
        ceiling = fma_ceiling(torch.get_num_threads())
    else:
        ceiling = read_ceiling(case.bytes) if case.reads else copy_ceiling()
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timer(contenders[name]))
    ratios = {
        peer: statistics.median(t / o for t, o in zip(times[peer], times["lmkern"], strict=True))
        for peer in case.peers
    }
    best = min(ratios, key=lambda peer: ratios[peer])
    median = statistics.median(times["lmkern"])
    rate = (case.flops or case.bytes) / median
    return {
        "case": case.name,
        "topic": case.topic,
        "threads": torch.get_num_threads(),
        "milliseconds": median * 1e3,
        "p20": statistics.quantiles(times["lmkern"], n=5)[0] * 1e3,
        "p80": statistics.quantiles(times["lmkern"], n=5)[3] * 1e3,
        "peers_ms": {p: statistics.median(times[p]) * 1e3 for p in case.peers},
        "ratios": ratios,
        "best_peer": best,
        "ratio": ratios[best],
        "rate": rate,
        "unit": "FLOP/s" if case.flops else "B/s",
        "ceiling": ceiling,
        "fraction": rate / ceiling,
        "rounds": rounds,
        **timing,
        **case.extra,
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean, worst and best ratio and fraction of the ceiling, by topic and threads."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["topic"], row["threads"]), []).append(row)
    return [
        {
            "topic": topic,
            "threads": threads,
            "cases": len(group),
            "ratio": statistics.geometric_mean(row["ratio"] for row in group),
            "worst": min(row["ratio"] for row in group),
            "best": max(row["ratio"] for row in group),
            "fraction": [min(r["fraction"] for r in group), max(r["fraction"] for r in group)],
        }
        for (topic, threads), group in sorted(groups.items())
    ]


def rounded(value: Any) -> Any:
    """Four digits, all that a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def infer(call: Callable[..., Any], inputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of ``call`` without gradients."""
    with torch.no_grad():
        return list(call(*inputs))


def train(
    call: Callable[..., Any],
    inputs: Iterable[torch.Tensor],
    d_outputs: Iterable[torch.Tensor],
    parameters: Iterable[torch.Tensor],
) -> list[torch.Tensor]:
    """One training step of ``call``: its outputs, then the gradients of inputs and parameters.

    The weights change before each, as they do in training: nothing packed survives it.
    """
    parameters = list(parameters)
    with torch.no_grad():
        for p in parameters:
            p.mul_(1.0)
            p.grad = None
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = list(call(*leaves))
    torch.autograd.backward(outputs, list(d_outputs))
    return [*(y.detach() for y in outputs), *(leaf.grad for leaf in [*leaves, *parameters])]


def assert_agree(ours: Run, peers: Mapping[str, Run], tolerance: float) -> None:
    """What we compute against every peer, those that were compiled included."""
    result = ours()
    for name, peer in peers.items():
        assert_close(result, peer(), tolerance, name)


def assert_close(ours: Any, theirs: Any, tolerance: float, peer: str = "peer") -> None:
    """Relative to the largest element, tensor by tensor."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
        assert error < tolerance, (
            f"wrong result: tensor {i} against {peer}: relative error {error:.1e}"
        )
