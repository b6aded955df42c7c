"""Positions: added to the input, rotated into queries and keys, or as slopes of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init

from lmkern.functional import rotary_embedding
from lmkern.ops.library import accumulate_dtype


class _Table:
    """Rows of a function of the position, computed once and grown when a later one is asked for."""

    def __init__(self, rows: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.rows = rows
        self.kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def __deepcopy__(self, memo: Any) -> _Table:
        return _Table(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "kept": {}}  # not into a checkpoint: it is cheap

    def _make(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # In float64, and rounded once: in float32 the angle of position 100,000 is off by 0.004.
        return tuple(x.to(dtype) for x in self.rows(position.double()))

    def __call__(
        self, offset: int | Tensor, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Rows of positions offset to offset + length: [length, ...], or [B, length, ...]."""
        if (
            torch.compiler.is_compiling()
        ):  # part of the graph: a table that grew would be another one
            position = torch.arange(length, device=device)
            if not isinstance(offset, Tensor):
                return self._make(position + offset, dtype)
            position = offset[:, None] + position
            made = self._make(position.flatten(), dtype)
            return tuple(x.unflatten(0, position.shape) for x in made)
        if isinstance(offset, Tensor):
            needed = max(int(offset.max()), 0) + length if offset.numel() else 0
        else:
            needed = offset + length
        kept = self.kept.get((device, dtype), ())
        if not kept or kept[0].shape[0] < needed:
            size = 1 << max(needed - 1, 0).bit_length()
            with torch.no_grad():
                kept = self._make(torch.arange(size, device=device), dtype)
            self.kept[device, dtype] = kept
        return tuple(_rows(x, offset, length) for x in kept)


def _rows(table: Tensor, offset: int | Tensor, length: int) -> Tensor:
    if isinstance(offset, Tensor):
        position = offset[:, None] + torch.arange(length, device=table.device)
        return table[position.clamp(min=0)]
    return table[offset : offset + length]


def _check_offset(owner: str, offset: int | Tensor, batch: int | None) -> None:
    if isinstance(offset, Tensor):
        if offset.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{owner}: offset must be int32 or int64, got {offset.dtype}")
        if tuple(offset.shape) != (batch,):
            raise ValueError(
                f"{owner}: offset must be an int or [B] = [{batch}], got {list(offset.shape)}"
            )
    elif not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"{owner}: offset must be an int or a Tensor, got {type(offset).__name__}")
    elif offset < 0:
        raise ValueError(f"{owner}: offset must be at least 0, got {offset}")


class _Added(Module):
    """What modules share that add a row for each position to [L, B, E], [B, L, E] or [L, E]."""

    def __init__(self, embed_dim: int, batch_first: bool) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(
                f"{type(self).__name__}: embed_dim must be at least 1, got {embed_dim}"
            )
        self.embed_dim, self.batch_first = embed_dim, batch_first

    def _positions(self, offset: int | Tensor, length: int, input: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor, offset: int | Tensor = 0) -> Tensor:
        name = type(self).__name__
        if input.dim() not in (2, 3) or input.shape[-1] != self.embed_dim:
            layout = "[B, L, E]" if self.batch_first else "[L, B, E]"
            raise ValueError(
                f"{name}: input must be {layout} or [L, E] with E = {self.embed_dim}, "
                f"got {list(input.shape)}"
            )
        batched = input.dim() == 3
        steps, rows = (1, 0) if batched and self.batch_first else (0, 1)
        _check_offset(name, offset, input.shape[rows] if batched else None)
        position = self._positions(offset, input.shape[steps], input)
        if batched and not self.batch_first:  # [L, E] -> [L, 1, E], [B, L, E] -> [L, B, E]
            position = position.transpose(0, 1) if position.dim() == 3 else position.unsqueeze(1)
        return input + position


class SinusoidalPosition(_Added):
    r"""input + PE, the fixed sines and cosines of the Transformer; any length.

    .. math:: PE_{p, 2i} = \sin(p / 10000^{2i/E}), \qquad PE_{p, 2i+1} = \cos(p / 10000^{2i/E})

    Args:
        embed_dim: E. base: the 10000 above.
        batch_first: the input is [B, L, E] instead of [L, B, E].

    Shape:
        - input: [L, B, E], [B, L, E] with ``batch_first``, or [L, E].
        - offset: the position of the first row, an int, or int32 or int64 [B], where it may be negative:
          rows before position 0 are padding, and get anything.
        - returns the shape and dtype of the input.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Vaswani et al. 2017, section 3.5.
    """

    def __init__(self, embed_dim: int, base: float = 10000.0, batch_first: bool = False) -> None:
        super().__init__(embed_dim, batch_first)
        self.base = base
        self._table = _Table(_Sinusoids(embed_dim, base))

    def _positions(self, offset: int | Tensor, length: int, input: Tensor) -> Tensor:
        return self._table(offset, length, input.device, input.dtype)[0]

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, base={self.base}, batch_first={self.batch_first}"


class LearnedPosition(_Added):
    """input + weight[position], the learned positions of GPT and BERT.

    Args:
        max_length: number of positions. embed_dim: E.
        batch_first: the input is [B, L, E] instead of [L, B, E].
        device, dtype: of ``weight`` [max_length, E], drawn from N(0, 0.02).

    Shape: as :class:`SinusoidalPosition`.

    Raises:
        IndexError: a position beyond ``max_length``.
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Gehring et al. 2017; deviation of the initial weights as in Radford et al. 2019 (GPT-2).
    """

    def __init__(
        self, max_length: int, embed_dim: int, batch_first: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__(embed_dim, batch_first)
        if max_length < 1:
            raise ValueError(f"LearnedPosition: max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        self.weight = Parameter(torch.empty(max_length, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=0.02)

    def _positions(self, offset: int | Tensor, length: int, input: Tensor) -> Tensor:
        if not isinstance(offset, Tensor) and offset + length > self.max_length:
            raise IndexError(
                f"LearnedPosition: positions must be below max_length = {self.max_length}, "
                f"got {offset} to {offset + length - 1}"
            )
        return _rows(self.weight, offset, length)

    def extra_repr(self) -> str:
        return f"{self.max_length}, {self.embed_dim}, batch_first={self.batch_first}"


class RotaryPosition(Module):
    r"""Rotates queries and keys by their positions, so that scores depend on distances only.

    Pair r of the first R features turns by the angle :math:`p · \text{base}^{-2r/R}` at position p, by
    :func:`lmkern.functional.rotary_embedding`. Angles are computed once, and again when a longer
    sequence comes.

    Args:
        head_dim: D, features of a head.
        base: the slowest pair turns by about 1 / base for each position.
        rotary_dim: R, even and at most D; default D. The other features stay as they are.
        interleaved: pairs are neighbours (GPT-J) instead of half a head apart (Llama).

    Shape:
        - query: [..., H, L, D]. key: [..., H_kv, L, D], or None.
        - offset: the position of the first row, an int, or int32 or int64 [B] for [B, H, L, D]; see
          :class:`SinusoidalPosition`.
        - returns (query, key), of the same shapes and dtypes.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Su et al. 2021 (RoFormer).
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(
                f"RotaryPosition: rotary_dim must be even and at most head_dim = {head_dim}, "
                f"got {rotary_dim}"
            )
        self.head_dim, self.base, self.rotary_dim = head_dim, base, rotary_dim
        self.interleaved = interleaved
        self._table = _Table(_Angles(rotary_dim, base))

    def forward(
        self, query: Tensor, key: Tensor | None = None, offset: int | Tensor = 0
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() < 2 or query.shape[-1] != self.head_dim:
            raise ValueError(
                f"RotaryPosition: query must be [..., L, D] with D = {self.head_dim}, "
                f"got {list(query.shape)}"
            )
        _check_offset("RotaryPosition", offset, query.shape[0] if query.dim() == 4 else None)
        cos, sin = self._table(offset, query.shape[-2], query.device, accumulate_dtype(query.dtype))
        if cos.dim() == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, L, R/2]: the same for all heads
        return rotary_embedding(query, key, cos, sin, self.interleaved)

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}, "
            f"interleaved={self.interleaved}"
        )


# Classes rather than closures: modules that hold them can be pickled.
class _Sinusoids:
    def __init__(self, width: int, base: float) -> None:
        self.width, self.base = width, base

    def __call__(self, position: Tensor) -> tuple[Tensor, ...]:
        even = torch.arange(0, self.width, 2, dtype=torch.float64, device=position.device)
        angle = torch.outer(position, self.base ** (-even / self.width))
        return (torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[:, : self.width],)


class _Angles:
    def __init__(self, width: int, base: float) -> None:
        self.width, self.base = width, base

    def __call__(self, position: Tensor) -> tuple[Tensor, ...]:
        even = torch.arange(0, self.width, 2, dtype=torch.float64, device=position.device)
        angle = torch.outer(position, self.base ** (-even / self.width))
        return angle.cos(), angle.sin()


def alibi_slopes(num_heads: int, device=None, dtype=None) -> Tensor:
    """The slopes of ALiBi, [num_heads], for ``alibi_slopes`` of attention.

    2^(-8/n), 2^(-16/n), ... for n a power of two; else those of the power below, and every second one
    of the power above.

    Raises:
        ValueError: num_heads is below 1.

    Source: Press et al. 2022, and their code for other numbers of heads.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1, got {num_heads}")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)][: num_heads - power]
    assert len(slopes) == num_heads and math.isclose(slopes[power - 1], 2**-8)
    return torch.tensor(slopes, device=device, dtype=dtype)
