"""The layers of the Transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Dropout, Module

from lmkern.functional import gelu
from lmkern.nn.attention import MultiheadAttention
from lmkern.nn.linear import Linear
from lmkern.nn.norm import LayerNorm

Activation = str | Callable[[Tensor], Tensor]


class _Layer(Module):
    """What encoder and decoder layers share: the feed-forward part and how a part is added."""

    # Attributes rather than arguments of __init__, so that each class keeps torch's order of
    # registration, on which state_dict and the random numbers of the initialisation depend.
    linear1: Linear
    linear2: Linear
    dropout: Dropout
    activation: Callable[[Tensor], Tensor]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def _set_activation(self, activation: Activation) -> None:
        if isinstance(activation, str):
            if activation not in ("relu", "gelu"):
                raise ValueError(
                    f"{type(self).__name__}: activation must be 'relu', 'gelu' or a callable, "
                    f"got {activation!r}"
                )
            self.activation = F.relu if activation == "relu" else gelu
        else:
            self.activation = activation


class TransformerEncoderLayer(_Layer):
    r"""``torch.nn.TransformerEncoderLayer`` on lmkern's kernels.

    .. math::
        x = \text{norm}_1(x + \text{attention}(x)), \quad
        x = \text{norm}_2(x + W_2 \, φ(W_1 x + b_1) + b_2)

    or, with ``norm_first``, x + attention(norm_1(x)) and so on. Constructor arguments, ``state_dict``
    and initialisation are exactly torch's; training and evaluation run the same operations, and nested
    tensors are not supported.

    Args:
        d_model: E, features. nhead: heads of the attention. dim_feedforward: features between W_1
            and W_2.
        dropout: probability of dropping an attention weight, and a value of φ and of each addition.
        activation: φ, "relu", "gelu" or a callable.
        layer_norm_eps: of the normalisations. norm_first: whether they come first.
        batch_first: the input is [B, L, E] instead of [L, B, E].
        bias: whether linear and normalisation layers have biases.
        device, dtype: of the parameters.

    Shape:
        - src: [L, B, E], [B, L, E] with ``batch_first``, or [L, E].
        - src_mask, src_key_padding_mask, is_causal: attn_mask, key_padding_mask and is_causal of
          :class:`MultiheadAttention`; ``is_causal`` needs no mask.
        - returns the shape of src.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Vaswani et al. 2017; norm_first: Xiong et al. 2020.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout=dropout, batch_first=batch_first, **kwargs
        )
        self.linear1 = Linear(d_model, dim_feedforward, **kwargs)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, **kwargs)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)
        self._set_activation(activation)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, src_key_padding_mask, need_weights=False, attn_mask=src_mask,
                is_causal=is_causal,
            )[0]  # fmt: skip

        x = src
        if self.norm_first:
            x = x + self.dropout1(attend(self.norm1(x)))
            return x + self.dropout2(self._feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout1(attend(x)))
        return self.norm2(x + self.dropout2(self._feed_forward(x)))


class TransformerDecoderLayer(_Layer):
    r"""``torch.nn.TransformerDecoderLayer`` on lmkern's kernels.

    As :class:`TransformerEncoderLayer`, with an attention to the encoder's output between the two
    parts. Constructor arguments, ``state_dict`` and initialisation are exactly torch's.

    Args: as :class:`TransformerEncoderLayer`.

    Shape:
        - tgt: [L, B, E], [B, L, E] with ``batch_first``, or [L, E]. memory: [S, B, E], likewise.
        - tgt_mask, tgt_key_padding_mask, tgt_is_causal and the same of memory: attn_mask,
          key_padding_mask and is_causal of the two :class:`MultiheadAttention`.
        - returns the shape of tgt.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: as :class:`TransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        attention = {"dropout": dropout, "batch_first": batch_first, **kwargs}
        self.self_attn = MultiheadAttention(d_model, nhead, **attention)
        self.multihead_attn = MultiheadAttention(d_model, nhead, **attention)
        self.linear1 = Linear(d_model, dim_feedforward, **kwargs)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, **kwargs)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.norm3 = LayerNorm(d_model, eps=layer_norm_eps, **kwargs)
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)
        self.dropout3 = Dropout(dropout)
        self._set_activation(activation)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, tgt_key_padding_mask, need_weights=False, attn_mask=tgt_mask,
                is_causal=tgt_is_causal,
            )[0]  # fmt: skip

        def look(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x, memory, memory, memory_key_padding_mask, need_weights=False,
                attn_mask=memory_mask, is_causal=memory_is_causal,
            )[0]  # fmt: skip

        x = tgt
        if self.norm_first:
            x = x + self.dropout1(attend(self.norm1(x)))
            x = x + self.dropout2(look(self.norm2(x)))
            return x + self.dropout3(self._feed_forward(self.norm3(x)))
        x = self.norm1(x + self.dropout1(attend(x)))
        x = self.norm2(x + self.dropout2(look(x)))
        return self.norm3(x + self.dropout3(self._feed_forward(x)))
