"""A text as memory-mapped tokens, cached by content and tokenizer settings.

Cache layout: `<cache_dir>/<key>/{tokenizer.json, train.npy, val.npy, meta.json}`, and test.npy for
a text in three files, where `key` is a hash of the text's bytes and of every setting that changes
the tokens. A directory appears by
one rename, so concurrent runs may build the same entry; meta.json holds each file's SHA-256, and
an entry that does not match is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_directory, read_json, remove_stale, write_json
from .tokenizer import Kind, Tokenizer

# Part of every cache key: raise it when the meaning of a cached file changes.
_FORMAT = 1
_FILES = ("tokenizer.json", "train.npy", "val.npy")
# A text in separate files, under the names of the Penn Treebank's and WikiText's.
_PARTS = {"train": "train.txt", "val": "valid.txt", "test": "test.txt"}
_DAY = 24 * 3600.0


@dataclass(frozen=True)
class DataConfig:
    """Which text to train on, and how to cut it into tokens.

    Args:
        path: a UTF-8 text file; or a directory with train.txt, valid.txt and (if it is to be
            tested) test.txt; empty for the built-in text, the language reference of Python
            (pydoc_data.topics, 0.46 million characters).
        tokenizer: char: one token per character; bpe: byte-level BPE trained on the training text;
            word: one token per word of the training text, <eos> for a line break, <unk> for others.
        vocab_size: number of BPE tokens, at least 256; characters and words are counted instead.
        val_fraction: this much of a single text, at its end, is for validation.
        cache_dir: where tokens are kept; empty for $LMKERN_CACHE, or else ~/.cache/lmkern.
    """

    path: str = ""
    tokenizer: Kind = "char"
    vocab_size: int = 512
    val_fraction: float = 0.1
    cache_dir: str = ""

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(
                f"DataConfig: val_fraction must be between 0 and 1, got {self.val_fraction!r}"
            )
        if self.tokenizer == "bpe" and self.vocab_size < 256:
            raise ValueError(
                f"DataConfig: vocab_size must be at least 256 for bpe, got {self.vocab_size}"
            )


@dataclass(frozen=True)
class TokenData:
    """A tokenized corpus.

    train, val: token ids [N] uint16 or uint32, memory-mapped; source: where the text came from,
    for messages; key: equal keys mean equal tokens ("" if unknown); test: where there is a part
    that training never looks at.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer | None = None
    source: str = "data"
    key: str = ""
    test: np.ndarray | None = None


def load_data(config: DataConfig) -> TokenData:
    """Tokens of the configured text, from the cache where it is whole, built otherwise.

    Raises:
        FileNotFoundError, ValueError: the text is missing, empty, not UTF-8 or too short.
        OSError: the cache cannot be written.
    """
    source = config.path or "the built-in text"
    settings: dict[str, Any] = asdict(config)
    del settings["path"], settings["cache_dir"]
    if config.tokenizer != "bpe":
        del settings["vocab_size"]
    in_parts = bool(config.path) and Path(config.path).is_dir()
    if in_parts:
        del settings["val_fraction"]
    digest = hashlib.sha256(json.dumps([_FORMAT, settings], sort_keys=True).encode())
    parts: dict[str, str] | None = None
    if in_parts:
        for part, path in _part_files(Path(config.path)).items():
            digest.update(part.encode() + _file_digest(path))
    elif config.path:
        digest.update(_file_digest(_checked(Path(config.path))))
    else:
        parts = read_parts(config)
        digest.update("".join(parts.values()).encode())
    key = digest.hexdigest()[:32]
    directory = cache_directory(config) / key
    if not _is_whole(directory):
        if parts is None:
            parts = read_parts(config)
        remove_stale(directory.parent, older_than=_DAY)
        _build(directory, parts, config, source)
    test = directory / "test.npy"
    return TokenData(
        train=np.load(directory / "train.npy", mmap_mode="r"),
        val=np.load(directory / "val.npy", mmap_mode="r"),
        tokenizer=Tokenizer.load(directory / "tokenizer.json"),
        source=source,
        key=key,
        test=np.load(test, mmap_mode="r") if test.exists() else None,
    )


def read_parts(config: DataConfig) -> dict[str, str]:
    """The configured text as "train", "val" and, where it has one, "test".

    Raises:
        FileNotFoundError, ValueError: as `read_text`.
    """
    if config.path and Path(config.path).is_dir():
        return {part: read_text(path) for part, path in _part_files(Path(config.path)).items()}
    text = read_text(config.path) if config.path else builtin_text()
    train, val = split_text(text, config.val_fraction)
    return {"train": train, "val": val}


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, a directory or not UTF-8 (with the offset of the bad byte).
    """
    path = _checked(Path(path))
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: not UTF-8: byte 0x{byte:02x} at offset {error.start}") from None


def builtin_text() -> str:
    """The embedded corpus: Python's language reference as plain text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cache_directory(config: DataConfig) -> Path:
    """Where tokenized texts are kept."""
    chosen = config.cache_dir or os.environ.get("LMKERN_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lmkern"


def split_text(text: str, val_fraction: float) -> tuple[str, str]:
    """The first part for training, the last `val_fraction` for validation (as nanoGPT does)."""
    boundary = int(len(text) * (1.0 - val_fraction))
    return text[:boundary], text[boundary:]


def _part_files(directory: Path) -> dict[str, Path]:
    files = {part: directory / name for part, name in _PARTS.items()}
    if not files["test"].exists():
        del files["test"]
    return {part: _checked(path) for part, path in files.items()}


def _checked(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, expected a text file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    return path


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _build(directory: Path, parts: dict[str, str], config: DataConfig, source: str) -> None:
    if not parts["train"] or not parts["val"]:
        raise ValueError(
            f"{source}: too short to split, it has {len(''.join(parts.values()))} characters"
        )
    # Characters are taken from the whole text, as nanoGPT does, or validation could not be
    # encoded; BPE merges and words are learned from the training part only.
    fitted_on = "".join(parts.values()) if config.tokenizer == "char" else parts["train"]
    tokenizer = Tokenizer.train(fitted_on, config.tokenizer, config.vocab_size)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    files = [*_FILES, *(["test.npy"] if "test" in parts else [])]
    with atomic_directory(directory, keep_if=_is_whole) as temporary:
        for part, text in parts.items():
            np.save(temporary / f"{part}.npy", tokenizer.encode(text).astype(dtype))
        tokenizer.save(temporary / "tokenizer.json")
        sums = {name: _file_digest(temporary / name).hex() for name in files}
        write_json(temporary / "meta.json", {"source": source, "sha256": sums})


def _is_whole(directory: Path) -> bool:
    try:
        sums = read_json(directory / "meta.json")["sha256"]
        return set(sums) in (set(_FILES), {*_FILES, "test.npy"}) and all(
            _file_digest(directory / name).hex() == sums[name] for name in _FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
