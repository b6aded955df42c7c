"""Token, position and segment embeddings with norm and dropout. Math: csrc/ops/token_position.h."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern import reference
from lmkern.functional._embedding import resolve_padding_idx
from lmkern.functional.norm import check_dropout, check_kind, default_eps, dropout_seed
from lmkern.ops.check import check_dims, check_dtype, check_shape, check_tensors
from lmkern.ops.library import needs_grad, use_kernel
from lmkern.ops.token_position import NORMS, TokenPositionFunction

_OP = "token_position_embedding"


def token_position_embedding(
    input: Tensor,
    token: Tensor,
    position: Tensor | None = None,
    segment: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    segments: Tensor | None = None,
    scale: float = 1.0,
    norm: str | None = None,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    sparse: bool = False,
    reuse_grad: bool = True,
) -> Tensor:
    r"""The first layer of a language model, in one pass each way.

    .. math::
        y = \text{dropout}(\text{norm}(\text{scale} · \text{token}_\text{input}
            + \text{position}_\text{positions} + \text{segment}_\text{segments}))

    The sum is not stored: backward makes it again from the tables, which therefore must not change in
    between if there is a norm.

    Args:
        input: [*, L] int32 or int64, rows of ``token``.
        token: [V, D].
        position: [P, D], learned or fixed; None for no positions.
        segment: [S, D]; None for no segments.
        weight, bias: [D], of the norm; their dtype that of ``token``, or float32 for 16-bit tables.
            RMS norm has no bias.
        eps: of the norm; default 1e-5, or that of :func:`~lmkern.functional.rms_norm`.
        positions: rows of ``position``: [*, L] as ``input``, or [L]; default ``offset`` to
            ``offset + L - 1``.
        offset: the position of the first token, where a cache holds those before it.
        segments: rows of ``segment``, as ``input``.
        scale: what the rows of ``token`` are multiplied with; sqrt(D) in the Transformer.
        norm: None, "layer" or "rms".
        padding_idx: the row of ``token`` that gets no gradient; negative counts from the end.
        dropout_p: probability of dropping an element, if ``training``; see
            :func:`~lmkern.functional.dropout`.
        sparse, reuse_grad: of the gradient of ``token``, as for
            :func:`~lmkern.functional.embedding`.

    Returns:
        [*, L, D], of the dtype of ``token``.

    Raises:
        IndexError: an index outside its table, naming it.
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Vaswani et al. 2017; Devlin et al. 2019 (BERT); Radford et al. 2019 (GPT-2).
    """
    padding, rms = _check(
        input,
        token,
        position,
        segment,
        weight,
        bias,
        positions,
        offset,
        segments,
        norm,
        padding_idx,
    )
    p = check_dropout(_OP, dropout_p) if training else 0.0
    kernel = use_kernel(_OP, token, kernel="token_position_forward")
    if not kernel or (sparse and torch.compiler.is_compiling()):
        return reference.token_position_embedding(
            input, token, position, segment, weight, bias, eps, positions=positions, offset=offset,
            segments=segments, scale=scale, norm=norm, padding_idx=padding, dropout_p=p,
            sparse=sparse,
        )  # fmt: skip
    length = input.numel()  # of the rows that have positions of their own
    if position is not None and (positions is None or positions.shape != input.shape):
        length = input.shape[-1] if input.dim() else 1
    tables = token, position, segment, weight, bias
    indices = input, positions, segments, dropout_seed(p, token)
    eps = default_eps(eps, token, rms)
    options = float(scale), NORMS.index(norm), eps, p
    if needs_grad(*tables):
        return TokenPositionFunction.apply(
            *tables, *indices, offset, length, *options, padding, sparse, reuse_grad
        )
    return torch.ops.lmkern.token_position_forward(
        input, token, position, positions, offset, length, segment, segments, options[0], weight,
        bias, indices[-1], *options[1:],
    )[0]  # fmt: skip


def _check(
    input: Tensor,
    token: Tensor,
    position: Tensor | None,
    segment: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    positions: Tensor | None,
    offset: int,
    segments: Tensor | None,
    norm: str | None,
    padding_idx: int | None,
) -> tuple[int, bool]:
    """``padding_idx`` counted from the front, and whether the norm is "rms"."""
    check_tensors(
        _OP, token=token, input=input, position=position, segment=segment, weight=weight, bias=bias,
        positions=positions, segments=segments,
    )  # fmt: skip
    check_dims(_OP, "token", token, 2, "[V, D]")
    width = token.shape[1]
    check_dtype(_OP, token.dtype, position=position, segment=segment)
    for name, table, symbolic in (("position", position, "[P, D]"), ("segment", segment, "[S, D]")):
        if table is not None:
            check_dims(_OP, name, table, 2, symbolic)
            check_shape(_OP, name, table, (table.shape[0], width), symbolic)
    for name, index in (("input", input), ("positions", positions), ("segments", segments)):
        if index is not None and index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{_OP}: {name} must be int32 or int64, got {index.dtype}")
    if positions is not None:
        if position is None:
            raise ValueError(f"{_OP}: positions need a position table")
        if offset != 0:
            raise ValueError(f"{_OP}: offset must be 0 where positions are given, got {offset}")
        if positions.shape not in (input.shape, input.shape[-1:]):
            raise ValueError(
                f"{_OP}: positions must be like input {list(input.shape)} or its last dimension, "
                f"got {list(positions.shape)}"
            )
    if (segment is None) != (segments is None):
        raise ValueError(f"{_OP}: segments must be given with a segment table, and only then")
    check_shape(_OP, "segments", segments, input.shape, "input's shape")
    if norm is None:
        if weight is not None or bias is not None:
            raise ValueError(f"{_OP}: weight and bias must be None without a norm")
        rms = False
    else:
        rms = check_kind(_OP, norm, bias)
        check_shape(_OP, "weight", weight, (width,), "[D]")
        check_shape(_OP, "bias", bias, (width,), "[D]")
    return resolve_padding_idx(_OP, padding_idx, token.shape[0]), rms
