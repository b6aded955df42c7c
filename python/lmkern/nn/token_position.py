"""The layer of token, position and segment embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init

from lmkern.functional import token_position_embedding

from .position import _Sinusoids, _Table


class TokenPositionEmbedding(Module):
    r"""Token + position + segment embeddings, norm and dropout as one layer.

    .. math:: y = \text{dropout}(\text{norm}(\text{scale} · \text{token} + \text{position}
              + \text{segment}))

    GPT-2's with ``norm=None``, BERT's with ``num_segments=2``, that of the Transformer with
    ``position="sinusoidal"``, ``norm=None`` and ``scale=sqrt(D)``; computed by
    :func:`lmkern.functional.token_position_embedding`.

    Args:
        num_embeddings: V. embedding_dim: D.
        max_length: P, the number of learned positions; only for those.
        position: "learned"; "sinusoidal", the fixed ones of
            :class:`~lmkern.nn.SinusoidalPosition`, of any length and not in the ``state_dict``; or None.
        num_segments: S; 0 for no segments.
        norm: None, "layer" or "rms". eps: of the norm; default 1e-5, or that of ``torch.nn.RMSNorm``.
        elementwise_affine: whether the norm has a weight. bias: whether layer norm has a bias, too.
        dropout: probability of dropping an element, while training.
        scale: what token rows are multiplied with.
        padding_idx: the token whose row starts with zeros and gets no gradient.
        sparse, reuse_grad: as for :class:`~lmkern.nn.Embedding`.
        base: of the sinusoids.
        device, dtype: of ``token_weight [V, D]``, ``position_weight [P, D]``, ``segment_weight [S, D]``,
            drawn from N(0, 0.02), and of ``norm_weight [D]`` and ``norm_bias [D]``, 1 and 0.

    Shape:
        - input: [*, L] int32 or int64.
        - segments: as input, default all 0.
        - positions: as input, or [L]. offset: the position of the first token without them.
        - returns [*, L, D].

    Raises:
        IndexError: an index outside its table, naming it.
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Vaswani et al. 2017; Devlin et al. 2019 (BERT); Radford et al. 2019 (GPT-2), whose deviation
    of the initial weights it takes.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_length: int | None = None,
        *,
        position: str | None = "learned",
        num_segments: int = 0,
        norm: str | None = "layer",
        eps: float | None = None,
        elementwise_affine: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        scale: float = 1.0,
        padding_idx: int | None = None,
        sparse: bool = False,
        reuse_grad: bool = True,
        base: float = 10000.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.position_weight: Parameter | None
        self.segment_weight: Parameter | None
        self.norm_weight: Parameter | None
        self.norm_bias: Parameter | None
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(
                f"{name}: num_embeddings and embedding_dim must be at least 1, got {num_embeddings} "
                f"and {embedding_dim}"
            )
        if position not in ("learned", "sinusoidal", None):
            raise ValueError(
                f"{name}: position must be 'learned', 'sinusoidal' or None, got {position!r}"
            )
        if (position == "learned") != (max_length is not None) or max_length == 0:
            raise ValueError(
                f"{name}: max_length must be at least 1 for position = 'learned', and None for others, "
                f"got {max_length}"
            )
        if num_segments < 0:
            raise ValueError(f"{name}: num_segments must be at least 0, got {num_segments}")
        if norm not in ("layer", "rms", None):
            raise ValueError(f"{name}: norm must be 'layer', 'rms' or None, got {norm!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{name}: dropout must be in [0, 1], got {dropout}")
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"{name}: padding_idx must be in [-{num_embeddings}, {num_embeddings}), "
                    f"got {padding_idx}"
                )
            padding_idx %= num_embeddings
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.max_length, self.position, self.num_segments = max_length, position, num_segments
        self.norm, self.eps, self.dropout, self.scale = norm, eps, dropout, scale
        self.padding_idx, self.sparse, self.reuse_grad = padding_idx, sparse, reuse_grad

        def parameter(wanted: bool, *shape: int) -> Parameter | None:
            return Parameter(torch.empty(*shape, device=device, dtype=dtype)) if wanted else None

        width, affine = embedding_dim, norm is not None and elementwise_affine
        self.token_weight = Parameter(
            torch.empty(num_embeddings, width, device=device, dtype=dtype)
        )
        self.register_parameter(
            "position_weight", parameter(position == "learned", max_length or 0, width)
        )
        self.register_parameter("segment_weight", parameter(num_segments > 0, num_segments, width))
        self.register_parameter("norm_weight", parameter(affine, width))
        self.register_parameter("norm_bias", parameter(affine and bias and norm == "layer", width))
        self._sinusoids = _Sinusoids(width, base)
        self._table = _Table(self._sinusoids) if position == "sinusoidal" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.token_weight, self.position_weight, self.segment_weight):
            if table is not None:
                init.normal_(table, std=0.02)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.token_weight[self.padding_idx].fill_(0)
        if self.norm_weight is not None:
            init.ones_(self.norm_weight)
        if self.norm_bias is not None:
            init.zeros_(self.norm_bias)

    def forward(
        self,
        input: Tensor,
        segments: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        position: Tensor | None = self.position_weight
        if self._table is not None:
            position, positions, offset = self._sinusoidal(input, positions, offset)
        if segments is None and self.segment_weight is not None:
            segments = torch.zeros_like(input)
        return token_position_embedding(
            input, self.token_weight, position, self.segment_weight, self.norm_weight,
            self.norm_bias, self.eps, positions=positions, offset=offset, segments=segments,
            scale=self.scale, norm=self.norm, padding_idx=self.padding_idx, dropout_p=self.dropout,
            training=self.training, sparse=self.sparse, reuse_grad=self.reuse_grad,
        )  # fmt: skip

    def _sinusoidal(
        self, input: Tensor, positions: Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor | None, int]:
        """A table of positions, the rows of it, and the first one."""
        assert self._table is not None
        place = input.device, self.token_weight.dtype
        if positions is None:
            if offset < 0:
                raise ValueError(f"{type(self).__name__}: offset must be at least 0, got {offset}")
            return self._table(offset, input.shape[-1] if input.dim() else 1, *place)[0], None, 0
        # How long the table must be, a graph does not know, and a GPU would have to be waited for.
        if torch.compiler.is_compiling() or positions.is_cuda:
            rows = self._sinusoids(positions.flatten().double())[0].to(place[1])
            places = torch.arange(rows.shape[0], device=positions.device)
            return rows, places.view(positions.shape), offset
        most = int(positions.max()) + 1 if positions.numel() else 0
        return self._table(0, max(most, 0), *place)[0], positions, offset

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, max_length={self.max_length}, "
            f"position={self.position!r}, num_segments={self.num_segments}, norm={self.norm!r}, "
            f"eps={self.eps}, dropout={self.dropout}, scale={self.scale}, "
            f"padding_idx={self.padding_idx}"
        )
