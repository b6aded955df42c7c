"""Swap the layers of an existing model for lmkern's, and back.

A layer is swapped by giving the module object lmkern's class, as torch's own parametrizations and
FSDP2 do, not by putting another object in its place. So everything that hangs on the object is still
there by construction: Parameters and buffers (optimizers, DDP, tied weights), train or eval mode, hooks
of all kinds, parametrizations, attributes, modules shared between two places, references from outside
the model, and the model itself where it is a single layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from lmkern import nn
from lmkern._layer_kinds import (
    KINDS,
    Place,
    attributes,
    lookalike,
    needed_state,
    obstacle,
    plain_class,
)

Selector = str | type[Module]

# In a swapped module's __dict__: its class before, torch's class that it is of, and what other
# attributes were before, `...` for those that were not there (copies and pickles keep its identity).
_RECORD = "_lmkern_converted_from"


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer in a report.

    Attributes:
        names: where it is in the model; several for a module that stands at several places, "" for the
            model itself.
        kind: the name of its class.
        reason: why it was left, "" if it was swapped.
    """

    names: tuple[str, ...]
    kind: str
    reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did; ``print`` it.

    Attributes:
        swapped: the layers that run on lmkern now.
        left: the layers whose kind lmkern has and that stay as they were, with the reason.
    """

    swapped: list[ConvertedLayer]
    left: list[ConvertedLayer]

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return "lmkern.convert: no layer of a kind that lmkern.nn has"
        lines = [f"lmkern.convert: swapped {len(self.swapped)}, left {len(self.left)}"]
        groups: dict[tuple[str, str], list[str]] = {}
        for layer in (*self.swapped, *self.left):
            name, *others = (n or "the model itself" for n in layer.names)
            text = f"{name} (also {', '.join(others)})" if others else name
            groups.setdefault((layer.kind, layer.reason), []).append(text)
        for (kind, reason), names in groups.items():
            shown = ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
            lines.append(f"  {kind}: {shown}" + (f": left, {reason}" if reason else ""))
        return "\n".join(lines)


def convert(
    model: Module,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] = (),
) -> ConversionReport:
    """Run every layer of ``model`` that lmkern has on lmkern's kernels, in place.

    The module objects stay: only their class changes, so Parameters, buffers, hooks, parametrizations,
    attributes, mode, and whatever refers to a module stay, too. ``isinstance(layer, torch.nn.LSTM)`` is
    no longer true of a swapped one, though. ``model`` may itself be such a layer. A second call finds
    nothing left to do; :func:`revert` undoes it, also on a copied or unpickled model.

    Left as they are, with a reason in the report: subclasses that define more than a constructor, layers
    whose ``forward`` was replaced on the object (as by accelerate's hooks), quantized, TorchScript and
    uninitialised lazy ones, devices, dtypes and options without a kernel, and what is inside of a left
    torch.nn.TransformerEncoderLayer, whose fast path reads the weights of its children itself.

    Args:
        model: any module.
        include: only these layers: types, or names as in ``model.named_modules()``, where ``*`` stands
            for anything; a name stands for all that is inside of it, too.
        exclude: not these layers, likewise; it wins over ``include``.

    Returns:
        A report with ``swapped`` and ``left``, readable as a string.

    Raises:
        TypeError: ``model`` is not a module; a selector is neither a string nor a type of module.
        ValueError: a name that matches nothing in the model, or a type to include that lmkern does not
            have. Nothing has been swapped then.
    """
    _check_model("convert", model)
    names = _names(model)
    kinds = {getattr(torch.nn, k): getattr(nn, k) for k in KINDS if hasattr(nn, k)}
    included = None if include is None else _selection("include", include, names, set(kinds))
    excluded = _selection("exclude", exclude, names, None)

    plans: list[tuple[Module, type[Module], dict[Place, Any]]] = []
    report = ConversionReport([], [])
    closed: dict[Module, str] = {}  # modules inside a left layer that reads them, and its name
    for module, places in names.items():
        found = next((base for base in kinds if isinstance(module, base)), None)
        if isinstance(module, tuple(kinds.values())):
            continue
        if found is None:
            reason = lookalike(module)
            if reason:
                report.left.append(ConvertedLayer(tuple(places), _kind_name(module), reason))
            continue
        state: dict[Place, Any] = {}
        if module in closed:
            reason = f"{closed[module]} around it was left and reads its weights directly"
        elif module in excluded:
            reason = "excluded"
        elif included is not None and module not in included:
            reason = "not included"
        else:
            reason = obstacle(module, found)
            if not reason:
                state, reason = needed_state(module, found, kinds)
        if reason:
            report.left.append(ConvertedLayer(tuple(places), _kind_name(module), reason))
            if KINDS[found.__name__].reads_children and type(module).forward is found.forward:
                inside = (child for child in module.modules() if child is not module)
                closed |= {child: _kind_name(module) for child in inside}
        else:
            plans.append((module, found, state))
            report.swapped.append(ConvertedLayer(tuple(places), _kind_name(module)))

    for module, found, state in plans:
        before: dict[Place, Any] = {}
        cls = plain_class(module)
        for key in KINDS[found.__name__].drop:
            module.__dict__.pop(key, None)
        _set_class(module, kinds[found])
        for (where, key), value in state.items():
            values = attributes(module, where)
            before[where, key] = values.get(key, ...)
            values[key] = value
        module.__dict__[_RECORD] = (cls, found, before)
    return report


def revert(model: Module) -> list[str]:
    """Undo :func:`convert`: every layer that it swapped gets its class back, in place.

    Layers that were made as ``lmkern.nn`` layers stay. Options of lmkern's that torch's layer does not
    have and that were set meanwhile are lost.

    Returns:
        The names of the layers, as in ``model.named_modules()``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the class of a swapped layer was changed again since, by FSDP for one; nothing has
            been reverted.
    """
    _check_model("revert", model)
    names = {m: places for m, places in _names(model).items() if _RECORD in m.__dict__}
    for module, places in names.items():
        _, base, _ = module.__dict__[_RECORD]
        ours = getattr(nn, base.__name__)
        if plain_class(module) is not ours:
            raise ValueError(
                f"revert: {places[0] or 'the model'} must be a {ours.__module__}.{ours.__name__} as "
                f"convert() left it, got {_kind_name(module)}"
            )
    for module in names:
        cls, base, before = module.__dict__.pop(_RECORD)
        for (where, key), value in before.items():
            if value is ...:
                attributes(module, where).pop(key, None)
            else:
                attributes(module, where)[key] = value
        _set_class(module, cls)
        KINDS[base.__name__].restore(module)
    return [places[0] for places in names.values()]


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _names(model: Module) -> dict[Module, list[str]]:
    """Every module once, parents first, with all the names that it has."""
    names: dict[Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _selection(
    argument: str,
    selectors: Selector | Iterable[Selector],
    names: dict[Module, list[str]],
    kinds: set[type[Module]] | None,
) -> set[Module]:
    """The modules that ``selectors`` stand for."""
    if isinstance(selectors, (str, type)):
        selectors = [selectors]
    chosen: set[Module] = set()
    for selector in selectors:
        if isinstance(selector, str):
            hits = {
                child
                for module, places in names.items()
                if any(fnmatchcase(name, selector) for name in places)
                for child in module.modules()
            }
            if not hits:
                raise ValueError(
                    f"convert: {argument} must name modules of the model, got {selector!r}"
                )
        elif isinstance(selector, type) and issubclass(selector, Module):
            known = kinds is None or any(
                issubclass(selector, kind) or issubclass(kind, selector) for kind in kinds
            )
            if not known:
                raise ValueError(
                    f"convert: {argument} must be kinds that lmkern.nn has "
                    f"({', '.join(sorted(k.__name__ for k in kinds or ()))}), got {selector.__name__}"
                )
            hits = {module for module in names if isinstance(module, selector)}
        else:
            raise TypeError(
                f"convert: {argument} must be names or types of modules, got {selector!r}"
            )
        chosen |= hits
    return chosen


def _kind_name(module: Module) -> str:
    return plain_class(module).__name__


def _set_class(module: Module, cls: type[Module]) -> None:
    """Give ``module`` the class ``cls``, under its parametrizations if it has any."""
    if parametrize.is_parametrized(module):
        # parametrize keeps its properties in a class that it makes for each module.
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls
