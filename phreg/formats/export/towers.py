"""Vision towers in timm's words: the timm model that computes what a tower of another library computes.

A converter, one module per library (`from_transformers`, `from_open_clip`), renames and joins weights, and
says what timm should build to hold them. What both share is here: how a sequence begins, and how a tower
becomes a timm model.

    backbone ──converter──► TimmTowerSpec (architecture, arguments, tensors) ──build──► timm model

Nothing is trusted to have come out right: the export is compared with the model that it came from.
"""

import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Spec
from phreg.backbones.timm import TimmBackbone
from phreg.formats.export.spec import TOLERANCE

SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1152: "so400m", 1280: "huge", 1536: "giant"}
"""Width -> what timm calls models of that width."""

FIRST = ("patch_embed.proj", "embeds.proj")
"""What timm calls the layer that sees pixels."""

EPS = 1e-6
"""What timm's norms add to the variance, but for those of its CLIP models."""

CLIP_EPS = 1e-5
"""What those add."""

LOOSE = 1e-4
"""Tolerance where a model's norms add less to the variance than timm's least, 1e-6, which is no argument of
timm's: a ViT of transformers adds 1e-12. On a real ViT-Ti that moves tokens by 1.5e-5 of the largest."""


@dataclass(frozen=True)
class TimmTowerSpec:
    """A vision transformer in timm's words.

    Attributes:
        architecture: Name of a timm model whose class, norms and MLP are the tower's.
        arguments: How the tower differs from it.
        tensors: The weights, as timm names them; biases that are missing are zero.
        preparation: How images are prepared: `interpolation`, `crop_pct`, `crop_mode`.
        labels: Names of the classes; None where there are none.
        tolerance: Largest difference that counts as equal, relative to the largest value.
    """

    architecture: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    preparation: dict[str, Any]
    labels: list[str] | None = None
    tolerance: float = TOLERANCE


def build(tower: TimmTowerSpec, spec: Spec) -> TimmBackbone:
    """Builds the timm model of a tower, whose weights it shares, and whose registers are timm's own."""
    head = tower.tensors.get("head.weight")
    num_classes = 0 if head is None else len(head)
    settings = {
        "input_size": (3, *spec.input_size),
        "num_classes": num_classes,
        "pool_size": None,
        "mean": spec.mean,
        "std": spec.std,
        "first_conv": next(name for name in FIRST if f"{name}.weight" in tower.tensors),
        "classifier": "head",
        "label_names": tower.labels,
        **tower.preparation,
    }
    with torch.device("meta"):
        model: Any = timm.create_model(
            tower.architecture, pretrained_cfg=settings, num_classes=num_classes, **tower.arguments
        )
    some = next(iter(tower.tensors.values()))
    biases = {
        name: some.new_zeros(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith("bias")
    }
    model.load_state_dict(biases | tower.tensors, assign=True)
    return TimmBackbone(model.eval())


def architecture(eps: float, kind: str, spec: Spec) -> str:
    """Names timm's VisionTransformer of a width, patch and norm, or the plain one where it has none such.

    Args:
        eps: What the model's norms add to the variance.
        kind: How the name should end where the norms are not those of CLIP, such as `dinov2` or `224`.
        spec: What is known about the model.
    """
    kind, plain = ("clip_224", "clip_224") if eps == CLIP_EPS else (kind, "224")
    name = f"vit_{SIZES.get(spec.width)}_patch{spec.patch_size[0]}_{kind}"
    return name if timm.is_model(name) else f"vit_base_patch16_{plain}"


def unsupported_norm(eps: float) -> str | None:
    """Says why timm has no such norm; None where it has, or one so close that the export can be measured."""
    if eps <= EPS or eps == CLIP_EPS:
        return None
    return f"its norms add {eps:g} to the variance, and those of timm at most {CLIP_EPS:g}"


def tolerance(eps: float) -> float:
    """Says how large a difference counts as equal for a model with such norms."""
    return LOOSE if eps < EPS else TOLERANCE


def ratio(hidden: int, width: int) -> float:
    """Finds the MLP ratio from which timm, which rounds down, computes exactly this hidden width."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else math.nextafter(exact, math.inf)


def joined(*layers: nn.Module) -> dict[str, Tensor]:
    """Stacks linear layers; a bias that only some of them have is zero in the others."""
    weight = torch.cat([layer.weight.detach() for layer in layers])  # pyright: ignore[reportArgumentType, reportCallIssue]
    biases: list[Any] = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return {"weight": weight}
    zeros = [layer.weight.new_zeros(len(layer.weight)) for layer in layers]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bias = torch.cat(
        [zero if bias is None else bias.detach() for bias, zero in zip(biases, zeros, strict=True)]
    )
    return {"weight": weight, "bias": bias}


def sequence(
    prefix: Float[Tensor, "1 prefix width"],
    positions: Float[Tensor, "1 positions width"] | None,
    registers: Float[Tensor, "1 registers width"] | None,
    *,
    num_patches: int,
    class_token: bool,
) -> dict[str, Tensor]:
    """Lays a sequence out as timm does, `[cls | registers]` and a position embedding for patches alone.

    Positions of the first prefix tokens, where there are any, are added to those tokens; what the prefix has
    beyond CLS (a distillation token, native registers) becomes the first of timm's registers.
    """
    tensors = {}
    if positions is not None:
        rows = positions.shape[1] - num_patches
        own, tensors["pos_embed"] = positions.split([rows, num_patches], dim=1)
        prefix = torch.cat([prefix[:, :rows] + own, prefix[:, rows:]], dim=1)
    if registers is not None:
        prefix = torch.cat([prefix, registers], dim=1)
    if class_token:
        tensors["cls_token"] = prefix[:, :1]
    rest = prefix[:, int(class_token) :]
    return tensors | ({"reg_token": rest} if rest.shape[1] else {})


def named(**modules: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    """Names the tensors of modules by what the modules are called; `__` stands for a dot."""
    return {
        f"{name.replace('__', '.')}.{key}": tensor.detach()
        for name, module in modules.items()
        for key, tensor in (module if isinstance(module, dict) else module.state_dict()).items()
    }
