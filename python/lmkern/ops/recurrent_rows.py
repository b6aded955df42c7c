"""The rows of a recurrent layer's batch as its kernel wants them.

A kernel runs over N rows, step after step; which rows of the batch take part in a step is a rectangle
or, as in a PackedSequence, a staircase. For the CPU, padded input with ``lengths`` is brought into that
form here: rows sorted by length, padding left out, so that padded steps cost nothing. A GPU masks rows
in its kernels instead (the classes at the end), because nothing may depend on data there.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lmkern.ops.library import matmul
from lmkern.ops.memory import fresh


class Rows:
    """Between a caller's layout and the kernel's. The base class: [T, B, ...] without padding.

    pack/unpack: of what has a value at each step; sort/unsort: of what has one for each row of the
    batch; ``index``: where packing is more than a view.
    """

    index: Tensor | None = None
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None  # int64 [B], on a GPU: of the rows of the batch
    offsets: Tensor | None = None  # int64 [T], on a GPU: of the rows of a step, where packed

    def __init__(self, lead: torch.Size, batch: int) -> None:
        self.lead, self.batch = lead, batch
        self.count = lead.numel()
        self.single = self.count == batch  # one step of all rows

    @overload
    def pack(self, x: Tensor) -> Tensor: ...
    @overload
    def pack(self, x: None) -> None: ...
    def pack(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten(0, 1).contiguous()

    def fresh(self, y: Tensor) -> Tensor:
        """A buffer for the kernel's form of y: y itself, where that is a view."""
        return y.flatten(0, 1)

    def pack_for_sum(self, x: Tensor) -> Tensor:
        """:meth:`pack` of what is summed over all rows: padding may hold anything, and adds nothing."""
        return self.pack(x)

    def unpack(self, packed: Tensor, out: Tensor) -> None:
        """Writes the kernel's form to ``out``, which may be where ``packed`` lies."""
        if packed.data_ptr() != out.data_ptr() or packed.dtype != out.dtype:
            out.copy_(packed.view(out.shape))

    def sort(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    def fresh_state(self, out: Tensor) -> Tensor:
        return out

    def unsort(self, packed: Tensor, out: Tensor) -> None:
        """Writes the kernel's form of a state to ``out``."""

    def unsorted(self, packed: Tensor) -> Tensor:
        return packed

    def each_step(self, x: Tensor | None) -> Tensor:
        """[B, ...] repeated for the rows of all steps."""
        assert x is not None
        return x.repeat(self.count // max(self.batch, 1), 1)

    def sum_steps(self, x: Tensor) -> Tensor:
        """[N, P] summed over the steps of each row of the batch: [B, P]."""
        return x.view(self.count // max(self.batch, 1), self.batch, x.shape[1]).sum(0)

    def previous(self, y: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        """[N, P]: y of the step before each row's, ``initial`` (or zeros) for its first."""
        if initial is None:
            initial = y.new_zeros(self.batch, y.shape[1])
        if reverse:
            return torch.cat([y[self.batch :], initial])
        return torch.cat([initial, y[: y.shape[0] - self.batch]])

    def recurrent_weight_gradient(
        self, d_hh: Tensor, y: Tensor, h0: Tensor | None, reverse: bool
    ) -> Tensor:
        """sum over rows of d_hh_t^T h_{t-1}, without a copy of y."""
        b, n = self.batch, self.count
        first, rest, before = (
            (slice(n - b, n), slice(0, n - b), slice(b, n))
            if reverse
            else (slice(0, b), slice(b, n), slice(0, n - b))
        )
        d_w = matmul(d_hh[rest], y[before], transpose_a=True)
        return d_w if h0 is None or n == 0 else d_w.addmm_(d_hh[first].t(), h0)


class PackedRows(Rows):
    """[N, ...] as in a PackedSequence, whose rows are sorted already."""

    def __init__(self, lead: torch.Size, batch: int, batch_sizes: Tensor) -> None:
        super().__init__(lead, batch)
        self.single = False
        self.batch_sizes = batch_sizes.contiguous()

    @overload
    def pack(self, x: Tensor) -> Tensor: ...
    @overload
    def pack(self, x: None) -> None: ...
    def pack(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    def fresh(self, y: Tensor) -> Tensor:
        return y

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Time and row of the batch of each of the N rows."""
        assert self.batch_sizes is not None
        sizes = self.batch_sizes
        time = torch.repeat_interleave(torch.arange(sizes.numel()), sizes)
        offsets = sizes.cumsum(0) - sizes
        return time, torch.arange(self.count) - offsets[time]

    def each_step(self, x: Tensor | None) -> Tensor:
        assert x is not None
        return x.index_select(0, self._positions()[1].to(x.device))

    def sum_steps(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.batch, x.shape[1]).index_add_(
            0, self._positions()[1].to(x.device), x
        )

    def previous(self, y: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        assert self.batch_sizes is not None
        if initial is None:
            initial = y.new_zeros(self.batch, y.shape[1])
        sizes = self.batch_sizes
        time, row = self._positions()
        here = torch.arange(self.count)
        if reverse:
            following = torch.cat([sizes[1:], sizes.new_zeros(1)])
            source = torch.where(row < following[time], here + sizes[time], self.count + row)
        else:
            source = torch.where(time > 0, here - sizes[(time - 1).clamp(min=0)], self.count + row)
        return torch.cat([y, initial]).index_select(0, source.to(y.device))


class SortedRows(PackedRows):
    """[T, B, ...] with lengths: sorted by length, without the padding."""

    def __init__(self, lead: torch.Size, batch: int, lengths: Tensor) -> None:
        steps = lead[0]
        self.order = lengths.argsort(descending=True, stable=True)
        time = torch.arange(steps, device=lengths.device).unsqueeze(1)
        taking_part = time < lengths[self.order]
        place = time * batch + self.order
        self.index = place[taking_part]
        super().__init__(lead, batch, taking_part.sum(1).cpu())
        self.count = self.index.numel()

    @overload
    def pack(self, x: Tensor) -> Tensor: ...
    @overload
    def pack(self, x: None) -> None: ...
    def pack(self, x: Tensor | None) -> Tensor | None:
        assert self.index is not None
        return None if x is None else x.flatten(0, 1).index_select(0, self.index)

    def fresh(self, y: Tensor) -> Tensor:
        return fresh(y, self.count, y.shape[-1])

    def unpack(self, packed: Tensor, out: Tensor) -> None:
        assert self.index is not None
        out.zero_().flatten(0, 1).index_copy_(0, self.index, packed.to(out.dtype))

    def sort(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, self.order)

    def fresh_state(self, out: Tensor) -> Tensor:
        return torch.empty_like(out)

    def unsort(self, packed: Tensor, out: Tensor) -> None:
        out.index_copy_(0, self.order, packed)

    def unsorted(self, packed: Tensor) -> Tensor:
        return torch.empty_like(packed).index_copy_(0, self.order, packed)


class DeviceRows(Rows):
    """[T, B, ...] on a GPU, with ``lengths`` or without: row b is masked from step lengths[b] on."""

    def __init__(self, lead: torch.Size, batch: int, lengths: Tensor | None) -> None:
        super().__init__(lead, batch)
        self.single = False  # the kernel does a single step's products, too
        self.lengths = None if lengths is None else lengths.contiguous()

    def pack_for_sum(self, x: Tensor) -> Tensor:
        if self.lengths is None:
            return self.pack(x)
        time = torch.arange(self.count // max(self.batch, 1), device=x.device).unsqueeze(1)
        return self.pack(x.masked_fill((time >= self.lengths).unsqueeze(2), 0))

    def previous(self, y: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        before = super().previous(y, initial, reverse)
        if not reverse or self.lengths is None or initial is None:
            return before
        steps = self.count // max(self.batch, 1)
        later = torch.arange(1, steps + 1, device=y.device).unsqueeze(1)
        starts = (later >= self.lengths).view(-1, 1)  # the step after has no such row
        return torch.where(starts, self.each_step(initial), before)


_placed = WeakTensorKeyDictionary()  # batch_sizes: what _on_device made of them
_of_graphs: list[Any] = []  # what CUDA graphs read in each replay, for as long as they live


def _on_device(batch_sizes: Tensor, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the rows of each step begin, and the lengths of the rows of the batch.

    Copied once for all layers and passes: after a warm-up, none is left for the capture of a CUDA graph.
    """
    key = (0 if batch_sizes.is_inference() else batch_sizes._version, batch, device)
    known: tuple[Any, tuple[Tensor, Tensor]] | None = _placed.get(batch_sizes)
    if known is None or known[0] != key:
        rows = torch.arange(batch).unsqueeze(1)
        offsets = batch_sizes.cumsum(0) - batch_sizes
        both = torch.cat([offsets, (batch_sizes > rows).sum(1)]).to(device)
        made: tuple[Tensor, Tensor] = both.split([batch_sizes.numel(), batch])
        _placed[batch_sizes] = known = key, made
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _of_graphs.append(known[1])
    return known[1]


class DevicePackedRows(PackedRows):
    """[N, ...] as in a PackedSequence, on a GPU. ``batch_sizes`` lies on the CPU, as torch has it."""

    def __init__(
        self, lead: torch.Size, batch: int, batch_sizes: Tensor, device: torch.device
    ) -> None:
        super().__init__(lead, batch, batch_sizes)
        self.steps, self.batch_sizes = batch_sizes.numel(), None
        self.offsets, self.lengths = _on_device(batch_sizes, batch, device)

    def _positions(self) -> tuple[Tensor, Tensor]:
        assert self.offsets is not None
        place = torch.arange(self.count, device=self.offsets.device)
        time = torch.searchsorted(self.offsets, place, right=True) - 1
        return time, place - self.offsets[time]

    def sum_steps(self, x: Tensor) -> Tensor:
        # Not index_add_, whose atomics add in any order.
        time, row = self._positions()
        rectangle = x.new_zeros(self.steps * self.batch, x.shape[1])
        rectangle.index_copy_(0, time * self.batch + row, x)
        return rectangle.view(self.steps, self.batch, -1).sum(0)

    def previous(self, y: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        assert self.offsets is not None and self.lengths is not None
        if initial is None:
            initial = y.new_zeros(self.batch, y.shape[1])
        time, row = self._positions()
        before = time + 1 if reverse else time - 1
        inner = (before >= 0) & (before < self.lengths[row])
        source = self.offsets[before.clamp(0, self.steps - 1)] + row
        return torch.cat([y, initial]).index_select(0, torch.where(inner, source, self.count + row))


def device_rows_of(
    x: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, batch: int
) -> Rows:
    """:func:`rows_of` on a GPU."""
    if batch_sizes is not None:
        return DevicePackedRows(x.shape[:-1], batch, batch_sizes, x.device)
    return DeviceRows(x.shape[:-1], batch, lengths)


def rows_of(x: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, batch: int) -> Rows:
    """The rows of x: [T, B, I], or [N, I] with batch_sizes."""
    if batch_sizes is not None:
        return PackedRows(x.shape[:-1], batch, batch_sizes)
    if lengths is not None:
        return SortedRows(x.shape[:-1], batch, lengths)
    return Rows(x.shape[:-1], batch)
