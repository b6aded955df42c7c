"""Attention, in plain torch operations."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
