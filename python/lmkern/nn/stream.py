"""Recurrent layers one step at a time, for input that arrives token by token."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmkern import _C
from lmkern.ops.backend import takes_cuda
from lmkern.ops.library import KERNEL_DTYPES
from lmkern.ops.recurrent_passes import CELLS, GATES, reads_weights_directly

if TYPE_CHECKING:
    from lmkern.nn.recurrent_base import RNNBase


class Streaming:
    """The part of a recurrent layer that takes one step at a time."""

    def stream(self: Any, batch_size: int = 1, hx: Any = None) -> StreamState:
        """A state for :meth:`step`, from zeros or from ``hx``, a state as ``forward`` returns it."""
        return StreamState(self, batch_size, hx)

    @torch.no_grad()
    def step(self: Any, x: Tensor, state: StreamState) -> Tensor:
        """One step of all layers: x [B, I] -> y [B, H] (with a projection [B, P]); updates ``state``.

        For generation and other input that arrives token by token: as ``forward`` with T = 1, but
        without its checks and allocations, and without gradients. y is a buffer of ``state``, which
        the step after the next overwrites; clone it to keep it.

        Raises:
            ValueError, TypeError: x does not fit the layer or the state; or the layer is in training
                mode with dropout, zoneout or weight drop, which a step does not draw.
        """
        if self.training and (self._noisy or (self.dropout and self.num_layers > 1)):
            raise ValueError(f"{type(self).__name__}: call eval() before step(): it draws no noise")
        name = type(self).__name__
        if not isinstance(state, StreamState):
            raise TypeError(f"{name}: state must be a StreamState, got {type(state).__name__}")
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: x must be a Tensor, got {type(x).__name__}")
        if x.shape != (state.batch_size, self.input_size):
            raise ValueError(
                f"{name}: x must be [B, I] = {[state.batch_size, self.input_size]}, got {list(x.shape)}"
            )
        if x.dtype != state._like.dtype:
            raise TypeError(f"{name}: x must be {state._like.dtype}, got {x.dtype}")
        return state._step(self, x)


class StreamState:
    """The state of a recurrent layer between two calls of ``step``.

    Made by ``module.stream(batch_size)``. ``h`` and, for an LSTM, ``c`` are lists with one tensor
    [B, H] (h with a projection: [B, P]) for each layer. All buffers are made once; a step allocates
    nothing. The layer's parameters are read where they lie, so there is no packed copy to go stale:
    changes in place are seen. After parameters were replaced or moved, make a new stream. ``set`` and
    ``reset`` write to the buffer that the last step returned.
    """

    def __init__(self, module: RNNBase, batch_size: int, hx: Any = None) -> None:
        name = type(module).__name__
        if module.bidirectional:
            raise ValueError(f"{name}: bidirectional must be False for a stream")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"{name}: batch_size must be an integer >= 1, got {batch_size!r}")
        self.batch_size = batch_size
        self._module = weakref.ref(module)
        weights = [group[0] for group in module.all_weights]
        self._like = weights[0]
        lstm = module.mode == "LSTM"
        gates = GATES[CELLS.index(module.mode.lower())]
        widths = [group[1].shape[1] for group in module.all_weights]
        hiddens = [group[0].shape[0] // gates for group in module.all_weights]
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = [
                [self._like.new_zeros(batch_size, width) for width in widths] for _ in range(2)
            ]
            self.c = (
                [self._like.new_zeros(batch_size, hidden) for hidden in hiddens] if lstm else []
            )
            self._parity = 0
            if hx is not None:
                self.set(hx)
        self._calls = self._prepare(module) if self._is_small(module) else None

    @property
    def h(self) -> list[Tensor]:
        """The hidden state of each layer; the buffers of the step after next."""
        return self._buffers[self._parity]

    @torch.no_grad()
    def set(self, hx: Any) -> None:
        """Take over a state as the layer returns it: h_n, or (h_n, c_n) for an LSTM."""
        h, c = hx if isinstance(hx, (tuple, list)) and self.c else (hx, ())
        if len(h) != len(self.h) or len(c) != len(self.c):
            raise ValueError(
                f"stream: hx must have {len(self.h)} layers, got {len(h)}"
                + (f" and {len(c)}" if len(c) else "")
            )
        pairs = list(zip([*self.h, *self.c], [*h, *c], strict=True))
        for target, value in pairs:
            if target.shape != value.shape:
                raise ValueError(
                    f"stream: hx must be {list(target.shape)} for each layer, got {list(value.shape)}"
                )
        for target, value in pairs:
            target.copy_(value)

    @torch.no_grad()
    def reset(self, rows: Tensor | None = None) -> None:
        """Zero the state; with ``rows``, a bool mask [B], only of these rows of the batch."""
        for buffer in (*self.h, *self.c):
            if rows is None:
                buffer.zero_()
            else:
                buffer.masked_fill_(rows.unsqueeze(1), 0)

    def _is_small(self, module: RNNBase) -> bool:
        # Parameters themselves, which are read where they lie; not what a parametrization computes.
        own: dict[str, Any] = module._parameters
        plain = all(
            len(names) == (4 if module.bias else 2)
            and all(name in own and own[name].is_contiguous() for name in names)
            for names in module._all_weights
        )
        return (
            plain
            and reads_weights_directly(self.batch_size, self._like.dtype)
            and self._like.is_cpu
            and not takes_cuda(self._like)
            and self._like.dtype in KERNEL_DTYPES
            and not any(module._zoneouts())
        )

    def _prepare(self, module: RNNBase) -> list[list[tuple[Any, ...]]]:
        """The kernel's arguments after x, for either parity and each layer."""
        self._cell = CELLS.index(module.mode.lower())
        calls: list[list[tuple[Any, ...]]] = []
        for parity in range(2):
            now, following = self._buffers[parity], self._buffers[1 - parity]
            layers = []
            for n, group in enumerate(module.all_weights):
                w = [t.detach().contiguous() for t in group] + [None] * (4 - len(group))
                c = self.c[n] if self.c else None
                layers.append((*w, now[n], c, following[n], None, c, None, None, None))
            calls.append(layers)
        return calls

    def _step(self, module: RNNBase, x: Tensor) -> Tensor:
        if self._module() is not module:
            raise ValueError(f"{type(module).__name__}: state must come from this layer's stream()")
        if self._calls is None:
            return self._general_step(module, x)
        x = x.contiguous()
        torch.get_num_threads()  # makes torch set the thread count in a new Python thread
        following = self._buffers[1 - self._parity]
        for n, arguments in enumerate(self._calls[self._parity]):
            _C.recurrent_step(self._cell, None, None, x, *arguments)
            x = following[n]
        self._parity = 1 - self._parity
        return x

    def _general_step(self, module: RNNBase, x: Tensor) -> Tensor:
        hx: Any = list(self.h) if module.hidden_sizes is not None else torch.stack(self.h)
        if self.c:
            hx = (hx, list(self.c) if module.hidden_sizes is not None else torch.stack(self.c))
        _, state = module(x.unsqueeze(1 if module.batch_first else 0), hx)
        self._parity = 1 - self._parity
        self.set(state)
        return self.h[-1]
