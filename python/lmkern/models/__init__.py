"""Complete language models: one readable file per family.

Common call form: `model(input_ids [B,T] int64, state=None) -> (logits [B,T,V], state)`;
with `targets` [B,T] -> (summed loss, state).
"""

from .gpt import GPT, GPTConfig, KVCache
from .pretrained import LanguageModel, load_pretrained
from .recurrent_lm import RecurrentLM, RecurrentLMConfig

__all__ = [
    "GPT",
    "GPTConfig",
    "KVCache",
    "LanguageModel",
    "RecurrentLM",
    "RecurrentLMConfig",
    "load_pretrained",
]
