"""Holds the CUDA kernels to what they say of themselves; nvcc's launcher where LMKERN_CUDA_CHECK is on.

check_kernels.py --compile NVCC ARGS... SOURCE.cu
    compiles, and fails where ptxas gives a kernel more registers, or more bytes of spills, for any
    architecture and type, than the line above the kernel allows:

        // registers: 128, spills: 0
        template <class S>
        LMKERN_KERNEL(kThreads, 1)
        name(Params<S> p) {

    Without such a line it may take any number of registers, and spill nothing.

check_kernels.py --size MODULE
    fails where the module is larger than a wheel should carry.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
MAX_BYTES = 40_000_000


class Use(NamedTuple):
    """What a kernel takes, or may take, a thread; spills and other local memory in bytes."""

    registers: int
    spills: int


def limits_of(source: str) -> dict[str, Use]:
    """The limits in a source text, by the kernels' names."""
    line = r"// registers: (\d+), spills: (\d+)\n"
    kernel = r"(?:template\s*<[^;{}]*>\s*)?LMKERN_KERNEL\([^;{}]*?\)\s*(\w+)\("
    return {m[3]: Use(int(m[1]), int(m[2])) for m in re.finditer(line + kernel, source)}


def uses_in(log: str) -> dict[tuple[str, str], Use]:
    """What ``ptxas -v`` says of each (kernel, architecture), the functions it calls included."""
    uses: dict[tuple[str, str], Use] = {}
    patterns = "|".join(
        (
            r"Compiling entry function '(?P<kernel>[^']+)' for '(?P<architecture>[^']+)'",
            r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
            r"(?P<loads>\d+) bytes spill loads",
            r"Used (?P<registers>\d+) registers",
        )
    )
    now = ("", "")
    for found in re.finditer(patterns, log):
        if found["kernel"]:
            now = (found["kernel"], found["architecture"])
            uses[now] = Use(0, 0)
        elif now in uses:
            before = uses[now]
            uses[now] = Use(
                max(before.registers, int(found["registers"] or 0)),
                max(before.spills, *(int(found[n] or 0) for n in ("frame", "stores", "loads"))),
            )
    return uses


def excesses(log: str, limits: dict[str, Use]) -> list[str]:
    """A line for each kernel and quantity over its limit, with the worst case."""
    uses = uses_in(log)
    mangled = "\n".join(kernel for kernel, _ in uses)
    names = subprocess.run(
        ["c++filt"], input=mangled, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    worst: dict[tuple[str, str], tuple[int, str]] = {}
    for ((_, architecture), use), name in zip(uses.items(), names, strict=True):
        # void lmkern::cuda::(anonymous namespace)::name<types>(parameters)
        short = re.sub(r"\(anonymous namespace\)::|lmkern::|cuda::|^void ", "", name)
        short = re.sub(r"\(.*", "", short)
        kernel = re.sub(r"<.*", "", short)
        for quantity, amount in use._asdict().items():
            case = (amount, f"{short} on {architecture}")
            worst[kernel, quantity] = max(worst.get((kernel, quantity), case), case)
    found = []
    for (kernel, quantity), (amount, case) in worst.items():
        if amount > (limit := getattr(limits.get(kernel, Use(255, 0)), quantity)):
            found.append(f"{case}: {quantity}: {amount}, at most {limit} allowed")
    return found


def compile_checked(command: list[str]) -> int:
    source = next(Path(word) for word in reversed(command) if word.endswith(".cu"))
    done = subprocess.run(
        [*command, "--ptxas-options=-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    talk = re.compile(r"ptxas info|\s*\d+ bytes stack frame|\s*\d+ bytes gmem|$")
    sys.stderr.write("".join(line for line in done.stdout.splitlines(True) if not talk.match(line)))
    if done.returncode != 0:
        return done.returncode
    limits: dict[str, Use] = {}
    for file in (*CUDA.glob("*.h"), source):
        limits |= limits_of(file.read_text())
    found = excesses(done.stdout, limits)
    for line in found:
        print(f"{source.name}: {line}", file=sys.stderr)
    return 1 if found else 0


def main(arguments: list[str]) -> int:
    match arguments:
        case ["--compile", *command]:
            return compile_checked(command)
        case ["--size", module]:
            size = Path(module).stat().st_size
            if size > MAX_BYTES:
                print(
                    f"{module}: {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} allowed",
                    file=sys.stderr,
                )
            return int(size > MAX_BYTES)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
