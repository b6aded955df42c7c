"""What all language models share: the call form, input checks, saving and loading."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..files import read_json, read_tensors, write_json, write_tensors

Backend = Literal["lmkern", "torch"]
Model = TypeVar("Model", bound="LanguageModel")

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_REGISTRY: dict[str, type[LanguageModel]] = {}


class LanguageModel(nn.Module):
    """Base of all models here: `model(input_ids [B,T], state=None) -> (logits [B,T,V], state)`.

    With `targets` [B,T] the first result is the sum of their cross entropies, float32, and the
    logits need not exist.

    A subclass states `model_type` (its name in config.json), `config_class` (a dataclass with a
    `vocab_size`), `carries_state` (whether training hands the state on from batch to batch),
    and takes `(config, backend="lmkern")` in its constructor. One with `has_penalty` is called with
    `return_penalty=True` in training, and returns a third result: what is added to the loss per
    token.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type]
    carries_state: ClassVar[bool]

    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _REGISTRY[cls.model_type] = cls

    @property
    def context_size(self) -> int | None:
        """The most tokens one state can hold, or None where there is no limit."""
        return None

    @property
    def has_penalty(self) -> bool:
        """Whether training adds something to the loss that depends on more than the logits."""
        return False

    @property
    def num_parameters(self) -> int:
        """Number of trained values, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def init_state(self, batch_size: int) -> Any:
        """An empty state for `batch_size` sequences, to be passed to `forward`."""
        raise NotImplementedError

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `model.safetensors` (tied weights once) and `config.json` to `directory`.

        Raises:
            OSError: the disk is full or `directory` is not writable.
        """
        directory = Path(directory)
        write_tensors(directory / WEIGHTS_FILE, dict(self.named_parameters()))
        config = {"model_type": self.model_type, **dataclasses.asdict(self.config)}
        write_json(directory / CONFIG_FILE, config)

    @classmethod
    def from_pretrained(
        cls: type[Model], directory: str | Path, backend: Backend = "lmkern"
    ) -> Model:
        """Loads what `save_pretrained` wrote; parameters arrive on the CPU.

        Raises:
            FileNotFoundError: `directory` lacks one of the two files.
            ValueError: a file is truncated, foreign or does not fit the other.
        """
        directory = Path(directory)
        config_path = directory / CONFIG_FILE
        fields = read_json(config_path)
        model_type = fields.pop("model_type", None)
        if model_type != cls.model_type:
            raise ValueError(
                f"{config_path}: model_type must be {cls.model_type!r} for {cls.__name__}, "
                f"got {model_type!r}"
            )
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        if set(fields) != known:
            raise ValueError(
                f"{config_path}: {cls.config_class.__name__} lacks {sorted(known - set(fields))} "
                f"and does not know {sorted(set(fields) - known)}"
            )
        try:
            config = cls.config_class(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path}: {error}") from None
        # The initial values are overwritten, so the caller's random stream stays untouched.
        with torch.random.fork_rng(devices=[]):
            model = cls(config, backend=backend)
        load_weights(model, directory / WEIGHTS_FILE)
        return model


def load_pretrained(directory: str | Path, backend: Backend = "lmkern") -> LanguageModel:
    """Loads a saved model of any family, chosen by the `model_type` in its config.json.

    Raises:
        FileNotFoundError, ValueError: as `LanguageModel.from_pretrained`.
    """
    path = Path(directory) / CONFIG_FILE
    model_type = read_json(path).get("model_type")
    if model_type not in _REGISTRY:
        raise ValueError(
            f"{path}: model_type must be one of {sorted(_REGISTRY)}, got {model_type!r}"
        )
    return _REGISTRY[model_type].from_pretrained(directory, backend=backend)


def load_weights(model: LanguageModel, path: Path) -> None:
    """Copies a safetensors file into the model's parameters, wherever those are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or names or shapes are not the model's.
    """
    weights = read_tensors(path)
    parameters = dict(model.named_parameters())
    missing = sorted(set(parameters) - set(weights))
    unknown = sorted(set(weights) - set(parameters))
    if missing or unknown:
        raise ValueError(
            f"{path}: not the weights of this {type(model).__name__}: "
            f"lacks {missing[:3]}, does not expect {unknown[:3]}"
        )
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} must have shape {list(parameter.shape)} according to "
                f"{CONFIG_FILE}, got {list(weights[name].shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` is one of the two."""
    if backend not in ("lmkern", "torch"):
        raise ValueError(f"backend must be 'lmkern' or 'torch', got {backend!r}")


def check_positive(owner: str, **values: int) -> None:
    """Raises ValueError naming the first of `values` that is not an int of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")


def check_dropout(owner: str, **rates: float) -> None:
    """Raises ValueError naming the first of `rates` that is not a probability below 1."""
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{owner}: {name} must be in [0, 1), got {rate!r}")


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Checks [B,T], integer dtype and, on the CPU, the range of the ids.

    On a GPU the range is left to the embedding kernel: looking would wait for the device.

    Raises:
        ValueError: wrong number of dimensions, or T = 0.
        TypeError: not int32 or int64.
        IndexError: an id outside [0, vocab_size).
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [B, T] with T >= 1, got {list(input_ids.shape)}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= vocab_size:
        raise IndexError(
            f"token id {low if low < 0 else high} is out of range: "
            f"vocab_size is {vocab_size}, so ids must be in [0, {vocab_size - 1}]"
        )
