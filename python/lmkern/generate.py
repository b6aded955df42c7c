"""Sampling from a language model, one token at a time, without recomputing the prefix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .models import LanguageModel


def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Tensor:
    """The prompt followed by `max_new_tokens` sampled tokens, [B, T + max_new_tokens] int64.

    Arguments, errors and behaviour as `stream`.
    """
    new = stream(
        model,
        input_ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return torch.cat([input_ids, *(tokens[:, None] for tokens in new)], dim=1)


def stream(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every sequence, [B] int64, `max_new_tokens` times.

    The model's state (recurrent state or key-value cache) carries the prefix. A GPT whose context
    is full starts a new cache from the last half of its window, so a token costs one pass over
    half a window at most every block_size / 2 tokens; a prompt longer than the context is cut to
    its last block_size tokens. Dropout is off while the model runs.

    Args:
        model: any model of `lmkern.models`.
        input_ids: [B, T] int64 prompts of equal length, T >= 1, on the model's device.
        max_new_tokens: number of tokens to sample, >= 0.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest most likely tokens that together have probability top_p.
        seed: makes the samples reproducible, apart from torch's global generator.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be >= 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be [B, T] with T >= 1, got {list(input_ids.shape)}")
    generator = None
    if seed is not None:
        generator = torch.Generator(input_ids.device)
        generator.manual_seed(seed)
    # The checks above run at the call, not at the first `next()`.
    return _stream(model, input_ids, max_new_tokens, temperature, top_k, top_p, generator)


def _stream(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    size = model.context_size
    recent = input_ids if size is None else input_ids[:, -size:]
    state = model.init_state(input_ids.shape[0])
    feed, filled = recent, recent.shape[1]
    for i in range(max_new_tokens):
        with _evaluating(model):
            logits, state = model(feed, state)
            tokens = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        yield tokens
        feed = tokens[:, None]
        if size is None or i + 1 == max_new_tokens:
            continue
        recent = torch.cat([recent, feed], dim=1)[:, -size:]
        if filled == size:
            feed = recent[:, -max(1, size // 2) :]
            state = model.init_state(input_ids.shape[0])
            filled = 0
        filled += feed.shape[1]


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of `logits` [B, V] float32, as [B] int64; arguments as in `stream`."""
    if temperature < 1e-30:  # below, dividing by it overflows: the limit is the same
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it have less than top_p: the first one always does.
        dropped = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(dropped, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode without gradients, and the model's mode as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
