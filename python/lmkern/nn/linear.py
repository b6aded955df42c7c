"""Linear layers."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from lmkern.functional import linear


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` on lmkern's matrix product, where that is the faster one: out = x W^T + b.

    Constructor, parameters, ``state_dict`` and initialisation are torch's own; see
    :func:`lmkern.functional.linear`.

    Shape: [..., in_features] -> [..., out_features].
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
