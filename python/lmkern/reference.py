"""Every op in a few plain torch operations.

They state what the kernels compute, serve as the tests' oracle (in float64), differentiate twice, and
run wherever a kernel does not. They are not fast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "rnn_sigmoid": 1}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


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


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    return_weights: str | None = None,
    keep: Tensor | None = None,
) -> Any:
    """As :func:`lmkern.functional.scaled_dot_product_attention`, whose docstring has the semantics.

    Scores and probabilities are in float32 (float64 for float64). ``alibi_slopes`` is [H] or [..., H],
    ``key_lengths`` [...], with the leading dimensions of ``query``. ``keep`` [..., H, L, S], instead of
    ``dropout_p``: what dropout multiplies the weights with.
    """
    scale = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    queries, keys = query.shape[-2], key.shape[-2]
    bottom_right = causal_align == "bottom_right"
    visible = []  # the conditions under which query i sees key j, each broadcastable to the scores
    i = torch.arange(queries, device=query.device)[:, None]
    j = torch.arange(keys, device=query.device)
    offset: Any = keys - queries if bottom_right else 0
    slopes = None if alibi_slopes is None else alibi_slopes[..., None, None]
    if key_lengths is not None:
        lengths = key_lengths[..., None, None, None]
        offset = lengths - queries if bottom_right else 0
        visible.append(j < lengths)
        # What stands in the padding, NaN included, must reach neither the output nor a gradient.
        key, value = (x.masked_fill((j >= lengths).mT, 0.0) for x in (key, value))
    if cu_seqlens is not None:
        cu_q, cu_k = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
        sequence_q = torch.searchsorted(cu_q, i, right=True) - 1
        sequence_k = torch.searchsorted(cu_k, j, right=True) - 1
        visible.append(sequence_q == sequence_k)
        i, j = i - cu_q[sequence_q], j - cu_k[sequence_k]
        offset = (cu_k.diff() - cu_q.diff())[sequence_q] if bottom_right else 0
        if alibi_slopes is not None and alibi_slopes.dim() > 1:
            slopes = alibi_slopes[sequence_q[:, 0]].mT[..., None]
    position = i + offset

    scores = (scale * query @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype) * (position - j).abs()
    left, right = (-1 if w is None else w for w in window or (None, None))
    if left >= 0:
        visible.append(j >= position - left)
    if right >= 0 or is_causal:
        visible.append(j <= position + (0 if is_causal else right))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible.append(attn_mask)
    elif attn_mask is not None:
        scores = scores + attn_mask
    for condition in visible:
        scores = scores.masked_fill(~condition, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    p = scores.softmax(-1).masked_fill(empty, 0.0)[..., :keys]
    p = F.dropout(p, dropout_p) if keep is None else p * keep
    results = [p.to(query.dtype) @ value]
    if return_lse:
        results.append(scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf))
    if return_weights is not None:
        results.append((p if return_weights == "heads" else p.mean(-3)).to(query.dtype))
    return results[0] if len(results) == 1 else tuple(results)


def embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *,
    inplace: bool = False,
    sparse: bool = False,
) -> Tensor:
    """weight[indices]; padding_idx = -1 means none.

    Rows with a norm above ``max_norm`` are scaled down to it: in ``weight`` if ``inplace``, else in the
    result only, and the gradient is that of the scaled row.
    """
    rows = F.embedding(
        indices,
        weight,
        None if padding_idx < 0 else padding_idx,
        max_norm if inplace else None,
        norm_type,
        scale_grad_by_freq,
        sparse,
    )
    return rows if inplace or max_norm is None else clip_norm(rows, max_norm, norm_type)


def cross_entropy_terms(
    logits: Tensor,
    index: Tensor | None,
    probabilities: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    smooth: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a cross entropy is made of (csrc/ops/cross_entropy.h): [N, C, P] -> four of [N, P].

    Returns:
        lse; likelihood: log p of the class ``index`` [N, P], or the sum of t w log p for
        probabilities t; total: the sum of w log p, empty unless ``smooth``; correct: whether the
        class has the largest logit, empty for probabilities.
    """
    s = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    log_p = s.log_softmax(1)
    w = s.new_ones(s.shape[1], 1) if weight is None else weight.to(s.dtype).unsqueeze(1)
    total = (log_p * w).sum(1) if smooth else s.new_empty(0)
    if index is None:
        assert probabilities is not None
        likelihood = (log_p * (probabilities.to(s.dtype) * w)).sum(1)
        return s.logsumexp(1), likelihood, total, s.new_empty(0, dtype=torch.bool)
    inside = (index != ignore_index).unsqueeze(1)
    at = index.unsqueeze(1).where(inside, 0)
    likelihood = log_p.gather(1, at).where(inside, 0).squeeze(1)
    correct = (s.gather(1, at) >= s.amax(1, keepdim=True)).squeeze(1)
    return s.logsumexp(1), likelihood, total, correct


def linear_cross_entropy_terms(
    x: Tensor, linear_weight: Tensor, bias: Tensor | None, *target: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`cross_entropy_terms` of the logits x W^T + b, of [1, N]: x [N, D], W [C, D], b [C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    logits = F.linear(x.to(wide), linear_weight.to(wide), bias)
    return cross_entropy_terms(logits.t().unsqueeze(0), *target)


def clip_norm(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Rows [..., D] whose p-norm is above ``max_norm`` scaled down, as torch.embedding_renorm_ does."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, norm_type, -1, keepdim=True)
    return (wide * torch.where(norm > max_norm, max_norm / (norm + 1e-7), 1.0)).to(rows.dtype)


def embedding_bag(
    indices: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    mode: str = "mean",
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    include_last_offset: bool = False,
    winners: Tensor | None = None,
) -> Tensor:
    """Sums, means or maxima of the rows of each bag; padding_idx = -1 means none.

    Args:
        indices: [N] with ``offsets`` ([B], or [B + 1] with ``include_last_offset``), or [B, L].
        per_sample_weights: as ``indices``; they multiply the rows before anything else.
        winners: [B, D], which term of its bag is the maximum, instead of finding out.
    """
    flat = indices.reshape(-1)
    if offsets is None:
        bags = indices.shape[0]
        bag = torch.arange(bags, device=flat.device).repeat_interleave(indices.shape[1])
    else:
        ends = offsets.new_tensor([flat.shape[0]])
        lengths = (offsets if include_last_offset else torch.cat([offsets, ends])).diff()
        bags = lengths.shape[0]
        bag = torch.arange(bags, device=flat.device).repeat_interleave(lengths)
        flat = flat[: bag.shape[0]]
    padding = None if padding_idx < 0 else padding_idx
    rows = F.embedding(flat, weight, padding, scale_grad_by_freq=scale_grad_by_freq)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1)[: bag.shape[0], None]
    kept = flat != padding_idx
    rows, bag = rows[kept], bag[kept]
    count = torch.bincount(bag, minlength=bags)
    if mode != "max" or rows.shape[0] == 0:
        out = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows)
        if mode == "mean":
            out = out / count.clamp(min=1)[:, None]
        return out.to(weight.dtype)
    first = count.cumsum(0) - count
    if winners is None:
        term = torch.arange(bag.shape[0], device=bag.device) - first[bag]
        table = rows.new_full((bags, int(count.max()), rows.shape[1]), -math.inf)
        winners = table.index_put((bag, term), rows.detach()).max(1).indices
    chosen = (first[:, None] + winners).clamp(max=rows.shape[0] - 1)
    out = rows.gather(0, chosen).masked_fill(count[:, None] == 0, 0.0)
    return out.to(weight.dtype)


def embedding_sgd(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor | None,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
) -> None:
    """In place: rows of ``weight`` decay by what they owe, and move by step_size * u (here: gradient).

    Args:
        weight: [V, D]. rows: int64 [N], or None for all. gradient: [N, D], or None for u = 0; gradients
            of the same row are summed.
        touched: float64 [V]: a row decays by ``decay / touched``; without, by ``decay``.
    """
    u = None
    if gradient is not None:
        rows, u = _summed(rows, gradient, gradient_scale)
    _move_rows(weight, rows, u, touched, decay, step_size)


def embedding_adagrad(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
    sum: Tensor,
    weight_decay: float,
    eps: float,
) -> None:
    """As :func:`embedding_sgd`, u = g / (sqrt(sum) + eps); a ``sum`` of [V] takes means over rows."""
    rows, g = _summed(rows, gradient, gradient_scale)
    if weight_decay != 0:
        g = g + weight_decay * _wide(_read(weight, rows))
    s = _read(sum, rows) + (g.square().mean(1) if sum.dim() == 1 else g.square())
    _write(sum, rows, s)
    u = g / ((s.unsqueeze(1) if sum.dim() == 1 else s).sqrt() + eps)
    _move_rows(weight, rows, u, touched, decay, step_size)


def embedding_adam(
    weight: Tensor,
    rows: Tensor | None,
    gradient: Tensor,
    gradient_scale: float,
    touched: Tensor | None,
    decay: float,
    step_size: float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """As :func:`embedding_sgd`, u = exp_avg / (sqrt(exp_avg_sq) + eps)."""
    rows, g = _summed(rows, gradient, gradient_scale)
    m = torch.lerp(_read(exp_avg, rows), g, 1 - beta1)
    v = beta2 * _read(exp_avg_sq, rows) + (1 - beta2) * g.square()
    _write(exp_avg, rows, m)
    _write(exp_avg_sq, rows, v)
    _move_rows(weight, rows, m / (v.sqrt() + eps), touched, decay, step_size)


def _move_rows(
    weight: Tensor,
    rows: Tensor | None,
    u: Tensor | None,
    touched: Tensor | None,
    decay: float,
    step_size: float,
) -> None:
    w = _wide(_read(weight, rows))
    if touched is None:
        w = w * decay
    else:
        before = _read(touched, rows)
        w = w * (decay / before).unsqueeze(1).to(w.dtype)
        _write(touched, rows, torch.full_like(before, decay))
    _write(weight, rows, w if u is None else w - step_size * u)


def _summed(
    rows: Tensor | None, gradient: Tensor, gradient_scale: float
) -> tuple[Tensor | None, Tensor]:
    g = _wide(gradient) * gradient_scale
    if rows is None:
        return None, g
    rows, place = rows.unique(return_inverse=True)
    return rows, g.new_zeros(len(rows), g.shape[1]).index_add_(0, place, g)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _read(table: Tensor, rows: Tensor | None) -> Tensor:
    return table if rows is None else table.index_select(0, rows)


def _write(table: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        table.copy_(values)
    else:
        table.index_copy_(0, rows, values.to(table.dtype))


def norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
) -> Tensor:
    """torch's layer norm, or RMS norm, which has no bias; eps = None is the default of that."""
    if rms:
        return F.rms_norm(input, normalized_shape, weight, eps)
    return F.layer_norm(input, normalized_shape, weight, bias, 1e-5 if eps is None else eps)


def add_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    rms: bool = False,
    dropout_p: float = 0.0,
    input_bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum), sum = residual + dropout(input + input_bias).

    ``keep``, instead of ``dropout_p``: what dropout multiplies with.
    """
    x = input if input_bias is None else input + input_bias
    x = F.dropout(x, dropout_p) if keep is None else x * keep
    sum = residual + x
    return norm(sum, normalized_shape, weight, bias, eps, rms), sum


def activation(
    input: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    function: str,
    gated: bool,
    gate_first: bool,
) -> Tensor:
    """f(x), or f(gate) * value, where x, and without ``up`` [gate value], is input + bias."""
    x = input if bias is None else input + bias
    if not gated:
        return ACTIVATIONS[function](x)
    first, second = x.chunk(2, -1) if up is None else (x, up)
    return (
        ACTIVATIONS[function](first) * second
        if gate_first
        else first * ACTIVATIONS[function](second)
    )
