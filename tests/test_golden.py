"""The golden tests of the wrappers that CUDA kernels are written in (csrc/cuda/golden*): on the
emulator under several schedules, in both modes, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmkern import cli
from lmkern.ops.backend import cuda_kernels, cuda_problem

SCHEDULES = [("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2), ("random", 3)]
EMULATORS = [n for n in ("_C_simt", "_C_simt_race") if importlib.util.find_spec(f"lmkern.{n}")]
GPU = cuda_kernels() is not None and not cuda_problem(0)
# One case or more of each file of csrc/cuda/device.
WRAPPERS = {
    "atomic.h": [
        "add_acquire_release",
        "add_relaxed",
        "add_release",
        "load_acquire",
        "min_relaxed",
    ],
    "barrier.h": ["block_barrier", "map_shared", "named_barrier", "warp_barrier"],
    "block_reduce.h": ["block_sum"],
    "bulk_copy.h": ["bulk_copy", "bulk_copy_remote", "store_async.4", "store_async.16"],
    "cluster.h": ["cluster_rank", "map_shared"],
    "convert.h": ["from_accumulate", "to_accumulate", "to_tf32"],
    "copy.h": ["copy_async.4", "copy_async.8", "copy_async.16", "copy_async.groups"],
    "group_barrier.h": ["group_barrier"],
    "launch.h": ["launch.limits", "launch.refusals"],
    "math.h": ["tanh", "sigmoid"],
    "matrix.h": ["ldmatrix.x4", "ldmatrix.x4.trans", "mma.bfloat16", "mma.float16", "mma.tf32"],
    "mbarrier.h": ["mbarrier.phases", "mbarrier.ring", "mbarrier_arrive_remote"],
    "shuffle.h": ["shuffle", "vote", "warp_sum_max"],
    "thread.h": ["thread"],
    "vector.h": ["vector"],
}


@pytest.fixture(scope="module")
def names() -> list[str]:
    modules = EMULATORS or (["_C_cuda"] if GPU else [])
    if not modules:
        pytest.skip("built without LMKERN_SIMT, and no GPU")
    return importlib.import_module(f"lmkern.{modules[0]}").golden_names()


def check_all(kernels) -> None:
    """One test for all cases: on a GPU, what the first one breaks is seen in the next ones, too."""
    wrong = {}
    for name in kernels.golden_names():
        message = kernels.golden(name)
        if message and not message.startswith("skipped: "):
            wrong[name] = message
    assert not wrong


@pytest.mark.parametrize("module", EMULATORS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}{s[1] or ''}")
def test_emulator(module, schedule):
    kernels = importlib.import_module(f"lmkern.{module}")
    kernels.set_schedule(*schedule)
    try:
        check_all(kernels)
    finally:
        kernels.set_schedule("fifo", 0)


@pytest.mark.skipif(not GPU, reason="no GPU that lmkern's kernels run on")
def test_gpu():
    check_all(cuda_kernels())


def test_every_wrapper_has_a_case(names):
    for header, cases in WRAPPERS.items():
        for case in cases:
            assert any(n == case or n.startswith(f"{case}.") for n in names), (header, case)
    source = Path(__file__).parents[1] / "csrc" / "cuda" / "device"
    assert {p.name for p in source.glob("*.h")} == set(WRAPPERS) | {"base.h"}


@pytest.mark.skipif(not EMULATORS, reason="built without LMKERN_SIMT")
def test_an_unknown_case_is_named():
    kernels = importlib.import_module(f"lmkern.{EMULATORS[0]}")
    with pytest.raises(ValueError, match=r"there is no test named 'shuffle\.none'"):
        kernels.golden("shuffle.none")


class Wrong:
    """Kernels of a GPU on which something differs, something fails and something is missing."""

    @staticmethod
    def golden_names():
        return ["mma", "shuffle", "store_async", "vote"]

    @staticmethod
    def golden(name):
        if name == "vote":
            raise RuntimeError("lmkern: launch: invalid argument")
        return {"mma": "lane 5: expected 1, got 2", "store_async": "skipped: no clusters"}.get(
            name, ""
        )


def test_selftest_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr("lmkern._selftest.EMULATOR", Wrong)
    assert cli.main(["selftest"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "mma: lane 5: expected 1, got 2",
        "store_async: skipped: no clusters",
        "vote: lmkern: launch: invalid argument",
        "emulator: 1 right, 2 wrong, 1 skipped",
    ]


@pytest.mark.skipif(not EMULATORS, reason="built without LMKERN_SIMT")
def test_selftest_on_the_emulator():
    done = subprocess.run(
        [sys.executable, "-m", "lmkern.cli", "selftest"],
        env=os.environ | {"LMKERN_SIMT": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong, 0 skipped" in done.stdout


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_selftest_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("lmkern._selftest.EMULATOR", None)
    assert cli.main(["selftest"]) == 1
    assert "lmkern: error: selftest: " in capsys.readouterr().err
