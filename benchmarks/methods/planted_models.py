"""Planted models: small vision transformers of four builds, with artifacts of a known cause, and clean twins.

Each is an ordinary timm `VisionTransformer` whose weights are worked out on the spot, of the scale that those
of trained networks have, so that phreg's default settings apply (the demonstration model's are larger).

    dinov2       CLS, LayerScale, SwiGLU (packed)
    dinov2-reg   the same, with four registers of its own
    clip         CLS, a norm before the blocks, quick GELU, projection of CLS
    siglip       no CLS, GELU (tanh), attention pooling

What is planted, and where, says plants.py. The twin has the same weights without the cause. Norms play the
sinks' channels down, as those of real models do, and no query, key or value of the other tokens reads them:
so other tokens are alike in both, and the twin is what a repair should come to, but for the views' own blur.
"""

import itertools
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, cast

import timm
import torch
from plants import (
    CHANNEL,
    NOTE_BLOCK,
    OTHER_CHANNEL,
    PLANTS,
    SINK_BLOCK,
    Directions,
    Weights,
    at_every_25th,
)
from torch import Tensor

from phreg.demo import demo_images
from phreg.errors import PhregError
from phreg.seeding import keyed_generator

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SIZE, PATCH, WIDTH, DEPTH, HEADS, HIDDEN = 160, 16, 192, 6, 3, 384
GRID, HEAD_WIDTH = SIZE // PATCH, WIDTH // HEADS

BUILDS = {
    "dinov2": ("vit_giant_patch14_dinov2", {"num_classes": 0, "mlp_ratio": 2 * HIDDEN / WIDTH}),
    "dinov2-reg": ("vit_giant_patch14_reg4_dinov2", {"num_classes": 0, "mlp_ratio": 2 * HIDDEN / WIDTH}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 96, "mlp_ratio": HIDDEN / WIDTH}),
    "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 0, "mlp_ratio": HIDDEN / WIDTH}),
}
"""timm architectures, and what is changed beside the size."""

LAYER_SCALE = 0.5
"""DINOv2's, in all blocks."""

DAMPED = 0.05
"""Weight of the sinks' channels in all norms behind the sinks."""

BASE, POSITION, MARK = 3.0, 1.0, 0.5
"""Lengths in the residual stream: what all patches share, position, the mark."""
BRIGHTNESS, TEXTURE, COLOUR = 0.02, 0.25, 0.5
"""Gains of the filters; texture's grows with frequency, as natural images fall off with it."""

READ, NEAR, ATTENTION = 0.05, 2.8, 0.03
"""Root mean square of random weights that read, gain of attention to near patches, and rms of its output."""
WRITE = {"dinov2": 0.03, "dinov2-reg": 0.03, "clip": 0.025, "siglip": 0.025}
"""Root mean square of what random hidden units write."""
FIRST = 0.2
"""Gain of attention in the noting block, which is to see the patch itself."""
STREAM = {"dinov2": 1.0, "dinov2-reg": 1.0, "clip": 2.5, "siglip": 1.0}
"""How long tokens are: the norm before CLIP's blocks stretches them, and all that is written goes with it."""


def kind_of(model: str) -> str | None:
    """Returns the build of planted:KIND; None for other models."""
    return model.removeprefix("planted:") if model.startswith("planted:") else None


def build(kind: str, *, planted: bool = True) -> "VisionTransformer":
    """Builds a planted model: 160 pixels, 10x10 patches, width 192, 6 blocks; the same on every machine.

    Args:
        kind: A key of `PLANTS`.
        planted: Whether the cause of the artifacts is there; if not, this is the clean twin.

    Raises:
        PhregError: There is no such model.
    """
    if kind not in PLANTS:
        raise PhregError(f"asked for the planted model {kind!r}; there are {', '.join(PLANTS)}")
    body, plant = PLANTS[kind]
    architecture, changes = BUILDS[body]
    overlay = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "pool_size": None}
    overlay |= {"num_classes": changes["num_classes"]}  # CLIP's projection is no new classifier
    with torch.random.fork_rng(devices=[]):  # pooling and projection keep what timm draws
        torch.manual_seed(0)
        model = timm.create_model(
            architecture, img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
            pretrained_cfg_overlay=overlay, **changes,
        )  # fmt: skip
    to = _directions()
    own = model.state_dict()
    gated = body.startswith("dinov2")
    weights = Weights(gated=gated, scale=STREAM[body] / (LAYER_SCALE if gated else 1), to=to)
    weights["patch_embed.proj.weight"] = torch.einsum("nw,nchv->wchv", to.ordinary[:60], _filters())
    positions = torch.zeros(own["pos_embed"].shape[1:], dtype=torch.float64)
    positions[-GRID * GRID :] = _position_embedding(to)
    weights["pos_embed"] = positions[None]
    if "cls_token" in own:
        weights["cls_token"] = BASE * to.ordinary[61].view(1, 1, WIDTH)
    if "reg_token" in own:
        weights["reg_token"] = BASE * to.ordinary[None, 62 : 62 + own["reg_token"].shape[1]]
    for index in range(DEPTH):
        weights.update(_block(body, index, weights))
    plant(weights, planted)
    damped = torch.ones(WIDTH)
    damped[[CHANNEL, OTHER_CHANNEL] if kind == "two" else CHANNEL] = DAMPED
    late = tuple(f"blocks.{index}." for index in range(SINK_BLOCK + 1, DEPTH))
    for name, old in own.items():
        if name in weights:
            old.copy_(weights[name])
        elif name == "norm.weight" or (name.startswith(late) and "norm" in name and name.endswith("weight")):
            old.copy_(damped)
        elif ".gamma" in name:
            old.fill_(LAYER_SCALE)
        old.mul_(2**20).round_().div_(2**20)  # coarser than what machines differ by
    return cast("VisionTransformer", model.eval())


def _directions() -> Directions:
    drawn = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=keyed_generator("planted"))
    drawn[0] = 1  # LayerNorm removes the mean
    drawn[1] = 0
    drawn[1, CHANNEL] = 1
    basis = torch.linalg.qr(drawn.T)[0].T[2:]
    return Directions(basis[:168], basis[168:184], *basis[184:188])


def _filters() -> Tensor:
    """48 filters of luminance and 12 of colour, (60, 3, patch, patch), all even from left to right."""
    index = torch.arange(PATCH, dtype=torch.float64)
    waves = torch.cos(torch.pi / PATCH * index[:, None] * (index + 0.5)) * math.sqrt(2 / PATCH)
    waves[0] /= math.sqrt(2)
    white, red_blue, green = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    frequencies = sorted(itertools.product(range(12), range(0, 12, 2)), key=lambda pair: (sum(pair), pair))
    chosen = [(white, v, h, TEXTURE * (v + h) or BRIGHTNESS) for v, h in frequencies[:48]]
    chosen += [(hue, v, h, COLOUR * (1 + v + h)) for hue in (red_blue, green) for v, h in frequencies[:6]]
    return torch.stack(
        [
            gain * torch.einsum("c,h,w->chw", hue / hue.norm(), waves[v], waves[h])
            for hue, v, h, gain in chosen
        ]
    )


def _position_embedding(to: Directions) -> Tensor:
    """What all patches share, four frequencies along each axis, and the marks."""
    row, col = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    )
    angles = torch.outer(torch.cat([row, col]).double(), torch.arange(1, 5) * torch.pi / (2 * GRID))
    waves = torch.cat([*angles.sin().chunk(2), *angles.cos().chunk(2)], 1)
    marked = at_every_25th(GRID, 3)
    return (
        BASE * to.ordinary[60]
        + POSITION / math.sqrt(8) * waves @ to.position
        + MARK * torch.outer(marked, to.mark)
    )


def _block(body: str, index: int, weights: Weights) -> dict[str, Tensor]:
    """Attention to near patches in one head, random elsewhere; a random MLP."""
    draw, to, scale = keyed_generator("planted", body, index), weights.to, weights.scale

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw)

    room = to.ordinary.T @ to.ordinary  # projects onto what random maps read and write
    queries, keys = READ * normal(2, WIDTH, WIDTH) @ room
    for near in (queries, keys):
        near[:HEAD_WIDTH] = 0
        near[: len(to.position)] = NEAR * to.position
    up = READ * normal(HIDDEN, WIDTH) @ room
    gate = READ * normal(HIDDEN, WIDTH) @ room
    rows = 2 * HIDDEN if weights.gated else HIDDEN
    block = f"blocks.{index}."
    return {
        f"{block}mlp.fc2.weight": scale * WRITE[body] * room @ normal(WIDTH, HIDDEN),
        f"{block}mlp.fc1.weight": torch.cat([up, gate]) if weights.gated else up,
        f"{block}mlp.fc1.bias": torch.zeros(rows, dtype=torch.float64),
        f"{block}attn.qkv.weight": torch.cat([queries, keys, READ * normal(WIDTH, WIDTH) @ room]),
        f"{block}attn.qkv.bias": torch.zeros(3 * WIDTH, dtype=torch.float64),
        f"{block}attn.proj.weight": (FIRST if index == NOTE_BLOCK else 1)
        * scale
        * ATTENTION
        * room
        @ normal(WIDTH, WIDTH),
    }


# -- photographs ---------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int = 600) -> Path:
    """Writes numbered crops of scikit-image's photographs.

    Those of `NNN % 5 == 0` are from other photographs than the rest.

    Returns:
        The folder; what is there already stays.
    """
    if len(list(folder.glob("*.png"))) == count:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    squares = {held_out: demo_images(held_out=held_out) for held_out in (True, False)}
    draw = random.Random(0)
    for number in range(count):
        whole = draw.choice(squares[number % 5 == 0])
        side = draw.randint(whole.width * 2 // 3, whole.width)
        left, top = (draw.randint(0, whole.width - side) for _ in range(2))
        whole.resize((SIZE, SIZE), box=(left, top, left + side, top + side)).save(folder / f"{number:03}.png")
    return folder
