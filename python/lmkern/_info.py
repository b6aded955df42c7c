"""What this installation is and what it runs on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from lmkern import _C
from lmkern._version import __version__


def info() -> dict[str, Any]:
    """Versions, the instruction set in use, threads and the state of CUDA, for humans and bug reports.

    Returns:
        A dict of plain values: ``lmkern``, ``torch``, ``python``, ``platform``, ``isa``,
        ``isa_supported``, ``threads``, ``cuda``.
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
    if not torch.cuda.is_available():
        return "no kernels in this version; torch sees no GPU"
    name = torch.cuda.get_device_name()
    return f"no kernels in this version; torch sees {name}, where plain torch operations run"
