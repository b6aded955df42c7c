"""Recurrent layers. What they share, and their forward, is in recurrent_base.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lmkern.functional import gru, lstm, rnn
from lmkern.nn.recurrent_base import RNNBase

State = tuple[Tensor, Tensor]


class LSTM(RNNBase):
    r"""``torch.nn.LSTM`` on lmkern's kernels, and more.

    .. math::
        i, f, g, o = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ \tanh(g), \quad h_t = σ(o) ⊙ \tanh(c_t)

    Constructor arguments, parameter names and shapes, ``state_dict`` and initialisation are exactly
    torch's: a checkpoint of one loads into the other, and the same seed gives the same weights. The
    keyword-only arguments are ours; their parameters come in addition.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: stacked layers, each reading the one below.
        bias: whether layers have b_ih and b_hh.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...].
        dropout: probability of dropout on the output of every layer but the last.
        bidirectional: a second direction, its output concatenated.
        proj_size: if > 0, h is projected to this many features P: h_t = W_hr (σ(o) ⊙ tanh(c_t)).
        device, dtype: of the parameters.
        layer_norm: LayerNorm of W_ih x, of W_hh h (over all gates, with the gains ``norm_ih_l*`` and
            ``norm_hh_l*`` [4H] and the biases of the layer) and of c_t on its way to h
            (``norm_cell_weight_l*``, ``norm_cell_bias_l*`` [H]).
        zoneout: probability with which each value of h keeps that of the step before; a pair for h and
            c. In evaluation both are mixed in the same proportion.
        recurrent_dropout: probability of dropping a value of h on its way into W_hh, with one mask for
            the whole sequence.
        weight_drop: probability of dropping a weight of W_hh, with one mask for each call.
        recompute: keep only h and c for the backward and compute the gates again: 2 values for each
            unit and step in place of 6 (GRU: 1 in place of 5, RNN: 1 in place of 2).
        hidden_sizes: a size for each layer, ending in ``hidden_size``; ``num_layers`` may stay 1. The
            states are then tuples, see below. Excludes ``proj_size``.
        peephole: i, f and o also see the cell, through ``peephole_l*`` [3H].

    Shape:
        - input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a PackedSequence.
        - hx: (h_0, c_0), [num_layers * directions, B, P or H], or without B if unbatched; zeros if
          None. With ``hidden_sizes``, h_0 and c_0 are tuples with one [B, H_k] for each layer and
          direction.
        - lengths: int64 [B], how many steps of each row count: the others give zeros and leave the
          state alone. No sorting, no packing.
        - reset_mask: bool [T, B], laid out like the input ([B, T], [T], or a PackedSequence): True
          starts the row anew, from a state of zeros, at this step.
        - returns output [T, B, directions * (P or H)] (laid out like the input) and (h_n, c_n),
          shaped as hx; with ``return_cell_states`` also all c_t of the last layer, laid out like the
          output: [T, B, directions * H].

    Note:
        On a GPU the float32 products with W_hh and W_hr follow
        ``torch.backends.cudnn.rnn.fp32_precision``, as torch's layers do there: ``"tf32"``, the
        default, rounds their operands to 10 bits of mantissa.

    Raises:
        ValueError, TypeError: an input or state that does not fit, naming expected and actual.

    Source: as :func:`lmkern.functional.lstm`; ``weight_drop``: Merity et al. 2018 (AWD-LSTM).
    """

    _function = staticmethod(lstm)

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
        *,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        recompute: bool = False,
        hidden_sizes: Sequence[int] | None = None,
        peephole: bool = False,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype, layer_norm=layer_norm, zoneout=zoneout,
            recurrent_dropout=recurrent_dropout, weight_drop=weight_drop, recompute=recompute,
            hidden_sizes=hidden_sizes, peephole=peephole,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | PackedSequence | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        output, h_n, c_n, cells = self._run(input, hx, lengths, reset_mask, return_cell_states)
        return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))


class GRU(RNNBase):
    r"""``torch.nn.GRU`` on lmkern's kernels, and more.

    .. math::
        r, z = σ(W_{i\{r,z\}} x_t + b_{i\{r,z\}} + W_{h\{r,z\}} h_{t-1} + b_{h\{r,z\}}) \\
        n = \tanh(W_{in} x_t + b_{in} + r ⊙ (W_{hn} h_{t-1} + b_{hn})), \quad
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    Constructor arguments, ``state_dict`` and initialisation are exactly torch's. The keyword-only
    arguments, and those of ``forward``, are as in :class:`LSTM`, without what concerns its cell
    state: ``zoneout`` is one rate, ``layer_norm`` has the gains ``norm_ih_l*``, ``norm_hh_l*`` [3H].

    Shape:
        - input, lengths, reset_mask: as in :class:`LSTM`.
        - hx: [num_layers * directions, B, H], or without B if unbatched; zeros if None. With
          ``hidden_sizes`` a tuple of [B, H_k], one for each layer and direction.
        - returns output [T, B, directions * H] (laid out like the input) and h_n, shaped as hx.

    Raises:
        ValueError, TypeError: an input or state that does not fit, naming expected and actual.

    Source: as :func:`lmkern.functional.gru`.
    """

    _function = staticmethod(gru)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        recompute: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
            device, dtype, layer_norm=layer_norm, zoneout=zoneout,
            recurrent_dropout=recurrent_dropout, weight_drop=weight_drop, recompute=recompute,
            hidden_sizes=hidden_sizes,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | PackedSequence | None = None,
    ) -> tuple[Any, Any]:
        return self._run(input, hx, lengths, reset_mask)[:2]


class RNN(RNNBase):
    r"""``torch.nn.RNN``, the Elman network, on lmkern's kernels, and more.

    .. math:: h_t = φ(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Constructor arguments, ``state_dict`` and initialisation are exactly torch's. The keyword-only
    arguments, and those of ``forward``, are as in :class:`GRU`, with gains of [H].

    Args:
        nonlinearity: φ: "tanh" or "relu", as in torch, or "sigmoid".

    Shape: as in :class:`GRU`.

    Raises:
        ValueError, TypeError: an input or state that does not fit, naming expected and actual.

    Source: as :func:`lmkern.functional.rnn`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        recompute: bool = False,
        hidden_sizes: Sequence[int] | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu", "sigmoid"):
            raise ValueError(
                f"RNN: nonlinearity must be 'tanh', 'relu' or 'sigmoid', got {nonlinearity!r}"
            )
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first,
            dropout, bidirectional, 0, device, dtype, layer_norm=layer_norm, zoneout=zoneout,
            recurrent_dropout=recurrent_dropout, weight_drop=weight_drop, recompute=recompute,
            hidden_sizes=hidden_sizes,
        )  # fmt: skip
        self.nonlinearity = nonlinearity

    def _function(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return rnn(*args, activation=self.nonlinearity, **kwargs)

    def extra_repr(self) -> str:
        text = super().extra_repr()  # torch's does not tell tanh from relu
        return text + ", nonlinearity=sigmoid" if self.nonlinearity == "sigmoid" else text

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | PackedSequence | None = None,
    ) -> tuple[Any, Any]:
        return self._run(input, hx, lengths, reset_mask)[:2]
