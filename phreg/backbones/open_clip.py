"""The adapter to open_clip: its own vision transformer, and timm models that it wraps.

The native tower builds its sequence in `_embeds` and takes it apart in `_pool`, so registers are a subclass
that overrides the two; inserting them swaps the tower's `__class__`, removing them swaps it back. Towers
that timm built are left to the timm adapter. Text towers are never touched.

    conv1, positions ──_embeds──► [cls | registers | patches] ──resblocks──► _pool ──proj──► image features
                                         └ inserted here                       └ stripped here

open_clip's tower has one size only. In `run` others work too: the position table is resampled as open_clip
resamples it when it loads one.
"""

import difflib
import json
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from phreg.backbones import timm as timm_adapter
from phreg.backbones.base import Attention, Backbone, Mlp, Spec, Triple, first_unpacked, matrix_of, prefixed
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.parsing import parse_json

CONFIG = "open_clip_config.json"
"""The file that describes a model."""

WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""The files that may hold its weights, best first."""

ASSUMED = "which are OpenAI's"
"""Whose mean and standard deviation are assumed of a model that does not say."""

UNBUILDABLE = (OSError, RuntimeError, TypeError, ValueError, LookupError, AssertionError)
"""What open_clip raises for a config that it can make no model of."""


def adapt(model: nn.Module) -> "NativeTower | TimmTower":
    """Wraps an open_clip model or its bare image tower; nothing about the model changes.

    Raises:
        UnsupportedModelError: The image tower is not one that phreg can patch.
    """
    inside = isinstance(model, CLIP | CustomTextCLIP | CoCa)
    tower, prefix = (model.visual, "visual.") if inside else (model, "")
    if isinstance(tower, TimmModel):
        return TimmTower(model, tower, prefix)
    if type(tower) in (VisionTransformer, RegisterVisionTransformer):
        return NativeTower(model, tower, prefix)
    raise UnsupportedModelError(
        f"cannot add registers to open_clip's {type(model).__name__}: its image tower is a "
        f"{type(tower).__name__}; use a vision transformer such as ViT-B-16: see phreg/backbones/README.md"
    )


# -- open_clip's own tower -----------------------------------------------------------------------------------


def _renamed(function: FunctionType, name: str) -> FunctionType:
    """Copies a function under another name, by which TorchScript keeps it apart from what overrides it."""
    copied = FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copied.__annotations__ = function.__annotations__
    return copied


class RegisterVisionTransformer(VisionTransformer):
    """open_clip's vision transformer with registers inside its block stack.

    TorchScript compiles `_embeds` and `_pool`, and knows no `super()`: the methods that they stand for are
    called by names of their own.
    """

    registers: nn.Parameter
    # TorchScript reads a class's own annotations alone.
    output_tokens: torch.jit.Final[bool]  # pyright: ignore[reportPrivateImportUsage]

    _stock_embeds = _renamed(VisionTransformer._embeds, "_stock_embeds")
    _stock_pool = _renamed(VisionTransformer._pool, "_stock_pool")

    def _embeds(self, x: Tensor) -> Tensor:
        x = self._stock_embeds(x)
        # ln_pre norms every token by itself, so this is the same as insertion ahead of it.
        registers = self.ln_pre(self.registers.to(x.dtype)).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._stock_pool(torch.cat([x[:, :1], x[:, 1 + self.registers.shape[1] :]], dim=1))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """Returns what open_clip's method of this name returns, the registers left out."""
        # Asked for a grid, the parent would fold the registers into its channels without a word.
        fmt = "NLC" if output_fmt == "NCHW" else output_fmt
        output = super().forward_intermediates(
            x, indices, stop_early, normalize_intermediates, intermediates_only, fmt, output_extra_tokens
        )
        patches = [tokens[:, self.registers.shape[1] :] for tokens in output["image_intermediates"]]
        if output_fmt == "NCHW":
            rows = x.shape[-2] // self.conv1.kernel_size[0]
            patches = [tokens.transpose(1, 2).unflatten(2, (rows, -1)).contiguous() for tokens in patches]
        return output | {"image_intermediates": patches}

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes what open_clip's method of this name freezes; registers go with the class embedding."""
        super().lock(unlocked_groups, freeze_bn_stats)
        self.registers.requires_grad_(self.class_embedding.requires_grad)


class NativeTower(Backbone):
    """open_clip's own vision transformer, alone or inside a CLIP.

    Args:
        model: The user's model: the tower itself, or the CLIP that holds it.
        tower: The vision transformer.
        prefix: What the tower's parameter names open with in the model.

    Attributes:
        origin: What open_clip calls the model's config, where it was loaded by that; the model keeps none.
        config: What open_clip built the model of, as `open_clip_config.json` has it; None for an instance.
    """

    def __init__(self, model: nn.Module, tower: Any, prefix: str) -> None:
        mean, std, assumed = _normalisation(tower)
        spec = Spec(
            library="open_clip",
            family="VisionTransformer",
            patch_size=tower.patch_size,
            width=tower.conv1.out_channels,
            num_heads=tower.transformer.resblocks[0].attn.num_heads,
            num_prefix=1,
            input_size=tower.image_size,
            any_size=True,
            mean=mean,
            std=std,
        )
        super().__init__(model, spec, assumed)
        self.origin: str | None = None
        self.config: dict[str, Any] | None = None
        self.tower = tower
        self._prefix = prefix

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        return list(self.tower.transformer.resblocks)

    @property
    def first_block_input(self) -> nn.Module:
        """The norm before the blocks."""
        return self.tower.ln_pre

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block; an identity in CoCa, whose pooler takes raw tokens."""
        pooled_raw = self.tower.attn_pool is not None and self.tower.attn_pool_contrastive is None
        return nn.Identity() if pooled_raw else self.tower.ln_post

    @property
    def projection(self) -> Tensor | None:
        """The (width, dim) matrix from tokens to the joint space; None where a pooler comes between."""
        return self.tower.proj if self.tower.attn_pool is None else None

    @property
    def num_registers(self) -> int:
        """Registers phreg added."""
        return 0 if self.registers is None else self.registers.shape[1]

    @property
    def registers(self) -> nn.Parameter | None:
        """The tower's `registers`, (1, registers, width); None where phreg added none."""
        return getattr(self.tower, "registers", None)

    def insert_registers(self, tokens: Float[Tensor, "registers width"]) -> None:
        """Makes the tower a `RegisterVisionTransformer`, with these registers."""
        self.tower.registers = nn.Parameter(tokens[None].to(self.tower.class_embedding).clone())
        self.tower.__class__ = RegisterVisionTransformer

    def remove_registers(self) -> None:
        """Makes the tower what it was."""
        del self.tower.registers
        self.tower.__class__ = VisionTransformer

    def run(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Encodes images as `encode_image` does, at any size, without the normalisation to unit length."""
        tower, table = self.tower, self._position_table(self.layout(images).grid)
        if table is tower.positional_embedding:
            output = tower(images)
        else:
            output = torch.func.functional_call(tower, {"positional_embedding": table}, (images,))
        return output[0] if tower.output_tokens else output

    def roles(self) -> dict[str, list[str]]:
        """Names the parameters of `model` by role; those of a text tower have none."""
        blocks = [f"block.{index}" for index in range(len(self.blocks))]
        roles: dict[str, list[str]] = {role: [] for role in (*set(ROLES.values()), *blocks)}
        for name, _ in self.tower.named_parameters():
            stem, *rest = name.split(".")
            role = f"block.{rest[1]}" if stem == "transformer" else ROLES[stem]
            roles[role].append(f"{self._prefix}{name}")
        return roles

    def vision_tower(self) -> Backbone:
        """Wraps the tower by itself."""
        return adapt(self.tower)

    def attention(self, index: int) -> Attention:
        """Takes apart the self-attention of one block.

        Raises:
            PhregError: It is a custom block of open_clip's, such as one that norms queries and keys.
        """
        block = self.blocks[index]
        if not isinstance(block, ResidualAttentionBlock):
            raise PhregError(
                f"queries, keys and values of block {index} asked of {self.describe()}, a "
                f"{type(block).__name__} whose attention is not made of these alone; use read-outs and "
                "measures that do without them"
            )
        return _Attention(block.attn, block.ln_1)

    def mlp(self, index: int) -> Mlp | None:
        """Takes apart the MLP of one block, custom ones too; None where its layers are wrapped (PEFT)."""
        mlp: Any = self.blocks[index].mlp
        return Mlp.of([mlp.c_fc], mlp.c_proj, getattr(mlp, "ln", None))

    def built_of(self) -> Mapping[str, Any]:
        """Gives what open_clip built the model of; empty of an instance, which does not say."""
        return self.config or {}

    def set_input_size(self, size: int | tuple[int, int]) -> None:
        """Resamples the stored position table once, so that `size` becomes the model's own size.

        Raises:
            PhregError: The size is no multiple of the patch.
        """
        height, width = (size, size) if isinstance(size, int) else size
        self.check_size((height, width))
        tower, grid = self.tower, (height // self.spec.patch_size[0], width // self.spec.patch_size[1])
        table = self._position_table(grid).detach()
        tower.positional_embedding = nn.Parameter(
            table, requires_grad=tower.positional_embedding.requires_grad
        )
        tower.image_size, tower.grid_size = (height, width), grid
        _note_size(tower, (height, width))
        self.spec = replace(self.spec, input_size=(height, width))

    def _position_table(self, grid: tuple[int, int]) -> Float[Tensor, "tokens width"]:
        """Resamples the position table as open_clip does: bicubic, antialiased, CLS apart."""
        table, own = self.tower.positional_embedding, self.tower.grid_size
        if grid == own:
            return table
        patches = table[1:].float().T.unflatten(1, own)[None]
        patches = functional.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([table[:1], patches[0].flatten(1).T.to(table.dtype)])


ROLES = {
    "registers": "registers",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed",
    "class_embedding": "cls",
    "ln_pre": "norm",
    "ln_post": "norm",
    "attn_pool": "head",
    "attn_pool_contrastive": "head",
    "proj": "head",
}
"""Roles of the native tower's parameters outside its blocks."""


class _Attention:
    """The parts of torch's multi-head attention, whose three projections are one matrix."""

    def __init__(self, attention: nn.MultiheadAttention, norm: nn.Module) -> None:
        self.module: nn.Module = attention
        self._attention = attention
        self._norm = norm
        self.scale: float = attention.head_dim**-0.5

    def norm(self, tokens: Tensor) -> Tensor:
        return self._norm(tokens)

    def queries(self, tokens: Tensor) -> Tensor:
        return self._project(tokens, 0)

    def keys(self, tokens: Tensor) -> Tensor:
        return self._project(tokens, 1)

    def values(self, tokens: Tensor) -> Tensor:
        return self._project(tokens, 2)

    def out(self, tokens: Tensor) -> Tensor:
        return self._attention.out_proj(tokens)

    def _project(self, tokens: Tensor, part: int) -> Tensor:
        """Projects to queries (0), keys (1) or values (2) alone: (batch, heads, tokens, head_dim)."""
        weight = self._attention.in_proj_weight.chunk(3)[part]
        projected = functional.linear(tokens, weight, self._attention.in_proj_bias.chunk(3)[part])
        return projected.unflatten(-1, (self._attention.num_heads, -1)).transpose(1, 2)


# -- timm's models as towers ---------------------------------------------------------------------------------


class TimmTower(Backbone):
    """A timm model that open_clip wraps as an image tower; its trunk is the timm adapter's.

    Args:
        model: The user's model: the tower itself, or the CLIP that holds it.
        tower: open_clip's wrapper: a trunk and a head.
        prefix: What the tower's parameter names open with in the model.

    Attributes:
        origin: What open_clip calls the model's config, where it was loaded by that; the model keeps none.
        config: What open_clip built the model of, as `open_clip_config.json` has it; None for an instance.
    """

    def __init__(self, model: nn.Module, tower: Any, prefix: str) -> None:
        trunk: Any = timm_adapter.adapt(tower.trunk, projects=True)
        mean, std, assumed = _normalisation(tower)
        super().__init__(model, replace(trunk.spec, library="open_clip", mean=mean, std=std), assumed)
        self.origin: str | None = None
        self.config: dict[str, Any] | None = None
        self.tower = tower
        self.trunk = trunk
        self._prefix = prefix

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        return self.trunk.blocks

    @property
    def first_block_input(self) -> nn.Module:
        """The norm before the trunk's blocks, or the first of them."""
        return self.trunk.first_block_input

    @property
    def class_tokens(self) -> tuple[str, ...]:
        """`CLS`, where the trunk has one."""
        return self.trunk.class_tokens

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        return self.trunk.final_norm

    @property
    def projection(self) -> Tensor | None:
        """The (width, dim) matrix from tokens to the joint space; None where pooler or bias is in the way."""
        linear = getattr(self.tower.head, "proj", None)
        if linear is None:
            return self.trunk.projection
        if linear.bias is not None or self.tower.trunk.attn_pool is not None:
            return None
        return matrix_of(linear, first_unpacked(self.trunk.model.parameters()))

    def to_joint(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens dim"]:
        """Takes tokens to the joint space; those of SigLIP each through its attention pooling alone.

        Pooled by itself a token gets all the attention, and goes through values, output projection and MLP.

        Raises:
            PhregError: There is neither a projection nor such a pooling.
        """
        trunk = self.tower.trunk
        if getattr(trunk, "attn_pool", None) is None:
            return super().to_joint(tokens)
        # Not by timm's `forward_head`, which would take a token that is alone for a register and drop it.
        pooled = trunk.fc_norm(trunk.attn_pool(tokens.flatten(0, 1).unsqueeze(1)))
        return self.tower.head(trunk.head(trunk.head_drop(pooled))).unflatten(0, tokens.shape[:2])

    @property
    def num_registers(self) -> int:
        """Registers phreg added."""
        return self.trunk.num_registers

    @property
    def registers(self) -> nn.Parameter | None:
        """The trunk's `reg_token`, native ones first; None where phreg added none."""
        return self.trunk.registers

    def insert_registers(self, tokens: Float[Tensor, "registers width"]) -> None:
        """Puts registers into the trunk, as timm has them."""
        self.trunk.insert_registers(tokens)

    def remove_registers(self) -> None:
        """Undoes `insert_registers`; where CLS was trained since, the model keeps what it learned."""
        self.trunk.remove_registers()

    def run(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Encodes images as `encode_image` does, at any size, without the normalisation to unit length."""
        # Not by the trunk's `run`: that stops short of a projection that open_clip left to the trunk's head.
        with self.trunk._taking((images.shape[-2], images.shape[-1])):
            return self.tower(images)

    def roles(self) -> dict[str, list[str]]:
        """Names the parameters of `model` by role; those of a text tower have none."""
        prefix = f"{self._prefix}trunk."
        roles = {role: [prefix + name for name in names] for role, names in self.trunk.roles().items()}
        return roles | {"head": roles["head"] + prefixed(self.tower.head, f"{self._prefix}head")}

    def vision_tower(self) -> Backbone:
        """Gives the timm model inside, as the timm adapter wraps it."""
        return self.trunk

    def attention(self, index: int) -> Attention:
        """Takes apart the self-attention of one block.

        Raises:
            UnsupportedModelError: It is gated, differential, or runs beside the MLP.
        """
        return self.trunk.attention(index)

    def mlp(self, index: int) -> Mlp | None:
        """Takes apart the MLP of one block; None where timm's block has none that stands by itself."""
        return self.trunk.mlp(index)

    def built_of(self) -> Mapping[str, Any]:
        """Gives what open_clip built the model of; empty of an instance, which does not say."""
        return self.config or {}

    def set_input_size(self, size: int | tuple[int, int]) -> None:
        """Resamples the trunk's position embedding once, so that `size` becomes the model's own size.

        Raises:
            PhregError: The size is no multiple of the patch, or the trunk has no size of its own
            (NaFlexVit).
        """
        self.trunk.set_input_size(size)
        self.spec = replace(self.spec, input_size=self.trunk.spec.input_size)
        self.tower.image_size = self.spec.input_size
        _note_size(self.tower, self.spec.input_size)


def _normalisation(tower: Any) -> tuple[Triple, Triple, str | None]:
    """Reads how images are normalised; OpenAI's way is assumed where open_clip noted nothing on the model."""
    noted = getattr(tower, "preprocess_cfg", {})
    mean = noted.get("mean", open_clip.OPENAI_DATASET_MEAN)
    std = noted.get("std", open_clip.OPENAI_DATASET_STD)
    return tuple(mean), tuple(std), None if _says_normalisation(noted) else ASSUMED


def _says_normalisation(noted: Mapping[str, Any]) -> bool:
    return {"mean", "std"} <= noted.keys()


def _note_size(tower: Any, size: tuple[int, int]) -> None:
    """Tells open_clip's image transforms of a new size."""
    if hasattr(tower, "preprocess_cfg"):
        tower.preprocess_cfg = tower.preprocess_cfg | {"size": size}


# -- from disk -----------------------------------------------------------------------------------------------


def load(folder: Path, arch: str | None = None, tag: str | None = None) -> Backbone:
    """Builds the model of a local open_clip folder, in eval mode and fp32.

    Args:
        folder: Holds `open_clip_config.json` and the weights; with `arch`, the weights are enough.
        arch: An open_clip architecture, such as `ViT-B-16`, to build instead of the one in the folder's
            config.
        tag: What open_clip calls these weights for it, such as `openai`.

    Raises:
        LoadError: Config or weights are missing or broken, or do not belong together.
        UnsupportedModelError: The image tower is not one that phreg can patch.
    """
    asked = f"open_clip model '{folder}'" if arch is None else f"open_clip model '{folder}' as {arch}"
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise LoadError(f"{asked} has no weights; they should be in {', '.join(WEIGHTS)}")
    try:
        noted = _preprocessing(folder, arch, tag)
        if arch is None:
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        else:
            model = open_clip.create_model(arch, pretrained=str(weights), force_preprocess_cfg=noted)
    except UNBUILDABLE as error:
        raise _unreadable(asked, error) from error
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise _unreadable(asked, error) from error
    backbone = adapt(model.eval())
    backbone.origin = arch or f"local-dir:{folder}"
    if not _says_normalisation(noted):
        backbone.assumed = ASSUMED
    noted = getattr(backbone.tower, "preprocess_cfg", {})
    backbone.config = {"model_cfg": open_clip.get_model_config(backbone.origin), "preprocess_cfg": noted}
    return backbone


def build(
    name: str,
    config: dict[str, Any],
    tensors: Collection[str] = (),  # noqa: ARG001 (the config says all)
) -> "NativeTower | TimmTower":
    """Builds a model of random weights in fp32, of what `open_clip_config.json` says.

    Raises:
        LoadError: open_clip cannot make a model of it.
    """
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        except UNBUILDABLE as error:
            raise LoadError(
                f"open_clip {open_clip.__version__} cannot build the {name} of this config ({error}); save "
                "it again with this version of open_clip"
            ) from error
    backbone = adapt(model)
    backbone.config = config
    return backbone


def _unreadable(asked: str, error: Exception) -> LoadError:
    found = " ".join(str(error).split())
    return LoadError(
        f"{asked} cannot be built from its config and weights: {type(error).__name__}: "
        f"{found[:300]}{'…' if len(found) > 300 else ''}; one is broken or belongs to another model, copy or "
        "download both again"
    )


def _preprocessing(folder: Path, arch: str | None, tag: str | None) -> dict[str, Any]:
    """Finds how images are prepared, which an architecture alone does not say; empty where nothing does.

    The folder's config says it, if there is one; else open_clip's own list of weights.
    """
    if (folder / CONFIG).is_file():
        return dict(parse_json((folder / CONFIG).read_bytes())).get("preprocess_cfg", {})
    if arch is None or tag is None:
        return {}
    weights = open_clip.get_pretrained_cfg(arch.removesuffix("-quickgelu"), tag)
    return {name: weights[name] for name in ("mean", "std") if name in weights}


def hub_file(name: str) -> tuple[str, str]:
    """Finds the pretrained weights that open_clip knows by a name.

    Args:
        name: Architecture and tag, such as `ViT-B-16/openai`.

    Returns:
        The architecture, in its quick-GELU form where the weights were trained with that, and the hub
        repository.

    Raises:
        LoadError: open_clip knows no such weights; near misses are named.
    """
    arch, _, tag = name.partition("/")
    weights = open_clip.get_pretrained_cfg(arch, tag)
    repository = weights.get("hf_hub", "").rpartition("/")[0]
    if not repository:
        known = ["/".join(pair) for pair in open_clip.list_pretrained()]
        near = difflib.get_close_matches(name, known, n=3) or ["ViT-B-16/openai"]
        raise LoadError(
            f"open_clip:{name} is unknown to open_clip {open_clip.__version__}, which names weights "
            f"ARCHITECTURE/TAG; did you mean {' or '.join(near)}?"
        )
    quick = weights.get("quick_gelu", False) and not arch.endswith("-quickgelu")
    return (f"{arch}-quickgelu" if quick else arch), repository
