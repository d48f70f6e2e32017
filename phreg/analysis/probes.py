"""Asks with linear probes what single tokens hold of their own patch.

A patch token should tell where it lies and what its patch looks like. An artifact tells less of both and more
of the image's class (`phreg.analysis.class_probe`), which is how it is known to have been put to another use
(Darcet et al. 2024, arXiv 2309.16588, section 2, figure 5b, tables 1 and 4 to 6).

    batches ──backbone──┬─► outliers of block `focus`
                        └─► tokens of block `layer` ─► final norm ─► sample ─► position, pixels

Every probe is measured on other images than it is trained on. As in the paper, tokens are read behind the
model's final norm; unlike there, at the block where the outliers are, if that is not the last.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from phreg.analysis.gap import outlier_mask
from phreg.analysis.linear import fit_linear, fit_softmax
from phreg.analysis.norms import NormReport
from phreg.backbones.base import Backbone
from phreg.errors import DataError
from phreg.seeding import keyed_generator
from phreg.tokens import TokenLayout

Figures = TypeVar("Figures")


@dataclass(frozen=True, eq=False)
class TokenSample:
    """Patch tokens of some images, with what they ought to know, on the CPU.

    Attributes:
        layer: Block that the tokens are from; the model's final norm is applied.
        grid: Patch rows and columns.
        tokens: Of each image all outliers, and as many others as were asked for.
        images: Number of the image that each is from.
        positions: Number of the patch it stands for, row by row.
        pixels: That patch's pixels, normalised as the model is given them, channel by channel.
        outliers: Whether it is an outlier.
    """

    layer: int
    grid: tuple[int, int]
    tokens: Float[Tensor, "tokens width"]
    images: Int64[Tensor, " tokens"]
    positions: Int64[Tensor, " tokens"]
    pixels: Float[Tensor, "tokens values"]
    outliers: Bool[Tensor, " tokens"]


@dataclass(frozen=True)
class PositionFigures:
    """How well a probe tells where tokens of one kind lie.

    Attributes:
        tokens: Tokens measured, all of held-out images.
        top1: Share of them whose position is predicted exactly.
        distance: Mean distance from the predicted position to the true one, in patches.
        chance: Share of them at the position most common for their kind in training: what `top1` comes to by
            telling only the kind. High where artifacts keep to fixed patches.
    """

    tokens: int
    top1: float
    distance: float
    chance: float


@dataclass(frozen=True)
class ReconstructionFigures:
    """How well a probe tells what the patches of tokens of one kind look like.

    Attributes:
        tokens: Tokens measured, all of held-out images.
        error: Mean Euclidean distance of the predicted pixels to the true ones, over all values of a patch,
            in units of the input normalisation.
        chance: The same, where the mean patch of the training tokens is always predicted. It is low for
            patches that show little, as those of artifacts often do.
    """

    tokens: int
    error: float
    chance: float


@dataclass(frozen=True)
class TokenProbe(Generic[Figures]):
    """What patch tokens know, ordinary ones and outliers apart.

    Attributes:
        trained: Tokens trained on, of both kinds.
        ordinary: Figures of ordinary tokens; None where no held-out image has any.
        outliers: Figures of outliers; None likewise.
    """

    trained: int
    ordinary: Figures | None
    outliers: Figures | None

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return asdict(self)


PositionProbe = TokenProbe[PositionFigures]
"""What patch tokens know of their position."""

ReconstructionProbe = TokenProbe[ReconstructionFigures]
"""What patch tokens know of their patch's pixels."""


def sample_tokens(
    backbone: Backbone,
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
    report: NormReport,
    *,
    layer: int | None = None,
    per_image: int = 256,
    seed: int = 0,
) -> TokenSample:
    """Collects tokens for `position_probe` and `reconstruction_probe`, in one pass over the images.

    An image takes at most `per_image` tokens and its outliers: 256 of ViT-B/16 are 1.6 MB, pixels included.

    Args:
        backbone: The model, in eval mode.
        batches: Normalised images, all of one size.
        report: Says by which gap, in which block, tokens are outliers; of these images or of others.
        layer: Block to read tokens from, negative from the end; None means the one the report focuses on.
        per_image: Most ordinary tokens to keep of an image, drawn at random; outliers are all kept.
        seed: Seed of the draw.

    Raises:
        DataError: There are no images, or their sizes differ.
        PhregError: There is no such block.
    """
    index = probed_layer(backbone, report, layer)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    grids: set[tuple[int, int]] = set()
    seen = 0
    for batch in batches:
        images = batch.to(backbone.device)
        layout, tokens, outliers = read_tokens(backbone, images, report, index)
        patches, pixels = layout.patches(tokens), _pixels(images, layout.grid)
        grids.add(layout.grid)
        if len(grids) > 1:
            raise DataError(
                f"probes asked for with images of one size, found patch grids {sorted(grids)}; "
                "resize the images to one size"
            )
        for image in range(len(images)):
            rest = (~outliers[image]).nonzero().flatten()
            order = torch.randperm(len(rest), generator=keyed_generator("probe", seed, seen))
            chosen = torch.cat([outliers[image].nonzero().flatten(), rest[order[:per_image]]])
            at = chosen.to(patches.device)
            number = torch.full_like(chosen, seen)
            parts.append(
                (patches[image, at].cpu(), number, chosen, pixels[image, at].cpu(), outliers[image, chosen])
            )
            seen += 1
    if not parts:
        raise DataError(f"probes asked for of {backbone.describe()}, found no images; give at least two")
    return TokenSample(index, grids.pop(), *map(torch.cat, zip(*parts, strict=True)))


def position_probe(
    sample: TokenSample, *, test_share: float = 0.25, penalty: float = 1e-2, seed: int = 0
) -> PositionProbe:
    """Trains a linear softmax from a token to its position, and tests it on other images.

    Args:
        sample: The tokens.
        test_share: Share of the images to hold out.
        penalty: L2 penalty of the probe; see `fit_softmax`.
        seed: Seed of the choice of images.

    Raises:
        DataError: There is one image only.
    """
    held = _held_out(sample, test_share, seed)
    tokens, positions, outliers = sample.tokens, sample.positions, sample.outliers
    probe = fit_softmax(tokens[~held], positions[~held], math.prod(sample.grid), penalty)

    def measure(kind: Tensor) -> PositionFigures | None:
        tested = held & kind
        if not tested.any():
            return None
        found, true = probe(tokens[tested]).argmax(1), positions[tested]
        trained = positions[~held & kind]
        common = trained.bincount(minlength=math.prod(sample.grid)).argmax()
        coordinates = [
            torch.stack([at // sample.grid[1], at % sample.grid[1]]).float() for at in (found, true)
        ]
        return PositionFigures(
            tokens=len(true),
            top1=float((found == true).float().mean()),
            distance=float((coordinates[0] - coordinates[1]).norm(dim=0).mean()),
            chance=float((true == common).float().mean()) if len(trained) else 0.0,
        )

    return PositionProbe(int((~held).sum()), measure(~outliers), measure(outliers))


def reconstruction_probe(
    sample: TokenSample, *, test_share: float = 0.25, penalty: float = 1e-2, seed: int = 0
) -> ReconstructionProbe:
    """Fits a linear map from a token to the pixels of its patch, and tests it on other images.

    Args:
        sample: The tokens.
        test_share: Share of the images to hold out.
        penalty: L2 penalty of the map; see `fit_linear`.
        seed: Seed of the choice of images.

    Raises:
        DataError: There is one image only.
    """
    held = _held_out(sample, test_share, seed)
    tokens, pixels = sample.tokens, sample.pixels
    probe = fit_linear(tokens[~held], pixels[~held], penalty)
    mean = pixels[~held].mean(0)

    def measure(kind: Tensor) -> ReconstructionFigures | None:
        tested = held & kind
        if not tested.any():
            return None
        true = pixels[tested]
        errors = (probe(tokens[tested]) - true).norm(dim=1), (mean - true).norm(dim=1)
        return ReconstructionFigures(len(true), *(float(error.mean()) for error in errors))

    return ReconstructionProbe(int((~held).sum()), measure(~sample.outliers), measure(sample.outliers))


def probed_layer(backbone: Backbone, report: NormReport, layer: int | None) -> int:
    """Finds the block to read tokens from: the one asked for, or the one the report focuses on."""
    return report.blocks[report.focus].block if layer is None else backbone.block_index(layer)


@torch.no_grad()
def read_tokens(
    backbone: Backbone, images: Tensor, report: NormReport, layer: int
) -> tuple[TokenLayout, Tensor, Tensor]:
    """Runs the model once.

    Returns:
        Where tokens lie; all tokens of a block behind the final norm, in fp32; and which patches are outliers
        (batch, patches), on the CPU.
    """
    block = report.blocks[report.focus]
    layout = backbone.layout(images)
    found = backbone.block_tokens(images, sorted({layer, block.block}))
    norms = layout.patches(found[block.block]).float().norm(dim=-1)
    return layout, backbone.final_norm(found[layer]).float(), outlier_mask(norms, block.gap).cpu()


def _pixels(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cuts images into patches: (batch, patches, 3 * patch height * patch width)."""
    (rows, cols), (height, width) = grid, images.shape[-2:]
    patches = images.float().unflatten(3, (cols, width // cols)).unflatten(2, (rows, height // rows))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)


def _held_out(sample: TokenSample, share: float, seed: int) -> Tensor:
    """Marks the tokens of images held out for testing, at least one image and not all."""
    count = int(sample.images.max()) + 1
    if count < 2:
        raise DataError(
            "a probe asked for on tokens of 1 image; give two or more, one to learn from and one to test on"
        )
    held = torch.zeros(count, dtype=torch.bool)
    chosen = torch.randperm(count, generator=keyed_generator("held out", seed))
    held[chosen[: held_count(share, count)]] = True
    return held[sample.images]


def held_count(share: float, count: int) -> int:
    """Computes how many of some images to hold out: the share of them, at least one and not all."""
    return min(count - 1, max(1, round(share * count)))
