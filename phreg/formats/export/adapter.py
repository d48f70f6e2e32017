"""The adapter format: what a run made, its model card and all, taken out of the run and tried on the base.

It is the small one, and asks most of whoever loads it: phreg, and the very weights it was made from.

    run/model/{adapter.safetensors, phreg.json, README.md} ──copied──► folder ──onto the base──► same model?
"""

import shutil
from functools import partial
from pathlib import Path

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Located
from phreg.errors import LoadError, UnsupportedModelError
from phreg.formats.adapter import apply_adapter, base_of, read_adapter
from phreg.formats.export.spec import Card, Contents, FormatSpec, dense_features
from phreg.formats.load import open_as_it_is, open_as_trained
from phreg.record import Base, RunRecord
from phreg.storage import ADAPTER_TENSORS

FILES = (ADAPTER_TENSORS, "README.md")
"""What is copied as it is; the card may be missing."""


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    if backbone.adapter is None:
        return "it was not loaded from a run or an adapter, so what it has that its base has not is unknown"
    if not (backbone.adapter / FILES[0]).is_file():
        return f"the adapter it was loaded from, {backbone.adapter}, is no longer there"
    return None


def contents(backbone: Backbone) -> Contents:
    """Names the files to copy."""
    folder = backbone.adapter or Path()
    present = [folder / name for name in FILES if (folder / name).is_file()]
    copied = {file.name: partial(shutil.copyfile, file) for file in present}
    return Contents({}, {}, copied, record=read_adapter(folder))


def open_adapter(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    """Finds the base again and patches it."""
    base = base_of(record)
    if base.source == "instance":
        raise LoadError(
            f"the adapter in {found.folder} was made from a model instance, which cannot be found again; "
            "build that model and pass it: phreg.load(path, into=model), which phreg.export takes too"
        )
    try:
        backbone, _ = open_as_it_is(base.source, base.revision)
    except (LoadError, UnsupportedModelError) as error:
        raise type(error)(
            f"the base of the adapter in {found.folder} cannot be opened: {error}. With that base at hand: "
            "phreg.load(path, into=model)"
        ) from error
    apply_adapter(found.folder, backbone)
    return backbone, base


SPEC = FormatSpec(
    name="adapter",
    unsupported_reason=unsupported_reason,
    contents=contents,
    read_back=open_as_trained,
    answer=dense_features,
    open=open_adapter,
    carries_hooks=True,
    carries_packed=True,  # its tensors are copied from the one that the model was loaded from
    needs_base=True,
    pushed=(ADAPTER_TENSORS,),
    load_line='phreg.load("{folder}")',
    card=Card(
        note="An adapter: the registers and the weights retrained with them, put onto the base by phreg.",
        into=(
            '`phreg.load("{place}", into=model)` patches a `{base}` at hand, or a model built around it, '
            "such as a vision-language model."
        ),
    ),
)
