"""The layer of bags of embeddings."""

from __future__ import annotations

from typing import Any

import torch.nn
from torch import Tensor

from lmkern.functional import embedding_bag


class EmbeddingBag(torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` on lmkern's kernels: sum, mean or maximum of weight[input] in each bag.

    Constructor, parameters, ``state_dict``, initialisation and ``from_pretrained`` are torch's own.
    ``per_sample_weights`` work in every mode; see :func:`lmkern.functional.embedding_bag`.

    Args:
        max_norm_mode: "inplace" (as torch) or "functional", which leaves ``weight`` alone; see there.
        reuse_grad: keep the memory of the dense gradient for the next step; see
            :func:`lmkern.functional.embedding`.

    Shape: input [B, L], or [N] with offsets [B], int32 or int64 -> [B, embedding_dim].

    Raises:
        IndexError: an index outside [0, num_embeddings), naming index, position and V.
        ValueError: offsets that do not start at 0, decrease or exceed N.
    """

    max_norm_mode: str = "inplace"
    reuse_grad: bool = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        max_norm_mode: str = "inplace",
        reuse_grad: bool = True,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
            _weight, include_last_offset, padding_idx, device, dtype,
        )  # fmt: skip
        self.max_norm_mode, self.reuse_grad = max_norm_mode, reuse_grad

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
            max_norm_mode=self.max_norm_mode,
            reuse_grad=self.reuse_grad,
        )
