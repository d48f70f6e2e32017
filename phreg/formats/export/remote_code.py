"""The remote-code format: a transformers folder that brings the one class it needs, for `trust_remote_code`.

transformers has classes with registers for DINOv2 alone. For every other model the folder holds a small
module, in which a subclass of the model's own class adds registers; what it adds them with is the source of
phreg's own hooks. Heads, processors, generation and outputs stay those of the stock class, and the config's
`model_type` is a new one, which no Auto class loads without that module. The file of the config holds a
refusal besides, which the subclass takes out as it reads and the stock class stumbles over.

    ViTForImageClassification ──► RegistersViTForImageClassification   in modeling_registers.py
    ViTConfig, model_type vit ──► RegistersViTConfig, registers_vit    auto_map in config.json
"""

import inspect
import json
import re
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, cast

import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from phreg import __version__
from phreg.backbones import transformers_registers as hooks
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Located
from phreg.backbones.transformers import TransformersBackbone, adapt, load_remote_code
from phreg.backbones.transformers_registers import REMOTE_CLASS, REMOTE_MODEL_TYPE
from phreg.errors import LoadError
from phreg.formats.adapter import read_tensors
from phreg.formats.export.opening import check_unchanged, whole_base
from phreg.formats.export.spec import WEIGHTS, Card, Contents, FormatSpec
from phreg.record import Base, RunRecord, weights_sha256

MODULE = "modeling_registers"
"""The module that the folder brings."""

HOOKS = (
    hooks.Registers,
    hooks.RegisterSpan,
    hooks.LinkRegisters,
    hooks.InsertRegisters,
    hooks.Strip,
    hooks.TellBlocks,
    hooks.RouteStates,
    hooks.StripStates,
    hooks._are_states,
    hooks.PadMask,
    hooks.attach,
    hooks.with_refusal,
    hooks.without_refusal,
)
"""What that module is made of, besides the two classes of `CODE`."""

CODE = Template('''"""$stock with $count register tokens: the code beside the weights, for trust_remote_code.

Written by phreg $version, which is licensed under Apache-2.0, and so is this file. Registers take part in
attention inside the block stack and are seen nowhere else: inputs and outputs are those of the stock class.
It needs transformers alone, 5 or newer: AutoModel.from_pretrained(folder, trust_remote_code=True).
$stock itself, which has no place for registers, refuses the config.

    embeddings -> registers in -> (pre-norm) -> blocks -> registers out -> norm, pooler, heads
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import $config, $stock

REFUSAL = "$refusal"
REGISTERS = "$registers"
HANDLES = "$handles"
RUNNING = "$running"
LONGER_MASK = "$longer_mask"
STATE = "$state"


$hooks


class $prefix$config($config):
    """The config of $stock, and how many registers it has."""

    model_type = "$type_prefix$model_type"
    num_registers: int = $count

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(without_refusal(config_dict), **kwargs)

    def to_json_string(self, *args, **kwargs):
        config = json.loads(super().to_json_string(*args, **kwargs))
        return json.dumps(with_refusal(config), indent=2, sort_keys=True) + "\\n"


class $prefix$stock($stock):
    """$stock with registers."""

    config_class = $prefix$config

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        tower = $tower
        blocks = tower.get_submodule("$blocks")
        tokens = 0.02 * torch.randn(config.num_registers, tower.config.hidden_size)
        registers = Registers(tokens, num_prefix=$num_prefix)
        attach(tower, registers, $first_block_input, blocks, $collector)
$pooler''')


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    if not isinstance(backbone, TransformersBackbone):
        return f"it is a model of {backbone.spec.library}, and phreg does not convert those to transformers"
    if not backbone.num_registers:
        return "it has no registers, so its own save_pretrained writes all of it"
    if type(backbone.tower).__name__.endswith("Backbone"):
        return "it is a Backbone, and transformers' AutoBackbone takes no code that comes with a folder"
    if not hasattr(transformers, _stock(backbone.model).__name__):
        return f"{_stock(backbone.model).__name__} is none of transformers' public classes"
    return None


def contents(backbone: Backbone) -> Contents:
    """Puts together what the model's folder holds."""
    backbone = cast(TransformersBackbone, backbone)
    model, stock, config = backbone.model, _stock(backbone.model), _stock(backbone.model.config)
    autos = _autos(stock, config)
    classes = {"AutoConfig": f"{MODULE}.{REMOTE_CLASS}{config.__name__}"}
    settings = {
        **json.loads(model.config.to_json_string()),
        "model_type": f"{REMOTE_MODEL_TYPE}{config.model_type}",
        "num_registers": backbone.num_registers,
        "architectures": [f"{REMOTE_CLASS}{stock.__name__}"],
        "auto_map": classes | dict.fromkeys(autos, f"{MODULE}.{REMOTE_CLASS}{stock.__name__}"),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    named = {"stock": stock.__name__, "count": backbone.num_registers, "version": __version__}
    code = partial(Path.write_text, data=_code(backbone, named), encoding="utf-8")
    described = {"config.json": hooks.with_refusal(settings)} | _processor(backbone)
    if model.can_generate():
        described["generation_config.json"] = json.loads(cast(Any, model).generation_config.to_json_string())
    return Contents({WEIGHTS: model.state_dict()}, described, {f"{MODULE}.py": code})


def load(folder: Path) -> Backbone:
    """Reads such a folder by transformers' own loader, in eval mode."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    auto = getattr(transformers, next(name for name in named if name != "AutoConfig"))
    model, found = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[key]]
    if wrong:
        raise LoadError(f"{type(model).__name__} and the file differ in {sorted(map(str, wrong))[:3]}")
    return adapt(model.eval())


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    """Calls the model as its users do: logits of a classifier, else the pooled output."""
    backbone = cast(TransformersBackbone, backbone)
    takes_images = backbone.family.name != "siglip2_vision_model"  # rather than patches
    if takes_images and "ForImageClassification" in type(backbone.model).__name__:
        return backbone.model(images).logits
    return backbone.run(images)


def open_remote_code(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    """Builds the stock class under the code of the folder, which is not run."""
    # The class in the folder, unlike the stock class, has no other names on disk than in memory.
    check_unchanged(found, record, weights_sha256(read_tensors(found.folder / WEIGHTS)))
    backbone = load_remote_code(found.folder)
    backbone.eval()
    return backbone, whole_base(backbone, found)


# -- the module ----------------------------------------------------------------------------------------------


def _code(backbone: TransformersBackbone, named: dict[str, Any]) -> str:
    """Writes the module that the folder brings."""
    model, tower = backbone.model, backbone.tower
    places = {module: f'tower.get_submodule("{name}")' for name, module in tower.named_modules()}
    places[tower] = "tower"
    # A pooler that the checkpoint came without, and which the class would make up.
    lacks_pooler = getattr(tower, "pooler", tower) is None
    return CODE.substitute(
        named,
        config=_stock(model.config).__name__,
        model_type=_stock(model.config).model_type,
        prefix=REMOTE_CLASS,
        type_prefix=REMOTE_MODEL_TYPE,
        refusal=hooks.REFUSAL,
        registers=hooks.REGISTERS,
        handles=hooks.HANDLES,
        running=hooks.RUNNING,
        longer_mask=hooks.LONGER_MASK,
        state=hooks.STATE,
        hooks="\n\n".join(_source(part) for part in HOOKS).rstrip(),
        tower=f'self.get_submodule("{backbone.tower_name}")' if backbone.tower_name else "self",
        blocks=backbone.family.blocks,
        first_block_input=places[backbone.first_block_input],
        collector=places[backbone.collector],
        num_prefix=backbone.spec.num_prefix,
        pooler="        tower.pooler = None\n" if lacks_pooler else "",
    )


def _source(part: Any) -> str:
    """Takes the source of one of phreg's hooks, with plain types and errors in place of phreg's."""
    source = inspect.getsource(part).replace("PhregError", "ValueError")
    return re.sub(r'Float\[Tensor, "[^"]*"\]', "Tensor", source)


# -- transformers' classes -----------------------------------------------------------------------------------


def _stock(thing: Any) -> Any:
    """Finds transformers' own class of a model or config, which may be of a subclass."""
    return next(base for base in type(thing).__mro__ if base.__module__.startswith("transformers.models."))


def _autos(stock: type, config: type) -> list[str]:
    """Names the Auto classes that load a class, and `AutoModel`, which in the folder loads it in any case."""
    found = {"AutoModel"}
    for name in sorted(name for name in dir(transformers) if name.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is not None and config in mapping:
            known = mapping[config]
            if stock in (known if isinstance(known, tuple | list) else (known,)):
                found.add(name)
    return sorted(found)


def _processor(backbone: TransformersBackbone) -> dict[str, dict[str, Any]]:
    """Describes how images are prepared, at the model's own size, where transformers knows a class for it."""
    kind = backbone.tower.config.model_type.removesuffix("_vision_model")
    processors: Any = IMAGE_PROCESSOR_MAPPING
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in processors:
        return {}
    processor = processors[CONFIG_MAPPING[kind]]["torchvision"]()
    processor.do_rescale, processor.rescale_factor, processor.do_normalize = True, 1 / 255, True
    processor.image_mean, processor.image_std = list(backbone.spec.mean), list(backbone.spec.std)
    height, width = backbone.spec.input_size
    if "shortest_edge" in (getattr(processor, "size", None) or {}):
        processor.size = {"shortest_edge": max(height, width)}  # so that the part cut out lies inside
        processor.crop_size = {"height": height, "width": width}
    elif getattr(processor, "size", None):
        processor.size = {"height": height, "width": width}
    else:  # Siglip2, which is told how many patches an image may have
        rows, cols = (height // backbone.spec.patch_size[0], width // backbone.spec.patch_size[1])
        processor.patch_size, processor.max_num_patches = backbone.spec.patch_size[0], rows * cols
    return {"preprocessor_config.json": json.loads(processor.to_json_string())}


SPEC = FormatSpec(
    name="remote-code",
    unsupported_reason=unsupported_reason,
    contents=contents,
    read_back=load,
    answer=answer,
    open=open_remote_code,
    leaves=("*.py",),
    load_line='transformers.AutoModel.from_pretrained("{folder}", trust_remote_code=True)',
    card=Card(
        library="transformers",
        code=(
            "from transformers import AutoModel\n\n"
            'model = AutoModel.from_pretrained("{repository}", trust_remote_code=True)'
        ),
    ),
)
