"""Whole training steps of language models: forward, loss, backward, gradient clipping and AdamW.

ours: the model of this package with its default backend; peers: the same model on torch's layers, as it
comes and compiled (without the time of the compilation).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import Case
from lmkern.models import GPT, GPTConfig, LanguageModel, RecurrentLM, RecurrentLMConfig

# name: configuration, B, T
MODELS: dict[str, tuple[Any, int, int]] = {
    "nanoGPT CPU": (GPTConfig(65, 64, 4, 4, 128), 12, 64),
    "GPT 6x384 V=50257": (GPTConfig(50257, 256, 6, 6, 384), 4, 256),
    "Zaremba small": (
        RecurrentLMConfig(10000, embedding_dim=200, hidden_size=200, num_layers=2), 20, 20,
    ),
    "Zaremba medium": (
        RecurrentLMConfig(10000, embedding_dim=650, hidden_size=650, num_layers=2, dropout=0.5),
        20, 35,
    ),
}  # fmt: skip


class Step:
    """One model and its optimizer; each call is one update."""

    def __init__(self, name: str, backend: Any, compiled: bool = False) -> None:
        config, batch, length = MODELS[name]
        family = GPT if isinstance(config, GPTConfig) else RecurrentLM
        torch.manual_seed(0)
        self.model: LanguageModel = family(config, backend)
        self.call = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        self.ids, self.targets = torch.randint(
            config.vocab_size, (2, batch, length), generator=generator
        )

    def __call__(self) -> torch.Tensor:
        loss, _ = self.call(self.ids, targets=self.targets)
        loss = loss / self.targets.numel()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


@pytest.mark.parametrize("name", MODELS)
def test_training_step(compare, threads, name):
    config, batch, length = MODELS[name]
    ours, theirs = Step(name, "lmkern"), Step(name, "torch")
    peers = {"torch": theirs, "compile": Step(name, "torch", compiled=True)}

    def check():
        if getattr(config, "dropout", 0.0) == 0.0:  # the same curve, from the same seed
            for _ in range(3):
                torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)

    head = config.vocab_size * getattr(config, "n_embd", getattr(config, "hidden_size", 0))
    body = sum(p.numel() for n, p in ours.model.named_parameters() if "embedding" not in n)
    body -= 0 if isinstance(config, GPTConfig) else head
    compare(
        Case(
            f"training step {name}",
            ours=ours,
            peers=peers,
            check=check,
            flops=6.0 * batch * length * (body + head),
            topic="training step",
        )
    )
