"""phreg: register tokens for pretrained vision transformers, by post-hoc self-distillation.

    import phreg
    result = phreg.distill("facebook/dinov2-base", images="photos/", output="runs/dinov2-reg")
    model = phreg.load("runs/dinov2-reg")      # an ordinary transformers, timm or open_clip model

No model library is imported before a model of it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from phreg.deprecated import current_attribute

__version__ = "0.1.0"

if TYPE_CHECKING:
    from phreg.api import add_test_time_registers as add_test_time_registers
    from phreg.api import denoise as denoise
    from phreg.api import distill as distill
    from phreg.api import evaluate as evaluate
    from phreg.api import export as export
    from phreg.api import inspect as inspect
    from phreg.api import load as load
    from phreg.api import push as push
    from phreg.api import quickstart as quickstart
    from phreg.errors import PhregError as PhregError
    from phreg.formats.info import info as info
    from phreg.registers import add_registers as add_registers
    from phreg.registers import remove_registers as remove_registers

_LAZY_EXPORTS = {
    "PhregError": "phreg.errors",
    "add_registers": "phreg.registers",
    "add_test_time_registers": "phreg.api",
    "denoise": "phreg.api",
    "distill": "phreg.api",
    "evaluate": "phreg.api",
    "export": "phreg.api",
    "info": "phreg.formats.info",
    "inspect": "phreg.api",
    "load": "phreg.api",
    "push": "phreg.api",
    "quickstart": "phreg.api",
    "remove_registers": "phreg.registers",
}
__all__ = [
    "PhregError",
    "add_registers",
    "add_test_time_registers",
    "denoise",
    "distill",
    "evaluate",
    "export",
    "info",
    "inspect",
    "load",
    "push",
    "quickstart",
    "remove_registers",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: accelerate, kornia and matplotlib take seconds."""
    if name in _LAZY_EXPORTS:
        return getattr(importlib.import_module(_LAZY_EXPORTS[name]), name)
    if (new := current_attribute("phreg", name)) is not None:
        return __getattr__(new)
    raise AttributeError(f"module 'phreg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
