"""Keys and values of the tokens that a decoder has seen."""

from __future__ import annotations

import torch
from torch import Tensor

_NAME = "KVCache"


class KVCache:
    """Preallocated keys and values of all layers, to which each call appends in place.

    In a decoder's layer, with the heads of the new tokens::

        keys, values, key_lengths = cache.append(layer, k, v)
        out = scaled_dot_product_attention(
            q, keys, values, is_causal=True, causal_align="bottom_right", enable_gqa=True,
            window=(cache.window, None), key_lengths=key_lengths,
        )

    Positions are right without further ado: the last query stands at the last key. Layers that turn
    keys by their position (:class:`RotaryPosition`) take ``offset=cache.position(layer)`` before they
    append, or ``cache.position(layer) + counts - n`` for rows that are padded on the left. For
    inference: gradients do not survive the next call, which writes into the same memory.

    Args:
        num_layers: number of layers. batch_size: B, sequences.
        num_heads: heads of key and value, H_kv.
        max_length: tokens that fit, M. With ``window`` it may be None: any number fits.
        head_dim: D, features of a key. value_dim: Dv, features of a value; default D.
        window: query at p sees the keys from p - window on. Older ones are forgotten: memory for at
            most 2 (window + 1) tokens.
        device, dtype: of the keys and values.

    Attributes:
        keys, values: for each layer [B, H_kv, capacity, D] and [B, H_kv, capacity, Dv].
        window: as given.

    Raises:
        ValueError, TypeError: an argument that does not fit, or tokens that do not, naming expected
            and actual; nothing has been written then.

    Source: Shazeer 2019, incremental inference; window: Jiang et al. 2023 (Mistral 7B, rolling buffer
    cache), here without the rotation, which would lose the order of the keys.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        max_length: int | None,
        head_dim: int,
        *,
        value_dim: int | None = None,
        window: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        for key, value, low in (
            ("num_layers", num_layers, 1), ("batch_size", batch_size, 0),
            ("num_heads", num_heads, 1), ("max_length", max_length, 1), ("head_dim", head_dim, 1),
            ("window", window, 0),
        ):  # fmt: skip
            if value is not None and value < low:
                raise ValueError(f"{_NAME}: {key} must be at least {low}, got {value}")
        if max_length is None and window is None:
            raise ValueError(f"{_NAME}: max_length must be an int without window, got None")
        # Twice the window, so that it moves to the front once in window + 1 tokens.
        room = None if window is None else 2 * (window + 1)
        capacity = min(size for size in (max_length, room) if size is not None)
        shape = (batch_size, num_heads, capacity)
        self.keys = [
            torch.zeros(*shape, head_dim, device=device, dtype=dtype) for _ in range(num_layers)
        ]
        self.values = [
            torch.zeros(*shape, value_dim or head_dim, device=device, dtype=dtype)
            for _ in range(num_layers)
        ]
        self.window, self.max_length = window, max_length
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        layers = len(self.keys)
        self._seen = [0] * layers  # tokens appended; rows with lengths: the most of a row
        self._filled = [0] * layers  # of these, how many the buffer still holds
        self._rows: list[Tensor | None] = [None] * layers  # tokens of each row, once they differ

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        """Tokens that have gone through all layers (of the longest row)."""
        return self._seen[-1]

    def position(self, layer: int) -> int | Tensor:
        """Where the next token of this layer stands: for all rows, or [B] once they differ."""
        rows = self._rows[layer]
        return self._seen[layer] if rows is None else rows

    def append(
        self, layer: int, key: Tensor, value: Tensor, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write the keys and values of n new tokens of each row.

        Args:
            layer: 0 to num_layers - 1.
            key: [B, H_kv, n, D]. value: [B, H_kv, n, Dv].
            counts: int64 [B], 0 to n: how many of the n tokens of each row count: the last ones, as in
                a batch of prompts that are padded on the left. Once given, rows have lengths of their
                own. Excludes ``window``.

        Returns:
            keys [B, H_kv, S, D], values [B, H_kv, S, Dv], the past and these, in the dtype of the
            arguments and, unless that or ``window`` costs a copy, in place; and the lengths of the
            rows, int64 [B], or None if all are S. With ``window``, S counts what the new tokens can
            see.
        """
        self._check(layer, key, value, counts)
        if counts is not None or self._rows[layer] is not None:
            return self._append_rows(layer, key, value, counts)
        new, seen = key.shape[2], self._seen[layer]
        keys, values, filled = self.keys[layer], self.values[layer], self._filled[layer]
        past = filled if self.window is None else min(filled, self.window)
        if filled + new > keys.shape[2]:  # only with a window
            keep = slice(filled - past, filled)
            if past + new > keys.shape[2]:
                # More than the buffer holds: attention reads them once from here.
                whole = [
                    torch.cat([buffer[:, :, keep].to(x.dtype), x], 2)
                    for buffer, x in ((keys, key), (values, value))
                ]
                last = min(past + new, self.window or 0)
                for buffer, x in zip((keys, values), whole, strict=True):
                    buffer[:, :, :last] = x[:, :, x.shape[2] - last :]
                self._seen[layer], self._filled[layer] = seen + new, last
                return whole[0], whole[1], None
            for buffer in (keys, values):
                buffer[:, :, :past] = buffer[:, :, keep].clone()
            filled = past
        end = filled + new
        keys[:, :, filled:end], values[:, :, filled:end] = key, value
        self._seen[layer], self._filled[layer] = seen + new, end
        begin = filled - past
        return (
            keys[:, :, begin:end].to(key.dtype), values[:, :, begin:end].to(value.dtype), None,
        )  # fmt: skip

    def _append_rows(
        self, layer: int, key: Tensor, value: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values, new = self.keys[layer], self.values[layer], key.shape[2]
        before = self._rows[layer]
        if before is None:
            before = torch.full((self.batch_size,), self._seen[layer], device=keys.device)
        counts = torch.full_like(before, new) if counts is None else counts
        lengths = before + counts
        longest = int(lengths.max()) if lengths.numel() else 0
        if longest > keys.shape[2]:
            raise ValueError(
                f"{_NAME}: tokens must be at most max_length = {keys.shape[2]}, got {longest}"
            )
        first = new - counts
        row, i = (torch.arange(new, device=keys.device) >= first[:, None]).nonzero(as_tuple=True)
        place = before[row] + i - first[row]
        keys[row, :, place] = key[row, :, i].to(keys.dtype)
        values[row, :, place] = value[row, :, i].to(values.dtype)
        self._rows[layer] = lengths
        self._seen[layer] = self._filled[layer] = longest
        keys, values = keys[:, :, :longest], values[:, :, :longest]
        return keys.to(key.dtype), values.to(value.dtype), lengths

    def _check(self, layer: int, key: Tensor, value: Tensor, counts: Tensor | None) -> None:
        new = key.shape[2] if key.dim() == 4 else -1
        for name, x, buffer in (
            ("key", key, self.keys[layer]), ("value", value, self.values[layer]),
        ):  # fmt: skip
            expected = (*buffer.shape[:2], new, buffer.shape[3])
            if tuple(x.shape) != expected:
                symbols = "[B, H_kv, n, D]" if name == "key" else "[B, H_kv, n, Dv]"
                shown = str(list(expected)).replace("-1", "n")
                raise ValueError(
                    f"{_NAME}: {name} must be {symbols} = {shown}, got {list(x.shape)}"
                )
        if counts is not None:
            if self.window is not None:
                raise ValueError(f"{_NAME}: counts must be None with window")
            if counts.dtype != torch.int64 or tuple(counts.shape) != (self.batch_size,):
                raise ValueError(
                    f"{_NAME}: counts must be int64 [B] = [{self.batch_size}], "
                    f"got {counts.dtype} {list(counts.shape)}"
                )
            if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > new):
                raise ValueError(
                    f"{_NAME}: counts must be between 0 and n = {new}, "
                    f"got {int(counts.min())} to {int(counts.max())}"
                )
        elif self.max_length is not None and self._rows[layer] is None:
            after = self._seen[layer] + new
            if after > self.max_length:
                raise ValueError(
                    f"{_NAME}: tokens must be at most max_length = {self.max_length}, got {after}"
                )

    def reorder(self, indices: Tensor) -> None:
        """Row b becomes what row indices[b] was: the beams of a search. indices: int64 [B]."""
        if tuple(indices.shape) != (self.batch_size,):
            raise ValueError(
                f"{_NAME}: indices must be [B] = [{self.batch_size}], got {list(indices.shape)}"
            )
        for layer, filled in enumerate(self._filled):
            for buffer in (self.keys[layer], self.values[layer]):
                buffer[:, :, :filled] = buffer[:, :, :filled].index_select(0, indices)
            rows = self._rows[layer]
            self._rows[layer] = None if rows is None else rows.index_select(0, indices)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length`` of each row: those that a draft got wrong."""
        for layer, seen in enumerate(self._seen):
            dropped = max(seen - length, 0)
            kept = self._filled[layer] - dropped
            # A window's buffer must still hold all that the next token sees.
            if length < 0 or (
                self.window is not None and dropped and kept < min(length, self.window)
            ):
                raise ValueError(
                    f"{_NAME}: length must be at least 0 and inside of the window, got {length} "
                    f"of {seen}"
                )
        for layer, seen in enumerate(self._seen):
            dropped = max(seen - length, 0)
            self._seen[layer] -= dropped
            self._filled[layer] -= dropped
            rows = self._rows[layer]
            self._rows[layer] = None if rows is None else rows.clamp(max=length)
