"""Recurrent layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter, init
from torch.nn.utils.rnn import PackedSequence

from lmkern._warnings import warn_once
from lmkern.functional import lstm

State = tuple[Tensor, Tensor]


class LSTM(Module):
    r"""``torch.nn.LSTM`` on lmkern's kernels.

    .. math::
        i, f, g, o = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ \tanh(g), \quad h_t = σ(o) ⊙ \tanh(c_t)

    Constructor arguments, parameter names and shapes, ``state_dict`` and initialisation are exactly
    torch's: a checkpoint of one loads into the other, and the same seed gives the same weights.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: stacked layers, each reading the one below.
        bias: whether layers have b_ih and b_hh.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...].
        dropout: probability of dropout on the output of every layer but the last.
        bidirectional: a second direction, its output concatenated.
        proj_size: if > 0, h is projected to this many features; runs torch's operator for now.
        device, dtype: of the parameters.

    Shape:
        - input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a PackedSequence
          (which runs torch's operator for now).
        - hx: (h_0, c_0), each [num_layers * directions, B, H], or without B if unbatched; zeros if
          None.
        - returns output [T, B, directions * H] (laid out like the input) and (h_n, c_n), shaped as hx.

    Raises:
        ValueError: an input or state of the wrong shape, naming expected and actual.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("input_size", input_size, 0),
            ("hidden_size", hidden_size, 1),
            ("num_layers", num_layers, 1),
            ("proj_size", proj_size, 0),
        ):
            if not isinstance(value, int) or value < low:
                raise ValueError(f"LSTM: {name} must be an integer >= {low}, got {value!r}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"LSTM: dropout must be a probability in [0, 1], got {dropout!r}")
        if proj_size >= hidden_size:
            raise ValueError(
                f"LSTM: proj_size must be smaller than hidden_size = {hidden_size}, got {proj_size}"
            )
        self.mode = "LSTM"
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size

        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                below = input_size if layer == 0 else self._features * self._directions
                shapes: dict[str, tuple[int, ...]] = {"weight_ih": (4 * hidden_size, below)}
                shapes["weight_hh"] = (4 * hidden_size, self._features)
                if bias:
                    shapes["bias_ih"] = shapes["bias_hh"] = (4 * hidden_size,)
                if proj_size > 0:
                    shapes["weight_hr"] = (proj_size, hidden_size)
                for name, shape in shapes.items():
                    weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
                    setattr(self, f"{name}_{suffix}", weight)
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _features(self) -> int:  # of h
        return self.proj_size or self.hidden_size

    def _suffixes(self, layer: int) -> list[str]:
        return [f"l{layer}", f"l{layer}_reverse"][: self._directions]

    def _weights(self, suffix: str) -> list[Tensor]:
        names = ["weight_ih", "weight_hh"]
        names += ["bias_ih", "bias_hh"] if self.bias else []
        names += ["weight_hr"] if self.proj_size else []
        return [getattr(self, f"{name}_{suffix}") for name in names]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, as in torch."""
        return [self._weights(s) for n in range(self.num_layers) for s in self._suffixes(n)]

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-1/√H, 1/√H), in torch's order."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
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
        }
        parts += [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(parts)

    def forward(
        self, input: Tensor | PackedSequence, hx: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if not isinstance(input, torch.Tensor):
            raise TypeError(
                f"LSTM: input must be a Tensor or PackedSequence, got {type(input).__name__}"
            )
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: input must be 2-D or 3-D, got {list(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"LSTM: input must have {self.input_size} features (input_size), got {list(input.shape)}"
            )
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        state = self._check_state(hx, x.shape[1], batched)
        if state is not None and not batched:
            state = (state[0].unsqueeze(1), state[1].unsqueeze(1))

        y, (h_n, c_n) = self._torch(x, state) if self.proj_size else self._layers(x, state)

        if batched:
            return (y.transpose(0, 1) if self.batch_first else y), (h_n, c_n)
        return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))

    def _check_state(self, hx: State | None, batch: int, batched: bool) -> State | None:
        if hx is None:
            return None
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise TypeError(f"LSTM: hx must be a pair (h_0, c_0), got {type(hx).__name__}")
        rows = self.num_layers * self._directions
        for name, tensor, width in (
            ("h_0", hx[0], self._features),
            ("c_0", hx[1], self.hidden_size),
        ):
            expected = [rows, batch, width] if batched else [rows, width]
            if list(tensor.shape) != expected:
                raise ValueError(f"LSTM: {name} must be {expected}, got {list(tensor.shape)}")
        return hx[0], hx[1]

    def _layers(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        finals_h, finals_c = [], []
        for layer in range(self.num_layers):
            outputs = []
            for direction, suffix in enumerate(self._suffixes(layer)):
                row = layer * self._directions + direction
                hx = None if state is None else (state[0][row], state[1][row])
                w_ih, w_hh, *biases = self._weights(suffix)
                b_ih, b_hh = biases or (None, None)
                y, (h, c) = lstm(x, w_ih, w_hh, b_ih, b_hh, hx, reverse=direction == 1)
                outputs.append(y)
                finals_h.append(h)
                finals_c.append(c)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, (torch.stack(finals_h), torch.stack(finals_c))

    def _zero_state(self, x: Tensor, batch: int) -> State:
        rows = self.num_layers * self._directions
        return x.new_zeros(rows, batch, self._features), x.new_zeros(rows, batch, self.hidden_size)

    def _torch(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        warn_once("LSTM: no kernel for proj_size > 0 yet, running torch's operator")
        state = self._zero_state(x, x.shape[1]) if state is None else state
        y, h_n, c_n = torch._VF.lstm(
            x, state, [w for group in self.all_weights for w in group], self.bias, self.num_layers,
            self.dropout, self.training, self.bidirectional, False,
        )  # fmt: skip
        return y, (h_n, c_n)

    def _forward_packed(
        self, packed: PackedSequence, hx: State | None
    ) -> tuple[PackedSequence, State]:
        warn_once("LSTM: no kernel for PackedSequence yet, running torch's operator")
        batch = int(packed.batch_sizes[0])
        state = self._check_state(hx, batch, batched=True)
        if state is None:
            state = self._zero_state(packed.data, batch)
        elif packed.sorted_indices is not None:
            state = (
                state[0].index_select(1, packed.sorted_indices),
                state[1].index_select(1, packed.sorted_indices),
            )
        y, h_n, c_n = torch._VF.lstm(
            packed.data, packed.batch_sizes, state, [w for group in self.all_weights for w in group],
            self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
        )  # fmt: skip
        if packed.unsorted_indices is not None:
            h_n = h_n.index_select(1, packed.unsorted_indices)
            c_n = c_n.index_select(1, packed.unsorted_indices)
        output = PackedSequence(
            y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
        return output, (h_n, c_n)
