"""What this installation is and what it runs on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from lmkern import _C
from lmkern._version import __version__
from lmkern.ops.backend import EMULATOR, cuda_kernels, cuda_problem, cuda_version


def info() -> dict[str, Any]:
    """Versions, the instruction set in use, threads and the state of CUDA, for humans and bug reports.

    Returns:
        A dict of plain values: ``lmkern``, ``torch``, ``python``, ``platform``, ``isa``,
        ``isa_supported``, ``threads``, ``cuda``: whether its kernels can run, or why not and what to do,
        and the GPUs.
    """
    return {
        "lmkern": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "isa": _C.isa(),
        "isa_supported": _C.supported_isas(),
        "threads": _C.max_threads(),
        "cuda": _cuda(),
    }


def _cuda() -> str:
    module = cuda_kernels()
    parts = [cuda_problem() or "kernels ready"]
    if module is not None:
        parts.append(
            f"built with CUDA {cuda_version(module.runtime_version())} for "
            f"{', '.join(module.architectures())}"
        )
        parts.append(f"the driver knows CUDA {cuda_version(module.driver_version())}")
    if EMULATOR is not None:
        parts.append(f"emulated by {EMULATOR.__name__}")
    if not torch.cuda.is_available():
        parts.append("torch sees no GPU")
    else:
        parts += [
            f"cuda:{n} {torch.cuda.get_device_name(n)}: {cuda_problem(n) or 'ready'}"
            for n in range(torch.cuda.device_count())
        ]
    return "; ".join(parts)
