"""Character, byte-level BPE and word tokenizers, stored as a Hugging Face tokenizer.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ..files import atomic_file, one_line

Kind = Literal["char", "bpe", "word"]

# The words of the Penn Treebank's language modelling files (Mikolov et al. 2010).
EOS = "<eos>"
UNKNOWN = "<unk>"

# Enough for a chunk's offsets and strings (about 100 bytes a token inside `tokenizers`) to stay
# far below the size of a model.
_CHUNK = 1 << 20


class Tokenizer:
    """Text to token ids and back.

    Character level: every character of the training text is one token, in code point order; a
    character unseen there is an error. Byte-level BPE: any text can be encoded. Neither loses
    anything. Word level: what stands between white space is one token, most frequent first; a line
    break is <eos>, a word unseen in the training text <unk>.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.kind: Kind = "bpe"
        if isinstance(inner.pre_tokenizer, pre_tokenizers.WhitespaceSplit):
            self.kind = "word"
            self._words: dict[str, int] = inner.get_vocab()
        elif isinstance(inner.model, models.WordLevel):
            self.kind = "char"
            vocabulary = inner.get_vocab()
            characters = sorted(vocabulary)
            self._code_points = _code_points("".join(characters))
            self._ids = np.array([vocabulary[c] for c in characters], dtype=np.uint32)

    @classmethod
    def train(cls, text: str, kind: Kind = "char", vocab_size: int = 512) -> Tokenizer:
        """Builds a tokenizer from `text`; `vocab_size` (at least 256) is for BPE only."""
        if kind == "char":
            vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
            inner = tokenizers.Tokenizer(models.WordLevel(vocabulary))
            # An empty pattern matches between any two characters.
            inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
            inner.decoder = decoders.Fuse()
            return cls(inner)
        if kind == "word":
            counts = Counter(_words(text))
            ordered = sorted(counts.keys() | {EOS, UNKNOWN}, key=lambda word: (-counts[word], word))
            vocabulary = {word: i for i, word in enumerate(ordered)}
            inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
            inner.normalizer = normalizers.Replace("\n", f" {EOS} ")
            inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            return cls(inner)
        if kind != "bpe":
            raise ValueError(f"tokenizer must be 'char', 'bpe' or 'word', got {kind!r}")
        if vocab_size < 256:
            raise ValueError(
                f"vocab_size of a byte-level BPE must be at least 256, got {vocab_size}"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(_chunks(text), trainer)
        return cls(inner)

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size())

    def encode(self, text: str) -> np.ndarray:
        """Token ids [N] uint32 of `text`.

        Raises:
            ValueError: character level, and `text` has a character that training did not see.
        """
        if self.kind == "bpe":
            parts = [self.inner.encode(chunk).ids for chunk in _chunks(text)]
            return np.array([token for part in parts for token in part], dtype=np.uint32)
        if self.kind == "word":
            unknown = self._words[UNKNOWN]
            ids = [self._words.get(word, unknown) for word in _words(text)]
            return np.array(ids, dtype=np.uint32)
        # Same ids as `inner.encode`, a hundred times faster, and it knows where it failed.
        points = _code_points(text)
        found = np.searchsorted(self._code_points, points)
        found[found == len(self._code_points)] = 0
        unseen = np.flatnonzero(self._code_points[found] != points)
        if len(unseen):
            position = int(unseen[0])
            raise ValueError(
                f"character {text[position]!r} (U+{ord(text[position]):04X}) at position "
                f"{position} is not among the tokenizer's {self.vocab_size} characters"
            )
        return self._ids[found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; incomplete UTF-8 (byte-level BPE) becomes U+FFFD.

        Word level: a space after every word, and a line break for <eos>.
        """
        if self.kind == "word":
            words = (self.inner.id_to_token(int(i)) for i in ids)
            return "".join("\n" if word == EOS else f"{word} " for word in words)
        return str(self.inner.decode([int(i) for i in ids], skip_special_tokens=False))

    def stream_decode(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields text as ids arrive, holding back the bytes of an unfinished character."""
        pending: list[int] = []
        sent = text = ""
        for token in ids:
            pending.append(int(token))
            text = self.decode(pending)
            # U+FFFD at the end may still become a character; before the end it is final.
            certain = text.rstrip("\ufffd")
            if len(certain) > len(sent):
                yield certain[len(sent) :]
                sent = certain
            if certain == text:
                pending.clear()
                sent = text = ""
        if len(text) > len(sent):
            yield text[len(sent) :]

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, atomically."""
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(self.inner.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a tokenizer.json.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json ({one_line(error)})") from None


def _words(text: str) -> list[str]:
    return text.replace("\n", f" {EOS} ").split()


def _code_points(text: str) -> np.ndarray:
    # "surrogatepass": a lone surrogate from a command line is an unseen character, not a crash.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


_BOUNDARY = re.compile(r"(?<=\S)(?=\s)")


def _chunks(text: str) -> Iterator[str]:
    """Pieces of about 1 MiB that a byte-level BPE encodes to the same tokens as the whole.

    Its pre-tokenizer never joins a non-space with the white space after it, so a cut in front
    of a run of white space changes nothing.
    """
    begin = 0
    while begin < len(text):
        boundary = _BOUNDARY.search(text, begin + _CHUNK)
        end = boundary.start() if boundary else len(text)
        yield text[begin:end]
        begin = end
