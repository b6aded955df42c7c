"""A recurrent language model: embedding, LSTM layers, linear head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .pretrained import (
    Backend,
    LanguageModel,
    check_backend,
    check_dropout,
    check_input_ids,
    check_positive,
)

LSTMState = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RecurrentLMConfig:
    """Size of a recurrent language model.

    Args:
        vocab_size: number of different tokens.
        embedding_dim: width of a token's vector.
        hidden_size: width of the LSTM.
        num_layers: LSTM layers on top of each other.
        dropout: probability of dropping a value after the embedding, between the layers and
            before the head.
        tie_weights: use the embedding as the head's weight; needs embedding_dim == hidden_size.
    """

    vocab_size: int = 256
    embedding_dim: int = 128
    hidden_size: int = 192
    num_layers: int = 2
    dropout: float = 0.0
    tie_weights: bool = False

    def __post_init__(self) -> None:
        owner = "RecurrentLMConfig"
        check_positive(
            owner,
            vocab_size=self.vocab_size,
            embedding_dim=self.embedding_dim,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
        )
        check_dropout(owner, self.dropout)
        if self.tie_weights and self.embedding_dim != self.hidden_size:
            raise ValueError(
                f"{owner}: tie_weights needs embedding_dim == hidden_size, "
                f"got {self.embedding_dim} and {self.hidden_size}"
            )


class RecurrentLM(LanguageModel):
    """Embedding -> dropout -> LSTM -> dropout -> linear head.

    `backend="torch"` builds the same model on `torch.nn.Embedding` and `torch.nn.LSTM`: same
    parameter names, same values from the same seed, interchangeable state_dict.
    """

    model_type: ClassVar[str] = "recurrent_lm"
    config_class: ClassVar[type] = RecurrentLMConfig
    carries_state: ClassVar[bool] = True

    def __init__(self, config: RecurrentLMConfig, backend: Backend = "lmkern") -> None:
        super().__init__()
        check_backend(backend)
        layers: Any = nn
        if backend == "lmkern":
            import lmkern.nn

            layers = lmkern.nn
        self.config = config
        self.embedding = layers.Embedding(config.vocab_size, config.embedding_dim)
        self.dropout = nn.Dropout(config.dropout)
        # torch warns about dropout in a single layer, where there is nothing between.
        between_layers = config.dropout if config.num_layers > 1 else 0.0
        self.lstm = layers.LSTM(
            config.embedding_dim,
            config.hidden_size,
            num_layers=config.num_layers,
            dropout=between_layers,
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        if config.tie_weights:
            # As an embedding, torch's N(0, 1) learns fastest; as a head, it starts far too large.
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
            self.head.weight = self.embedding.weight

    def init_state(self, batch_size: int) -> LSTMState:
        """Zero (h, c), each [num_layers, B, hidden_size], where the weights are."""
        weight = self.embedding.weight
        shape = (self.config.num_layers, batch_size, self.config.hidden_size)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def forward(
        self, input_ids: Tensor, state: LSTMState | None = None
    ) -> tuple[Tensor, LSTMState]:
        """Logits of the next token at every position.

        Args:
            input_ids: [B, T] int64.
            state: (h, c), each [num_layers, B, hidden_size], from the tokens before; None: zeros.

        Returns:
            logits [B, T, vocab_size] and the state after the last token, still attached to the
            graph (detach it for truncated back-propagation).

        Raises:
            ValueError, TypeError, IndexError: input_ids of wrong shape, dtype or range.
        """
        check_input_ids(input_ids, self.config.vocab_size)
        # Time-major from here on: transposing the ids costs nothing, transposing vectors would.
        x = self.dropout(self.embedding(input_ids.t()))  # [T, B, E]
        x, state = self.lstm(x, state)  # [T, B, H]
        return self.head(self.dropout(x.transpose(0, 1))), state
