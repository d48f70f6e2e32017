"""Adapter for the vision transformers of transformers.

The facts of each architecture stand in one table (`transformers_families`), and one class reads it; how
registers get into a model and out again is in `transformers_registers`. A tower, the module that turns pixels
into tokens, is the model itself or a part of it:

    images ─► tower: embeddings ─► blocks ─► norm, pooler ─► (visual_projection) ─► pooled

A patched model keeps its class, its heads and the shapes of its outputs, but for `output_attentions`, which
shows registers. It saves itself in a format of its own. That holds from the model given to `adapt` downwards,
so a whole CLIPModel or LlavaForConditionalGeneration should be patched as such, not through its tower: a
tower cannot know what it is part of, and the whole would save itself as stock.
"""

import inspect
import json
import math
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from phreg.backbones import hub
from phreg.backbones.base import Backbone, Mlp, Spec, first_unpacked, load_tensors, matrix_of
from phreg.backbones.transformers_families import FAMILIES, HEADS, MLPS, REFUSED, TOWERS, Family, Triple
from phreg.backbones.transformers_registers import (
    REGISTERS,
    REMOTE_CLASS,
    REMOTE_MODEL_TYPE,
    RefuseStockSaving,
    Registers,
    SavePatched,
    attach,
    detach,
    disk_names,
    without_refusal,
)
from phreg.backbones.transformers_registers import save_patched as save_patched
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.parsing import parse_json

LOAD_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)
"""What transformers raises over a folder that is incomplete, damaged or inconsistent."""


class TransformersBackbone(Backbone):
    """A vision transformer of transformers.

    Args:
        model: The user's model.
        spec: What was found out about it.
        family: The facts of its architecture.
        tower_name: Path of the vision tower in the model; empty where it is the model.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, spec: Spec, family: Family, tower_name: str) -> None:
        super().__init__(model, spec, f"which are usual for {family.name}")
        self.family = family
        self.tower_name = tower_name
        self.image_processor: dict[str, Any] = {}
        """The settings of the image processor that came with the model, where one did."""
        self._grid: tuple[int, int] | None = None  # of the images last run

    def use_processor(self, settings: dict[str, Any]) -> None:
        """Takes over the settings of the model's image processor, the normalisation among them.

        Raises:
            LoadError: They normalise in no way that there is for RGB.
        """
        self.image_processor = settings
        found = normalisation(settings)
        if found is not None:
            self.set_normalisation(*found)

    def find_normalisation(self) -> None:
        """Looks for an image processor at the model's `name_or_path`: a folder, or a hub id."""
        for model in (self.model, self.tower):
            settings = _processor_at(
                model.config.name_or_path or "", getattr(model.config, "_commit_hash", None)
            )
            if settings:
                self.use_processor(settings)
                return

    @property
    def tower(self) -> PreTrainedModel:
        """The module that turns pixels into tokens."""
        return cast(PreTrainedModel, self.model.get_submodule(self.tower_name))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        return list(cast(nn.ModuleList, self.tower.get_submodule(self.family.blocks)))

    @property
    def first_block_input(self) -> nn.Module:
        """The norm before the blocks, where there is one, else the first block."""
        return self.tower.get_submodule(self.family.pre_norm) if self.family.pre_norm else self.blocks[0]

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        return self.tower.get_submodule(self.family.final_norm)

    @property
    def projection(self) -> Tensor | None:
        """The (width, dim) matrix to the joint space, a view of the weight; None without."""
        layer = getattr(self.model, "visual_projection", None)
        return None if layer is None else matrix_of(layer, first_unpacked(self.final_norm.parameters()))

    def to_joint(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens dim"]:
        """Takes tokens to the joint space; those of SigLIP each through its attention pooling alone.

        Pooled by itself a token gets all the attention, and goes through values, output projection and MLP.

        Raises:
            PhregError: There is neither a projection nor such a pooling.
        """
        pool = getattr(self.tower, "head", None)
        if pool is None:
            return super().to_joint(tokens)
        pooled = pool(tokens.flatten(0, 1).unsqueeze(1)).unflatten(0, tokens.shape[:2])
        return pooled if self.projection is None else pooled @ self.projection

    @property
    def class_tokens(self) -> tuple[str, ...]:
        """`CLS` and DeiT's `distillation`, as far as the family has them."""
        own = [path for path in self.family.cls if path != "embeddings.register_tokens"]
        return ("CLS", "distillation")[: len(own)]

    # -- registers

    @property
    def num_registers(self) -> int:
        """Registers phreg added; native ones are in `spec.num_prefix`."""
        return 0 if self.registers is None else self.registers.shape[1]

    @property
    def registers(self) -> nn.Parameter | None:
        """The parameter (1, registers, width) of the tower's child; None without."""
        child = getattr(self.tower, REGISTERS, None)
        return None if child is None else child.tokens

    def insert_registers(self, tokens: Float[Tensor, "registers width"]) -> None:
        """Adds the child and its hooks to the tower, and takes over saving.

        Raises:
            PhregError: There are registers already.
        """
        if self.num_registers:
            raise PhregError(
                f"asked to insert registers into {self.describe()}, which has {self.num_registers}; "
                "call remove_registers first"
            )
        tower, blocks = self.tower, self.blocks
        # Of the type of the tokens that they join, which norms that are kept in fp32 do not tell.
        device = first_unpacked(blocks[0].parameters()).device
        registers = Registers(tokens.to(device, self.dtype), self.spec.num_prefix)
        registers.register_state_dict_pre_hook(RefuseStockSaving())
        attach(tower, registers.train(tower.training), self.first_block_input, blocks, self.collector)
        for module in self._models_that_save():
            vars(module)["save_pretrained"] = SavePatched(module, tower)

    def remove_registers(self) -> None:
        """Takes the child and its hooks off the tower, and gives saving back."""
        detach(self.tower, self.first_block_input)
        for module in self._models_that_save():
            vars(module).pop("save_pretrained", None)

    @property
    def collector(self) -> nn.Module:
        """The module that returns hidden states: the innermost model around the blocks."""
        parts = self.family.blocks.split(".")
        parents = [self.tower.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
        return [module for module in parents if isinstance(module, PreTrainedModel)][-1]

    def _models_that_save(self) -> Iterator[PreTrainedModel]:
        """Finds the models around the registers and inside their tower; a text tower is neither."""
        parts = set(self.tower.modules())
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel) and (module in parts or self.tower in module.modules()):
                yield module

    # -- running

    def run(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Runs the tower and, where there is one, the projection.

        Returns:
            The image embedding of a model with a projection, else the pooler's output, else CLS after the
            norm, else the mean of the patches.
        """
        inputs = self._inputs(images)
        with _every_patch_seen(self.tower.config):
            output = self.tower(**inputs, return_dict=True)
        pooled = self._pool(output)
        project = getattr(self.model, "visual_projection", None)
        return pooled if project is None else project(pooled)

    def logits(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Runs the model with its own classifier."""
        if not hasattr(self.model, "classifier"):
            return super().logits(images)
        inputs = self._inputs(images)
        with _every_patch_seen(self.tower.config):
            return self.model(**inputs, return_dict=True).logits

    def _inputs(self, images: Tensor) -> dict[str, Any]:
        """Makes the arguments of the tower."""
        layout = self.layout(images)
        self._grid = layout.grid
        inputs: dict[str, Any] = {"pixel_values": images}
        if self.family.sizes == "keyword":
            # Never for a model of its own size alone: transformers resamples any table as if it were square.
            inputs["interpolate_pos_encoding"] = self.spec.any_size
        if isinstance(self.tower, BackboneMixin):  # else it returns feature maps only
            inputs["output_hidden_states"] = True
        if self.family.name == "vit_mae":  # sorts patches by this noise
            inputs["noise"] = torch.arange(layout.num_patches, device=images.device).expand(
                images.shape[0], -1
            )
        if self.family.name == "siglip2_vision_model":
            inputs |= _cut_into_patches(images, layout.grid, self.spec.patch_size)
        return inputs

    def _pool(self, output: Mapping[str, Any]) -> Tensor:
        pooled, tokens = output.get("pooler_output"), output.get("last_hidden_state")
        if pooled is not None:
            return pooled
        if tokens is None:
            tokens = self.final_norm(output["hidden_states"][-1])
        return tokens[:, 0] if self.spec.num_prefix else tokens.mean(1)

    def attention(self, index: int) -> "SelfAttention":
        """Takes apart the self-attention of one block.

        DINOv3 rotates queries and keys by their position in the image. Those of the image size last run are
        used, without the random stretching that the model does in training.
        """
        block = self.blocks[index]
        attention = block.get_submodule(self.family.attention)
        rope = getattr(self.tower, "rope_embeddings", None)
        return SelfAttention(
            norm=block.get_submodule(self.family.attention_norm),
            projections=attention,
            out=attention.get_submodule(self.family.out),
            num_heads=self.spec.num_heads,
            scale=(self.spec.width // self.spec.num_heads) ** -0.5,
            rotate=_unrotated if rope is None else Rotary(rope, self.spec.patch_size, self._grid),
        )

    def mlp(self, index: int) -> Mlp | None:
        """Takes apart the MLP of one block; None where it has layers beside those of `MLPS`, or PEFT's."""
        mlp = self.blocks[index].get_submodule(self.family.mlp)
        layers = {name: child for name, child in mlp.named_children() if list(child.parameters())}
        for up, down in MLPS:
            if layers.keys() == {*up, down}:
                return Mlp.of([layers[name] for name in up], layers[down])
        return None

    # -- parameters

    def roles(self) -> dict[str, list[str]]:
        """Names the parameters of `model` by role; a mask token, used in pre-training only, has none."""
        family, prefix = self.family, f"{self.tower_name}." if self.tower_name else ""
        names = [name for name, _ in self.tower.named_parameters()]

        def at(*paths: str | None) -> list[str]:
            prefixes = tuple(f"{path}." for path in paths if path)
            return [prefix + name for name in names if f"{name}.".startswith(prefixes)]

        heads = [name for name, _ in self.model.named_parameters() if name.partition(".")[0] in HEADS]
        return {
            "registers": at(REGISTERS),
            "pos_embed": at(family.pos_embed),
            "patch_embed": at(*family.patch_embed),
            "cls": at(*family.cls),
            "norm": at(family.pre_norm, family.final_norm),
            **{f"block.{index}": at(f"{family.blocks}.{index}") for index in range(len(self.blocks))},
            "head": at("pooler", "head") + heads,
        }

    def set_input_size(self, size: int | tuple[int, int]) -> None:
        """Resamples the position table as the library does on the fly, and tells all who keep the size.

        Raises:
            PhregError: The model has no table of its own size, or the size is not one of whole patches, or it
            is no square and the model keeps one side alone.
        """
        table = _parameter(self.tower, self.family.pos_embed)
        embeddings = self.tower.get_submodule("embeddings")
        if table is None or not hasattr(self.tower.config, "image_size"):
            super().set_input_size(size)
            return
        (height, width), (high, wide) = _pair(size), self.spec.patch_size
        old, new = self.spec.grid, (height // high, width // wide)
        whole = not height % high and not width % wide and all(new)
        square = old[0] == old[1] and new[0] == new[1]
        # Families that keep both sides run at their own size without resampling, whatever its shape.
        takes_any_shape = isinstance(getattr(embeddings, "image_size", None), tuple | list)
        if not whole or not (square or takes_any_shape):
            shape, sides = ("grid", "sides") if takes_any_shape else ("square grid", "a side")
            raise PhregError(
                f"native size {height}x{width} asked of {self.describe()}, which keeps a {shape} of patches "
                f"of {high}x{wide} pixels; use {sides} of whole patches"
            )
        table.data = _resample_table(table.data, old, new, antialias=self.family.antialias)
        self.tower.config.image_size = height if height == width else (height, width)
        _tell_size(embeddings, (height, width), new[0] * new[1], table.shape[-2])
        any_size = _any_size(self.family, self.tower.config, (height, width), table)
        self.spec = replace(self.spec, input_size=(height, width), any_size=any_size)

    def built_of(self) -> Mapping[str, Any]:
        """Gives the config of the model, without the path that it was read from."""
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        return {key: value for key, value in config.items() if key != "_name_or_path"}

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames tensors as the checkpoint on the hub names them, and joins some."""
        return disk_names(self.model, tensors)

    def vision_tower(self) -> Backbone:
        """Wraps the tower by itself."""
        return adapt(self.tower) if self.tower_name else self

    def load_disk_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors named as `disk_state` names them back into the model; others stay as they are.

        Raises:
            PhregError: A name or a shape does not fit; nothing is copied then.
        """
        own = self.model.state_dict()
        names = list(own)
        # Rows that bear their tensor's number show, once renamed, which tensors were joined into which.
        numbered = {name: torch.full(own[name].shape[:1], number) for number, name in enumerate(names)}
        origins = disk_names(self.model, numbered)
        parts: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            rows = origins[name].reshape(-1) if name in origins else torch.empty(0)
            if name not in origins or tensor.shape[:1].numel() != len(rows):
                found = f"{len(rows)} rows there" if name in origins else "no such tensor"
                raise PhregError(
                    f"tensor {name} of shape {tuple(tensor.shape)} given to {self.describe()}, which has "
                    f"{found}; it belongs to another model or size"
                )
            numbers, counts = rows.unique_consecutive(return_counts=True)
            pieces = [tensor] if len(numbers) == 1 else tensor.split(counts.tolist())
            parts |= {names[number]: piece for number, piece in zip(numbers.tolist(), pieces, strict=True)}
        load_tensors(self.model, parts, self.describe())


# -- attention -----------------------------------------------------------------------------------------------


@dataclass(repr=False)
class SelfAttention:
    """The parts of one block's attention; see `base.Attention`."""

    norm: nn.Module
    projections: nn.Module
    out: nn.Module
    num_heads: int
    scale: float
    rotate: Callable[[Tensor], Tensor]

    @property
    def module(self) -> nn.Module:
        """The attention itself, whose first argument is normed tokens."""
        return self.projections

    def queries(self, tokens: Tensor) -> Tensor:
        """Projects normed tokens to queries."""
        return self.rotate(self._project("q_proj", tokens))

    def keys(self, tokens: Tensor) -> Tensor:
        """Projects normed tokens to keys."""
        return self.rotate(self._project("k_proj", tokens))

    def values(self, tokens: Tensor) -> Tensor:
        """Projects normed tokens to values."""
        return self._project("v_proj", tokens)

    def _project(self, name: str, tokens: Tensor) -> Tensor:
        heads = self.projections.get_submodule(name)(tokens).unflatten(-1, (self.num_heads, -1))
        return heads.transpose(1, 2)


@dataclass(frozen=True, repr=False)
class Rotary:
    """Rotates queries or keys of patches by their position in the grid, as DINOv3 does."""

    rope: nn.Module
    patch_size: tuple[int, int]
    grid: tuple[int, int] | None

    def __call__(
        self, heads: Float[Tensor, "batch heads tokens dim"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Rotates the last tokens, as many as the grid has.

        Raises:
            PhregError: The grid is unknown.
        """
        if self.grid is None:
            raise PhregError(
                "queries or keys asked of a model that rotates them by position in the image, and it has "
                "seen no image; run the backbone first, then take its attention"
            )
        height, width = (count * side for count, side in zip(self.grid, self.patch_size, strict=True))
        training = self.rope.training
        cos, sin = self.rope.eval()(heads.new_empty(1, 3, height, width))
        self.rope.train(training)
        return apply_rotary_pos_emb(heads, heads, cos, sin)[0]


def _unrotated(heads: Tensor) -> Tensor:
    return heads


# -- images and sizes ----------------------------------------------------------------------------------------


def _cut_into_patches(
    images: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Makes Siglip2's input: a row for a patch, pixels row by row and colours last, and no padding."""
    (rows, cols), (high, wide) = grid, patch_size
    patches = images.unflatten(3, (cols, wide)).unflatten(2, (rows, high)).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.reshape(len(images), rows * cols, -1),
        "pixel_attention_mask": torch.ones(len(images), rows * cols, dtype=torch.long, device=images.device),
        "spatial_shapes": torch.tensor([grid] * len(images)),  # read on the CPU, so never moved off it
    }


@contextmanager
def _every_patch_seen(config: Any) -> Iterator[None]:
    """Keeps a masked autoencoder from dropping patches; other models have no mask ratio."""
    ratio = getattr(config, "mask_ratio", None)
    if ratio is None:
        yield
        return
    config.mask_ratio = 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


def _resample_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool) -> Tensor:
    """Resamples positions (…, prefix + rows * cols, width) from one grid to another; the prefix stays."""
    count = old[0] * old[1]
    prefix, patches = table.split([table.shape[-2] - count, count], dim=-2)
    image = patches.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    image = functional.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    patches = image.permute(0, 2, 3, 1).reshape(*table.shape[:-2], new[0] * new[1], -1)
    return torch.cat([prefix, patches.to(table.dtype)], dim=-2)


def _any_size(family: Family, config: Any, size: tuple[int, int], table: Tensor | None) -> bool:
    """Tells whether transformers resamples a model's position table rightly, for other sizes than its own.

    It takes every table for one of a square grid, and most families take patches to be square.
    """
    if table is None:
        return True
    rows, cols = (side // patch for side, patch in zip(size, _pair(config.patch_size), strict=True))
    match family.sizes:
        case "own":
            return False
        case "keyword":
            return rows == cols and isinstance(config.patch_size, int)
        case "always":  # and so at its own size too, unless that is square
            return rows == cols or size[0] != size[1]


def _tell_size(embeddings: nn.Module, size: tuple[int, int], num_patches: int, num_positions: int) -> None:
    """Updates what the embedding's modules keep of the image size beside the config."""
    for module in cast(Iterable[Any], embeddings.modules()):
        if hasattr(module, "image_size"):
            module.image_size = size[0] if isinstance(module.image_size, int) else size
        if hasattr(module, "num_patches"):
            module.num_patches = num_patches
        if hasattr(module, "num_positions"):
            module.num_positions = num_positions
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(num_positions, device=module.position_ids.device)[None]
        if isinstance(module, nn.Embedding):
            module.num_embeddings = num_positions


# -- finding a tower -----------------------------------------------------------------------------------------


def adapt(model: nn.Module) -> TransformersBackbone:
    """Wraps a vision model of transformers, or a larger model around one: image-text, language, classifier.

    Raises:
        UnsupportedModelError: It is none that phreg can patch.
    """
    name = _tower_name(model)
    if name is None or not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"cannot add registers to {type(model).__name__}: {_unsupported_reason(model)}. Supported are "
            f"vision models of the kinds {', '.join(family.name for family in FAMILIES)}: see "
            "phreg/backbones/README.md."
        )
    tower = cast(PreTrainedModel, model.get_submodule(name))
    family, config = cast(Family, _family(tower)), cast(Any, tower.config)
    patch_size, table = _pair(config.patch_size), _parameter(tower, family.pos_embed)
    if hasattr(config, "image_size"):
        input_size = _pair(config.image_size)
    else:  # Siglip2, whose table is square
        side = math.isqrt(config.num_patches)
        input_size = (side * patch_size[0], side * patch_size[1])
    problem = _problem(family, config, input_size, table)
    if problem:
        raise UnsupportedModelError(f"cannot add registers to {type(model).__name__}: {problem}")
    prefix = [token for path in family.cls if (token := _parameter(tower, path)) is not None]
    spec = Spec(
        library="transformers",
        family=family.name,
        patch_size=patch_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_prefix=sum(token.numel() // config.hidden_size for token in prefix),
        input_size=input_size,
        any_size=_any_size(family, config, input_size, table),
        mean=family.normalisation[0],
        std=family.normalisation[1],
    )
    return TransformersBackbone(model, spec, family, name)


def _problem(family: Family, config: Any, size: tuple[int, int], table: Tensor | None) -> str | None:
    """Says why a model of a known family cannot be run by phreg; None where it can."""
    channels = getattr(config, "num_channels", 3)
    if channels != 3:
        return f"it takes images of {channels} channels, not of 3; use a model of RGB images"
    rows, cols = (side // patch for side, patch in zip(size, _pair(config.patch_size), strict=True))
    square = math.isqrt(rows * cols) ** 2 == rows * cols
    if family.sizes == "always" and table is not None and size[0] != size[1] and not square:
        return (
            f"transformers resamples its positions, a grid of {rows}x{cols}, as if they were a square, and "
            "so cannot run it at its own size; use a model of square images"
        )
    return None


def _family(module: nn.Module) -> Family | None:
    """Finds the family whose tower a module is, by its class or one that this derives from."""
    bases = [base for base in type(module).__mro__ if base.__module__.startswith("transformers.models.")]
    return next((TOWERS[base.__name__] for base in bases if base.__name__ in TOWERS), None)


def _tower_name(model: nn.Module) -> str | None:
    """Finds the vision tower: the model itself, a child of it, or the only one deeper in it."""
    if _family(model):
        return ""
    child = next((name for name, child in model.named_children() if _family(child)), None)
    inner = _inner_towers(model)
    return inner[0] if child is None and len(inner) == 1 else child


def _inner_towers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if _family(module)]


def _unsupported_reason(model: nn.Module) -> str:
    if not isinstance(model, PreTrainedModel):
        return "it is no model of transformers"
    kind = model.config.model_type
    if kind in REFUSED:
        return REFUSED[kind]
    inner = _inner_towers(model)
    if inner:
        return f"it has several vision models; give one: {', '.join(f'model.{name}' for name in inner)}"
    return f"its architecture, {kind}, is none that phreg knows to keep a token for each patch to the end"


def _parameter(module: nn.Module, path: str | None) -> nn.Parameter | None:
    """Finds a parameter by its path; None where the model has none there."""
    return dict(module.named_parameters()).get(path) if path else None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# -- loading -------------------------------------------------------------------------------------------------


def load(folder: Path) -> TransformersBackbone:
    """Builds the model in a folder of transformers: fp32, eval mode, tensors only, no code from there.

    Its class is the one that the config names, if that is a vision model, alone or with a classifier or a
    projection; else the one that `AutoModel` takes, such as the full `CLIPModel`.

    Raises:
        LoadError: The folder cannot be read, or its weights do not fit the vision model.
        UnsupportedModelError: It holds a model that phreg cannot patch.
    """
    asked = f"model in {folder}"
    config = _read_json(folder / "config.json", asked)
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{asked}: config.json says model_type {kind!r}, which transformers does not know, and phreg "
            "runs no code that comes with a model; give a model of a class that transformers has"
        )
    try:
        model, found = _model_class(config).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, weights_only=True
        )
    except LOAD_FAILURES as error:
        raise LoadError(
            f"{asked}: transformers cannot load it ({error}); copy or download it again"
        ) from error
    backbone = adapt(model.eval())
    _check_loaded(backbone, found, asked)
    backbone.use_processor(_image_processor(folder, asked))
    return backbone


CONSTRUCTED = {"add_pooling_layer": "pooler.", "use_mask_token": "mask_token"}
"""Constructor arguments that no config holds, and what is in the names of the tensors that they make."""


def build(name: str, config: dict[str, Any], tensors: Collection[str] = ()) -> TransformersBackbone:
    """Builds a model of random weights in fp32, of the name of its class and its config.

    Args:
        name: Name of its class.
        config: Its config.
        tensors: Names of its tensors, which tell what its config does not: whether it has a pooler or a mask
            token. Without any, it has what its class has by default.

    Raises:
        LoadError: They do not belong together, or to this version of transformers.
    """
    try:
        described = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        named = getattr(transformers, name)
        if not (isinstance(named, type) and issubclass(named, PreTrainedModel)):
            raise LoadError(f"{name!r} is no class of models of transformers")
        arguments = constructor_arguments(named, tensors) if tensors else {}
        return adapt(named(described, **arguments).float())
    except (*LOAD_FAILURES, LookupError, AttributeError) as error:
        raise LoadError(
            f"{name} cannot be built of the config of a {config.get('model_type')} ({error}); save it again "
            "with this version of transformers"
        ) from error


def constructor_arguments(model_class: type[PreTrainedModel], tensors: Collection[str]) -> dict[str, bool]:
    """Finds arguments of `CONSTRUCTED` that a class takes, by the names of the tensors that there are."""
    known = inspect.signature(model_class.__init__).parameters
    return {
        argument: any(part in tensor for tensor in tensors)
        for argument, part in CONSTRUCTED.items()
        if argument in known
    }


def load_remote_code(folder: Path) -> TransformersBackbone:
    """Builds a remote-code export of the stock class under its code, which is not run: fp32, eval mode.

    Raises:
        LoadError: The folder cannot be read, or its tensors are not those of the class with registers.
    """
    asked = f"model in {folder}"
    config = without_refusal(_read_json(folder / "config.json", asked))
    try:
        (name,), kind = config["architectures"], config["model_type"].removeprefix(REMOTE_MODEL_TYPE)
        tensors = load_file(folder / "model.safetensors")
        backbone = build(name.removeprefix(REMOTE_CLASS), config | {"model_type": kind}, tensors)
        backbone.insert_registers(torch.zeros(config["num_registers"], backbone.spec.width))
        backbone.model.load_state_dict(tensors)
    except (*LOAD_FAILURES, LookupError, AttributeError, PhregError) as error:
        raise LoadError(f"{asked} cannot be rebuilt without its code ({error}); export it again") from error
    backbone.use_processor(_image_processor(folder, asked))
    return backbone


def _model_class(config: Mapping[str, Any]) -> Any:
    """Picks the class to load a model as."""
    suffixes = ("ForImageClassification", "ForImageClassificationWithTeacher", "WithProjection", "Backbone")
    named = [name for name in config.get("architectures") or () if name.endswith(suffixes) or name in TOWERS]
    return getattr(transformers, named[0], AutoModel) if named else AutoModel


def _check_loaded(backbone: TransformersBackbone, found: Mapping[str, Iterable[str]], asked: str) -> None:
    """Checks that every weight on the image's path came from the file, and that none for it was left over.

    A pooler that the file lacks, as those of self-supervised models do, would be random: it is taken off,
    which is what `add_pooling_layer=False` does.
    """
    tower, prefix = backbone.tower, f"{backbone.tower_name}." if backbone.tower_name else ""
    parts = tuple(f"{prefix}{name}." for name in (REGISTERS, *dict(tower.named_children()))) + HEADS
    # A mask token is used in pre-training only, and position_ids are counted, not learned.
    ignored = ("mask_token", "position_ids")
    missing, unexpected = (
        {name for name in found[key] if name.startswith(parts) and not name.endswith(ignored)}
        for key in ("missing_keys", "unexpected_keys")
    )
    pooler = {name for name in missing if name.startswith(f"{prefix}pooler.")}
    if pooler:
        cast(Any, tower).pooler = None
    for names, problem in ((missing - pooler, "lacks"), (unexpected, "has, unlike the class,")):
        if names:
            raise LoadError(
                f"{asked}: its file {problem} {len(names)} weights on the image's path, such as "
                f"{min(names)}: {type(backbone.model).__name__} did not write it; load it with what did, "
                "and give phreg the instance"
            )


def _image_processor(folder: Path, asked: str) -> dict[str, Any]:
    """Reads the settings of the image processor, where there is one, as `AutoImageProcessor` finds it."""
    return _settings_in(lambda name: folder / name if (folder / name).is_file() else None, asked)


def _processor_at(name_or_path: str, commit: str | None) -> dict[str, Any]:
    """Reads the settings of the image processor where a model came from; empty where that has none."""
    if not name_or_path:
        return {}
    if Path(name_or_path).is_dir():
        return _image_processor(Path(name_or_path), f"model in {name_or_path}")
    return _processor_on_hub(name_or_path, commit)


@lru_cache(maxsize=64)  # so that a hub that does not answer is waited for once
def _processor_on_hub(repository: str, commit: str | None) -> dict[str, Any]:
    return _settings_in(lambda name: hub.find_file(repository, commit, name), f"model '{repository}'")


def _settings_in(find: Callable[[str], Path | None], asked: str) -> dict[str, Any]:
    """Reads the settings of an image processor out of the first file that holds some."""
    whole = find("processor_config.json")
    settings = _read_json(whole, asked).get("image_processor") if whole else None
    vision_tower = None if settings else find("preprocessor_config.json")
    return settings or (_read_json(vision_tower, asked) if vision_tower else {})


def normalisation(settings: Mapping[str, Any]) -> tuple[Triple, Triple] | None:
    """Finds what an image processor subtracts from RGB and divides it by, both on a scale of 0 to 1.

    It may leave out either step, scaling or normalising, and scale otherwise than to between 0 and 1.

    Args:
        settings: What its `preprocessor_config.json` says. What that leaves out, its class says.

    Returns:
        Mean and standard deviation; None where the settings are no image processor's.

    Raises:
        LoadError: They are not three numbers, or one for all.
    """

    def setting(name: str, otherwise: Any) -> Any:
        value = settings.get(name)
        return getattr(_processor_class(settings), name, otherwise) if value is None else value

    if not settings:
        return None
    mean, std = setting("image_mean", None), setting("image_std", None)
    if not setting("do_normalize", otherwise=True):
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        return None
    # What it normalises are the 256 levels times this factor.
    white = 255 * setting("rescale_factor", 1 / 255) if setting("do_rescale", otherwise=True) else 255.0
    white = 1.0 if math.isclose(white, 1, rel_tol=1e-6) else white
    return _rgb(mean, white, settings), _rgb(std, white, settings)


def _rgb(values: Any, white: float, settings: Mapping[str, Any]) -> Triple:
    listed = values if isinstance(values, list | tuple) else [values]
    try:
        scaled = [float(value) / white for value in (listed * 3 if len(listed) == 1 else listed)]
        red, green, blue = scaled
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise LoadError(
            f"an image processor for RGB should normalise with three numbers, or one, found {values!r} of "
            f"{settings.get('image_processor_type', 'its kind')}; correct its preprocessor_config.json"
        ) from error
    return red, green, blue


def _processor_class(settings: Mapping[str, Any]) -> type | None:
    """Finds the class of an image processor, by the name that it goes by today."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    current = str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    return getattr(transformers, current, None) if current.endswith("ImageProcessor") else None


def _read_json(path: Path, asked: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{asked}: {path.name} cannot be read ({error}); copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise LoadError(
            f"{asked}: {path.name} should hold an object, found {type(content).__name__}; "
            "copy or download it again"
        )
    return content
