"""GPT: a decoder-only transformer with learned positions, pre-norm blocks and a tied head.

Source: Radford et al. 2019 (GPT-2); sizes, names of options and initialisation as in nanoGPT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmkern.functional
import lmkern.nn
from lmkern.nn import KVCache

from .head import Head
from .pretrained import (
    Backend,
    LanguageModel,
    check_backend,
    check_dropout,
    check_input_ids,
    check_positive,
)


@dataclass(frozen=True)
class GPTConfig:
    """Size of a GPT.

    Args:
        vocab_size: number of different tokens.
        block_size: the most tokens the model can look at.
        n_layer: number of transformer blocks.
        n_head: attention heads per block.
        n_embd: width of the model; a multiple of n_head.
        dropout: probability of dropping a value (embeddings, attention weights, block outputs).
        bias: give the linear and normalisation layers a bias.
    """

    vocab_size: int = 256
    block_size: int = 64
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        owner = "GPTConfig"
        check_positive(
            owner,
            vocab_size=self.vocab_size,
            block_size=self.block_size,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
        )
        check_dropout(owner, dropout=self.dropout)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"{owner}: n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}"
            )


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """Causal attention of torch, the last query at the last key.

    Its ``is_causal`` has the first query at the first key: a mask says it where that differs.
    """
    new, length = query.shape[2], key.shape[2]
    mask = None
    if 1 < new < length:
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal=new == length
    )


class Attention(nn.Module):
    """Causal self-attention over [B, T, n_embd]."""

    def __init__(self, config: GPTConfig, layers: Any) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.sdpa: Any = _torch_attention
        if layers is lmkern.nn:
            self.sdpa = partial(
                lmkern.functional.scaled_dot_product_attention,
                is_causal=True,
                causal_align="bottom_right",
            )
        self.qkv = layers.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = layers.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.n_head, width // self.n_head)
        q, k, v = (
            part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )  # [B, H, T, D]
        if cache is not None:
            k, v, _ = cache.append(layer, k, v)
        y = self.sdpa(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(batch, length, width)
        return self.out(y)


class MLP(nn.Module):
    """Two linear layers with a GELU between, 4 times as wide inside."""

    def __init__(self, config: GPTConfig, layers: Any) -> None:
        super().__init__()
        self.up = layers.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.out = layers.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = layers.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))


class _TorchAddNorm(nn.LayerNorm):
    """:class:`lmkern.nn.AddNorm` in torch's operations."""

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__(width, bias=bias)
        self.dropout = dropout

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = residual + F.dropout(input, self.dropout, self.training)
        return super().forward(x), x


def _add_norm(config: GPTConfig, layers: Any) -> Any:
    """What follows a sublayer: (output, x) -> norm(x + dropout(output)), x + dropout(output)."""
    cls = lmkern.nn.AddNorm if layers is lmkern.nn else _TorchAddNorm
    return cls(config.n_embd, bias=config.bias, dropout=config.dropout)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Each sum is made where its norm is, in one pass: what the mlp puts out is added by the next block.
    """

    def __init__(self, config: GPTConfig, layers: Any, first: bool) -> None:
        super().__init__()
        if first:
            self.attention_norm = layers.LayerNorm(config.n_embd, bias=config.bias)
        else:
            self.attention_norm = _add_norm(config, layers)
        self.attention = Attention(config, layers)
        self.mlp_norm = _add_norm(config, layers)
        self.mlp = MLP(config, layers)

    def forward(
        self, output: Tensor | None, x: Tensor, cache: KVCache | None, layer: int
    ) -> tuple[Tensor, Tensor]:
        """From (the output of the mlp below, or None; x before it) to the same of this block."""
        if output is None:
            normed = self.attention_norm(x)
        else:
            normed, x = self.attention_norm(output, x)
        normed, x = self.mlp_norm(self.attention(normed, cache, layer), x)
        return self.mlp(normed), x


class GPT(LanguageModel):
    """Token and position embedding -> blocks -> norm -> head tied to the token embedding.

    `backend="torch"` builds the same model on torch's embedding and attention: same parameter
    names, same values from the same seed, interchangeable state_dict.
    """

    model_type: ClassVar[str] = "gpt"
    config_class: ClassVar[type] = GPTConfig
    carries_state: ClassVar[bool] = False

    def __init__(self, config: GPTConfig, backend: Backend = "lmkern") -> None:
        super().__init__()
        check_backend(backend)
        layers: Any = lmkern.nn if backend == "lmkern" else nn
        self.config = config
        self.token_embedding = layers.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Parameter(torch.empty(config.block_size, config.n_embd))
        self.dropout = layers.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layers, i == 0) for i in range(config.n_layer))
        self.norm = _add_norm(config, layers)
        self.head = Head(config.n_embd, config.vocab_size, bias=False, backend=backend)
        self.head.weight = self.token_embedding.weight
        self._init_parameters()

    def _init_parameters(self) -> None:
        """N(0, 0.02); the 2 n_layer projections that add to the residual stream scaled down,
        so that its variance at the top does not grow with the depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                scale = math.sqrt(2 * self.config.n_layer) if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _embed(self, input_ids: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """dropout(token + position), the first position being `begin`; and the head's weight."""
        if type(self.token_embedding) is lmkern.nn.Embedding:
            table, head = self.head.tied_to(self.token_embedding.weight)
            x = lmkern.functional.token_position_embedding(
                input_ids,
                table,
                self.position_embedding,
                offset=begin,
                dropout_p=self.dropout.p,
                training=self.dropout.training,
                sparse=table is not self.token_embedding.weight,
            )
            return x, head
        positions = self.position_embedding[begin : begin + input_ids.shape[1]]
        return self.dropout(self.token_embedding(input_ids) + positions), self.head.weight

    @property
    def context_size(self) -> int:
        return self.config.block_size

    def init_state(self, batch_size: int) -> KVCache:
        """An empty key-value cache for `batch_size` sequences, where the weights are."""
        config = self.config
        weight = self.position_embedding
        return KVCache(
            config.n_layer,
            batch_size,
            config.n_head,
            config.block_size,
            config.n_embd // config.n_head,
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(
        self, input_ids: Tensor, state: KVCache | None = None, *, targets: Tensor | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """Logits of the next token at every position, or their loss.

        Args:
            input_ids: [B, T] int64.
            state: None (training: attend within `input_ids` only), or a cache from `init_state`,
                to which the new keys and values are appended in place (inference only).
            targets: [B, T] int64; -100 counts for nothing.

        Returns:
            logits [B, T, vocab_size], with `targets` the sum of their cross entropies; and `state`.

        Raises:
            ValueError, TypeError, IndexError: input_ids of wrong shape, dtype or range, or more
                tokens than block_size together with those in the cache.
        """
        check_input_ids(input_ids, self.config.vocab_size)
        batch, length = input_ids.shape
        begin = 0 if state is None else state.length
        if begin + length > self.config.block_size:
            raise ValueError(
                f"GPT: {begin} cached + {length} new tokens exceed "
                f"block_size = {self.config.block_size}"
            )
        if state is not None and state.batch_size != batch:
            raise ValueError(f"GPT: state holds {state.batch_size} sequences, input_ids {batch}")
        x, head_weight = self._embed(input_ids, begin)
        output = None
        for layer, block in enumerate(self.blocks):
            output, x = block(output, x, state, layer)
        return self.head(self.norm(output, x)[0], targets, head_weight), state
