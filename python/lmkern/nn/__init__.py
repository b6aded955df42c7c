"""Layers with exactly torch's constructor arguments, ``state_dict`` and initialisation."""

from lmkern.nn.activation import GELU, GeGLU, SiLU, SwiGLU
from lmkern.nn.adaptive_softmax import AdaptiveLogSoftmaxWithLoss
from lmkern.nn.attention import MultiheadAttention
from lmkern.nn.dropout import Dropout
from lmkern.nn.embedding import Embedding
from lmkern.nn.embedding_bag import EmbeddingBag
from lmkern.nn.kv_cache import KVCache
from lmkern.nn.linear import Linear
from lmkern.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from lmkern.nn.norm import AddNorm, LayerNorm, RMSNorm
from lmkern.nn.position import (
    LearnedPosition,
    RotaryPosition,
    SinusoidalPosition,
    alibi_slopes,
)
from lmkern.nn.quantized_embedding import QuantizedEmbedding, quantize_embedding
from lmkern.nn.recurrent import GRU, LSTM, RNN
from lmkern.nn.recurrent_base import RNNBase
from lmkern.nn.recurrent_cell import GRUCell, LSTMCell, RNNCell, RNNCellBase
from lmkern.nn.stream import StreamState
from lmkern.nn.token_position import TokenPositionEmbedding
from lmkern.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from lmkern.nn.transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveLogSoftmaxWithLoss",
    "AddNorm",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "EmbeddingBag",
    "GRUCell",
    "GeGLU",
    "KVCache",
    "LSTMCell",
    "LayerNorm",
    "LearnedPosition",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "QuantizedEmbedding",
    "RMSNorm",
    "RNNBase",
    "RNNCell",
    "RNNCellBase",
    "RotaryPosition",
    "SiLU",
    "SinusoidalPosition",
    "StreamState",
    "SwiGLU",
    "TokenPositionEmbedding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "alibi_slopes",
    "quantize_embedding",
]
