"""What :mod:`lmkern.convert` knows of each kind of layer, and whether a given one can be swapped."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lmkern import nn
from lmkern.ops.library import KERNEL_DTYPES, missing_kernel

# An attribute: "" for a plain one, or "_parameters" or "_buffers"; its name.
Place = tuple[str, str]


class _Placeholder(Module):
    """Stands for a child whose own conversion is decided apart."""


@dataclass(frozen=True)
class Kind:
    """How a layer of torch.nn becomes the one of the same name in lmkern.nn.

    Attributes:
        kernel: the op without which a layer on its device stays as it is.
        arguments: constructor arguments that the layer does not keep under their own name.
        reads_children: whether torch's forward reads the weights of children past their forward.
        drop: torch's private attributes that only its own forward needs.
        restore: brings those back.
    """

    kernel: str
    arguments: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    reads_children: bool = False
    drop: tuple[str, ...] = ()
    restore: Callable[[Any], None] = lambda layer: None


_RECURRENT = Kind(
    "recurrent_forward",
    drop=("_flat_weights", "_flat_weight_refs"),
    restore=lambda layer: layer._init_flat_weights(),
)
_TRANSFORMER_LAYER: dict[str, Callable[[Any], Any]] = {
    "d_model": lambda layer: layer.self_attn.embed_dim,
    "nhead": lambda layer: layer.self_attn.num_heads,
    "dim_feedforward": lambda layer: layer.linear1.out_features,
    "dropout": lambda layer: layer.dropout.p,
    "layer_norm_eps": lambda layer: layer.norm1.eps,
    "batch_first": lambda layer: layer.self_attn.batch_first,
    "bias": lambda layer: layer.linear1.bias is not None,
}

# Layers that lmkern.nn does not have are passed over.
KINDS: dict[str, Kind] = {
    "RNN": _RECURRENT,
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNNCell": Kind("recurrent_forward"),
    "LSTMCell": Kind("recurrent_forward"),
    "GRUCell": Kind("recurrent_forward"),
    "Embedding": Kind("embedding_forward"),
    "EmbeddingBag": Kind("embedding_bag_forward"),
    "Linear": Kind("linear_forward", {"bias": lambda layer: layer.bias is not None}),
    "CrossEntropyLoss": Kind("cross_entropy_forward"),
    "AdaptiveLogSoftmaxWithLoss": Kind(
        "linear_cross_entropy_forward", {"cutoffs": lambda layer: layer.cutoffs[:-1]}
    ),
    "LayerNorm": Kind("norm_forward", {"bias": lambda layer: layer.bias is not None}),
    "RMSNorm": Kind("norm_forward"),
    "Dropout": Kind("dropout"),
    "GELU": Kind("activation_forward"),
    "SiLU": Kind("activation_forward"),
    "MultiheadAttention": Kind(
        "attention_forward",
        {
            "bias": lambda layer: layer.in_proj_bias is not None,
            "add_bias_kv": lambda layer: layer.bias_k is not None,
        },
        reads_children=True,
    ),
    "TransformerEncoderLayer": Kind("attention_forward", _TRANSFORMER_LAYER, reads_children=True),
    "TransformerDecoderLayer": Kind("attention_forward", _TRANSFORMER_LAYER),
    "TransformerEncoder": Kind(
        "attention_forward", {"encoder_layer": lambda layer: _Placeholder()}
    ),
    "TransformerDecoder": Kind(
        "attention_forward", {"decoder_layer": lambda layer: _Placeholder()}
    ),
    "Transformer": Kind(
        "attention_forward",
        {
            "custom_encoder": lambda layer: _Placeholder(),
            "custom_decoder": lambda layer: _Placeholder(),
        },
    ),
}

# What a subclass may define and still behave as its base once it is constructed.
_HARMLESS = {
    "__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__",
    "__firstlineno__", "__parameters__", "__orig_bases__", "__constants__",
}  # fmt: skip


def plain_class(module: Module) -> type[Module]:
    """The class of ``module`` under the one that torch.nn.utils.parametrize put over it."""
    return parametrize.type_before_parametrizations(module)


def lookalike(module: Module) -> str:
    """Why a module that is no layer of torch.nn, but is called like one, was left; "" for others."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript" if module.original_name in KINDS else ""
    known = cls.__name__ in KINDS and hasattr(nn, cls.__name__)
    own = cls.__module__.partition(".")[0] == "lmkern"
    is_torchs = cls is getattr(torch.nn, cls.__name__, None)
    if not known or own or is_torchs:
        return ""
    return f"{cls.__module__}.{cls.__name__} is not torch.nn.{cls.__name__}"


def obstacle(module: Module, base: type[Module]) -> str:
    """Why a layer of the kind ``base`` can't be swapped; "" if it can."""
    if any(is_lazy(p) for p in (*module.parameters(), *module.buffers())):
        return "its parameters are not initialised yet"
    cls = plain_class(module)
    for parent in cls.__mro__:
        if parent in base.__mro__:
            continue
        extra = [key for key in vars(parent) if key not in _HARMLESS]
        if "forward" in extra:
            return f"{parent.__name__} overrides forward"
        if extra:
            return f"{parent.__name__} defines {', '.join(extra[:3])}" + ", ..." * (len(extra) > 3)
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor) not in (Parameter, torch.Tensor, torch.nn.Buffer):
            return f"{name} is a {type(tensor).__name__}"
        missing = missing_kernel(KINDS[base.__name__].kernel, tensor.device)
        if missing:
            return missing
        is_number = tensor.is_floating_point() or tensor.is_complex()
        if is_number and tensor.dtype not in KERNEL_DTYPES:
            return f"no kernel for {tensor.dtype}"
    return ""


def needed_state(
    module: Module,
    base: type[Module],
    kinds: dict[type[Module], type[Module]],
) -> tuple[dict[Place, Any], str]:
    """The attributes that ``module`` needs as a layer of lmkern's, or why it does not fit.

    They are those of a new layer from the same constructor arguments, on the meta device, which costs
    neither memory nor random numbers. ``kinds``: torch's class -> lmkern's.
    """
    target = kinds[base]
    try:
        arguments = _arguments(module, target, KINDS[base.__name__].arguments)
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = target(**arguments)
    except (AttributeError, TypeError, ValueError) as error:
        return {}, f"it was changed: {error}"
    for key, tensor in (*model._parameters.items(), *model._buffers.items()):
        own = getattr(module, key, None)  # not in _parameters if it is parametrized or pruned
        shape, expected = (None if t is None else list(t.shape) for t in (own, tensor))
        if shape != expected:
            return {}, f"{key} must be {expected}, got {shape}"
    for key, child in model._modules.items():
        own = module._modules.get(key)
        if isinstance(child, _Placeholder) or (own is None and child is None):
            continue
        pair = {type(own), type(child)}
        same = getattr(type(own), "forward", None) is getattr(type(child), "forward", None)
        # Or a subclass of torch's that inherits its forward, as MultiheadAttention.out_proj is.
        inherits = any(
            type(child) is b and isinstance(own, a) and type(own).forward is a.forward
            for a, b in kinds.items()
        )
        if not same and not inherits and not any(pair == {a, b} for a, b in kinds.items()):
            return {}, f"{key} is a {type(own).__name__} instead of a {type(child).__name__}"
    state: dict[Place, Any] = {}
    plain = Module().__dict__  # what any module has is the layer's own
    for key, value in model.__dict__.items():
        own = module.__dict__.get(key, ...)
        # Options may have been changed since; what is private must be as lmkern's forward expects it.
        if own is ... or (key.startswith("_") and key not in plain and own != value):
            state["", key] = value
    for where in ("_parameters", "_buffers"):
        for key, value in attributes(model, where).items():
            if value is None and not hasattr(module, key):
                state[where, key] = None
    return state, ""


def attributes(module: Module, where: str) -> dict[str, Any]:
    """The dictionary that holds the attributes of ``module`` at such a :data:`Place`."""
    return module.__dict__[where] if where else module.__dict__


def _arguments(
    module: Module, target: type[Module], readers: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """The constructor arguments of ``target`` that make a layer like ``module``."""
    arguments = {}
    for parameter in list(inspect.signature(target.__init__).parameters.values())[1:]:
        key = parameter.name
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and not key.startswith("_"):
            if key in readers:
                arguments[key] = readers[key](module)
            elif hasattr(module, key):
                arguments[key] = getattr(module, key)
    return arguments
