"""Runs tests that were written for the CPU on another device, unchanged: ``pytest --device cuda``.

A test makes its tensors and modules with plain torch, ``torch.randn(3)``, ``lmkern.nn.LSTM(2, 3)``. Under
the name ``torch`` the modules of this folder find the module below, whose factories make the same tensor
on the CPU, by the CPU's random numbers, and move it. Layers that they construct are moved, too. The library
sees the real torch: a tensor that it puts on the wrong device stays there, and the test fails.
"""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = str(Path(__file__).parent)
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_strided", "eye", "from_numpy", "full", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor",
    "sparse_coo_tensor", "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip


class TorchOnDevice(types.ModuleType):
    """torch, but for the factories."""

    def __init__(self, device: str) -> None:
        super().__init__("torch")
        self.__dict__.update({name: _moved(getattr(torch, name), device) for name in FACTORIES})
        if device == "cuda":
            self.__dict__["autocast"] = _autocast

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _moved(factory: Callable[..., Any], device: str) -> Callable[..., Any]:
    def make(*args: Any, requires_grad: bool = False, **options: Any) -> Any:
        on_purpose = options.get("device") is not None or options.get("out") is not None
        if on_purpose or (args and isinstance(args[0], torch.Tensor)):
            options |= {"requires_grad": True} if requires_grad else {}
            return factory(*args, **options)
        made = factory(*args, **options).to(device)
        return made.requires_grad_() if requires_grad else made

    return functools.wraps(factory)(make)


def _autocast(device_type: str, *args: Any, **options: Any) -> Any:
    return torch.autocast("cuda" if device_type == "cpu" else device_type, *args, **options)


def install(device: str) -> None:
    """From now on. Before the tests are imported, and after the library."""
    _replace_torch(TorchOnDevice(device))
    _move_new_modules(device)
    rnn = torch.nn.utils.rnn
    rnn.pack_padded_sequence = _with_lengths_on_the_cpu(rnn.pack_padded_sequence)
    if device == "cuda":
        pytest.raises = _waiting(pytest.raises)
        for name in ("gradcheck", "gradgradcheck"):  # the reference has sums by atomics in it
            check = functools.partial(getattr(torch.autograd, name), nondet_tol=1e-10)
            setattr(torch.autograd, name, check)


def _replace_torch(replacement: TorchOnDevice) -> None:
    real_import = builtins.__import__

    def import_(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ):
        module = real_import(name, globals, locals, fromlist, level)
        # `import torch` and `import torch.nn`: both bind the module that is returned here.
        if module is torch and not fromlist and _is_test((globals or {}).get("__file__")):
            return replacement
        return module

    builtins.__import__ = import_


def _is_test(file: str | None) -> bool:
    return file is not None and file.startswith(HERE) and file != __file__


def _move_new_modules(device: str) -> None:
    def moving(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def run(self: torch.nn.Module, *args: Any, **options: Any) -> None:
            init(self, *args, **options)
            # Not on the way from one constructor of the library to the next.
            if options.get("device") is None and _is_test(sys._getframe(1).f_code.co_filename):
                self.to(device)

        return run

    for cls in set(_subclasses(torch.nn.Module)):
        if cls.__module__.startswith(("torch.nn.", "lmkern.")) and "__init__" in vars(cls):
            cls.__init__ = moving(cls.__init__)  # type: ignore[method-assign]


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _with_lengths_on_the_cpu(pack: Callable[..., Any]) -> Callable[..., Any]:
    """torch wants them there."""

    @functools.wraps(pack)
    def run(input: torch.Tensor, lengths: Any, *args: Any, **options: Any) -> Any:
        lengths = lengths.cpu() if isinstance(lengths, torch.Tensor) else lengths
        return pack(input, lengths, *args, **options)

    return run


def _waiting(raises: Callable[..., Any]) -> Callable[..., Any]:
    """A bad index on a GPU is raised by the next call, or on demand: here, before the block ends."""

    class Waiting:
        def __init__(self, block: Any) -> None:
            self.block = block

        def __enter__(self) -> Any:
            return self.block.__enter__()

        def __exit__(self, *exception: Any) -> Any:
            import lmkern

            if exception[0] is None:
                try:
                    lmkern.synchronize()
                except IndexError:
                    exception = sys.exc_info()
            return self.block.__exit__(*exception)

    @functools.wraps(raises)
    def run(expected: Any, *args: Any, **options: Any) -> Any:
        block = raises(expected, *args, **options)
        kinds = expected if isinstance(expected, tuple) else (expected,)
        return Waiting(block) if not args and IndexError in kinds else block

    return run
