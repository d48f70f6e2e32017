"""A format that phreg does not bring: a timm model's tensors in one file, and how many of it are registers.

It is one module with a `SPEC`, as all formats are; `test_spec.py` adds its line to the table.
"""

import json
from functools import partial
from pathlib import Path

from families_timm import FAMILIES
from safetensors.torch import load_file
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Located, adapt
from phreg.formats.export.opening import check_unchanged, whole_base
from phreg.formats.export.spec import Card, Contents, FormatSpec
from phreg.record import Base, RunRecord, weights_sha256
from phreg.registers import add_registers


def unsupported_reason(backbone: Backbone) -> str | None:
    return None if backbone.spec.library == "timm" else "it is no model of timm"


def contents(backbone: Backbone) -> Contents:
    code = partial(Path.write_text, data="print('hello')")
    told = {"registers.json": {"registers": backbone.num_registers}}
    return Contents({"plain.safetensors": backbone.disk_state()}, told, {"read.lua": code})


def read_back(folder: Path) -> Backbone:
    backbone = adapt(FAMILIES["vit"]())
    add_registers(backbone, json.loads((folder / "registers.json").read_text())["registers"])
    backbone.load_disk_state(load_file(folder / "plain.safetensors"))
    return backbone


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone.model(images)


def open_plain(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    backbone = read_back(found.folder)
    check_unchanged(found, record, weights_sha256(backbone.disk_state()))
    return backbone, whole_base(backbone, found)


SPEC = FormatSpec(
    name="plain",
    unsupported_reason=unsupported_reason,
    contents=contents,
    read_back=read_back,
    answer=answer,
    open=open_plain,
    leaves=("*.lua",),
    load_line='plain.read("{folder}")',
    card=Card(library="plain", code='plain.read("{repository}")', note="Nothing but tensors."),
)
