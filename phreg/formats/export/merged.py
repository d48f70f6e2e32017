"""The merged format: the whole patched model, for `phreg.load` without its base.

All tensors, named as the model's library names them on disk, and that library's own config, of which its
class is built again, never by code from the folder. A patched transformers model's `save_pretrained` writes
the same. The names of the files are no stock library's, so none takes such a folder for a model without
registers.

    phreg.json         library, class, config, registers, size, normalisation, read-out, test-time units
    phreg.safetensors  every tensor

    config ──library──► model of random weights ──registers of zeros──► ──every tensor──► the patched model
"""

import copy
import json
from typing import Any

from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Located
from phreg.errors import LoadError, PhregError
from phreg.formats.adapter import read_own_tensors, take_shape
from phreg.formats.export.opening import whole_base
from phreg.formats.export.spec import Card, Contents, FormatSpec, dense_features
from phreg.formats.load import open_as_trained
from phreg.record import Base, RunRecord
from phreg.registers import remove_registers
from phreg.sinks import test_time
from phreg.storage import MODEL_FORMAT, MODEL_TENSORS


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    match backbone.spec.library:
        case "timm":
            from phreg.formats.export import timm  # which imports timm, and not every model is one of timm's

            return timm.unsupported_reason(backbone)
        case "open_clip" if getattr(backbone, "config", None) is None:
            return (
                "an open_clip instance does not say what it was built from; name the model by its folder, "
                "hub id or open_clip:ARCH/TAG, or load a run that was made so"
            )
    return None


def contents(backbone: Backbone) -> Contents:
    """Puts together what the folder holds."""
    tensors, moved = backbone.disk_state(), test_time.installed(backbone)
    record = RunRecord(
        format=MODEL_FORMAT,
        model_class=type(backbone.model).__name__,
        registers=backbone.num_registers,
        input_size=backbone.spec.input_size,
        mean=backbone.spec.mean,
        std=backbone.spec.std,
        library=backbone.spec.library,
        config=_config(backbone),
        readout=backbone.readout,
        test_time=moved.units if moved else None,
        test_time_size=moved.size if moved else None,
    )
    return Contents({MODEL_TENSORS: tensors}, {}, record=record.with_sums(tensors))


def open_merged(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    """Builds a model that the `merged` export or a transformers model's own `save_pretrained` wrote whole."""
    tensors = read_own_tensors(found.folder / MODEL_TENSORS, record)
    try:
        backbone = resolve.build(str(record.library), record.model_class, record.config or {}, tensors)
        take_shape(backbone, record)
        missing = sorted(backbone.disk_state().keys() - tensors.keys())
        if missing:
            raise LoadError(f"it lacks {missing[:3]}")
        backbone.load_disk_state(tensors)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, PhregError) as error:
        raise LoadError(
            f"patched model in {found.folder} cannot be loaded ({error}); save or copy it again"
        ) from error
    backbone.eval()
    return backbone, whole_base(backbone, found)


def _config(backbone: Any) -> dict[str, Any]:
    """Puts down what its library builds the model of, registers apart."""
    match backbone.spec.library:
        case "transformers":
            return json.loads(backbone.model.config.to_json_string(use_diff=False))
        case "timm":
            from phreg.formats.export import timm

            plain = remove_registers(copy.deepcopy(backbone))
            return dict(timm.contents(plain).settings["config.json"])
        case _:
            return backbone.config


SPEC = FormatSpec(
    name="merged",
    unsupported_reason=unsupported_reason,
    contents=contents,
    read_back=open_as_trained,
    answer=dense_features,
    open=open_merged,
    carries_hooks=True,
    pushed=(MODEL_TENSORS,),
    load_line='phreg.load("{folder}")',
    card=Card(),
)
