"""torch's Transformer trained beside ours on Multi30k, German to English, for one epoch."""

from __future__ import annotations

import gzip
import math
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmkern.nn

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        "LMKERN_DATA" not in os.environ,
        reason="set LMKERN_DATA to a directory with m30k.train.de.gz and m30k.train.en.gz",
    ),
]

PAD, START, END, UNKNOWN = range(4)
WORDS, WIDTH, BATCH = 3000, 128, 64


def sentences(language: str) -> list[list[int]]:
    """Multi30k's training set as numbers of the most frequent words, START first and END last."""
    path = Path(os.environ["LMKERN_DATA"]) / f"m30k.train.{language}.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [re.findall(r"\w+|[^\w\s]", line.lower()) for line in file]
    counts = Counter(word for line in lines for word in line)
    number = {word: i + 4 for i, (word, _) in enumerate(counts.most_common(WORDS - 4))}
    return [[START, *(number.get(word, UNKNOWN) for word in line), END] for line in lines]


def batches() -> list[tuple[Tensor, Tensor]]:
    """(German [S, B], English [L, B]), padded, of similar lengths, in a fixed random order."""
    pairs = sorted(
        zip(sentences("de"), sentences("en"), strict=True), key=lambda p: (len(p[0]), len(p[1]))
    )

    def padded(rows: tuple[list[int], ...]) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], False, PAD)

    groups = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    return [tuple(map(padded, zip(*groups[i], strict=True))) for i in order]


class Translator(nn.Module):
    """Embeddings, ``library``'s Transformer, and a head tied to the English embedding."""

    def __init__(self, library) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.position = lmkern.nn.SinusoidalPosition(WIDTH)
        # Not batch_first: torch's attention gives a transposed view then, and dropout draws its numbers
        # in the order of the memory.
        self.transformer = library.Transformer(WIDTH, 4, 2, 2, 256, dropout=0.1, norm_first=True)
        for module in self.modules():
            # Elsewhere both drop the same values from the same seed; inside of attention a kernel
            # has numbers of its own.
            if isinstance(module, (nn.MultiheadAttention, lmkern.nn.MultiheadAttention)):
                module.dropout = 0.0
        for embedding in (self.source, self.target):
            nn.init.normal_(embedding.weight, std=WIDTH**-0.5)

    def forward(self, german: Tensor, english: Tensor) -> Tensor:
        hidden = (german == PAD).t()
        size = english.shape[0]
        out = self.transformer(
            self.position(self.source(german) * math.sqrt(WIDTH)),
            self.position(self.target(english) * math.sqrt(WIDTH)),
            tgt_mask=torch.ones(size, size, dtype=torch.bool).triu(1),
            src_key_padding_mask=hidden,
            tgt_key_padding_mask=(english == PAD).t(),
            memory_key_padding_mask=hidden,
        )
        return F.linear(out, self.target.weight)


def train(library, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The loss of every step."""
    torch.manual_seed(1)
    model = Translator(library)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    losses = []
    for german, english in data:
        logits = model(german, english[:-1])
        loss = F.cross_entropy(logits.flatten(0, 1), english[1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_the_curves_agree():
    data = batches()
    assert len(data) == 454
    theirs, ours = train(nn, data), train(lmkern.nn, data)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
    # Every step, and the mean of every tenth of the epoch: rounding grows with the steps.
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.0)
    tenths = [x[:450].view(10, 45).mean(1) for x in (ours, theirs)]
    torch.testing.assert_close(*tenths, rtol=0.01, atol=0.0)
    assert tenths[0][-1] < 0.6 * tenths[0][0], tenths[0]
