"""Every op in a few plain torch operations.

They state what the kernels compute, serve as the tests' oracle (in float64), differentiate twice, and
run wherever a kernel does not. They are not fast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction: x [T, B, I] -> y [T, B, H], h_n [B, H], c_n [B, H]."""
    steps, batch, hidden = x.shape[0], x.shape[1], w_hh.shape[1]
    h = x.new_zeros(batch, hidden) if h0 is None else h0
    c = x.new_zeros(batch, hidden) if c0 is None else c0
    y: list[Tensor] = [h] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        gates = F.linear(x[t], w_ih, b_ih) + F.linear(h, w_hh, b_hh)
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        y[t] = h
    return torch.stack(y) if steps else x.new_empty(0, batch, hidden), h, c


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale q k^T + mask) v; a row that sees no key gives zeros."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = scale * query @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    unseen = (scores == -math.inf).all(-1, keepdim=True)
    p = scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)
    return F.dropout(p, dropout_p) @ value


def embedding(
    indices: Tensor, weight: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False
) -> Tensor:
    """weight[indices]; padding_idx = -1 means none."""
    return F.embedding(
        indices,
        weight,
        None if padding_idx < 0 else padding_idx,
        scale_grad_by_freq=scale_grad_by_freq,
    )
