"""Recurrent layers, in plain torch operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "rnn_sigmoid": 1}


def recurrence(
    cell: str,
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    w_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    eps: float = 1e-5,
    h_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    zoneout_h_rate: float = 0.0,
    zoneout_c_rate: float = 0.0,
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One recurrent layer in one direction; ``cell`` is a key of :data:`GATES`, G its gates.

    Args:
        x: [T, B, I], or packed rows [N, I] with ``batch_sizes``. Without ``w_ih``: [..., G*H].
        w_ih: [G*H, I]. w_hh: [G*H, P]. b_ih, b_hh: [G*H]. h0: [B, P]. c0: [B, H].
        w_hr: [P, H], projects h. peephole: [3H], how i, f and o see the cell.
        norm_hh: [G*H], gain of the LayerNorm of W_hh h (its bias is b_hh).
        norm_cell_weight, norm_cell_bias: [H], LayerNorm of the cell on its way to h.
        h_mask: [B, P], multiplies h where it enters W_hh.
        zoneout_h, zoneout_c: bool like y and cells, True keeps the value of the step before; without
            a mask, the rates give the expectation.
        reset_mask: bool [T, B] or [N]: the state before this step counts as zero.
        lengths: int64 [B]: later steps give y = 0 and leave the state alone.
        batch_sizes: int64 [T], non-increasing. recompute: for kernels, without effect here.

    Returns:
        y [T, B, P] (packed: [N, P]), h_n [B, P], c_n [B, H] or None, cells [T, B, H] (packed: [N, H]),
        the c carried after each step, or None.
    """

    def steps_of(sequence: Tensor | None) -> Sequence[Tensor | None]:
        if sequence is None:
            return [None] * steps
        return sequence.unbind(0) if sizes is None else sequence.split(sizes)

    sizes: list[int] | None = None if batch_sizes is None else batch_sizes.tolist()
    steps, batch = x.shape[:2] if sizes is None else (len(sizes), sizes[0])
    if lengths is not None:  # nothing that stands in the padding may reach a gradient
        padded = torch.arange(steps, device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(padded.unsqueeze(2), 0.0)
    if w_ih is not None:
        x = F.linear(x, w_ih, b_ih)
    elif b_ih is not None:
        x = x + b_ih
    hidden = w_hh.shape[0] // GATES[cell]
    h = x.new_zeros(batch, w_hh.shape[1]) if h0 is None else h0
    c = x.new_zeros(batch, hidden) if c0 is None else c0
    xs, resets = x.unbind(0) if sizes is None else x.split(sizes), steps_of(reset_mask)
    zones_h, zones_c = steps_of(zoneout_h), steps_of(zoneout_c)

    y, cells = [h] * steps, [c] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        rows = xs[t].shape[0]  # packed: those that have a step t
        h_before, c_before = h[:rows], c[:rows]
        reset = resets[t]
        if reset is not None:
            h_before = h_before.masked_fill(reset.unsqueeze(1), 0.0)
            c_before = c_before.masked_fill(reset.unsqueeze(1), 0.0)
        hh = F.linear(h_before if h_mask is None else h_before * h_mask[:rows], w_hh)
        if norm_hh is not None:
            hh = F.layer_norm(hh, hh.shape[-1:], norm_hh, b_hh, eps)
        elif b_hh is not None:
            hh = hh + b_hh

        if cell == "lstm":
            i, f, g, o = (xs[t] + hh).chunk(4, dim=1)
            if peephole is not None:
                p_i, p_f, p_o = peephole.chunk(3)
                i, f = i + p_i * c_before, f + p_f * c_before
            c_new = f.sigmoid() * c_before + i.sigmoid() * g.tanh()
            if peephole is not None:
                o = o + p_o * c_new
            out = c_new
            if norm_cell_weight is not None:
                out = F.layer_norm(c_new, (hidden,), norm_cell_weight, norm_cell_bias, eps)
            h_new = o.sigmoid() * out.tanh()
            if w_hr is not None:
                h_new = F.linear(h_new, w_hr)
            c_new = _zoneout(c_new, c_before, zones_c[t], zoneout_c_rate)
        else:
            c_new = c_before
            if cell == "gru":
                (x_r, x_z, x_n), (h_r, h_z, h_n) = xs[t].chunk(3, dim=1), hh.chunk(3, dim=1)
                r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
                h_new = (1 - z) * (x_n + r * h_n).tanh() + z * h_before
            else:
                h_new = getattr(torch, cell.removeprefix("rnn_"))(xs[t] + hh)
        h_new = _zoneout(h_new, h_before, zones_h[t], zoneout_h_rate)

        if lengths is not None:
            over = padded[t].unsqueeze(1)
            y[t], cells[t] = h_new.masked_fill(over, 0.0), c_new.masked_fill(over, 0.0)
            h, c = torch.where(over, h, h_new), torch.where(over, c, c_new)
        else:
            y[t], cells[t] = h_new, c_new
            h = h_new if rows == batch else torch.cat([h_new, h[rows:]])
            c = c_new if rows == batch else torch.cat([c_new, c[rows:]])
    join = torch.stack if sizes is None else torch.cat
    is_lstm = cell == "lstm"
    return join(y), h, c if is_lstm else None, join(cells) if is_lstm and return_cells else None


def _zoneout(new: Tensor, before: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    if mask is not None:
        return torch.where(mask, before, new)
    return new if rate == 0.0 else rate * before + (1 - rate) * new
