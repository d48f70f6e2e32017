"""A small vision transformer with planted artifacts, its clean twin, and photographs to try them on.

Nothing is downloaded and nothing trained: the weights are worked out on the spot, and the photographs come
with scikit-image. The model is an ordinary timm `VisionTransformer` that has what real ones grow: register
neurons.

    position embedding ─┬─ corner ──────────────────────────► block 3: register neurons ─► huge tokens,
                        └─ quiet, at every tenth patch ┐         ▲                         attention sinks
    pixels ─── content ────────────────────────────────┴► block 0: background

- **The corner sink.** The position embedding marks the corners. A neuron of block 3 reads the mark and
  writes one huge vector.
- **The background sink.** The position embedding marks every tenth patch "quiet", faintly. LayerNorm turns
  up what is faint where a patch has little content of its own, so block 0 can tell flat patches among the
  marked ones, and notes them as background. A second neuron of block 3 reads the note and writes another
  huge vector. Which flat patches become sinks thus depends on how the image lies on the grid, and a moved
  view has its artifacts elsewhere.

From block 3 on, the huge vector drowns what a token knew of its patch, and draws a good part of all
attention. In the clean twin the two neurons are zero and every other weight is the same, so its features
are the truth.

The rest is a plausible feature extractor: filters for texture and colour, attention to near and to similar
patches, random MLPs. The filters are even from left to right, so a mirrored image has mirrored features.
Each part has directions of the residual stream to itself: cosines, orthogonal to each other and to the mean
LayerNorm removes.

The artifacts can be undone from the position embedding alone. In a short run the patch embedding is better
left frozen: its weights are small and each sums over 768 values, so a learning rate that removes a mark
within 100 steps would blur all features first.
"""

import itertools
import math
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from phreg.errors import DataError, PhregError
from phreg.seeding import keyed_generator

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SIZE, PATCH, WIDTH, DEPTH, HEADS, HIDDEN = 224, 16, 96, 6, 4, 192
GRID, HEAD_WIDTH = SIZE // PATCH, WIDTH // HEADS

DETECTOR_BLOCK, SINK_BLOCK = 0, 3
"""Where flat patches are noticed, and where the artifacts emerge."""
DETECTORS = (40, 41)
"""Hidden units of the detector block; their difference is a step from 0 to 1."""
CORNER_NEURON, BACKGROUND_NEURON = 57, 148
"""Hidden units of the sink block: the plant."""

CORNER_MARK, QUIET_MARK, BACKGROUND_MARK = 0.1, 0.2, 0.1
"""Lengths of the marks, small beside content (about 1): so is what a student has to unlearn."""
QUIET_THRESHOLD, SINK_THRESHOLD = 3.6, 0.15
"""Parts of a LayerNormed token, whose length is sqrt(WIDTH), above which neurons fire."""
QUIET_SLOPE, SINK_GAIN = 60.0, 42.0

BRIGHTNESS, TEXTURE, COLOUR = 0.018, 0.04, 0.08
"""Gains of the filters; texture's grows with frequency, as natural images fall off with it."""
POSITION = 0.06
"""Amplitude of each sinusoid."""
NEAR, SIMILAR, SINK_LOGIT = 2.5, 0.8, 2.3
"""What attention is drawn by: gains of near and similar patches, and the logit of a sink."""
ATTENTION = (0.1, 0.5, 1.0, 1.0, 1.0, 1.0)
"""Gain of attention by block: little before the detector, which is to see the patch itself."""
MLP = 0.3

TRAINING = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
)
HELD_OUT = ("chelsea.png", "coffee.png", "rocket.jpg")
"""Photographs inside scikit-image's wheel; see its data/README for their sources."""


# --- The model -----------------------------------------------------------------------------------------


class _Directions(NamedTuple):
    """Orthonormal directions of the residual stream, by what they carry."""

    content: Float[Tensor, "28 width"]
    position: Float[Tensor, "16 width"]
    context: Float[Tensor, "46 width"]
    corner: Float[Tensor, " width"]
    quiet: Float[Tensor, " width"]
    background: Float[Tensor, " width"]
    corner_sink: Float[Tensor, " width"]
    background_sink: Float[Tensor, " width"]

    @property
    def ordinary(self) -> Float[Tensor, "74 width"]:
        """What random maps read and write; positions, marks and sinks pass through them untouched."""
        return torch.cat([self.content, self.context])


def demo_model(*, planted: bool = True) -> "VisionTransformer":
    """Builds the demonstration model: 224 pixels, 14x14 patches, width 96, 6 blocks, no classifier.

    Images are normalised with mean and standard deviation 0.5. The weights are the same on every machine.

    Args:
        planted: Whether the two register neurons are there; if not, this is the clean twin.

    Returns:
        An ordinary timm model in evaluation mode.
    """
    import timm  # not at the top: api imports this module

    with torch.random.fork_rng(devices=[]):  # timm draws weights that are replaced below
        model = timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=0,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=HIDDEN / WIDTH,
            no_embed_class=True,
        )
    half = (0.5, 0.5, 0.5)
    vars(model)["pretrained_cfg"] |= {"mean": half, "std": half, "tag": "", "license": "apache-2.0"}
    to = _directions()
    weights = {
        "cls_token": to.context[0].view(1, 1, WIDTH),
        "pos_embed": _position_embedding(to)[None],
        "patch_embed.proj.weight": torch.einsum("nw,nchv->wchv", to.content, _filters()),
    }
    for index in range(DEPTH):
        random = keyed_generator("demo", index)
        weights |= _attention(index, to, random) | _mlp(index, to, random, planted=planted)
    for name, old in model.state_dict().items():
        # Rounding drops the last bits, which differ from machine to machine; what is not named is neutral.
        new = weights[name].mul(2**20).round() / 2**20 if name in weights else float(name.endswith("weight"))
        old.copy_(torch.as_tensor(new))
    return cast("VisionTransformer", model.eval())


def truth(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch rows cols dim"]:
    """Computes what the demonstration model's patch features would be without artifacts.

    Args:
        images: Images of whole patches, normalised with mean and standard deviation 0.5. At another size than
            224x224 pixels, the position embedding is resampled.
    """
    clean, (height, width) = demo_model(planted=False).to(images.device), images.shape[-2:]
    if (height, width) != (SIZE, SIZE):
        clean.set_input_size(img_size=(height, width))
    grid = (height // PATCH, width // PATCH)
    with torch.inference_mode():
        return clean.forward_features(images)[:, clean.num_prefix_tokens :].unflatten(1, grid)


def _directions() -> _Directions:
    waves = _cosines(WIDTH)[1:]  # the first is constant: LayerNorm removes it
    content, position, context, marks = waves.split([28, 16, 46, 5])
    return _Directions(content, position, context, *marks)


def _cosines(length: int) -> Float[Tensor, "length length"]:
    """The orthonormal basis of the discrete cosine transform, one frequency a row."""
    index = torch.arange(length, dtype=torch.float64)
    basis = torch.cos(torch.pi / length * index[:, None] * (index + 0.5)) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis


def _filters() -> Float[Tensor, "28 3 patch patch"]:
    """24 filters of luminance, from low to high frequency, and 4 of colour, all even from left to right."""
    waves = _cosines(PATCH)
    white, red_blue, green = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    frequencies = sorted(itertools.product(range(8), range(0, 8, 2)), key=lambda pair: (sum(pair), pair))[:24]
    filters = [(white, v, h, TEXTURE * (v + h) or BRIGHTNESS) for v, h in frequencies]
    filters += [(colour, v, 0, COLOUR * (1 + v)) for colour in (red_blue, green) for v in (0, 1)]
    return torch.stack(
        [
            gain * torch.einsum("c,h,w->chw", colour / colour.norm(), waves[v], waves[h])
            for colour, v, h, gain in filters
        ]
    )


def _position_embedding(to: _Directions) -> Float[Tensor, "patches width"]:
    """Four frequencies along each axis, and the marks that make sinks."""
    row, col = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    row, col = row.flatten(), col.flatten()
    angles = torch.outer(torch.cat([row, col]).double(), torch.arange(1, 5) * torch.pi / GRID)
    waves = torch.cat([*angles.sin().chunk(2), *angles.cos().chunk(2)], 1)
    corner = (row % (GRID - 1) == 0) & (col % (GRID - 1) == 0)
    quiet = (row + 3 * col) % 10 == 3  # one in ten, evenly spread, no corner
    marks = torch.outer(corner, CORNER_MARK * to.corner) + torch.outer(quiet, QUIET_MARK * to.quiet)
    return POSITION * waves @ to.position + marks


def _attention(index: int, to: _Directions, random: torch.Generator) -> dict[str, Tensor]:
    """Half of the heads look at near patches, half at similar ones, and all at sinks."""
    ordinary = to.ordinary
    look = torch.zeros(HEADS, HEAD_WIDTH, WIDTH, dtype=torch.float64)
    look[: HEADS // 2, : len(to.position)] = NEAR * to.position
    look[HEADS // 2 :, :-1] = SIMILAR * _normal(random, HEADS // 2, HEAD_WIDTH - 1, len(ordinary)) @ ordinary
    # A head's last channel draws every query towards sinks.
    queries, keys, bias = look, look.clone(), torch.zeros(3, HEADS, HEAD_WIDTH, dtype=torch.float64)
    keys[:, -1] = SINK_LOGIT / math.sqrt(WIDTH) * (to.corner_sink + to.background_sink)
    bias[0, :, -1] = math.sqrt(HEAD_WIDTH)
    values = _normal(random, WIDTH, len(ordinary)) @ ordinary
    out = ATTENTION[index] / math.sqrt(WIDTH) * ordinary.T @ _normal(random, len(ordinary), WIDTH)
    return {
        f"blocks.{index}.attn.qkv.weight": torch.cat([queries.flatten(0, 1), keys.flatten(0, 1), values]),
        f"blocks.{index}.attn.qkv.bias": bias.flatten(),
        f"blocks.{index}.attn.proj.weight": out,
    }


def _mlp(index: int, to: _Directions, random: torch.Generator, *, planted: bool) -> dict[str, Tensor]:
    """Random hidden units, but for the few that have a purpose."""
    ordinary = to.ordinary
    read = _normal(random, HIDDEN, len(ordinary)) @ ordinary
    bias = torch.zeros(HIDDEN, dtype=torch.float64)
    write = MLP / math.sqrt(WIDTH) * _normal(random, HIDDEN, len(ordinary)) @ ordinary
    if index == DETECTOR_BLOCK:
        # GELU rises without end; less a second one that starts 1 later, it stops at 1.
        for neuron, late in zip(DETECTORS, (False, True), strict=True):
            read[neuron], bias[neuron] = QUIET_SLOPE * to.quiet, -QUIET_SLOPE * QUIET_THRESHOLD - late
            write[neuron] = (-1 if late else 1) * BACKGROUND_MARK * to.background
    if index == SINK_BLOCK:
        for neuron, mark, sink in (
            (CORNER_NEURON, to.corner, to.corner_sink),
            (BACKGROUND_NEURON, to.background, to.background_sink),
        ):
            read[neuron], bias[neuron] = planted * SINK_GAIN * mark, -planted * SINK_GAIN * SINK_THRESHOLD
            write[neuron] = planted * sink
    return {
        f"blocks.{index}.mlp.fc1.weight": read,
        f"blocks.{index}.mlp.fc1.bias": bias,
        f"blocks.{index}.mlp.fc2.weight": write.T,
    }


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    """Draws a random map that keeps lengths, on average."""
    return torch.randn(shape, dtype=torch.float64, generator=random) / math.sqrt(shape[-1])


# --- The photographs -----------------------------------------------------------------------------------


def demo_images(*, held_out: bool = False) -> list[Image.Image]:
    """Cuts photographs into squares of 224 pixels: whole ones, and two thirds of them from each corner.

    Args:
        held_out: Whether to take the 18 squares of photographs set aside, or the 58 of the others.

    Raises:
        DataError: scikit-image is installed without its pictures.
    """
    return list(_squares(held_out=held_out).values())


def write_demo_images(folder: str | Path, *, held_out: bool = False) -> list[Path]:
    """Writes what `demo_images` returns into a folder, as PNG files named by photograph.

    Raises:
        PhregError: The folder cannot be written.
        DataError: scikit-image is installed without its pictures.
    """
    paths = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, square in _squares(held_out=held_out).items():
            square.save(path := Path(folder, f"{name}.png"))
            paths.append(path)
    except OSError as error:
        raise PhregError(
            f"cannot write the demonstration photographs into {folder}: {error}; choose another folder"
        ) from error
    return paths


def _squares(*, held_out: bool) -> dict[str, Image.Image]:
    squares = {}
    for name in HELD_OUT if held_out else TRAINING:
        photo = _photograph(name)
        short = min(photo.size)
        for side in (short, short * 2 // 3):
            tops, lefts = ({0, length - side} for length in (photo.height, photo.width))
            for top in sorted(tops):
                for left in sorted(lefts):
                    box = (left, top, left + side, top + side)
                    square = photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
                    squares[f"{Path(name).stem}_{side}_{top}_{left}"] = square
    return squares


def _photograph(name: str) -> Image.Image:
    try:
        with resources.files("skimage").joinpath("data", name).open("rb") as file:
            return Image.open(file).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(
            f"the demonstration asks for the photograph {name} from scikit-image's wheel, "
            f"and finds no {error.filename}; reinstall scikit-image with pip"
        ) from error
