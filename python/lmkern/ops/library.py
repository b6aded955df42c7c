"""What all ops share: declaration, the choice between kernel and reference, the double backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lmkern import _C
from lmkern._warnings import warn_once
from lmkern.ops.backend import (
    EMULATOR,
    RUNS_AT_ONCE,
    cuda_problem,
    kernels_of,
    raise_index_error,
)
from lmkern.ops.memory import fresh

_LIBRARY = torch.library.Library("lmkern", "DEF")

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_KERNEL_DEVICES = ("cpu", "meta", "cuda")
_ON_CUDA: set[str] = set()  # ops, and kernels that are called straight, that CUDA has, too


def define_op(
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Declare ``lmkern::schema`` with its implementations, CPU and CUDA, and its shapes-only one.

    Where both do the same, ``cuda`` is ``cpu``, and takes its kernels from
    :func:`~lmkern.ops.backend.kernels_of`. Without ``cuda``, the callers take the reference on a GPU
    (:func:`use_kernel`).

    ``Library.define``/``impl`` rather than ``torch.library.custom_op``: 4 against 15-37 us a call.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    if cuda is not None:
        declare_cuda(name)
        if RUNS_AT_ONCE:
            cuda = _raising(cuda)
        _LIBRARY.impl(name, cuda, "CUDA")
    _LIBRARY.impl(name, cpu if EMULATOR is None or cuda is None else cuda, "CPU")
    torch.library.register_fake(f"lmkern::{name}", fake, lib=_LIBRARY)


def declare_cuda(*names: str) -> None:
    """Tell :func:`use_kernel` of kernels that CUDA has and that are called past the dispatcher."""
    _ON_CUDA.update(names)


def has_cuda(kernel: str) -> bool:
    """Whether CUDA has ``kernel``, the name of an op."""
    return kernel in _ON_CUDA


def _raising(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Raises a bad index in the call itself, where that has run to its end."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        result = implementation(*args)
        raise_index_error(kernels_of(next(a for a in args if isinstance(a, Tensor))))
        return result

    return run


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel accumulates, and saves what must not be rounded."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def register_vmap(name: str, rule: Callable[..., Any]) -> None:
    """The batching rule of ``lmkern::name``: rule(info, in_dims, *args) -> outputs, out_dims."""
    torch.library.register_vmap(f"lmkern::{name}", rule, lib=_LIBRARY)


def _forward_mode() -> bool:
    """Whether forward-mode differentiation is on, torch.autograd's or torch.func's."""
    if forward_ad._current_level >= 0:
        return True
    jvp = torch._C._functorch.TransformType.Jvp
    return any(i.key() == jvp for i in torch._C._functorch.get_interpreter_stack() or ())


def missing_kernel(kernel: str, device: torch.device) -> str:
    """Why ``kernel``, the name of an op, does not run on ``device``; "" if it does."""
    if device.type not in _KERNEL_DEVICES:
        return f"no kernel for device '{device.type}' yet"
    if device.type != "cuda":
        return ""
    problem = cuda_problem(device.index)
    if not problem and not has_cuda(kernel):
        problem = "no kernel for device 'cuda' yet"
    return problem


def use_kernel(
    op: str,
    tensor: Tensor,
    *,
    kernel: str | None = None,
    transforms: bool = False,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether ``op`` runs on its kernel; otherwise the caller takes :mod:`lmkern.reference`.

    The reference is made of plain torch operations, so it serves what a kernel cannot: other devices
    and dtypes (with one warning), forward-mode differentiation, and, unless the op has rules for them
    (``transforms``), the transforms of torch.func. ``kernel``: lmkern's op behind ``op``, if that is not
    ``{op}_forward``. ``dtype``: that it computes in, if not the tensor's.
    """
    dtype = dtype or tensor.dtype
    if not tensor.is_cpu:
        missing = missing_kernel(kernel or f"{op}_forward", tensor.device)
        if missing:
            # What holds for a whole GPU is said once, not once for each op.
            where = op if missing.startswith("no kernel") else "lmkern"
            warn_once(f"{where}: {missing}, running plain torch operations")
            return False
    if dtype not in KERNEL_DTYPES:
        warn_once(f"{op}: no kernel for {dtype} yet, running plain torch operations")
        return False
    if torch.compiler.is_compiling():
        return True
    # OpenMP keeps its thread count per thread; asking torch makes it set ours in a new Python thread.
    torch.get_num_threads()
    if torch._C._are_functorch_transforms_active():
        return transforms and not _forward_mode()
    return forward_ad._current_level < 0


def is_plain_eager() -> bool:
    """Whether nothing stands between a caller and a kernel: no compiler, transform, mode or autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch.get_num_threads() < 1  # asked for its effect, see use_kernel
    )


def is_plain_backward(d_out: Tensor) -> bool:
    """Whether a backward pass may call a kernel past the dispatcher: nothing looks at its ops."""
    return (
        type(d_out) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for tensors of this device; never for meta, which torch refuses to ask."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, cast to the autocast dtype where autocast is on (float64 is left alone)."""
    if not is_autocast_on(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


class plain_products:
    """For products inside op implementations: below autograd, and without autocast of any device, whose
    dtypes were settled outside."""

    def __enter__(self) -> None:
        self._guard = torch._C._AutoDispatchBelowAutograd()
        self._guard.__enter__()
        self._autocast = None
        if torch._C._is_any_autocast_enabled():
            self._autocast = torch._C._DisableAutocast()
            self._autocast.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(*exception)
        self._guard.__exit__(*exception)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """For differentiable operations whose dtypes were settled before."""
    if is_autocast_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# Where tiles save more than splitting takes: `b` is split for so many rows, `a` for so many columns,
# and a call costs 2 us.
_LEAST_ROWS, _LEAST_COLUMNS, _LEAST_PRODUCTS = 96, 48, 1 << 23
# From this depth on a wide product is faster as a tall one, whose transpose is then copied: packing
# the columns of `b` costs as much as 96 rows, splitting the rows of `a` only as much as 50 columns.
_DEEP = 512


def _rows(x: Tensor, transposed: bool) -> tuple[Tensor, bool]:
    """``x`` with contiguous rows, and whether the matrix that is meant is now its transpose."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x, transposed
    return (x.t(), not transposed) if x.stride(0) == 1 else (x.contiguous(), transposed)


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
) -> Tensor:
    """``op(a) @ op(b) + bias``, added to ``out`` if ``accumulate``; ``op`` transposes on request.

    On a CPU with AMX by lmkern's float32 kernel (csrc/ops/matmul.h), else and if small by torch.
    ``a [M, K]``, ``b [K, N]``, ``bias [N]``, ``out [M, N]``. For op implementations: no gradient.
    """
    x, y = a.t() if transpose_a else a, b.t() if transpose_b else b
    rows, depth, columns = x.shape[0], x.shape[1], y.shape[1]
    if out is None:
        out = fresh(a, rows, columns)
    if (
        a.is_cpu
        and a.dtype == torch.float32
        and rows >= _LEAST_ROWS
        and columns >= _LEAST_COLUMNS
        and rows * columns * depth >= _LEAST_PRODUCTS
        and out.stride(1) == 1
    ):
        if columns >= 2 * rows and depth >= _DEEP and bias is None and not accumulate:
            tall = matmul(b, a, transpose_a=not transpose_b, transpose_b=not transpose_a)
            return out.copy_(tall.t())
        (a, transpose_a), (b, transpose_b) = _rows(a, transpose_a), _rows(b, transpose_b)
        bias = None if bias is None else bias.contiguous()
        if _C.matmul(a, b, bias, out, transpose_a, transpose_b, accumulate):
            return out
    with plain_products():
        if accumulate:
            if bias is not None:
                out += bias
            return out.addmm_(x, y)
        if bias is None:
            return torch.mm(x, y, out=out)
        return torch.addmm(bias, x, y, out=out)


def reference_backward(
    reference: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradient of ``reference(*inputs)`` as a differentiable function: the double backward.

    Returns one gradient for each input, None where it needs none.
    """
    with torch.enable_grad():
        # Identities of the inputs, so that a path from one input to another is not counted twice.
        aliases = [t.view_as(t) if t is not None else None for t in inputs]
        outputs = reference(*aliases)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (o, g)
            for o, g in zip(outputs, grad_outputs, strict=True)
            if g is not None and o.requires_grad
        ]
        if not pairs:
            return (None,) * len(aliases)
        wanted = [a for a in aliases if a is not None and a.requires_grad]
        grads = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return tuple(next(grads) if a is not None and a.requires_grad else None for a in aliases)
