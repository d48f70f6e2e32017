"""The adapter to timm's VisionTransformer, Eva and NaFlexVit.

That covers AugReg, DeiT-III, DINO, DINOv2, CLIP and SigLIP (VisionTransformer), EVA02 and DINOv3 (Eva). These
classes know registers natively, so a patched model is one that timm itself could have built: the registers
are timm's own `reg_token`, recorded among the model's construction arguments. One thing is in the way: a
position embedding with a row for CLS has none for registers. Such rows are added, once, to the tokens they
belong to, as timm does when it converts DINOv2 checkpoints.

    as it came   [cls | native registers | patches] + position embedding
    patched      [cls'| native'| added   | patches  + position embedding]      no_embed_class=True

Removal takes the rows back out, exact to the bit where nothing was trained. Models take any multiple of the
patch inside `run`, and only there: outside they stay as strict about sizes as they were.
"""

import difflib
import json
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from timm.layers.format import Format
from timm.layers.mlp import GluMlp, SwiGLU
from timm.layers.mlp import Mlp as TimmMlp
from timm.layers.patch_embed import PatchEmbed
from timm.models import get_arch_name, get_pretrained_cfg
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from phreg.backbones.base import Attention, Backbone, Mlp, Spec, first_unpacked, matrix_of
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.parsing import parse_json

_BIAS = "its blocks have relative position biases for a fixed sequence"
_WINDOWS = "its tokens are merged on the way, or attend within windows, so no token lives through all blocks"
_STREAMS = "it runs a second stream of tokens beside its patches, and a register would belong to neither"
_NO_PREFIX = "its blocks and what comes after them take patches alone, so a register has no place in them"
REFUSED = {
    "VisionTransformerDistilled": "its distillation token leaves no room for registers",
    "Beit": _BIAS,
    "VisionTransformerRelPos": _BIAS,
    "ConVit": _BIAS,
    "Cait": "its class token joins the patches in the last blocks alone, so there is no one stack",
    "Xcit": "its blocks attend over channels and mix patches by convolutions, with no place for a register",
    "CrossVit": _STREAMS,
    "TNT": _STREAMS,
    "Hiera": _WINDOWS,
    "HieraDet": _WINDOWS,
    "Twins": _WINDOWS,
    "VisionTransformerSAM": _WINDOWS,
    "DeepseekVitClassifier": _NO_PREFIX,
    "DeepseekVitEncoder": _NO_PREFIX,
    "Gemma4VitClassifier": _NO_PREFIX,
    "Gemma4VitEncoder": _NO_PREFIX,
    "Qwen3VitClassifier": _NO_PREFIX,
    "Qwen3VitEncoder": _NO_PREFIX,
    "FeatureGetterNet": "it is the features_only wrapper; pass the model inside, its attribute `model`",
}
"""Classes near the supported ones, and why they are not supported."""

ROLES = {
    "reg_token": "registers",
    "cls_token": "cls",
    "pos_embed": "pos_embed",
    "pos_embed_y": "pos_embed",
    "pos_embed_x": "pos_embed",
    "rope": "pos_embed",
    "patch_embed": "patch_embed",
    "norm_pre": "norm",
    "norm": "norm",
}
"""Roles by the name of a parameter, or of the module that holds it."""

UNBUILDABLE = (
    # where the config asks for what timm does not have, or for other weights than there are
    *(RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError),
    # where the weights cannot be read
    *(OSError, EOFError, SafetensorError, pickle.UnpicklingError),
)
"""What timm raises for a folder that it can make no model of."""

ARGS = {"reg_tokens", "num_reg_tokens", "no_embed_class"}
"""Construction arguments that inserting registers may overwrite."""

FINE_TUNED = "ft"
"""Part of timm's tags of weights that were fine-tuned to classes, such as `openai_ft_in1k`."""

CLASSIFIER = "its head is a classifier"
"""Note of phreg's on weights of a CLIP whose head, to judge by its width alone, might be a projection."""

ADDED = "_phreg_added"
"""Attribute of a patched model that holds its `Added`; a plain one, so that copies of the model carry it."""


@dataclass(frozen=True)
class Added:
    """What inserting registers changed.

    Attributes:
        count: Registers added.
        prefix: CLS and native registers as they came, (1, prefix, width).
        positions: Their rows of the position embedding, (1, prefix, width); None where it had no such rows.
        args: Construction arguments of `ARGS` that were set before.
    """

    count: int
    prefix: Tensor
    positions: Tensor | None
    args: dict[str, Any]


# -- models --------------------------------------------------------------------------------------------------


def adapt(model: nn.Module, *, projects: bool = False) -> Backbone:
    """Wraps a timm vision transformer; nothing about the model changes.

    Args:
        model: The model.
        projects: Whether its head is known to be no classifier: it is part of an image-text model.

    Raises:
        UnsupportedModelError: The model is not one that phreg can patch.
    """
    reason = _unsupported_reason(model)
    if reason:
        raise UnsupportedModelError(
            f"cannot add registers to timm's {type(model).__name__}: {reason}. Supported are "
            "VisionTransformer, Eva and NaFlexVit: see phreg/backbones/README.md."
        )
    return TimmBackbone(model, projects=projects)


def _unsupported_reason(model: Any) -> str | None:
    name = type(model).__name__
    if name in REFUSED:
        return REFUSED[name]
    if not isinstance(model, VisionTransformer | Eva | NaFlexVit):
        return "it is not a plain stack of blocks over one sequence of patch tokens"
    if isinstance(model, VisionTransformer) and type(model)._pos_embed is not VisionTransformer._pos_embed:
        return "it lays out its tokens in a way of its own (_pos_embed)"
    if not _is_naflex(model) and not isinstance(model.patch_embed, PatchEmbed):
        return f"its patches come out of a convolutional network ({type(model.patch_embed).__name__})"
    if model.in_chans != 3:
        return f"it takes images of {model.in_chans} channels, not of 3"
    return None


def load(folder: Path) -> Backbone:
    """Builds the model of a local timm folder, in eval mode and fp32.

    Args:
        folder: Holds `config.json` and `model.safetensors`, or else plain tensors in `pytorch_model.bin`.

    Raises:
        LoadError: The folder is incomplete or broken, or config and weights do not belong together.
        UnsupportedModelError: timm does not know the architecture, or phreg cannot patch it.
    """
    asked = f"timm model '{folder}'"
    try:
        config = parse_json((folder / "config.json").read_bytes())
        architecture = str(config["architecture"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(
            f"{asked} should have a config.json that names its architecture, found {_brief(error)}; "
            "give a timm model, or copy it again"
        ) from error
    if not timm.is_model(architecture):
        raise UnsupportedModelError(
            f"{asked} is a {architecture!r}, which timm {timm.__version__} does not know; "
            f"{_near(architecture, timm.list_models())}, or update timm"
        )
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except UNBUILDABLE as error:
        raise LoadError(
            f"{asked} ({architecture}) cannot be built from its config and weights: {_brief(error)}; "
            "one is broken or belongs to another model, copy or download both again"
        ) from error
    backbone = adapt(model.float().eval())
    if not {"mean", "std"} <= config.get("pretrained_cfg", config).keys():
        backbone.assumed = "which are timm's default"
    return backbone


def build(
    name: str,
    config: dict[str, Any],
    tensors: Collection[str] = (),  # noqa: ARG001 (the config says all)
) -> Backbone:
    """Builds a model of random weights in fp32, of what a timm folder's `config.json` says.

    Raises:
        LoadError: timm cannot make a model of it.
    """
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=False)
        except UNBUILDABLE as error:
            raise LoadError(
                f"timm {timm.__version__} cannot build the {name} of this config ({_brief(error)}); "
                "save it again with this version of timm"
            ) from error
    return adapt(model.float())


def is_name(name: str) -> bool:
    """Tells whether timm knows an architecture, named with a tag (`vit_base_patch16_224.dino`) or without."""
    return "/" not in name and timm.is_model(name)


def hub_id(name: str) -> str:
    """Finds the hub repository with the weights of a timm name; without a tag, of timm's default one.

    Raises:
        LoadError: timm knows no such name, has no weights for it on the hub, or shares those of another
            architecture.
    """
    asked = f"timm model '{name}'"
    if not is_name(name):
        near = _near(name, timm.list_models(pretrained=True))
        raise LoadError(f"{asked} is asked for, and timm {timm.__version__} knows no such name; {near}")
    architecture = get_arch_name(name)
    near = _near(name, timm.list_models(f"{architecture}.*", pretrained=True))
    try:
        weights = get_pretrained_cfg(name)
    except RuntimeError as error:  # the tag is wrong
        raise LoadError(f"{asked} is asked for, and timm knows no weights of that name; {near}") from error
    repository = weights.hf_hub_id if weights else None
    if not repository:
        raise LoadError(f"{asked} is asked for, and timm has no weights for it on the hub; {near}")
    owner = get_arch_name(repository.rpartition("/")[2])
    if owner != architecture and timm.is_model(owner):
        raise LoadError(
            f"{asked} shares its weights with {owner}, in {repository}, whose config would build that one; "
            f"ask for {repository} if that will do, else pass timm.create_model('{name}', pretrained=True)"
        )
    return repository


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    if not near:
        return "timm.list_models(pretrained=True) lists what it has"
    return f"did you mean {' or '.join(near)}?"


def _brief(error: Exception) -> str:
    """Shortens another library's error, which may list every tensor of a model."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"


# -- the backbone --------------------------------------------------------------------------------------------


class TimmBackbone(Backbone):
    """A VisionTransformer, Eva or NaFlexVit.

    Args:
        model: The model, patched in place; one that was patched before is recognised.
        projects: Whether its head is known to be no classifier.
    """

    model: Any

    def __init__(self, model: nn.Module, *, projects: bool = False) -> None:
        weights = getattr(model, "pretrained_cfg", None) or {}
        has_normalisation = {"mean", "std"} <= weights.keys()
        super().__init__(model, _spec(model), None if has_normalisation else "which are ImageNet's")
        self.is_clip = _could_project(model) if projects else is_clip(model, weights)
        """Whether its head is a projection to a space shared with text."""

    @property
    def _added(self) -> Added | None:
        return getattr(self.model, ADDED, None)

    @property
    def _embed(self) -> Any:
        """The module that holds CLS, registers and position embedding."""
        return self.model.embeds if _is_naflex(self.model) else self.model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        return list(self.model.blocks)

    @property
    def first_block_input(self) -> nn.Module:
        """The norm before the blocks (an identity in most), or the first block of a class without one."""
        return getattr(self.model, "norm_pre", self.blocks[0])

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block; an identity where timm norms what was pooled instead (`fc_norm`)."""
        return self.model.norm

    @property
    def projection(self) -> Tensor | None:
        """The (width, dim) matrix of a CLIP tower, its head; None elsewhere."""
        if not self.is_clip:
            return None
        return matrix_of(self.model.head, first_unpacked(self.model.norm_pre.parameters()))

    @property
    def class_tokens(self) -> tuple[str, ...]:
        """`CLS`, where there is one: some models have native registers alone."""
        return ("CLS",) if self._embed.cls_token is not None else ()

    @property
    def num_registers(self) -> int:
        """Registers phreg added."""
        return self._added.count if self._added else 0

    @property
    def registers(self) -> nn.Parameter | None:
        """The model's `reg_token`, (1, registers, width), native ones first; None where phreg added none."""
        return self._embed.reg_token if self._added else None

    def insert_registers(self, tokens: Float[Tensor, "registers width"]) -> None:
        """Puts registers between prefix and patches, ahead of any norm before the blocks.

        Raises:
            UnsupportedModelError: The model pools its prefix too, so that registers would show in the output.
            PhregError: The model has registers from phreg already.
        """
        if self._added:
            raise PhregError(
                f"asked for registers on {self.describe()}, which has {self.num_registers} from phreg "
                "already; remove those first"
            )
        if _pools_prefix(self.model):
            raise UnsupportedModelError(
                f"cannot add registers to {self.describe()}: it pools all its tokens, and so would show them "
                "outside the blocks. Use a model that pools CLS or patches."
            )
        if not len(tokens):
            return
        embed, prefix, positions = self._embed, self._prefix(), None
        if embed.pos_embed is not None and not getattr(embed, "no_embed_class", True):
            positions = embed.pos_embed.detach()[:, : self.spec.num_prefix].clone()
            _replace(embed, "pos_embed", embed.pos_embed[:, self.spec.num_prefix :])
            embed.no_embed_class = True
        folded = prefix if positions is None else prefix + positions
        self._set_prefix(torch.cat([folded, tokens[None].to(folded)], dim=1))

        args = dict(getattr(self.model, "_model_args", {}))
        before = {name: args[name] for name in ARGS & args.keys()}
        setattr(self.model, ADDED, Added(len(tokens), prefix, positions, before))
        args["num_reg_tokens" if _is_eva(self.model) else "reg_tokens"] = embed.reg_token.shape[1]
        if positions is not None:
            args["no_embed_class"] = True
        self.model._model_args = args

    def remove_registers(self) -> None:
        """Undoes `insert_registers`; where CLS was trained since, the model keeps what it learned."""
        added = self._added
        if added is None:
            return
        embed, prefix = self._embed, self._prefix()[:, : self.spec.num_prefix]
        if added.positions is not None:
            positions = added.positions.to(prefix)
            untouched = prefix == (added.prefix + added.positions).to(prefix)
            prefix = torch.where(untouched, added.prefix.to(prefix), prefix - positions)
            _replace(embed, "pos_embed", torch.cat([positions, embed.pos_embed], dim=1))
            embed.no_embed_class = False
        self._set_prefix(prefix)

        args = {name: value for name, value in self.model._model_args.items() if name not in ARGS}
        self.model._model_args = args | added.args
        delattr(self.model, ADDED)

    def _prefix(self) -> Tensor:
        """Joins CLS and all registers as the model stores them, (1, prefix + registers, width)."""
        parts = [part.detach() for part in (self._embed.cls_token, self._embed.reg_token) if part is not None]
        like = first_unpacked(self.model.parameters()).detach()
        return torch.cat([like.new_empty(1, 0, self.spec.width), *parts], dim=1)

    def _set_prefix(self, prefix: Tensor) -> None:
        """Stores CLS and registers, and how many they are wherever the model keeps count."""
        embed, grown = self._embed, prefix.shape[1] - self.model.num_prefix_tokens
        num_cls = int(embed.cls_token is not None)
        if num_cls:
            _replace(embed, "cls_token", prefix[:, :1])
        if prefix.shape[1] > num_cls:
            _replace(embed, "reg_token", prefix[:, num_cls:])
        elif embed.reg_token is not None:
            del embed.reg_token  # the parameter, so that None is a plain attribute again
            embed.reg_token = None
        for module in self.model.modules():  # patch dropout spares the prefix, rope does not turn it
            for count in ("num_prefix_tokens", "num_reg_tokens"):
                if hasattr(module, count):
                    setattr(module, count, getattr(module, count) + grown)

    def run(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Runs the model as timm does, at the images' size, and returns its pooled output.

        That is what the classifier is given (`pre_logits`), or what a CLIP tower projects. A model told not
        to pool (`global_pool=""`) gives CLS, or the mean of its patches where it has none.
        """
        with self._taking((images.shape[-2], images.shape[-1])):
            tokens = self.model.forward_features(images)
        pooled = self.model.forward_head(tokens, pre_logits=not self.is_clip)
        if pooled.ndim == 2:
            return pooled
        first = self.model.num_prefix_tokens
        return pooled[:, 0] if self._embed.cls_token is not None else pooled[:, first:].mean(dim=1)

    def logits(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Runs the model with its own classifier, at the images' size."""
        if self.is_clip or not self.model.num_classes:
            return super().logits(images)
        with self._taking((images.shape[-2], images.shape[-1])):
            return self.model(images)

    @contextmanager
    def _taking(self, size: tuple[int, int]) -> Iterator[None]:
        """Lets the model take another size than its own, as if created with `dynamic_img_size`."""
        model, changes = self.model, []
        fixed = not _is_naflex(model) and not model.dynamic_img_size
        if fixed and size != model.patch_embed.img_size:
            patches = model.patch_embed
            changes += [(model, "dynamic_img_size", True), (patches, "strict_img_size", False)]
            changes += [(patches, "flatten", False), (patches, "output_fmt", Format.NHWC)]
            if hasattr(getattr(model, "rope", None), "_use_cached_embed"):
                # EVA02's rope would otherwise answer for its own grid, whatever grid it is asked for.
                changes.append((model.rope, "_use_cached_embed", False))
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
        for owner, name, value in changes:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)

    def set_input_size(self, size: int | tuple[int, int]) -> None:
        """Resamples the stored position embedding once, by timm's own `set_input_size`.

        Raises:
            PhregError: The size is no multiple of the patch, or the model has no size of its own (NaFlexVit).
        """
        if _is_naflex(self.model):
            super().set_input_size(size)
        sides = (size, size) if isinstance(size, int) else size
        self.check_size(sides)
        self.model.set_input_size(img_size=sides)
        self.spec = replace(self.spec, input_size=sides)

    def roles(self) -> dict[str, list[str]]:
        """Names the parameters of `model` by role.

        As long as phreg added no registers, native ones count as `cls`. Learned frequencies of rope count as
        `pos_embed`; `fc_norm`, which acts on what was pooled, as `head`.
        """
        blocks = [f"block.{index}" for index in range(len(self.model.blocks))]
        names = ("registers", "pos_embed", "patch_embed", "cls", "norm", *blocks, "head")
        roles: dict[str, list[str]] = {name: [] for name in names}
        for name, _ in self.model.named_parameters():
            roles[self._role(name)].append(name)
        return roles

    def _role(self, name: str) -> str:
        stem, _, rest = name.partition(".")
        if stem == "blocks":
            return f"block.{rest.partition('.')[0]}"
        # NaFlexVit keeps all that comes before the blocks in `embeds`.
        role = ROLES.get(rest, "patch_embed") if stem == "embeds" else ROLES.get(stem, "head")
        return "cls" if role == "registers" and not self._added else role

    def attention(self, index: int) -> Attention:
        """Takes apart the self-attention of one block.

        Raises:
            UnsupportedModelError: It is gated, differential, or runs beside the MLP.
        """
        block = self.model.blocks[index]
        attention = getattr(block, "attn", None)
        plain = isinstance(attention, TimmAttention | EvaAttention | AttentionRope)
        if not plain or attention.gate is not None:
            raise UnsupportedModelError(
                f"queries, keys and values of block {index} asked of {self.describe()}, a "
                f"{type(block).__name__} whose attention is not made of these alone (gated, differential, or "
                "beside the MLP); use read-outs and measures that do without them"
            )
        norm_first = not isinstance(block, ResPostBlock | EvaBlockPostNorm)
        return _Attention(attention, block.norm1 if norm_first else nn.Identity())

    def mlp(self, index: int) -> Mlp | None:
        """Takes apart the MLP of one block: plain, gated with both halves in one layer, or gated with two.

        None for blocks that run MLPs side by side (`ParallelThingsBlock`) or fuse theirs with attention
        (`ParallelScalingBlock`, `DiffParallelScalingBlock`), and for MLPs of other classes or with
        convolutions.
        """
        mlp: Any = getattr(self.model.blocks[index], "mlp", None)
        if type(mlp) in (TimmMlp, GluMlp):
            return Mlp.of([mlp.fc1], mlp.fc2, mlp.norm)
        if type(mlp) is SwiGLU:
            return Mlp.of([mlp.fc1_g, mlp.fc1_x], mlp.fc2, mlp.norm)
        return None


def _spec(model: Any) -> Spec:
    added = getattr(model, ADDED, None)
    config = getattr(model, "pretrained_cfg", {})
    if _is_naflex(model):
        patch: tuple[int, int] = model.embeds.patch_size
        _, height, width = config.get("input_size", (3, 224, 224))
        grid = (height // patch[0], width // patch[1])
    else:
        patch, grid = model.patch_embed.patch_size, model.patch_embed.grid_size
    return Spec(
        library="timm",
        family=type(model).__name__,
        patch_size=patch,
        width=model.embed_dim,
        num_heads=next(module.num_heads for module in model.blocks.modules() if hasattr(module, "num_heads")),
        num_prefix=model.num_prefix_tokens - (added.count if added else 0),
        input_size=(grid[0] * patch[0], grid[1] * patch[1]),
        any_size=True,
        mean=tuple(config.get("mean", IMAGENET_DEFAULT_MEAN)),
        std=tuple(config.get("std", IMAGENET_DEFAULT_STD)),
    )


def _is_naflex(model: Any) -> bool:
    return isinstance(model, NaFlexVit)


def _is_eva(model: Any) -> bool:
    return isinstance(model, Eva)


def is_clip(model: Any, weights: Mapping[str, Any]) -> bool:
    """Tells whether the head is a projection of CLS to a space shared with text, and no classifier.

    It is where weights of CLIP came with it: such weights have a head of this width, and were not fine-tuned
    to classes. A head of another width was made for classes since.

    Args:
        model: A model of timm.
        weights: What timm says of its weights, its `pretrained_cfg`.
    """
    return (
        _could_project(model)
        and weights.get("num_classes") == model.head.out_features
        and FINE_TUNED not in (weights.get("tag") or "").split("_")
        and not weights.get("label_names")
        and CLASSIFIER not in (weights.get("notes") or ())
    )


def _could_project(model: Any) -> bool:
    """Tells whether a model is of CLIP's shape; projections that timm converts carry a bias of zeros.

    Of a bias without values (meta device), zeros are assumed.
    """
    bias = getattr(model.head, "bias", None)
    return (
        not isinstance(model.norm_pre, nn.Identity)
        and model.attn_pool is None
        and isinstance(model.head, nn.Linear)
        and (bias is None or bias.is_meta or not bias.any())
    )


def _pools_prefix(model: Any) -> bool:
    """Tells whether CLS and registers are pooled along with the patches."""
    return model.attn_pool is not None if _is_eva(model) else model.pool_include_prefix


def _replace(owner: nn.Module, name: str, value: Tensor) -> None:
    """Puts a new parameter in the place of one that was None or had another shape."""
    old = getattr(owner, name)
    setattr(owner, name, nn.Parameter(value.detach().clone(), requires_grad=old is None or old.requires_grad))


class _Attention:
    """The parts of timm's Attention, EvaAttention or AttentionRope.

    Queries and keys come without rope, which turns them later: in a model with rope their products tell what
    tokens say to each other, but not from where.
    """

    def __init__(self, attention: Any, norm: nn.Module) -> None:
        self.module: nn.Module = attention
        self._attention = attention
        self._norm = norm
        self.scale: float = attention.scale

    def norm(self, tokens: Tensor) -> Tensor:
        return self._norm(tokens)

    def queries(self, tokens: Tensor) -> Tensor:
        return self._attention.q_norm(self._project(tokens, 0))

    def keys(self, tokens: Tensor) -> Tensor:
        return self._attention.k_norm(self._project(tokens, 1))

    def values(self, tokens: Tensor) -> Tensor:
        return self._project(tokens, 2)

    def out(self, tokens: Tensor) -> Tensor:
        return self._attention.proj_drop(self._attention.proj(self._attention.norm(tokens)))

    def _project(self, tokens: Tensor, part: int) -> Tensor:
        """Projects to queries (0), keys (1) or values (2) alone: (batch, heads, tokens, head_dim)."""
        attention, qkv = self._attention, self._attention.qkv
        if qkv is None:
            projected = (attention.q_proj, attention.k_proj, attention.v_proj)[part](tokens)
        elif getattr(attention, "q_bias", None) is not None:  # EVA keeps its biases apart
            bias = (attention.q_bias, attention.k_bias, attention.v_bias)[part]
            projected = functional.linear(tokens, qkv.weight.chunk(3)[part], bias)
        elif type(qkv) is not nn.Linear:  # wrapped by PEFT, whose change is to all three at once
            projected = qkv(tokens).chunk(3, dim=-1)[part]
        else:
            bias = None if qkv.bias is None else qkv.bias.chunk(3)[part]
            projected = functional.linear(tokens, qkv.weight.chunk(3)[part], bias)
        heads = projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        # Heads may share keys and values (grouped-query attention).
        return heads.repeat_interleave(attention.num_heads // heads.shape[1], dim=1)
