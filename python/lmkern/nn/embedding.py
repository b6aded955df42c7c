"""Embedding layers."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from lmkern.functional import embedding


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` on lmkern's kernels: out = weight[input].

    Constructor, parameters, ``state_dict``, initialisation and ``from_pretrained`` are torch's own;
    only the lookup and its gradient differ. ``max_norm`` and ``sparse=True`` run torch's operator for
    now, with one warning.

    Shape: input [*] int32 or int64 -> [*, embedding_dim].

    Raises:
        IndexError: an index outside [0, num_embeddings), naming index, position and V.
    """

    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
