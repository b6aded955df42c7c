"""Layers with exactly torch's constructor arguments, ``state_dict`` and initialisation."""

from lmkern.nn.activation import GELU, GeGLU, SiLU, SwiGLU
from lmkern.nn.attention import MultiheadAttention
from lmkern.nn.dropout import Dropout
from lmkern.nn.embedding import Embedding
from lmkern.nn.kv_cache import KVCache
from lmkern.nn.position import (
    LearnedPosition,
    RotaryPosition,
    SinusoidalPosition,
    alibi_slopes,
)
from lmkern.nn.recurrent import GRU, LSTM, RNN
from lmkern.nn.recurrent_base import RNNBase
from lmkern.nn.recurrent_cell import GRUCell, LSTMCell, RNNCell, RNNCellBase
from lmkern.nn.stream import StreamState
from lmkern.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from lmkern.nn.transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "Dropout",
    "Embedding",
    "GRUCell",
    "GeGLU",
    "KVCache",
    "LSTMCell",
    "LearnedPosition",
    "MultiheadAttention",
    "RNNBase",
    "RNNCell",
    "RNNCellBase",
    "RotaryPosition",
    "SiLU",
    "SinusoidalPosition",
    "StreamState",
    "SwiGLU",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "alibi_slopes",
]
