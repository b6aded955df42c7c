"""The emulator's modules for tests that call CUDA kernels by them, next to the CPU's."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

MODULES = ["_C_simt", "_C_simt_race"]
SCHEDULES = [("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2), ("random", 3)]


def use(module: Any, monkeypatch: pytest.MonkeyPatch, *users: Any) -> None:
    """Let ``users``, modules of lmkern.ops, take their kernels from ``module`` as a GPU's."""
    for user in users:
        monkeypatch.setattr(user, "kernels_of", lambda tensor: module)
        monkeypatch.setattr(user, "takes_cuda", lambda tensor: module.__name__ != "lmkern._C")


def emulated(name: str, monkeypatch: pytest.MonkeyPatch, *users: Any) -> Iterator[Any]:
    """For a fixture: the module, which no test leaves changed, nor with a bad index that nobody saw."""
    if importlib.util.find_spec(f"lmkern.{name}") is None:
        pytest.skip("built without LMKERN_SIMT")
    module = importlib.import_module(f"lmkern.{name}")
    use(module, monkeypatch, *users)
    assert module.take_index_error() is None
    yield module
    module.recurrent_begin_at("cluster")
    module.set_schedule("fifo", 0)
    module.set_device(8, 16, 227 << 10)
    assert module.take_index_error() is None
