"""Which extension module runs on a tensor: ``_C`` on the CPU, ``_C_cuda`` on an NVIDIA GPU.

Both have the same functions, but those of ops that have no CUDA kernel yet. ``_C_cuda`` is imported at
the first call with a CUDA tensor, never before; where it can't be used, :func:`cuda_problem` says why,
and plain torch operations run.

For tests, the environment variable ``LMKERN_SIMT`` (``1``, or ``race`` for the build that also finds
races) puts an emulator of a GPU, ``_C_simt`` or ``_C_simt_race``, in the place of ``_C_cuda``: every op
that has a CUDA implementation then runs it on tensors of the CPU. It is read once, at import.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from typing import Any

import torch
from torch import Tensor

from lmkern import _C

_EMULATORS = {"1": "_C_simt", "race": "_C_simt_race"}
_OLDEST = (8, 0)  # compute capability


def _load_emulator(mode: str) -> Any:
    if mode in ("", "0"):
        return None
    if mode not in _EMULATORS:
        raise ImportError(f"LMKERN_SIMT must be 1 or race, got {mode!r}")
    try:
        return importlib.import_module(f"lmkern.{_EMULATORS[mode]}")
    except ImportError as error:
        raise ImportError(
            f"LMKERN_SIMT={mode} needs lmkern.{_EMULATORS[mode]}, which this build does not have: "
            f"configure with -DLMKERN_SIMT=ON, or unset LMKERN_SIMT ({error})"
        ) from error


EMULATOR = _load_emulator(os.environ.get("LMKERN_SIMT", ""))
_ON_CPU: Any = _C if EMULATOR is None else EMULATOR
# Whether a CUDA implementation has run to its end when it returns, so that its bad index can be raised
# by the call itself.
RUNS_AT_ONCE = EMULATOR is not None or os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"


class _Cuda:
    """What is known of _C_cuda: the module, or why there is none; per GPU, why it can't be used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = False
        self.module: Any = None
        self.problem = ""
        self.of_gpu: dict[int, str] = {}


_cuda = _Cuda()


def kernels_of(tensor: Tensor) -> Any:
    """The module whose kernels take ``tensor``, for functions that both backends have.

    On a GPU it raises the IndexError of an earlier call first, if there was one.
    """
    if tensor.is_cpu:
        return _ON_CPU
    module = _cuda.module if _cuda.asked else cuda_kernels()
    if module is None or not tensor.is_cuda:
        raise RuntimeError(
            f"lmkern: no kernels for device '{tensor.device}'"
            + (f": {_cuda.problem}" if tensor.is_cuda else "")
        )
    raise_index_error(module)
    return module


def takes_cuda(tensor: Tensor) -> bool:
    """Whether ops with a CUDA implementation run it on ``tensor``: on a GPU, and on the emulator.

    For ways around the dispatcher, which only one backend has.
    """
    return EMULATOR is not None or tensor.is_cuda


def cuda_kernels() -> Any:
    """``lmkern._C_cuda``, imported at the first call; None where it or a driver for it is missing."""
    if not _cuda.asked:
        with _cuda.lock:
            if not _cuda.asked:
                _cuda.module, _cuda.problem = _load_cuda()
                _cuda.asked = True
    return _cuda.module


@torch.compiler.assume_constant_result
def cuda_problem(index: int | None = None) -> str:
    """Why kernels can't run on the GPU ``index`` (None: on any), and what to do; "" if they can."""
    module = cuda_kernels()
    if module is None or index is None:
        return _cuda.problem
    problem = _cuda.of_gpu.get(index)
    if problem is None:
        problem = _cuda.of_gpu[index] = _problem_of_gpu(
            torch.cuda.get_device_name(index),
            torch.cuda.get_device_capability(index),
            list(module.architectures()),
            module.driver_version() >= module.runtime_version(),
        )
    return problem


def _load_cuda() -> tuple[Any, str]:
    try:
        module: Any = importlib.import_module("lmkern._C_cuda")
    except ModuleNotFoundError:
        return None, (
            "this build of lmkern has no CUDA kernels: install a wheel that has them, or build with "
            "LMKERN_CUDA=ON"
        )
    except Exception as error:
        return None, f"lmkern._C_cuda can't be loaded, reinstall lmkern: {error}"
    driver, runtime = module.driver_version(), module.runtime_version()
    if driver == 0:
        return None, "no NVIDIA driver found: install one"
    # Drivers of the same major version run what a later toolkit compiled.
    if driver // 1000 < runtime // 1000:
        return None, (
            f"the NVIDIA driver is too old, it knows CUDA {cuda_version(driver)}, lmkern's kernels need "
            f"{runtime // 1000}.0: update the driver"
        )
    if module.device_count() == 0:
        return None, "the NVIDIA driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return module, ""


def cuda_version(number: int) -> str:
    """As people write it: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _problem_of_gpu(
    name: str, capability: tuple[int, int], architectures: list[str], compiles: bool
) -> str:
    """``architectures``: as CMake calls them, 90a-real (binary), 120-virtual (PTX) or 80 (both);
    ``compiles``: whether the driver is new enough to compile their PTX."""
    found = f"{name} has compute capability {capability[0]}.{capability[1]}"
    if capability < _OLDEST:
        return f"{found}, lmkern's kernels need {_OLDEST[0]}.{_OLDEST[1]} or more"
    old_driver = False
    for architecture in architectures:
        parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
        if parts is None:
            continue
        major, minor, special, form = int(parts[1]), int(parts[2]), parts[3], parts[4]
        later = special != "a" and minor < capability[1]  # of the same major version
        if form != "-virtual" and major == capability[0] and (minor == capability[1] or later):
            return ""
        if form != "-real" and not special and (major, minor) <= capability:
            if compiles:
                return ""
            old_driver = True
    if old_driver:
        return (
            f"{found}, for which the NVIDIA driver is too old to compile kernels: update the driver"
        )
    return (
        f"{found}, lmkern's kernels were built for {', '.join(architectures)}: build with "
        f"LMKERN_CUDA_ARCHITECTURES={capability[0]}{capability[1]}"
    )


def raise_index_error(module: Any) -> None:
    """Raise the IndexError of the first bad index that a kernel of ``module`` met since the last time.

    Reads a flag in host memory, without waiting for the GPU.
    """
    message = module.take_index_error()
    if message is not None:
        raise IndexError(message)


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Wait for a GPU as :func:`torch.cuda.synchronize` does, then raise what its kernels reported.

    A kernel on a GPU takes the nearest row for an index that is out of range, reports it, and goes on:
    nothing waits for the GPU. The IndexError comes with the next call of a kernel of lmkern on a GPU, or
    here. With the environment variable ``CUDA_LAUNCH_BLOCKING=1``, as for torch's own errors, it comes
    from the call that has the bad index. Unlike after those, the GPU stays usable.

    Args:
        device: a GPU; default: the current one. Without any GPU in use, nothing happens.

    Raises:
        IndexError: an index out of range in an earlier call, naming op, argument, index and range.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)
    for module in (_cuda.module, EMULATOR):
        if module is not None:
            raise_index_error(module)
