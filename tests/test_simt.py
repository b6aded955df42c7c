"""The emulator's own tests: kernels with a planted bug are reported, with file and line, and the same
kernels without it are silent, under every schedule."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only("the emulator has its own modules")

SOURCE = Path(__file__).parents[1] / "csrc" / "simt" / "planted.cu"
SCHEDULES = [("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2), ("random", 3)]
# What every mode reports; the rest shows in race mode, and out of bounds under AddressSanitizer, too.
ALWAYS = {
    "abandoned_barrier": "abandoned barrier",
    "divergent_barrier": "divergent barrier",
    "misaligned_vector": "misaligned access",
    "never_flagged": "deadlock",
    "remote_store_without_wait": "without waiting for it",
    "shuffle_mask_of_others": "abandoned shuffle",
    "shuffle_mask_without_self": "mask does not name lane",
    "weak_wait_group": "without waiting",
}
OUT_OF_BOUNDS = {"global_out_of_bounds", "shared_out_of_bounds", "unmasked_copy"}
RACES = {
    "block_for_cluster_barrier": "race|uninitialised",
    "block_for_grid_barrier": "race",
    "double_buffer_race": "race",
    "implicit_warp_synchrony": "race|uninitialised",
    "missing_block_barrier": "race|uninitialised",
    "no_empty_wait": "race|still owns",
    "no_full_wait": "still owns|uninitialised",
    "plain_histogram": "race",
    "remote_store_without_wait": "still owns|uninitialised",
    "shuffle_as_fence": "race|uninitialised",
    "uninitialised_shared": "uninitialised",
    "weak_wait_group": "still owns|without waiting",
} | dict.fromkeys(OUT_OF_BOUNDS, "out of bounds")


def emulator(name: str):
    """The module, where this build has it."""
    return pytest.importorskip(
        f"lmkern.{name}", reason="built without LMKERN_SIMT", exc_type=ImportError
    )


MODULES = [
    pytest.param(name, id=name)
    for name in ("_C_simt", "_C_simt_race")
    if importlib.util.find_spec(f"lmkern.{name}")
]


def lines_of(name: str) -> set[int]:
    """The lines that a report may name."""
    text = SOURCE.read_text().splitlines()
    return {n for n, line in enumerate(text, 1) if re.search(rf"// bug: .*\b{name}\b", line)}


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s[0]}{s[1] or ''}")
def schedule(request):
    return request.param


def run(module: str, name: str, bug: bool, schedule) -> bool:
    kernels = emulator(module)
    kernels.set_schedule(*schedule)
    try:
        return kernels.run_planted(name, bug)
    finally:
        kernels.set_schedule("fifo", 0)


def test_every_planted_kernel_is_expected_to_be_found():
    assert set(emulator("_C_simt").planted_names()) == set(ALWAYS) | set(RACES)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", sorted({*ALWAYS, *RACES}))
def test_the_correct_kernel_is_silent(module, name, schedule):
    assert run(module, name, False, schedule)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_misuse_is_reported_in_every_mode(module, name, schedule):
    expected = RACES.get(name) if module == "_C_simt_race" else None
    with pytest.raises(RuntimeError, match=expected or ALWAYS[name]) as error:
        run(module, name, True, schedule)
    assert int(re.match(r"planted\.cu:(\d+): ", str(error.value))[1]) in lines_of(name)


@pytest.mark.parametrize("name", sorted(RACES))
def test_race_mode_reports_the_line(name, schedule):
    with pytest.raises(RuntimeError, match=RACES[name]) as error:
        run("_C_simt_race", name, True, schedule)
    assert int(re.match(r"planted\.cu:(\d+): ", str(error.value))[1]) in lines_of(name)


@pytest.mark.skipif(
    "libasan" not in os.environ.get("LD_PRELOAD", ""), reason="needs the ASan build"
)
@pytest.mark.parametrize("name", sorted(OUT_OF_BOUNDS))
def test_address_sanitizer_sees_the_bounds(name):
    done = subprocess.run(
        [sys.executable, "-c", f"from lmkern import _C_simt; _C_simt.run_planted('{name}', True)"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    found = re.search(
        r"AddressSanitizer: heap-buffer-overflow[\s\S]*?planted\.cu:(\d+)", done.stderr
    )
    assert found, done.stderr[-2000:]
