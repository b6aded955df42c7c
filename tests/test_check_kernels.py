"""cmake/check_kernels.py, which holds CUDA kernels to their limits, on what ptxas prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only("of the build")

CMAKE = Path(__file__).parent.parent / "cmake"
sys.path.insert(0, str(CMAKE))
import check_kernels  # noqa: E402
from check_kernels import Use  # noqa: E402

SOURCE = """\
// registers: 40, spills: 0
template <class S, int kWide>
LMKERN_KERNEL(kThreads, (Terms<S, 2>::kMinBlocks))
gather(Gather<S> g) {
}

// Why it is here.
//
// registers: 64, spills: 16
LMKERN_KERNEL(kThreads, 1)
make_keys(Keys k) {
}

template <class S>
LMKERN_KERNEL(kThreads, 1)
unlimited(Gather<S> g) {
}
"""
GATHER = "_ZN6lmkern4cuda54_GLOBAL__N__23945d9a_15_step_product_cu_fe1dc5c1_100706gatherINS_7float16ELb0EEEvNS1_6GatherIT_EE"
KEYS = "_ZN6lmkern4cuda9make_keysENS0_4KeysE"
LIMITS = {"gather": Use(40, 0), "make_keys": Use(64, 16)}


def log(kernel: str, registers: int, spills: int, architecture: str = "sm_80") -> str:
    return f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{kernel}' for '{architecture}'
ptxas info    : Function properties for {kernel}
    {spills} bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 392 bytes cmem[0]
"""


def test_limits_stand_above_their_kernels():
    assert check_kernels.limits_of(SOURCE) == LIMITS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (log(GATHER, 40, 0) + log(KEYS, 64, 16), []),
        (
            log(GATHER, 41, 0) + log(GATHER, 48, 0, "sm_120") + log(GATHER, 44, 0, "sm_90a"),
            ["gather<float16, false> on sm_120: registers: 48, at most 40 allowed"],
        ),
        (log(KEYS, 64, 24), ["make_keys on sm_80: spills: 24, at most 16 allowed"]),
        (
            # A function that the kernel calls, too.
            log(KEYS, 64, 0).replace("ptxas info    : Used", "    0 bytes stack frame, 0 bytes spill stores, 32 bytes spill loads\nptxas info    : Used"),
            ["make_keys on sm_80: spills: 32, at most 16 allowed"],
        ),
        (
            log(KEYS.replace("9make_keys", "9unlimited"), 255, 4),
            ["unlimited on sm_80: spills: 4, at most 0 allowed"],
        ),
        ("", []),
    ],
)  # fmt: skip
def test_excesses(text, expected):
    assert check_kernels.excesses(text, LIMITS) == expected


@pytest.mark.parametrize(("bytes_", "status"), [(40_000_000, 0), (40_000_001, 1)])
def test_size(tmp_path, bytes_, status):
    module = tmp_path / "_C_cuda.so"
    with module.open("wb") as file:
        file.truncate(bytes_)
    assert check_kernels.main(["--size", str(module)]) == status
