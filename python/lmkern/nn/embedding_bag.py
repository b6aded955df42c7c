"""The layer of bags of embeddings."""

from __future__ import annotations

import torch.nn
from torch import Tensor

from lmkern.functional import embedding_bag


class EmbeddingBag(torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` on lmkern's kernels: sum, mean or maximum of weight[input] in each bag.

    Constructor, parameters, ``state_dict``, initialisation and ``from_pretrained`` are torch's own.
    ``per_sample_weights`` work in every mode; see :func:`lmkern.functional.embedding_bag`.

    Shape: input [B, L], or [N] with offsets [B], int32 or int64 -> [B, embedding_dim].

    Raises:
        IndexError: an index outside [0, num_embeddings), naming index, position and V.
        ValueError: offsets that do not start at 0, decrease or exceed N.
    """

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        return embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
