"""The last layer of a language model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import lmkern.functional

from .pretrained import Backend


class Head(nn.Linear):
    """From the last hidden states [..., D] to logits [..., V], or to their loss without them.

    Args:
        in_features, out_features, bias: as torch's. backend: whose operators.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, backend: Backend = "lmkern"
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.backend = backend

    def tied_to(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """An embedding's weight, and ours: by :func:`lmkern.functional.tie`, if they are one."""
        if self.backend == "lmkern" and table is self.weight:
            return lmkern.functional.tie(table)
        return table, self.weight

    def forward(
        self, input: Tensor, targets: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Logits; with ``targets`` [...] the sum of their cross entropies, float32.

        A target of -100, torch's ``ignore_index``, counts for nothing. ``weight``: another name of
        this layer's, from :meth:`tied_to`.
        """
        weight = self.weight if weight is None else weight
        if self.backend == "lmkern":
            if targets is None:
                return lmkern.functional.linear(input, weight, self.bias)
            loss = lmkern.functional.linear_cross_entropy(
                input, weight, targets, linear_bias=self.bias, reduction="sum"
            )
            assert isinstance(loss, Tensor)
            return loss.float()
        logits = F.linear(input, weight, self.bias)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum")
