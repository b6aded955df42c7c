"""What a cross entropy is made of, in plain torch operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
