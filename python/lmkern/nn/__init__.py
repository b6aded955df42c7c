"""Layers with exactly torch's constructor arguments, ``state_dict`` and initialisation."""

from lmkern.nn.embedding import Embedding
from lmkern.nn.recurrent import LSTM

__all__ = ["LSTM", "Embedding"]
