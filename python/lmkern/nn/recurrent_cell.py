"""Recurrent cells: one step of a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init

from lmkern.functional import gru_cell, lstm_cell, rnn_cell


class RNNCellBase(Module):
    """Base of RNNCell, LSTMCell and GRUCell; ``num_chunks`` is the number of gates, G."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        num_chunks: int,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for key, value in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(value, int):
                raise TypeError(f"{name}: {key} must be an int, got {type(value).__name__}")
            if value < 0:
                raise ValueError(f"{name}: {key} must be at least 0, got {value}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.layer_norm = layer_norm
        wide = num_chunks * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (wide, input_size),
            "weight_hh": (wide, hidden_size),
            "bias_ih": (wide,),
            "bias_hh": (wide,),
        }
        ours = self._extra_shapes(wide)
        self._extras = list(ours)
        for key, shape in (shapes | ours).items():
            if key in ("bias_ih", "bias_hh") and not bias:
                self.register_parameter(key, None)
            else:
                setattr(self, key, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _extra_shapes(self, wide: int) -> dict[str, tuple[int, ...]]:
        """The parameters that torch's cell does not have; named as the function's arguments."""
        return {"norm_ih": (wide,), "norm_hh": (wide,)} if self.layer_norm else {}

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        # Module.__getattr__ takes longer than the checks of the whole call.
        p: dict[str, Any] = self._parameters
        try:
            return p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]
        except KeyError:  # a parametrized weight is a property
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._extras}

    def reset_parameters(self) -> None:
        """Draw weights and biases from U(-1/√H, 1/√H) in torch's order, then peepholes; norms are 1."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        late = []
        for name, weight in self.named_parameters():
            own = name.removeprefix("parametrizations.").split(".")[0]
            if own in ("norm_ih", "norm_hh", "norm_cell_weight"):
                init.ones_(weight)
            elif own == "norm_cell_bias":
                init.zeros_(weight)
            elif own == "peephole":
                late.append(weight)
            else:
                init.uniform_(weight, -bound, bound)
        for weight in late:
            init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"bias": True, "nonlinearity": "tanh", "layer_norm": False}
        own = self.__dict__
        parts += [f"{k}={own[k]}" for k, v in defaults.items() if own.get(k, v) != v]
        return ", ".join(parts)


class LSTMCell(RNNCellBase):
    r"""``torch.nn.LSTMCell`` on lmkern's kernels: one step of :class:`LSTM`.

    Constructor arguments, ``state_dict`` and initialisation are exactly torch's.

    Args:
        input_size: I. hidden_size: H. bias: whether there are bias_ih and bias_hh.
        device, dtype: of the parameters.
        layer_norm: as in :class:`LSTM`, with the parameters ``norm_ih``, ``norm_hh`` [4H],
            ``norm_cell_weight``, ``norm_cell_bias`` [H].
        peephole: as in :class:`LSTM`, with the parameter ``peephole`` [3H].

    Shape:
        - input: [B, I] or [I]. hx: (h, c), each [B, H] or [H]; zeros if None.
        - returns the new (h, c), shaped as hx.

    Raises:
        ValueError, TypeError: an input or state that does not fit, naming expected and actual.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        peephole: bool = False,
    ) -> None:
        self._peephole = peephole
        super().__init__(input_size, hidden_size, bias, 4, device, dtype, layer_norm=layer_norm)

    def _extra_shapes(self, wide: int) -> dict[str, tuple[int, ...]]:
        shapes, hidden = super()._extra_shapes(wide), self.hidden_size
        if self.layer_norm:
            shapes |= {"norm_cell_weight": (hidden,), "norm_cell_bias": (hidden,)}
        return shapes | ({"peephole": (3 * hidden,)} if self._peephole else {})

    def extra_repr(self) -> str:
        return super().extra_repr() + ", peephole=True" * self._peephole

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        if self._extras:
            return lstm_cell(input, hx, *self._weights(), **self._options())
        return lstm_cell(input, hx, *self._weights())


class GRUCell(RNNCellBase):
    r"""``torch.nn.GRUCell`` on lmkern's kernels: one step of :class:`GRU`.

    Constructor arguments, ``state_dict`` and initialisation are exactly torch's.

    Args:
        input_size: I. hidden_size: H. bias: whether there are bias_ih and bias_hh.
        device, dtype: of the parameters.
        layer_norm: as in :class:`GRU`, with the parameters ``norm_ih``, ``norm_hh`` [3H].

    Shape:
        - input: [B, I] or [I]. hx: [B, H] or [H]; zeros if None.
        - returns the new h, shaped as hx.

    Raises:
        ValueError, TypeError: an input or state that does not fit, naming expected and actual.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device, dtype, layer_norm=layer_norm)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self._extras:
            return gru_cell(input, hx, *self._weights(), **self._options())
        return gru_cell(input, hx, *self._weights())


class RNNCell(RNNCellBase):
    r"""``torch.nn.RNNCell`` on lmkern's kernels: one step of :class:`RNN`.

    Constructor arguments, ``state_dict`` and initialisation are exactly torch's.

    Args:
        input_size: I. hidden_size: H. bias: whether there are bias_ih and bias_hh.
        nonlinearity: "tanh" or "relu", as in torch, or "sigmoid".
        device, dtype: of the parameters.
        layer_norm: as in :class:`RNN`, with the parameters ``norm_ih``, ``norm_hh`` [H].

    Shape:
        - input: [B, I] or [I]. hx: [B, H] or [H]; zeros if None.
        - returns the new h, shaped as hx.

    Raises:
        ValueError, TypeError: an input or state that does not fit, naming expected and actual.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
    ) -> None:
        if nonlinearity not in ("tanh", "relu", "sigmoid"):
            raise ValueError(
                f"RNNCell: nonlinearity must be 'tanh', 'relu' or 'sigmoid', got {nonlinearity!r}"
            )
        super().__init__(input_size, hidden_size, bias, 1, device, dtype, layer_norm=layer_norm)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self._extras:
            return rnn_cell(
                input, hx, *self._weights(), activation=self.nonlinearity, **self._options()
            )
        return rnn_cell(input, hx, *self._weights(), activation=self.nonlinearity)
