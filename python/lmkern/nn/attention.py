"""Multi-head attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.init import constant_, xavier_normal_, xavier_uniform_

from lmkern.functional import linear, scaled_dot_product_attention
from lmkern.functional._attention import check_window
from lmkern.nn.linear import Linear
from lmkern.nn.position import RotaryPosition, alibi_slopes
from lmkern.ops.library import is_autocast_on

Window = tuple[int | None, int | None]


class MultiheadAttention(Module):
    r"""``torch.nn.MultiheadAttention`` on lmkern's kernels, and more.

    .. math::
        \text{head}_h = \text{softmax}(Q_h K_h^T / \sqrt{D} + \text{mask}) V_h, \qquad
        \text{out} = \text{concat}(\text{head}_1, ...) W_{out}^T + b_{out}

    with Q, K, V linear in query, key and value. Constructor arguments, parameter names and shapes,
    ``state_dict`` and initialisation are exactly torch's: a checkpoint of one loads into the other, and
    the same seed gives the same weights. The keyword-only arguments are ours. Training and evaluation
    run the same operations; nested tensors are not supported (``key_lengths`` serves their purpose).

    Args:
        embed_dim: E, features of query and output. num_heads: H; each has D = E / H features.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have biases.
        add_bias_kv: append a learned key and value (``bias_k``, ``bias_v``), which every query sees.
        add_zero_attn: append a key and a value of zeros, which every query sees.
        kdim, vdim: features of key and value; default E.
        batch_first: query, key, value and output are [B, L, E] instead of [L, B, E].
        device, dtype: of the parameters.
        num_kv_heads: H_kv, heads of key and value, each serving H / H_kv heads of the query. The
            parameters of their projections have H_kv D rows instead of E.
        window: (left, right), the keys around its own position that a query sees; see
            :func:`lmkern.functional.scaled_dot_product_attention`.
        softcap: bounds the scores, see there.
        rotary: a :class:`RotaryPosition` of D features, which turns queries and keys.
        alibi: subtract the distance of query and key from their score, with :func:`alibi_slopes`.

    Shape:
        - query: [L, B, E], [B, L, E] with ``batch_first``, or [L, E]. key: [S, B, kdim] and value:
          [S, B, vdim], laid out likewise.
        - key_padding_mask: [B, S], or [S] unbatched: bool, True is ignored; or floating, added to the
          scores.
        - attn_mask: [L, S] or [B H, L, S], likewise. The two masks may be of different kinds.
        - is_causal: query i sees keys 0 to i. ``attn_mask`` may be None, unlike in torch; where it is
          given it must be the causal mask, and is not read (unless it requires a gradient).
        - key_lengths (ours): int32 or int64 [B]: the keys of each row that count, from the first one;
          the same as a key_padding_mask with a tail of True, but the kernel skips the tail.
        - returns the output, laid out like query, and the weights: [B, L, S], or [B, H, L, S] with
          ``average_attn_weights=False``, without B if unbatched, after dropout; None without
          ``need_weights``. S counts the appended keys.

    A query that sees no key gives zeros before the output projection, where torch gives NaN.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Vaswani et al. 2017; num_kv_heads: Shazeer 2019, Ainslie et al. 2023 (GQA).
    """

    bias_k: Tensor | None
    bias_v: Tensor | None
    alibi_slopes: Tensor | None

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
        *,
        num_kv_heads: int | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        rotary: RotaryPosition | None = None,
        alibi: bool = False,
    ) -> None:
        name = "MultiheadAttention"
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for key, value in (
            ("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads),
        ):  # fmt: skip
            if value <= 0:
                raise ValueError(f"{name}: {key} must be greater than 0, got {value}")
        if embed_dim % num_heads:
            raise ValueError(
                f"{name}: embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}"
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: num_heads must be a multiple of num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{name}: dropout must be in [0, 1], got {dropout}")
        if alibi and (add_bias_kv or add_zero_attn):
            raise ValueError(
                f"{name}: alibi must be False with add_bias_kv or add_zero_attn, whose keys have no "
                "position"
            )
        check_window(window, False)
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.head_dim = embed_dim // num_heads
        self.num_kv_heads, self.window, self.softcap = num_kv_heads, window, softcap
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise ValueError(
                f"{name}: rotary must be for heads of {self.head_dim}, got {rotary.head_dim}"
            )
        self.rotary, self.alibi = rotary, alibi

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        kv_dim = num_kv_heads * self.head_dim
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = parameter(embed_dim + 2 * kv_dim, embed_dim)
            for key in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(key, None)
        else:
            self.q_proj_weight = parameter(embed_dim, embed_dim)
            self.k_proj_weight = parameter(kv_dim, self.kdim)
            self.v_proj_weight = parameter(kv_dim, self.vdim)
            self.register_parameter("in_proj_weight", None)
        if bias:
            self.in_proj_bias = parameter(embed_dim + 2 * kv_dim)
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        if add_bias_kv:
            self.bias_k, self.bias_v = parameter(1, 1, kv_dim), parameter(1, 1, kv_dim)
        else:
            self.bias_k = self.bias_v = None
        slopes = alibi_slopes(num_heads, device=device) if alibi else None
        self.register_buffer("alibi_slopes", slopes, persistent=False)
        # torch.nn.TransformerEncoderLayer reads this, and would run on our parameters, but not on our
        # forward, if it were True.
        self._qkv_same_embed_dim = False
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """In torch's order: the same seed gives the same weights."""
        for weight in (
            self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight,
        ):  # fmt: skip
            if weight is not None:
                xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            constant_(self.in_proj_bias, 0.0)
            constant_(self.out_proj.bias, 0.0)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                xavier_normal_(bias)

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, {self.num_heads}"]
        defaults: dict[str, Any] = {
            "dropout": 0.0, "add_zero_attn": False, "kdim": self.embed_dim, "vdim": self.embed_dim,
            "batch_first": False, "num_kv_heads": self.num_heads, "window": None, "softcap": None,
            "alibi": False,
        }  # fmt: skip
        parts += [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        parts += ["bias=False"] * (self.in_proj_bias is None)
        return ", ".join(parts + ["add_bias_kv=True"] * (self.bias_k is not None))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        batch, queries, keys = self._check(query, key, value)
        q, k, v = self._heads(query, key, value)
        if self.rotary is not None:
            if query is key:
                q, k = self.rotary(q, k)
            else:
                q, k = self.rotary(q)[0], self.rotary(k)[0]
        if is_causal and not (attn_mask is not None and attn_mask.requires_grad):
            attn_mask = None
        else:
            is_causal = False
        left, right = check_window(self.window, is_causal)
        mask = self._mask(key_padding_mask, attn_mask, batch, queries, keys, batched)
        if self.bias_k is not None or self.add_zero_attn:
            # The appended keys stand outside of the sequence: no window and no length hides them.
            mask = _both(mask, _visible(left, right, key_lengths, queries, keys, q.device))
            left, right, key_lengths = -1, -1, None
            k, v, mask = self._append(k, v, mask)
        weights = None if not need_weights else "mean" if average_attn_weights else "heads"
        result = scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.num_heads,
            window=(left, right),
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            key_lengths=key_lengths,
            return_weights=weights,
        )
        out, shares = result if need_weights else (result, None)
        if not batched:
            out = out[0].transpose(0, 1)
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        out = self.out_proj(out.flatten(-2))
        return out, shares if batched or shares is None else shares[0]

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int]:
        """B, L and S; all that the projections would complain about less clearly."""
        name = "MultiheadAttention"
        dims = query.dim()
        for key_, x, width in (
            ("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim),
        ):  # fmt: skip
            if x.is_nested:
                raise TypeError(f"{name}: {key_} must not be nested (key_lengths does the same)")
            if dims not in (2, 3) or x.dim() != dims or x.shape[-1] != width:
                layout = "[B, L, E]" if self.batch_first else "[L, B, E]"
                raise ValueError(
                    f"{name}: {key_} must be {layout} or [L, E], like query, with E = {width}, "
                    f"got {list(x.shape)}"
                )
        weight = self.out_proj.weight
        if query.dtype != weight.dtype and not (is_autocast_on(query.device.type)):
            raise TypeError(
                f"{name}: query must be {weight.dtype} like the parameters, got {query.dtype}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{name}: value must have the lengths of key, {list(key.shape)[:-1]}, "
                f"got {list(value.shape)[:-1]}"
            )
        if dims == 2:
            return 1, query.shape[0], key.shape[0]
        rows, steps = (0, 1) if self.batch_first else (1, 0)
        if key.shape[rows] != query.shape[rows]:
            raise ValueError(
                f"{name}: key must have B = {query.shape[rows]} like query, got {key.shape[rows]}"
            )
        return query.shape[rows], query.shape[steps], key.shape[steps]

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections, as views [B, H, L, D], in as few products as torch."""
        widths = [self.embed_dim] + [self.num_kv_heads * self.head_dim] * 2
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            parts = linear(query, weight, bias).split(widths, -1)
        elif weight is not None and key is value:
            kv_widths = [widths[0], sum(widths[1:])]
            w_q, w_kv = weight.split(kv_widths)
            b_q, b_kv = (None, None) if bias is None else bias.split(kv_widths)
            parts = (
                linear(query, w_q, b_q), *linear(key, w_kv, b_kv).split(widths[1:], -1),
            )  # fmt: skip
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if weight is not None:
                weights = weight.split(widths)
            biases = (None,) * 3 if bias is None else bias.split(widths)
            parts = tuple(map(linear, (query, key, value), weights, biases))
        if query.dim() == 2:
            order, parts = (0, 2, 1, 3), tuple(x.unsqueeze(0) for x in parts)
        else:
            order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).permute(order) for x in parts)
        return q, k, v

    def _mask(
        self,
        padding: Tensor | None,
        mask: Tensor | None,
        batch: int,
        queries: int,
        keys: int,
        batched: bool,
    ) -> Tensor | None:
        """Both masks in one, broadcastable to [B, H, L, S], bool (True takes part) or floating."""
        name = "MultiheadAttention"
        for key, x in (("key_padding_mask", padding), ("attn_mask", mask)):
            if x is not None and x.dtype != torch.bool and not x.is_floating_point():
                raise TypeError(f"{name}: {key} must be bool or floating, got {x.dtype}")
        if padding is not None:
            expected = [batch, keys] if batched else [keys]
            if list(padding.shape) != expected:
                raise ValueError(
                    f"{name}: key_padding_mask must be {'[B, S]' if batched else '[S]'} = "
                    f"{expected}, got {list(padding.shape)}"
                )
            padding = padding.view(batch, 1, 1, keys)  # by stride, never [L, S]
        if mask is not None:
            shapes = ([queries, keys], [batch * self.num_heads, queries, keys])
            if list(mask.shape) not in shapes:
                raise ValueError(
                    f"{name}: attn_mask must be [L, S] = {shapes[0]} or [B H, L, S] = {shapes[1]}, "
                    f"got {list(mask.shape)}"
                )
            if mask.dim() == 3:
                mask = mask.unflatten(0, (batch, self.num_heads))
        return _both(_taking_part(padding), _taking_part(mask))

    def _append(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with bias_k, bias_v and zeros after them, and a mask that shows these."""
        ks, vs = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            for parts, bias in ((ks, self.bias_k), (vs, self.bias_v)):
                row = bias.view(1, self.num_kv_heads, 1, self.head_dim).to(k.dtype)
                parts.append(row.expand(k.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            ks.append(k.new_zeros(*k.shape[:2], 1, self.head_dim))
            vs.append(v.new_zeros(*v.shape[:2], 1, self.head_dim))
        if mask is not None:
            mask = F.pad(mask, (0, len(ks) - 1), value=mask.dtype == torch.bool)
        return torch.cat(ks, 2), torch.cat(vs, 2), mask


def _taking_part(mask: Tensor | None) -> Tensor | None:
    """A bool mask where True is ignored, as one where True takes part."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The mask that hides what either hides; floating if either is."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype == b.dtype == torch.bool:
        return a & b
    if a.dtype == torch.bool:
        a, b = b, a
    return torch.where(b, a, -math.inf) if b.dtype == torch.bool else a + b


def _visible(
    left: int, right: int, lengths: Tensor | None, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Window and lengths as a mask [L, S] or [B, 1, L, S]."""
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    mask = None
    if left >= 0:
        mask = _both(mask, j >= i - left)
    if right >= 0:
        mask = _both(mask, j <= i + right)
    return mask if lengths is None else _both(mask, j < lengths.view(-1, 1, 1, 1))
