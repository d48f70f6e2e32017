"""Asks with linear probes what single tokens hold: of their own patch, and of the whole image.

A patch token should tell where it lies and what its patch looks like. An artifact tells less of both and more
of the image's class, which is how it is known to have been put to another use (Darcet et al. 2024, arXiv
2309.16588, section 2, figure 5b, tables 1 and 4 to 6).

    batches ──backbone──┬─► outliers of block `focus`
                        └─► tokens of block `layer` ─► final norm ─┬─ sample ────────────► position, pixels
                                                                   └─ one of each image ─► class of the image

Every probe is measured on other images than it is trained on. As in the paper, tokens are read behind the
model's final norm; unlike there, at the block where the outliers are, if that is not the last.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from phreg.analysis.linear import fit_linear, fit_softmax
from phreg.analysis.norms import NormReport, outlier_mask
from phreg.backbones.base import Backbone
from phreg.deprecated import current_attribute
from phreg.errors import DataError
from phreg.seeding import keyed_generator
from phreg.tokens import TokenLayout

ORDINARY, OUTLIER = "ordinary patch", "outlier patch"
"""What `GlobalProbe` calls the two kinds of patch token."""

Figures = TypeVar("Figures")

# -- what its own patch -------------------------------------------------------------------------------------


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
    index = _layer(backbone, report, layer)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    grids: set[tuple[int, int]] = set()
    seen = 0
    for batch in batches:
        images = batch.to(backbone.device)
        layout, tokens, outliers = _read(backbone, images, report, index)
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


# -- what the whole image -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenAccuracy:
    """How well one token tells the class of its image.

    Attributes:
        token: Which one: `ordinary patch`, `outlier patch`, or as `Backbone.special_tokens` names it.
        images: Images that have one, trained and tested on.
        mean: Top-1 accuracy on held-out images, mean over seeds.
        std: Standard deviation over seeds (n - 1); None of a single one.
        values: The accuracy of each seed.
    """

    token: str
    images: int
    mean: float
    std: float | None
    values: tuple[float, ...]

    def __getattr__(self, name: str) -> Any:
        """Finds an attribute by its old name, with a warning."""
        if (new := current_attribute("phreg.analysis.probes.TokenAccuracy", name)) is not None:
            return getattr(self, new)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True)
class GlobalProbe:
    """What single tokens know of the whole image.

    Attributes:
        layer: Block that the tokens are from; the model's final norm is applied.
        images: Number of images.
        without_outliers: Images that have no outlier, which the outliers' probe does without.
        classes: Number of classes.
        chance: Share of the images that are of the most common class.
        seeds: Seeds of the choice of tokens and of held-out images.
        tokens: The accuracy of each kind of token. Without outliers in both parts of the images these have no
            entry.
    """

    layer: int
    images: int
    without_outliers: int
    classes: int
    chance: float
    seeds: tuple[int, ...]
    tokens: tuple[TokenAccuracy, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it. Files keep the keys of version 0.1."""
        tokens = [
            {"spread" if key == "std" else key: value for key, value in asdict(token).items()}
            for token in self.tokens
        ]
        return asdict(self) | {"tokens": tokens}


def global_probe(
    backbone: Backbone,
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
    labels: Int64[Tensor, " images"],
    report: NormReport,
    *,
    layer: int | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    test_share: float = 0.25,
    penalty: float = 1e-2,
) -> GlobalProbe:
    """Classifies images by logistic regression on one token each, kind by kind.

    With each seed other patches are drawn, one ordinary and one outlier an image, and other images are held
    out, of each class the same share.

    Args:
        backbone: The model, in eval mode.
        batches: Normalised images.
        labels: Class of every image, in the order of the batches.
        report: Says by which gap, in which block, tokens are outliers; of these images or of others.
        layer: Block to read tokens from, negative from the end; None means the one the report focuses on.
        seeds: One run each; at least one.
        test_share: Share of each class's images to hold out, at least one and not all.
        penalty: L2 penalty of the probe; see `fit_softmax`.

    Raises:
        DataError: Images and labels are not as many, there are none, or a class has one image only.
        PhregError: There is no such block.
    """
    index = _layer(backbone, report, layer)
    _, classes, sizes = labels.cpu().unique(return_inverse=True, return_counts=True)
    if sizes.numel() and int(sizes.min()) < 2:
        raise DataError(
            f"a probe of the class asked for on {len(labels)} images of {len(sizes)} classes, one of which "
            "has a single image; give two or more of each, one to learn from and one to test on"
        )
    tokens, present = _one_each(backbone, batches, report, index, seeds)
    images = len(present[ORDINARY])
    if images != len(labels) or not images:
        raise DataError(
            f"a probe of the class asked for with {len(labels)} labels, found {images} images; "
            "give one label an image, and at least two images"
        )
    held = {seed: _held_out_by_class(classes, test_share, seed) for seed in seeds}
    found = []
    for name, chosen in tokens.items():
        values = []
        for seed, inputs in zip(seeds, chosen, strict=True):
            trained, tested = present[name] & ~held[seed], present[name] & held[seed]
            if trained.any() and tested.any():
                probe = fit_softmax(inputs[trained], classes[trained], len(sizes), penalty)
                right = probe(inputs[tested]).argmax(1) == classes[tested]
                values.append(float(right.float().mean()))
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            count = int(present[name].sum())
            found.append(TokenAccuracy(name, count, statistics.fmean(values), std, tuple(values)))
    return GlobalProbe(
        layer=index,
        images=images,
        without_outliers=int((~present[OUTLIER]).sum()),
        classes=len(sizes),
        chance=int(sizes.max()) / images,
        seeds=tuple(seeds),
        tokens=tuple(found),
    )


def _one_each(
    backbone: Backbone,
    batches: Iterable[Tensor],
    report: NormReport,
    layer: int,
    seeds: Sequence[int],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Picks one token of each kind from every image.

    Returns:
        By kind, the tokens (seeds, images, width), and which images have one (images,).
    """
    picked: dict[str, list[Tensor]] = {ORDINARY: [], OUTLIER: []}
    present: dict[str, list[bool]] = {ORDINARY: [], OUTLIER: []}
    seen = 0
    for batch in batches:
        layout, tokens, outliers = _read(backbone, batch.to(backbone.device), report, layer)
        patches, tokens = layout.patches(tokens).cpu(), tokens.cpu()
        for image in range(len(batch)):
            generators = [keyed_generator("probe", seed, seen) for seed in seeds]
            for kind, mask in ((ORDINARY, ~outliers[image]), (OUTLIER, outliers[image])):
                candidates = mask.nonzero().flatten() if mask.any() else torch.zeros(1, dtype=torch.long)
                at = [
                    int(candidates[torch.randint(len(candidates), (1,), generator=generator)])
                    for generator in generators
                ]
                picked[kind].append(patches[image, at])
                present[kind].append(bool(mask.any()))
            for index, name in enumerate(backbone.special_tokens):
                picked.setdefault(name, []).append(tokens[image, index].expand(len(seeds), -1))
                present.setdefault(name, []).append(True)
            seen += 1
    empty = torch.empty(len(seeds), 0, backbone.spec.width)
    return (
        {kind: torch.stack(rows, dim=1) if rows else empty for kind, rows in picked.items()},
        {kind: torch.tensor(flags, dtype=torch.bool) for kind, flags in present.items()},
    )


# -- reading and holding out --------------------------------------------------------------------------------


def _layer(backbone: Backbone, report: NormReport, layer: int | None) -> int:
    return report.blocks[report.focus].block if layer is None else backbone.block_index(layer)


@torch.no_grad()
def _read(
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
    held[chosen[: _some(share, count)]] = True
    return held[sample.images]


def _held_out_by_class(classes: Tensor, share: float, seed: int) -> Tensor:
    """Marks images held out for testing, of each class the same share."""
    held = torch.zeros(len(classes), dtype=torch.bool)
    for label in classes.unique().tolist():
        members = (classes == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=keyed_generator("held out", seed, label))
        held[members[order[: _some(share, len(members))]]] = True
    return held


def _some(share: float, count: int) -> int:
    return min(count - 1, max(1, round(share * count)))
