"""Files that are either complete or absent.

Everything is written under a temporary name, fsynced and renamed, so that a crash, a SIGKILL
or a full disk at any moment leaves the old file (or none), never half of a new one. Tensors are
stored as safetensors and everything else as JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TEMPORARY_PREFIX = ".tmp-"


def fsync_path(path: Path) -> None:
    """Forces a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it is fsynced and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}"
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(
    path: Path, *, keep_if: Callable[[Path], bool] = lambda existing: False
) -> Iterator[Path]:
    """Yields a temporary directory beside `path`; on success it is fsynced and renamed to `path`.

    Where `path` exists by then, it is replaced, unless `keep_if(path)` holds, in which case the
    new one is dropped (for caches: the winner of a race has written the same contents).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent))
    try:
        yield temporary
        # mkdtemp's 0700 would lock colleagues out of a shared output directory.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for entry in temporary.rglob("*"):
            fsync_path(entry)
        fsync_path(temporary)
        if not keep_if(path):
            remove_directory(path)
        try:
            os.rename(temporary, path)
        except OSError as error:
            exists = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not (exists and keep_if(path)):
                raise
            shutil.rmtree(temporary)
        fsync_path(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_directory(path: Path) -> None:
    """Removes a directory so that a half-removed one is never taken for a whole one."""
    if not path.exists():
        return
    trash = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}removed-", dir=path.parent))
    os.rename(path, trash / path.name)
    shutil.rmtree(trash, ignore_errors=True)


def remove_stale(parent: Path, older_than: float = 0.0) -> None:
    """Removes temporary names that killed processes left in `parent`; `older_than` in seconds."""
    if not parent.is_dir():
        return
    for entry in parent.glob(f"{TEMPORARY_PREFIX}*"):
        try:
            if time.time() - entry.stat().st_mtime < older_than:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # another process is cleaning too


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors as one safetensors file, atomically.

    Raises:
        OSError: the disk is full or the directory is not writable (with `errno` set).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(contiguous, str(temporary), metadata={"format": "pt"})
        except SafetensorError as error:
            # safetensors wraps the system's error in text: "... (os error 28)".
            found = re.search(r"os error (\d+)", str(error))
            number = int(found.group(1)) if found else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file into CPU tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({one_line(error)})") from None


def one_line(error: BaseException | str) -> str:
    """An error's message with every run of white space made one space."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
