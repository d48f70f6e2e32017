"""What a format is: one `FormatSpec`, from which exporting, loading, cards and the hub take what they need.

    FORMATS ──name──► module of the format ──SPEC──► FormatSpec

It says why a model cannot take the format, what the folder of one that can would hold, how the format's own
loader reads such a folder, how its users call what comes of that, how `phreg.load` takes it back, and what
people are told. None of it writes anything.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from phreg.backbones.base import Backbone, Features
from phreg.backbones.resolve import Located
from phreg.formats import FORMATS
from phreg.record import Base, RunRecord
from phreg.storage import ADAPTER_FILE, EXPORT_FILE, OWN_FORMATS

TOLERANCE = 1e-5
"""Largest difference that counts as equal, relative to the largest value: the rounding of fp32 over a deep
network. Both models run the same kernels on the same weights, so the difference is mostly zero."""

FOLDER = "{folder}"
"""Stands in a setting for the path of the folder that the setting is written to."""

WEIGHTS = "model.safetensors"
"""The file that stock libraries look for weights in."""

Write = Callable[[Path], Any]
"""Writes a file, given its path."""


class Contents(NamedTuple):
    """What a folder holds, by file name."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """Weights, named as the class that loads them names them on disk."""
    settings: Mapping[str, Mapping[str, Any]]
    """What is written as JSON."""
    files: Mapping[str, Write] = MappingProxyType({})
    """Everything else."""
    tolerance: float = TOLERANCE
    """Largest difference that counts as equal; more where the stock class is known to round differently."""
    record: RunRecord | None = None
    """What a format of phreg's own tells of itself, which goes into the record with the rest."""


@runtime_checkable
class Graph(Protocol):
    """A model that is no backbone any more, and still gives its features.

    Attributes:
        any_size: Whether it takes other sizes than the model's own.
    """

    any_size: bool

    def __call__(self, images: Tensor) -> Features:
        """Reads dense and pooled features of normalised images."""
        ...


def dense_features(backbone: Backbone, images: Tensor) -> Tensor:
    """Reads dense features, by the read-out that the model has."""
    return backbone(images).patches


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says of the use of a format.

    Attributes:
        library: The library that loads it, as the hub calls it.
        code: Python that loads it without phreg, `{repository}` being its place; empty where there is none.
        note: What to know of it.
        into: What to know of `phreg.load`, `{place}` being its place and `{base}` the model's name.
    """

    library: str = "phreg"
    code: str = ""
    note: str = ""
    into: str = ""


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """A format of `phreg export`.

    Attributes:
        name: What it is called there.
        unsupported_reason: Says why a model cannot take it; None where it can.
        contents: Puts together what the folder of a model that can take it holds.
        read_back: Reads such a folder by the format's own loader, in eval mode and fp32.
        answer: Calls the model as users of the format do, head included, at its own size.
        open: Builds the model for `phreg.load`; None where it is a graph and no model of a library any more.
        packages: What writing and checking it takes beyond what phreg itself does.
        extra: The extra of phreg that installs those.
        carries_hooks: Whether it carries what works by hooks, as no stock class does: a dense read-out,
            test-time registers.
        carries_packed: Whether it carries quantised weights.
        needs_base: Whether it holds no more than what goes onto the model's base.
        pushed: The files that go to the hub; None means all of a folder.
        leaves: Patterns of files that a push of another format takes away, beyond those of `COMMON`.
        load_line: Python that loads it, `{folder}` being its place.
        card: What its model card says of its use.
    """

    name: str
    unsupported_reason: Callable[[Backbone], str | None]
    contents: Callable[[Backbone], Contents]
    read_back: Callable[[Path], Backbone | Graph]
    answer: Callable[[Backbone, Tensor], Tensor]
    open: Callable[[Located, RunRecord], tuple[Backbone, Base]] | None
    packages: tuple[str, ...] = ()
    extra: str = ""
    carries_hooks: bool = False
    carries_packed: bool = False
    needs_base: bool = False
    pushed: tuple[str, ...] | None = None
    leaves: tuple[str, ...] = ()
    load_line: str
    card: Card

    @property
    def record_file(self) -> str:
        """The file of its record."""
        return ADAPTER_FILE if self.name in OWN_FORMATS.values() else EXPORT_FILE


COMMON = ("*.safetensors", "*.json", "report/*.png")
"""Files of most formats, and of cards."""


def find_spec(name: str) -> FormatSpec:
    """Imports a format, and with it its library, which takes seconds.

    Args:
        name: Its name on the command line or in a record.
    """
    return importlib.import_module(FORMATS[OWN_FORMATS.get(name, name)]).SPEC


def needs_base(recorded: str) -> bool:
    """Tells whether a format, as records name it, holds no more than what goes onto a base.

    Only one of phreg's own may; their modules import no model library, so this does not either.
    """
    return recorded in OWN_FORMATS and find_spec(recorded).needs_base


def recorded_names() -> list[str]:
    """Names the formats as records do."""
    return [*OWN_FORMATS, *(name for name in FORMATS if name not in OWN_FORMATS.values())]


def all_specs() -> Iterator[FormatSpec]:
    """Imports all formats."""
    return map(find_spec, FORMATS)
