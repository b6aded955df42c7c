"""A recurrent language model: embedding, recurrent layers, linear head; with AWD-LSTM's options.

Source: Zaremba et al. 2014 (dropout between layers); Merity et al. 2018 (AWD-LSTM: variational
dropout, embedding dropout, weight drop, tied weights, activation regularisation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

import lmkern.functional
import lmkern.nn

from .head import Head
from .pretrained import (
    Backend,
    LanguageModel,
    check_backend,
    check_dropout,
    check_input_ids,
    check_positive,
)
from .recurrent_layer import GATES, Cell, RecurrentLayer, State


@dataclass(frozen=True)
class RecurrentLMConfig:
    """Size and regularisation of a recurrent language model.

    Args:
        vocab_size: number of different tokens.
        cell: lstm, gru or rnn (tanh).
        embedding_dim: width of a token's vector.
        hidden_size: width of the recurrent layers.
        num_layers: recurrent layers on top of each other.
        tie_weights: use the embedding as the head's weight; the last layer is then embedding_dim
            wide, as the head reads it.
        dropout: probability of dropping a value after the embedding, between the layers and
            before the head, where no option of its own says otherwise.
        dropout_input: the same after the embedding only (AWD-LSTM: dropouti).
        dropout_hidden: the same between the layers only (dropouth).
        dropout_output: the same before the head only (dropout).
        variational: these dropouts keep one mask for all steps of a sequence ("locked").
        dropout_embedding: probability of dropping a token's whole vector, at all its places in the
            batch (dropoute).
        weight_drop: probability of dropping an entry of the hidden-to-hidden weights, drawn once
            per batch (wdrop).
        recurrent_dropout: probability of dropping a value of the hidden state where it enters the
            hidden-to-hidden weights, one mask for all steps of a sequence.
        activation_reg: adds this times the mean square of the last layer's output, after dropout,
            to the loss (AR, alpha).
        temporal_reg: adds this times the mean square of that output's change from step to step,
            before dropout, to the loss (TAR, beta).
        init_range: draw all parameters from U(-init_range, init_range); by default as torch's
            layers do.
    """

    vocab_size: int = 256
    cell: Cell = "lstm"
    embedding_dim: int = 128
    hidden_size: int = 192
    num_layers: int = 2
    tie_weights: bool = False
    dropout: float = 0.0
    dropout_input: float | None = None
    dropout_hidden: float | None = None
    dropout_output: float | None = None
    variational: bool = False
    dropout_embedding: float = 0.0
    weight_drop: float = 0.0
    recurrent_dropout: float = 0.0
    activation_reg: float = 0.0
    temporal_reg: float = 0.0
    init_range: float | None = None

    def __post_init__(self) -> None:
        owner = "RecurrentLMConfig"
        if self.cell not in GATES:
            raise ValueError(f"{owner}: cell must be one of {', '.join(GATES)}, got {self.cell!r}")
        check_positive(
            owner,
            vocab_size=self.vocab_size,
            embedding_dim=self.embedding_dim,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
        )
        for name in ("dropout", "dropout_embedding", "weight_drop", "recurrent_dropout"):
            check_dropout(owner, **{name: getattr(self, name)})
        for place in ("input", "hidden", "output"):
            check_dropout(owner, **{f"dropout_{place}": self.rate(place)})
        for name in ("activation_reg", "temporal_reg"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{owner}: {name} must be >= 0, got {getattr(self, name)!r}")
        if self.init_range is not None and not 0.0 < self.init_range < math.inf:
            raise ValueError(f"{owner}: init_range must be > 0, got {self.init_range!r}")
        if self.tie_weights and self.num_layers == 1 and self.embedding_dim != self.hidden_size:
            raise ValueError(
                f"{owner}: tie_weights with one layer needs embedding_dim == hidden_size, "
                f"got {self.embedding_dim} and {self.hidden_size}"
            )

    @property
    def layer_sizes(self) -> list[int]:
        """The width of each layer."""
        last = self.embedding_dim if self.tie_weights else self.hidden_size
        return [self.hidden_size] * (self.num_layers - 1) + [last]

    def rate(self, place: str) -> float:
        """The dropout of a place: input, hidden or output."""
        own: float | None = getattr(self, f"dropout_{place}")
        return self.dropout if own is None else own


class RecurrentLM(LanguageModel):
    """Embedding -> dropout -> recurrent layers, dropout between -> dropout -> linear head.

    `backend="torch"` builds the same model on torch's operators: same parameter names, same values
    and, in training, same dropout masks from the same seed, interchangeable state_dict.
    """

    model_type: ClassVar[str] = "recurrent_lm"
    config_class: ClassVar[type] = RecurrentLMConfig
    carries_state: ClassVar[bool] = True

    def __init__(self, config: RecurrentLMConfig, backend: Backend = "lmkern") -> None:
        super().__init__()
        check_backend(backend)
        embedding: Any = lmkern.nn.Embedding if backend == "lmkern" else nn.Embedding
        self.config = config
        self.embedding = embedding(config.vocab_size, config.embedding_dim)
        below = [config.embedding_dim, *config.layer_sizes]
        self.layers = nn.ModuleList(
            RecurrentLayer(
                config.cell, inputs, size, config.weight_drop, config.recurrent_dropout, backend
            )
            for inputs, size in zip(below, config.layer_sizes, strict=False)
        )
        self.head = Head(below[-1], config.vocab_size, backend=backend)
        if config.tie_weights:
            # As an embedding, torch's N(0, 1) learns fastest; as a head, it starts far too large.
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
            self.head.weight = self.embedding.weight
        if config.init_range is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -config.init_range, config.init_range)

    @property
    def has_penalty(self) -> bool:
        return self.config.activation_reg > 0.0 or self.config.temporal_reg > 0.0

    def init_state(self, batch_size: int) -> State:
        """Zeros, where the weights are: for each layer h, and c for an LSTM, [B, its width]."""
        weight = self.embedding.weight
        parts = 2 if self.config.cell == "lstm" else 1
        sizes = [size for size in self.config.layer_sizes for _ in range(parts)]
        return tuple(weight.new_zeros(batch_size, size) for size in sizes)

    def forward(
        self,
        input_ids: Tensor,
        state: State | None = None,
        *,
        targets: Tensor | None = None,
        return_penalty: bool = False,
    ) -> Any:
        """Logits of the next token at every position, or their loss.

        Args:
            input_ids: [B, T] int64.
            state: from the tokens before, laid out as `init_state` does; None: zeros.
            targets: [B, T] int64; -100 counts for nothing.
            return_penalty: also return what activation_reg and temporal_reg add to the loss.

        Returns:
            logits [B, T, vocab_size], with `targets` the sum of their cross entropies; the state
            after the last token, still attached to the graph (detach it for truncated
            back-propagation); with `return_penalty` a scalar too.

        Raises:
            ValueError, TypeError, IndexError: input_ids of wrong shape, dtype or range, or a state
                of another model.
        """
        check_input_ids(input_ids, self.config.vocab_size)
        parts = 2 if self.config.cell == "lstm" else 1
        if state is not None and len(state) != parts * len(self.layers):
            raise ValueError(
                f"RecurrentLM: state must have {parts * len(self.layers)} tensors, got {len(state)}"
            )
        # Time-major from here on: transposing the ids costs nothing, transposing vectors would.
        table, head_weight = self.head.tied_to(self.embedding.weight)
        x = self._drop(self._embed(input_ids.t(), table), "input")  # [T, B, E]
        states: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if i > 0:
                x = self._drop(x, "hidden")
            x, last = layer(x, None if state is None else state[parts * i : parts * (i + 1)])
            states += last
        dropped = self._drop(x, "output")  # [T, B, H]
        result = self.head(dropped.transpose(0, 1), targets, head_weight)
        if return_penalty:
            return result, tuple(states), self._penalty(x, dropped)
        return result, tuple(states)

    def _embed(self, ids: Tensor, table: Tensor) -> Tensor:
        if table is self.embedding.weight:
            x = self.embedding(ids)
        else:  # tied: only the rows that are looked up have a gradient here
            x = lmkern.functional.embedding(ids, table, sparse=True)
        if self.training and self.config.dropout_embedding > 0.0:
            kept = x.new_ones(self.config.vocab_size, 1)
            x = x * F.dropout(kept, self.config.dropout_embedding)[ids]
        return x

    def _drop(self, x: Tensor, place: str) -> Tensor:
        """Dropout of x [T, B, C]: of single values, or of one mask [B, C] for all steps."""
        rate = self.config.rate(place)
        if not self.config.variational or not self.training or rate == 0.0:
            return F.dropout(x, rate, self.training)
        return x * F.dropout(x.new_ones(x.shape[1:]), rate)

    def _penalty(self, output: Tensor, dropped: Tensor) -> Tensor:
        config = self.config
        penalty = config.activation_reg * dropped.float().square().mean()
        if config.temporal_reg > 0.0 and len(output) > 1:
            change = (output[1:] - output[:-1]).float()
            penalty = penalty + config.temporal_reg * change.square().mean()
        return penalty
