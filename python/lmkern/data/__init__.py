"""From a text file to batches: tokenizers, the memory-mapped token cache, batch order."""

from .batches import IGNORE, Batch, RandomWindows, Streams, evaluation_batches
from .corpus import DataConfig, TokenData, load_data, read_parts, read_text
from .tokenizer import Tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "DataConfig",
    "RandomWindows",
    "Streams",
    "TokenData",
    "Tokenizer",
    "evaluation_batches",
    "load_data",
    "read_parts",
    "read_text",
]
