"""`make bench-cuda`: the table on a GPU, in one command and less than ten minutes.

Ceilings first, then the cases of cuda_cases.py, each checked before it is timed: as CUDA graphs where
all contenders can be captured, else by events as called; L2 overwritten between runs; clocks as found.
Every row is printed, and the file is whole, as soon as it is measured; cases for which the time did not
suffice are listed in it.

    make bench-cuda ARGS='-k "lstm training" --seconds 120'
    make bench-cuda LMKERN_PYTHON=python3       (one that has a wheel of lmkern)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import harness
import lmkern
from cuda_cases import Setting, cases
from cuda_timer import CudaTimer, ceilings, cpu_ceilings, gpu_facts

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-cuda", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="time for all, default 540")
    parser.add_argument("-k", metavar="WORDS", default="", help="only cases with all these words")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu-NAME.json")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny cases, on the CPU if there is no GPU"
    )
    options = parser.parse_args(argv)
    begin = time.monotonic()
    # What has no kernel falls back, and its row says so by its ratio.
    warnings.simplefilter("ignore", lmkern.LmkernWarning)
    gpu = torch.cuda.is_available()
    if not gpu and not options.dry_run:
        parser.exit(1, "bench-cuda: torch sees no GPU (--dry-run tries the cases on the CPU)\n")
    facts = gpu_facts() if gpu else {"gpu": "none: a dry run on the CPU"}
    found = ceilings(quick=options.dry_run) if gpu else cpu_ceilings()
    setting = Setting("cuda" if gpu else "cpu", found, tiny=options.dry_run)
    name = re.sub(r"\W+", "-", facts["gpu"].lower()).strip("-")
    out = options.out or (Path("out") if options.dry_run else RESULTS) / f"gpu-{name}.json"
    words = options.k.split()
    todo = [(n, make) for n, make in cases(setting) if all(w in n for w in words)]
    table: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **facts,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "lmkern": lmkern.info(),
        "ceilings": found,
        "note": "ratio: best peer's time / ours, median of interleaved rounds; fraction: of the ceiling "
        "measured first, by dtype, or of a copy; timing: CUDA graphs, or events around the call",
        "rows": [],
        "wrong": [],
        "not_measured": [n for n, _ in todo],
    }
    print(f"{facts['gpu']}, torch {torch.__version__}, lmkern {lmkern.__version__}")
    print(
        ", ".join(
            f"{k} {v / 1e9:,.0f} G{'B' if k == 'copy' else 'FLOP'}/s" for k, v in found.items()
        )
    )
    print(
        f"{'case':<50} {'ms':>9} {'ratio':>6}  {'best peer':<10} {'rate':>14} of ceiling",
        flush=True,
    )
    timer = CudaTimer() if gpu else harness.wall_seconds
    prepare = timer.prepare if isinstance(timer, CudaTimer) else None
    for done, (case_name, make) in enumerate(todo):
        left = options.seconds - (time.monotonic() - begin)
        if left <= 0:
            break
        # A case costs as much again for checks, warm-up and capture.
        seconds = 0.0 if options.dry_run else min(1.0, 0.5 * left / (len(todo) - done))
        try:
            row = harness.measure(make(), seconds, timer, prepare)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else ""
            table["wrong"].append({"case": case_name, "error": f"{type(error).__name__}: {text}"})
            print(f"{case_name:<50} {type(error).__name__}: {text}", flush=True)
        else:
            table["rows"].append(row)
            print(line(row), flush=True)
        table["not_measured"].remove(case_name)
        write(out, table)
        if gpu:
            torch.cuda.empty_cache()  # the next case's graphs have pools of their own
    write(out, table)
    print()
    for group in harness.summarise(table["rows"]):
        low, high = group["fraction"]
        print(
            f"{group['topic']:<32} {group['cases']:>3} cases: ratio {group['ratio']:.2f} "
            f"({group['worst']:.2f} to {group['best']:.2f}), {low:.0%} to {high:.0%} of ceiling"
        )
    print(
        f"{len(table['rows'])} measured, {len(table['wrong'])} wrong, {len(table['not_measured'])} not "
        f"measured, {time.monotonic() - begin:.0f} s; written: {out}"
    )
    return 1 if table["wrong"] else 0


def line(row: dict[str, Any]) -> str:
    unit = "GFLOP/s" if row["unit"] == "FLOP/s" else "GB/s"
    by = "" if row.get("timing") != "events" else "  (events)"
    return (
        f"{row['case']:<50} {row['milliseconds']:>9.4f} {row['ratio']:>6.2f}  {row['best_peer']:<10} "
        f"{row['rate'] / 1e9:>9,.1f} {unit:<7} {row['fraction']:>5.1%}{by}"
    )


def write(path: Path, table: dict[str, Any]) -> None:
    """Whole at any time: a run that is stopped leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(harness.rounded(table), indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    raise SystemExit(main())
