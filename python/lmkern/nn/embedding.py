"""Embedding layers."""

from __future__ import annotations

from typing import Any

import torch.nn
from torch import Tensor

from lmkern.functional import embedding


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` on lmkern's kernels: out = weight[input].

    Constructor, parameters, ``state_dict``, initialisation and ``from_pretrained`` are torch's own.

    Args:
        max_norm_mode: "inplace" (as torch) or "functional", which leaves ``weight`` alone; see
            :func:`lmkern.functional.embedding`, also for how a sparse gradient differs from torch's.
        reuse_grad: keep the memory of the dense gradient for the next step; see there, too.

    Shape: input [*] int32 or int64 -> [*, embedding_dim].

    Raises:
        IndexError: an index outside [0, num_embeddings), naming index, position and V.
    """

    max_norm_mode: str = "inplace"
    reuse_grad: bool = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        max_norm_mode: str = "inplace",
        reuse_grad: bool = True,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            sparse, _weight, _freeze, device, dtype,
        )  # fmt: skip
        self.max_norm_mode, self.reuse_grad = max_norm_mode, reuse_grad

    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
            max_norm_mode=self.max_norm_mode,
            reuse_grad=self.reuse_grad,
        )
