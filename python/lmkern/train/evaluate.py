"""Deterministic evaluation: mean loss and perplexity over a token array."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.batches import evaluation_batches
from ..data.corpus import TokenData
from ..models import LanguageModel


@dataclass(frozen=True)
class Evaluation:
    """loss: mean cross entropy in nats per token; perplexity: its exponential; tokens: counted."""

    loss: float
    perplexity: float
    tokens: int


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


def detached(state: Any) -> Any:
    """A recurrent state without its graph; None stays None."""
    return None if state is None else tuple(tensor.detach() for tensor in state)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    sequence_length: int,
    batch_size: int,
    carries_state: bool,
    max_batches: int | None = None,
) -> Evaluation:
    """Mean loss over `tokens`, every one but the first predicted once (or `max_batches` batches).

    A model that carries state reads the text as `batch_size` long lanes, its state handed on; a
    model that does not sees windows of `sequence_length` tokens, each without what came before.

    Raises:
        ValueError: fewer than 2 tokens.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # Summed on the device: asking for each batch's value would wait for it.
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    state = None
    try:
        for batch in evaluation_batches(
            tokens, sequence_length, batch_size, carries_state, max_batches
        ):
            loss, new_state = model(
                batch.inputs.to(device),
                None if batch.reset else state,
                targets=batch.targets.to(device),
            )
            state = new_state if carries_state else None
            total += loss
            count += batch.num_tokens
    finally:
        model.train(was_training)
    mean = total.item() / count
    return Evaluation(mean, perplexity(mean), count)


def evaluate_parts(
    model: LanguageModel, data: TokenData, *, sequence_length: int, batch_size: int
) -> dict[str, Evaluation]:
    """Loss on the validation part and, where there is one, the test part.

    A model that carries state reads the test part as one stream, as the custom is.

    Raises:
        ValueError: the test part has fewer than 2 tokens.
    """
    how: dict[str, Any] = {
        "sequence_length": sequence_length,
        "carries_state": model.carries_state,
    }
    results = {"validation": evaluate(model, data.val, batch_size=batch_size, **how)}
    if data.test is not None:
        lanes = 1 if model.carries_state else batch_size
        try:
            results["test"] = evaluate(model, data.test, batch_size=lanes, **how)
        except ValueError as error:
            raise ValueError(f"{data.source}: the test part {error}") from None
    return results
