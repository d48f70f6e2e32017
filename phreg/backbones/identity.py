"""What tells one model from another: a hash of all that decides what it computes.

Weights alone do not tell. Models of the same tensors may differ in an activation, in how images are
normalised, in the last block's read-out, or in a hook such as test-time registers are.

    tensors, as on disk ──weights_sha256──────────────────────┐
    spec, read-outs, what the library built it of ────────────┼──sha256──► identity
    modules: class, plain settings, hooks and what they hold ─┘

Models of one identity compute the same, but for a hook that keeps what matters out of its plain attributes
and variables. The reverse does not hold: another version of a library may describe the same model otherwise.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import nn

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import weights_sha256

WHEREABOUTS = frozenset({"name_or_path"})
"""Settings of a module that say where it came from, and not what it is."""


class Identity(NamedTuple):
    """Which model it is.

    Attributes:
        weights: `weights_sha256` of its tensors, named as on disk.
        whole: Of all that decides what it computes, the weights among it.
    """

    weights: str
    whole: str


def identify(backbone: Backbone) -> Identity:
    """Tells a model, in eval mode, from all that compute anything else; where it lies makes no difference."""
    weights = weights_sha256(backbone.disk_state())
    settings = {
        "weights": weights,
        "spec": asdict(backbone.spec),
        "readout": backbone.readout,
        "trained_readout": backbone.trained_readout,
        "built_of": backbone.built_of(),
        "modules": {name: _describe(module) for name, module in backbone.model.named_modules()},
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return Identity(weights, hashlib.sha256(text.encode()).hexdigest())


def _describe(module: nn.Module) -> list[Any]:
    """Lists a module's class, its plain settings, and the hooks on it."""
    settings = {key: value for key, value in _plain(vars(module)).items() if key not in WHEREABOUTS}
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [_name(type(module)), settings, [_describe_hook(hook) for hook in hooks]]


def _describe_hook(hook: Any) -> list[Any]:
    """Lists a hook's function or class, and the plain values among its attributes and variables."""
    cells = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    function = hook if hasattr(hook, "__qualname__") else type(hook)
    return [
        _name(function),
        _plain(getattr(hook, "__dict__", {})),
        [cell for cell in cells if _is_plain(cell)],
    ]


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps public attributes that are numbers, texts and lists of them; private ones hold state."""
    return {key: value for key, value in attributes.items() if key[:1] != "_" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
