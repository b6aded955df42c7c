"""Memory for the dense gradient of an embedding, kept from step to step.

All but a few of its V rows are zero, and allocating and zeroing them is 99 % of the time that
torch's backward takes. So each weight keeps the memory of its last gradient, and the ids that were
written: where nobody else holds that memory any more (the optimizer has dropped ``weight.grad``) and
nobody wrote to it, clearing those rows makes it a gradient of zeros again.

What tells that is torch's own book-keeping, not a promise of the caller:

- the use count of the storage: any tensor, NumPy array or storage object on it counts. Memory that is
  still held (``grad`` accumulates, or the user keeps it) is forgotten, and new memory taken.
- the version counter, shared with every alias that autograd sees: clipping, ``zero_grad`` in place,
  DistributedDataParallel advance it. Then all of the memory is looked through and cleared.

Writes that advance no version (through ``.data``, NumPy, a raw pointer) to rows that the step did not
touch are seen only if they hit one of 64 rows that are looked at, as a write to all rows does.

New memory comes zeroed from the system, page by page as it is touched: rows that no step touches cost
nothing at all.

All of this is the CPU's. A GPU clears memory at its full bandwidth, and torch keeps it there: each
gradient is in zeros of its own.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lmkern import _C
from lmkern.ops.backend import takes_cuda

_LEAST_BYTES = 1 << 18  # below, zeroing takes less time than asking
_SAMPLES = 64

Shape = tuple[int, int]


class GradientBuffer:
    """The memory of one weight's gradient. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: _Memory | None = None

    def fill(
        self, shape: Shape, dtype: torch.dtype, ids: Tensor, write: Callable[..., None]
    ) -> Tensor:
        """A gradient, zero but for the rows ``ids`` (ascending), which write(gradient, stale) writes,
        clearing the rows ``stale`` (ascending, or None)."""
        with self._lock:
            memory = self._memory
            if memory is None or not memory.fits(shape, dtype) or not memory.is_free():
                memory = self._memory = _Memory(shape, dtype)
            # Its holder, from now on. A new object, which AccumulateGrad takes over without a copy.
            gradient = memory.probe.detach()
        write(gradient, memory.reclaim())
        memory.written = ids
        memory.version = memory.probe._version
        return gradient


class _Memory:
    """A gradient's memory, what was written to it, and who else holds it."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.probe = lazily_zeroed(shape, dtype)  # shares the version counter with what is lent
        self.storage = self.probe.untyped_storage()
        self.written: Tensor | None = None  # ids of the rows that may not be zero; None: no row
        self.version = self.probe._version  # as it was then; -1 while a gradient is being written
        self._uses_when_free = self._uses()

    def fits(self, shape: Shape, dtype: torch.dtype) -> bool:
        return self.probe.shape == shape and self.probe.dtype == dtype

    def is_free(self) -> bool:
        return self._uses() == self._uses_when_free

    def _uses(self) -> tuple[int, int]:
        # A storage has one Python object, whoever asks for it: that one's own count is the second.
        return torch._C._storage_Use_Count(self.storage._cdata), sys.getrefcount(self.storage)

    def reclaim(self) -> Tensor | None:
        """The rows that are to be cleared. Until ``version`` is set again, nothing is known."""
        version, self.version = self.version, -1
        if version == self.probe._version and (
            self.written is None or _C.embedding_is_clear(self.probe, self.written, _SAMPLES)
        ):
            return self.written
        _C.embedding_clear(self.probe)
        return None


_buffers = WeakTensorKeyDictionary()
_buffers_lock = threading.Lock()


def buffer_of(weight: Tensor, reuse: bool) -> GradientBuffer | None:
    """The buffer of a large leaf on the CPU; without ``reuse``, none, and it is given back."""
    if weight.nbytes < _LEAST_BYTES or not weight.is_leaf:
        return None
    with _buffers_lock:
        if not reuse or takes_cuda(weight):
            _buffers.pop(weight, None)
            return None
        buffer = _buffers.get(weight)
        if buffer is None:
            buffer = _buffers[weight] = GradientBuffer()
        return buffer


def fill_gradient(
    buffer: GradientBuffer | None,
    shape: Shape,
    dtype: torch.dtype,
    ids: Tensor,
    write: Callable[..., None],
) -> Tensor:
    """:meth:`GradientBuffer.fill`, or the same in fresh memory."""
    if buffer is not None:
        return buffer.fill(shape, dtype, ids, write)
    gradient = lazily_zeroed(shape, dtype, ids.device)
    write(gradient, None)
    return gradient


def lazily_zeroed(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros whose pages, on the CPU, are not there before they are touched."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LEAST_BYTES or torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
