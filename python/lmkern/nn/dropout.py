"""Dropout as a layer."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from lmkern.functional import dropout


class Dropout(torch.nn.Dropout):
    """``torch.nn.Dropout`` on lmkern's kernels: :func:`lmkern.functional.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)
