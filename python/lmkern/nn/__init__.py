"""Layers with exactly torch's constructor arguments, ``state_dict`` and initialisation."""

from lmkern.nn.embedding import Embedding
from lmkern.nn.recurrent import GRU, LSTM, RNN
from lmkern.nn.recurrent_base import RNNBase
from lmkern.nn.recurrent_cell import GRUCell, LSTMCell, RNNCell, RNNCellBase
from lmkern.nn.stream import StreamState

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Embedding",
    "GRUCell",
    "LSTMCell",
    "RNNBase",
    "RNNCell",
    "RNNCellBase",
    "StreamState",
]
