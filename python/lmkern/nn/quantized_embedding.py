"""Embedding tables of 8 or 4 bits an element, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lmkern import reference
from lmkern.functional import quantized_embedding


class QuantizedEmbedding(Module):
    r"""An embedding, or bags of one, whose table has 8 or 4 bits an element; see
    :func:`quantize_embedding`, which makes it.

    .. math:: y = \text{scale}_v · q_{v, d} + \text{minimum}_v

    Args:
        num_embeddings: V. embedding_dim: D. bits: 8 or 4.
        mode: None for rows, "sum" or "mean" for bags. include_last_offset, padding_idx: of bags.
        dtype: of the result; ``.to(dtype)`` changes it, and nothing else.
        device: of ``weight [V, ceil(D bits / 8) + 8]``, a uint8 buffer of zeros.

    Shape:
        - input: [*] int32 or int64 -> [*, D].
        - with a mode, as :class:`~lmkern.nn.EmbeddingBag`: input [B, L], or [N] with offsets [B];
          per_sample_weights like input -> [B, D].

    Raises:
        IndexError: an index outside [0, V), naming index, position and V.
        ValueError, TypeError: an argument that does not fit, naming expected and actual.
    """

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 8,
        *,
        mode: str | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        super().__init__()
        _check_bits(type(self).__name__, bits)
        if embedding_dim < 1:
            raise ValueError(
                f"{type(self).__name__}: embedding_dim must be at least 1, got {embedding_dim}"
            )
        if mode not in ("sum", "mean", None):
            raise ValueError(
                f"{type(self).__name__}: mode must be 'sum', 'mean' or None, got {mode!r}"
            )
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.mode, self.include_last_offset, self.padding_idx = (
            mode, include_last_offset, padding_idx,
        )  # fmt: skip
        self.dtype = dtype
        size = num_embeddings, (embedding_dim * bits + 7) // 8 + 8
        self.register_buffer("weight", torch.zeros(size, dtype=torch.uint8, device=device))

    @property
    def table_bytes(self) -> int:
        """Bytes of the table, scales and minima included."""
        return self.weight.numel()

    @property
    def error_bound(self) -> Tensor:
        """[V] float32: half of each row's scale. No element was moved by more, but for the rounding of
        the result to ``dtype``."""
        return reference.row_affine(self.weight)[:, 0] / 2

    def dequantize(self) -> Tensor:
        """The table in ``dtype``, [V, D]."""
        return reference.dequantize_rows(self.weight, self.embedding_dim, self.bits, self.dtype)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedEmbedding:
        """Raises ``RuntimeError`` if True: there is nothing to train."""
        if requires_grad:
            raise RuntimeError(
                "QuantizedEmbedding: a quantised table has no gradient; train the embedding, then "
                "quantise it"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        return quantized_embedding(
            input, self.weight, self.embedding_dim, self.bits, mode=self.mode, offsets=offsets,
            per_sample_weights=per_sample_weights, include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx, dtype=self.dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        mode = "" if self.mode is None else f", mode={self.mode!r}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}{mode}, "
            f"dtype={self.dtype}, table_bytes={self.table_bytes:,}"
        )


@torch.no_grad()
def quantize_embedding(source: Module | Tensor, bits: int = 8) -> QuantizedEmbedding:
    """An embedding for inference whose table has 8 or 4 bits an element.

    Each row becomes q · scale + minimum with q in 0 .. 2^bits - 1, minimum its least element and
    scale = (largest - least) / (2^bits - 1), both in float32: an element moves by at most scale / 2
    (``error_bound``), and is rounded to the dtype of the result. A row of equal elements is exact.

    Args:
        source: an ``Embedding`` or ``EmbeddingBag`` (mode sum or mean), torch's or lmkern's, or a
            weight [V, D]. It is left alone. Rows beyond its ``max_norm`` are scaled down first, as its
            lookup does.
        bits: 8 or 4.

    Returns:
        A :class:`QuantizedEmbedding` of the same forward, its ``dtype`` that of the weight.

    Raises:
        ValueError: bits; mode "max"; a row with NaN or infinity, naming it.
        TypeError: another kind of source.

    Source: Guan et al. 2019, Post-training 4-bit quantization on embedding tables.
    """
    op = "quantize_embedding"
    _check_bits(op, bits)
    weight, options = source, {}
    if isinstance(source, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        weight = source.weight
        if source.max_norm is not None:
            weight = reference.clip_norm(weight, source.max_norm, source.norm_type)
    if isinstance(source, torch.nn.EmbeddingBag):
        if source.mode not in ("sum", "mean"):
            raise ValueError(f"{op}: mode must be 'sum' or 'mean', got {source.mode!r}")
        options = {
            key: getattr(source, key) for key in ("mode", "include_last_offset", "padding_idx")
        }
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{op}: source must be an Embedding, an EmbeddingBag or a Tensor, "
            f"got {type(source).__name__}"
        )
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{op}: weight must be [V, D] of floating dtype, got {list(weight.shape)} of {weight.dtype}"
        )
    rows, width = weight.shape
    layer = QuantizedEmbedding(
        rows, width, bits, dtype=weight.dtype, device=weight.device, **options
    )
    layer.weight.copy_(reference.quantize_rows(weight, bits))
    return layer.eval()


def _check_bits(op: str, bits: int) -> None:
    if bits not in (8, 4):
        raise ValueError(f"{op}: bits must be 8 or 4, got {bits}")
