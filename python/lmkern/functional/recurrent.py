"""Recurrent layers, one direction of one layer. Math and layouts: csrc/ops/recurrent.h."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmkern.functional._layer import rnn_cell_name, run_layer
from lmkern.ops.check import check_pair


def lstm(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    reverse: bool = False,
    w_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    eps: float = 1e-5,
    h_mask: Tensor | None = None,
    zoneout_h: float | Tensor = 0.0,
    zoneout_c: float | Tensor = 0.0,
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
    return_cell_states: bool = False,
) -> Any:
    r"""One LSTM layer in one direction over a whole sequence.

    .. math::
        i, f, g, o = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ \tanh(g), \quad h_t = σ(o) ⊙ \tanh(c_t)

    Args:
        input: [T, B, I], time first; with ``batch_sizes`` [N, I], the rows of a PackedSequence.
        w_ih: [4H, I], gates in torch's order i, f, g, o.
        w_hh: [4H, P]; P = H without ``w_hr``.
        b_ih, b_hh: [4H], both or neither.
        hx: initial (h [B, P], c [B, H]); zeros if None.
        reverse: run from the last step to the first; ``output`` keeps the input's order.
        w_hr: [P, H], a projection: h_t = W_hr (σ(o) ⊙ tanh(c_t)).
        peephole: [3H]: i and f also see p_i ⊙ c_{t-1} and p_f ⊙ c_{t-1}, and o sees p_o ⊙ c_t.
        norm_ih, norm_hh: [4H], LayerNorm over all gates of either product, with this gain and
            the layer's bias: LN(W_ih x) ⊙ norm_ih + b_ih, LN(W_hh h) ⊙ norm_hh + b_hh.
        norm_cell_weight, norm_cell_bias: [H], both or neither, with norm_hh: h_t = σ(o) ⊙ tanh(LN(c_t));
            c_t itself is carried as it is.
        eps: of all LayerNorms.
        h_mask: [B, P], multiplies h_{t-1} where it enters W_hh: recurrent dropout with one mask for
            the sequence.
        zoneout_h, zoneout_c: a bool mask shaped like ``output`` and the cell states (True keeps the
            value of the step before), or a rate r for the expectation r h_{t-1} + (1 - r) h_t. h_t is
            made of the new cell, whether or not zoneout keeps the old one.
        reset_mask: bool [T, B] ([N] if packed); True: the state before this step counts as zero.
        lengths: int64 [B], between 0 and T. Steps from there on give zeros and leave the state
            alone; with ``reverse`` a row starts at its own last step.
        batch_sizes: int64 [T] on the CPU, as in a PackedSequence. Excludes ``lengths``.
        recompute: keep h and c for the backward and compute the gates again: 2 values for each unit
            and step in place of 6 (GRU: 1 in place of 5, Elman: 1 in place of 2), for one more product
            with each weight matrix.
        return_cell_states: also return all c_t.

    Returns:
        output [T, B, P] (packed: [N, P]) and the final (h [B, P], c [B, H]); with
        ``return_cell_states`` also the cell states [T, B, H] (packed: [N, H]). All of the input's
        dtype.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before anything is computed.

    Source: Hochreiter & Schmidhuber 1997; Gers et al. 2000 (peepholes); Sak et al. 2014 (projection);
    Ba et al. 2016 (LayerNorm); Gal & Ghahramani 2016 (h_mask); Krueger et al. 2017 (zoneout). Without
    options it equals one layer of ``torch.nn.LSTM``.
    """
    h0, c0 = (None, None) if hx is None else check_pair("lstm", hx)
    y, h_n, c_n, cells = run_layer(
        "lstm", "lstm", 4, input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, norm_ih, norm_hh, eps,
        h_mask, zoneout_h, reset_mask, lengths, batch_sizes, recompute, w_hr, peephole,
        norm_cell_weight, norm_cell_bias, zoneout_c, return_cell_states,
    )  # fmt: skip
    return (y, (h_n, c_n), cells) if return_cell_states else (y, (h_n, c_n))


def gru(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    hx: Tensor | None = None,
    *,
    reverse: bool = False,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    eps: float = 1e-5,
    h_mask: Tensor | None = None,
    zoneout_h: float | Tensor = 0.0,
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""One GRU layer in one direction over a whole sequence.

    .. math::
        r, z = σ(W_{i\{r,z\}} x_t + b_{i\{r,z\}} + W_{h\{r,z\}} h_{t-1} + b_{h\{r,z\}}) \\
        n = \tanh(W_{in} x_t + b_{in} + r ⊙ (W_{hn} h_{t-1} + b_{hn})), \quad
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    Args:
        input: [T, B, I], time first; with ``batch_sizes`` [N, I], the rows of a PackedSequence.
        w_ih: [3H, I], gates in torch's order r, z, n. w_hh: [3H, H].
        b_ih, b_hh: [3H], both or neither.
        hx: initial h [B, H]; zeros if None.
        norm_ih, norm_hh: [3H]; h_mask: [B, H]; the others: as in :func:`lstm`. z ⊙ h_{t-1} sees h
            without ``h_mask``.

    Returns:
        output [T, B, H] (packed: [N, H]) and the final h [B, H], of the input's dtype.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before anything is computed.

    Source: Cho et al. 2014, in cuDNN's form. Without options it equals one layer of ``torch.nn.GRU``.
    """
    y, h_n, _, _ = run_layer(
        "gru", "gru", 3, input, w_ih, w_hh, b_ih, b_hh, hx, None, reverse, norm_ih, norm_hh, eps,
        h_mask, zoneout_h, reset_mask, lengths, batch_sizes, recompute,
    )  # fmt: skip
    return y, h_n


def rnn(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    hx: Tensor | None = None,
    *,
    activation: str = "tanh",
    reverse: bool = False,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    eps: float = 1e-5,
    h_mask: Tensor | None = None,
    zoneout_h: float | Tensor = 0.0,
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""One Elman layer in one direction over a whole sequence.

    .. math:: h_t = φ(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Args:
        input: [T, B, I], time first; with ``batch_sizes`` [N, I], the rows of a PackedSequence.
        w_ih: [H, I]. w_hh: [H, H]. b_ih, b_hh: [H], both or neither.
        hx: initial h [B, H]; zeros if None.
        activation: φ, one of "tanh", "relu", "sigmoid".
        norm_ih, norm_hh: [H]; h_mask: [B, H]; the others: as in :func:`lstm`.

    Returns:
        output [T, B, H] (packed: [N, H]) and the final h [B, H], of the input's dtype.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before anything is computed.

    Source: Elman 1990. Without options it equals one layer of ``torch.nn.RNN``.
    """
    y, h_n, _, _ = run_layer(
        "rnn", rnn_cell_name("rnn", activation), 1, input, w_ih, w_hh, b_ih, b_hh, hx, None, reverse,
        norm_ih, norm_hh, eps, h_mask, zoneout_h, reset_mask, lengths, batch_sizes, recompute,
    )  # fmt: skip
    return y, h_n
