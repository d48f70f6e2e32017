"""phreg: register tokens for pretrained vision transformers, by post-hoc self-distillation.

    import phreg
    result = phreg.distill("facebook/dinov2-base", images="photos/", output="runs/dinov2-reg")
    model = phreg.load("runs/dinov2-reg")      # an ordinary transformers, timm or open_clip model

No model library is imported before a model of it is used.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

from phreg.deprecated import current_attribute

__version__ = "0.1.0"


def _read_exports() -> dict[str, str]:
    """Reads the modules of the public names from `__init__.pyi`, which type checkers read too."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module) for node in imports for name in node.names}


_LAZY_EXPORTS = _read_exports()
__all__ = sorted(_LAZY_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]  # type checkers read the stub


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: accelerate, kornia and matplotlib take seconds."""
    if name in _LAZY_EXPORTS:
        return getattr(importlib.import_module(_LAZY_EXPORTS[name]), name)
    if (new := current_attribute("phreg", name)) is not None:
        return __getattr__(new)
    raise AttributeError(f"module 'phreg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
