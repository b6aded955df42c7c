"""What the recurrent layers share: parameters, call forms, the walk over layers and directions."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter, init
from torch.nn.utils.rnn import PackedSequence

from lmkern.functional._layer import check_lengths
from lmkern.nn.stream import Streaming
from lmkern.ops.library import is_autocast_on

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1, "RNN_SIGMOID": 1}

# A parameter's name without layer and direction -> the argument of lmkern.functional that takes it.
_ARGUMENTS = {
    "weight_ih": "w_ih",
    "weight_hh": "w_hh",
    "bias_ih": "b_ih",
    "bias_hh": "b_hh",
    "weight_hr": "w_hr",
    "norm_ih": "norm_ih",
    "norm_hh": "norm_hh",
    "norm_cell_weight": "norm_cell_weight",
    "norm_cell_bias": "norm_cell_bias",
    "peephole": "peephole",
}
# Those that torch's layers do not have and that are not drawn at random: their initial value.
_CONSTANTS = {"norm_ih": 1.0, "norm_hh": 1.0, "norm_cell_weight": 1.0, "norm_cell_bias": 0.0}


class RNNBase(Streaming, Module):
    """Base of RNN, LSTM and GRU; their documentation has the arguments.

    ``mode`` is "LSTM", "GRU", "RNN_TANH", "RNN_RELU" or "RNN_SIGMOID".
    """

    _function: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        recompute: bool = False,
        hidden_sizes: Sequence[int] | None = None,
        peephole: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for key, flag in (("bias", bias), ("batch_first", batch_first)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: {key} must be a bool, got {type(flag).__name__}")
        for key, value, low in (
            ("input_size", input_size, 1),
            ("hidden_size", hidden_size, 1),
            ("num_layers", num_layers, 1),
            ("proj_size", proj_size, 0),
        ):
            if not isinstance(value, int):
                raise TypeError(f"{name}: {key} must be an int, got {type(value).__name__}")
            if value < low:
                raise ValueError(f"{name}: {key} must be at least {low}, got {value}")
        if proj_size >= hidden_size:
            raise ValueError(
                f"{name}: proj_size must be smaller than hidden_size = {hidden_size}, got {proj_size}"
            )
        dropout = _probability(name, "dropout", dropout)
        if hidden_sizes is not None:
            hidden_sizes = list(hidden_sizes)
            num_layers = self._check_hidden_sizes(hidden_sizes, hidden_size, num_layers, proj_size)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"{name}: dropout acts on the output of every layer but the last, and with "
                f"num_layers = 1 nowhere, got dropout = {dropout}",
                stacklevel=3,
            )
        self.mode, self.input_size, self.hidden_size = mode, input_size, hidden_size
        self.num_layers, self.bias, self.batch_first = num_layers, bias, batch_first
        self.dropout, self.bidirectional, self.proj_size = dropout, bidirectional, proj_size
        self.layer_norm, self.recompute, self.hidden_sizes = layer_norm, recompute, hidden_sizes
        self.peephole = peephole
        self.zoneout: float | tuple[float, float]
        if isinstance(zoneout, (tuple, list)):
            if mode != "LSTM" or len(zoneout) != 2:
                raise ValueError(
                    f"{name}: zoneout must be a rate{' or a pair of rates' * (mode == 'LSTM')}, "
                    f"got {zoneout!r}"
                )
            self.zoneout = (
                _probability(name, "zoneout[0]", zoneout[0]),
                _probability(name, "zoneout[1]", zoneout[1]),
            )
        else:
            self.zoneout = _probability(name, "zoneout", zoneout)
        self.recurrent_dropout = _probability(name, "recurrent_dropout", recurrent_dropout)
        self.weight_drop = _probability(name, "weight_drop", weight_drop)

        self._directions = 2 if bidirectional else 1
        self._sizes = hidden_sizes or [hidden_size] * num_layers
        self._noisy = bool(recurrent_dropout or weight_drop or any(self._zoneouts()))
        self._all_weights: list[list[str]] = []
        below = input_size
        for layer, hidden in enumerate(self._sizes):
            shapes = self._shapes(below, hidden)
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: self._directions]:
                for key, shape in shapes.items():
                    weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
                    setattr(self, key + suffix, weight)
                self._all_weights.append([key + suffix for key in shapes])
            below = (proj_size or hidden) * self._directions
        self._arguments = [_ARGUMENTS[key] for key in shapes]
        self.reset_parameters()

    def _check_hidden_sizes(
        self, sizes: list[int], hidden_size: int, num_layers: int, proj_size: int
    ) -> int:
        """The number of layers, where each has its own size."""
        name = type(self).__name__
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"{name}: hidden_sizes must be positive integers, got {sizes}")
        if sizes[-1] != hidden_size:
            raise ValueError(
                f"{name}: hidden_sizes must end in hidden_size = {hidden_size}, got {sizes}"
            )
        if num_layers not in (1, len(sizes)):
            raise ValueError(
                f"{name}: hidden_sizes must have num_layers = {num_layers} values, got {sizes}"
            )
        if proj_size:
            raise ValueError(f"{name}: hidden_sizes and proj_size exclude each other")
        return len(sizes)

    def _shapes(self, below: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Parameters of one layer and direction: torch's in torch's order, then ours."""
        wide = _GATES[self.mode] * hidden
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (wide, below),
            "weight_hh": (wide, self.proj_size or hidden),
        }
        if self.bias:
            shapes |= {"bias_ih": (wide,), "bias_hh": (wide,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, hidden)
        if self.layer_norm:
            shapes |= {"norm_ih": (wide,), "norm_hh": (wide,)}
            if self.mode == "LSTM":
                shapes |= {"norm_cell_weight": (hidden,), "norm_cell_bias": (hidden,)}
        if self.peephole:
            shapes["peephole"] = (3 * hidden,)
        return shapes

    def _zoneouts(self) -> tuple[float, float]:
        zoneout = self.zoneout
        return zoneout if isinstance(zoneout, tuple) else (zoneout, 0.0)

    @property
    def all_weights(self) -> list[list[Parameter]]:
        """The parameters of each layer and direction, as in torch."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def reset_parameters(self) -> None:
        """Draw weights and biases from U(-1/√H, 1/√H) in torch's order, then peepholes; norms are 1."""
        rows = {name: row for row, names in enumerate(self._all_weights) for name in names}
        late = []
        for name, weight in self.named_parameters():
            # A parametrized one is called parametrizations.NAME.original.
            own = name.removeprefix("parametrizations.").split(".")[0]
            size = self._sizes[rows[own] // self._directions] if own in rows else self.hidden_size
            bound = 1.0 / math.sqrt(size)
            kind = own.rpartition("_l")[0]
            if kind in _CONSTANTS:
                init.constant_(weight, _CONSTANTS[kind])
            elif kind == "peephole":
                late.append((weight, bound))
            else:
                init.uniform_(weight, -bound, bound)
        for weight, bound in late:
            init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat weight buffer to keep. Here so that callers need not care."""

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "layer_norm": False,
            "zoneout": 0.0,
            "recurrent_dropout": 0.0,
            "weight_drop": 0.0,
            "recompute": False,
            "hidden_sizes": None,
            "peephole": False,
        }
        parts += [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(parts)

    # ---- forward --------------------------------------------------------------------------------

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | Sequence[int] | None,
        reset_mask: Tensor | PackedSequence | None,
        with_cells: bool = False,
    ) -> tuple[Any, Any, Any, Any]:
        """output, h_n, c_n (LSTM) and cell states (where asked for), laid out as the caller's input."""
        name = type(self).__name__
        batch_sizes = order = back = None
        batched = True
        if isinstance(input, Tensor):
            x, dims = input, input.dim()
            if dims not in (2, 3):
                raise ValueError(f"{name}: input must be 2-D or 3-D, got {list(input.shape)}")
            batched = dims == 3
            if not batched:
                x = input.unsqueeze(1)
            elif self.batch_first:
                x = input.transpose(0, 1)
            batch = x.shape[1]
        elif isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
            batch = int(batch_sizes[0])
            if lengths is not None:
                raise ValueError(f"{name}: lengths must be None, a PackedSequence has its own")
        else:
            raise TypeError(
                f"{name}: input must be a Tensor or PackedSequence, got {type(input).__name__}"
            )
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"{name}: input must have {self.input_size} features (input_size), got {list(x.shape)}"
            )
        if lengths is not None:
            lengths = torch.as_tensor(lengths)
            if lengths.device != x.device:  # there, their values are not looked at
                check_lengths(name, lengths, x.shape[0])
            lengths = lengths.to(x.device)
            lengths = lengths if batched else lengths.reshape(-1)
        if isinstance(reset_mask, PackedSequence):
            reset_mask = reset_mask.data
        elif reset_mask is not None and batch_sizes is None:
            if not batched:
                reset_mask = reset_mask.unsqueeze(1)
            elif self.batch_first:
                reset_mask = reset_mask.transpose(0, 1)

        is_lstm = self.mode == "LSTM"
        h0 = c0 = None
        if is_lstm and hx is not None:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                raise TypeError(f"{name}: hx must be a pair (h_0, c_0), got {type(hx).__name__}")
            h0 = self._state_rows("h_0", hx[0], self.proj_size, batch, batched, order)
            c0 = self._state_rows("c_0", hx[1], 0, batch, batched, order)
        elif hx is not None:
            h0 = self._state_rows("hx", hx, 0, batch, batched, order)

        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        cells: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            cells = []
            for direction in range(self._directions):
                row = layer * self._directions + direction
                state: Any = None if h0 is None else h0[row]
                if c0 is not None:
                    state = (state, c0[row])
                options = self._options(row, x, batch)
                if with_cells and layer == self.num_layers - 1:
                    options["return_cell_states"] = True
                result = self._function(
                    x, hx=state, reverse=direction == 1, lengths=lengths, reset_mask=reset_mask,
                    batch_sizes=batch_sizes, recompute=self.recompute, **options,
                )  # fmt: skip
                outputs.append(result[0])
                h_n.append(result[1][0] if is_lstm else result[1])
                if is_lstm:
                    c_n.append(result[1][1])
                    cells.extend(result[2:])
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)

        def as_input(sequence: Tensor) -> Any:
            if batch_sizes is not None:
                return PackedSequence(sequence, batch_sizes, order, back)
            if not batched:
                return sequence.squeeze(1)
            return sequence.transpose(0, 1) if self.batch_first else sequence

        return (
            as_input(x),
            self._as_state(h_n, batched, back),
            self._as_state(c_n, batched, back) if is_lstm else None,
            as_input(torch.cat(cells, dim=-1)) if cells else None,
        )

    def _options(self, row: int, x: Tensor, batch: int) -> dict[str, Any]:
        """The parameters of one layer and direction and its noise, as arguments of the function."""
        names, parameters = self._all_weights[row], self._parameters
        try:
            weights: list[Any] = [parameters[name] for name in names]
        except KeyError:  # a parametrized weight is a property
            weights = [getattr(self, name) for name in names]
        if weights[0].dtype != x.dtype and not (is_autocast_on(x.device.type)):
            raise ValueError(
                f"{type(self).__name__}: input must be {weights[0].dtype} like the parameters, "
                f"got {x.dtype}"
            )
        options = dict(zip(self._arguments, weights, strict=True))
        if not self._noisy:
            return options
        hidden = self._sizes[row // self._directions]
        features = self.proj_size or hidden
        rates = self._zoneouts()
        for key, rate, width in zip(
            ("zoneout_h", "zoneout_c"), rates, (features, hidden), strict=True
        ):
            if rate:
                shape = (*x.shape[:-1], width)
                options[key] = torch.rand(shape, device=x.device) < rate if self.training else rate
        if self.training and self.weight_drop:
            options["w_hh"] = F.dropout(options["w_hh"], self.weight_drop)
        if self.training and self.recurrent_dropout:
            options["h_mask"] = F.dropout(x.new_ones(batch, features), self.recurrent_dropout)
        return options

    def _state_rows(
        self, key: str, state: Any, width: int, batch: int, batched: bool, order: Tensor | None
    ) -> Sequence[Tensor]:
        """The initial state of each layer and direction, [B, width or the layer's size]."""
        name, rows = type(self).__name__, self.num_layers * self._directions
        batches = (batch,) if batched else ()
        if self.hidden_sizes is None:
            if not isinstance(state, Tensor):
                raise TypeError(f"{name}: {key} must be a Tensor, got {type(state).__name__}")
            if state.shape != (rows, *batches, width or self.hidden_size):
                raise ValueError(
                    f"{name}: {key} must be {[rows, *batches, width or self.hidden_size]}, "
                    f"got {list(state.shape)}"
                )
            if order is not None:
                state = state.index_select(1, order)
            return (state if batched else state.unsqueeze(1)).unbind(0)
        if not isinstance(state, (list, tuple)) or len(state) != rows:
            raise TypeError(
                f"{name}: {key} must be a list of {rows} tensors with hidden_sizes, one for each "
                f"layer and direction, got {type(state).__name__}"
            )
        for row, tensor in enumerate(state):
            expected = (*batches, self._sizes[row // self._directions])
            if tensor.shape != expected:
                raise ValueError(
                    f"{name}: {key}[{row}] must be {list(expected)}, got {list(tensor.shape)}"
                )
        if order is not None:
            return [tensor.index_select(0, order) for tensor in state]
        return state if batched else [tensor.unsqueeze(0) for tensor in state]

    def _as_state(self, rows: list[Tensor], batched: bool, back: Tensor | None) -> Any:
        """The inverse of :meth:`_state_rows`."""
        if self.hidden_sizes is not None:
            if back is not None:
                rows = [row.index_select(0, back) for row in rows]
            return tuple(rows if batched else [row.squeeze(0) for row in rows])
        state = rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
        if back is not None:
            state = state.index_select(1, back)
        return state if batched else state.squeeze(1)


def _probability(owner: str, key: str, value: Any) -> float:
    is_number = isinstance(value, numbers.Number) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ValueError(f"{owner}: {key} must be a probability in [0, 1], got {value!r}")
    return float(value)
