"""``lmkern selftest``: whether a GPU does with lmkern's building blocks what NVIDIA's documents say."""

from __future__ import annotations

from typing import Any

import torch

from .ops.backend import EMULATOR, cuda_kernels, cuda_problem


def run_selftest() -> int:
    """Run the golden tests of the CUDA kernels' building blocks on every GPU and print what is wrong.

    Returns:
        0 if all is right, 1 if anything differs.

    Raises:
        RuntimeError: no GPU on which kernels can run.
    """
    if EMULATOR is not None:
        return min(1, _check(EMULATOR, "emulator"))
    module = cuda_kernels()
    if module is None:
        raise RuntimeError(f"selftest: {cuda_problem()}")
    wrong = 0
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
        if problem := cuda_problem(index):
            print(f"{name}: {problem}")
            wrong += 1
            continue
        with torch.cuda.device(index):
            torch.cuda.current_stream().synchronize()  # makes the device's context
            wrong += _check(module, name)
    return min(1, wrong)


def _check(module: Any, device: str) -> int:
    wrong = skipped = 0
    names = module.golden_names()
    for name in names:
        try:
            message = module.golden(name)
        except RuntimeError as error:
            message = str(error)
        if message.startswith("skipped: "):
            skipped += 1
        elif message:
            wrong += 1
        if message:
            print(f"{name}: {message}")
    print(f"{device}: {len(names) - wrong - skipped} right, {wrong} wrong, {skipped} skipped")
    return wrong
