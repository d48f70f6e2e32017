"""Dense nearest neighbours: segmentation by looking patches up, without any training.

    training images ──► patch features, and the share of each class in them ──► memory bank
    test images ──► patch features ──k nearest, softmax(cosine / temperature)──► class shares ──► pixels

What a patch is taken for is the weighted mean of what its neighbours show, as in "Towards In-Context Scene
Understanding" (Balažević et al. 2023, arXiv 2306.01667). The bank holds the same number of patches of every
image. By default they are drawn evenly from images read once, and void is left out; the protocol
`hummingbird` draws rare classes first, from crops read several times, and takes void for the first class.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import ColorJitter, InterpolationMode, RandomApply, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from phreg.errors import DataError
from phreg.evaluation.datasets.masks import Segmentation, class_shares
from phreg.evaluation.dense import Dense
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.metrics.scores import IGNORE
from phreg.evaluation.record import Metrics
from phreg.evaluation.tasks.segmentation import (
    SEGMENTATION_METRICS,
    SEGMENTATION_TREE,
    SegmentationSettings,
    measure_segmentation,
)
from phreg.progress import track
from phreg.seeding import keyed_generator

DATA = "images with masks of classes, for training and testing: a folder in one of the layouts"
TREE = SEGMENTATION_TREE
METRICS = SEGMENTATION_METRICS

AT_ONCE = 4096
"""Patches that are looked up at a time, at most."""

SIMILARITIES = AT_ONCE * 50_000
"""Similarities that are held at a time, at most: about 0.8 GB."""


class Settings(SegmentationSettings):
    """Segmentation by nearest neighbours of patches."""

    bank_size: PositiveInt = 50_000
    """Patches in the memory bank."""
    neighbours: PositiveInt = 30
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.02
    """Temperature of their votes."""
    epochs: PositiveInt = 1
    """Times that training images are read, which makes a difference with augment alone."""
    augment: bool = False
    """Read random crops of training images, recoloured, instead of whole images."""
    rare_first: bool = False
    """Draw patches whose classes are in few patches of their image first, instead of evenly."""
    void: Literal["left-out", "first-class"] = "left-out"
    """What training pixels that do not count are in the bank: left out, or of the first class."""


def _hummingbird(size: int) -> dict[str, Any]:
    return {
        "reading": {"size": size, "fit": "square"},
        "bank_size": 10_240_000,
        "neighbours": 30,
        "temperature": 0.02,
        "epochs": 2,
        "augment": True,
        "rare_first": True,
        "void": "first-class",
        "differs": (
            "masks are compared at the size of each picture, theirs at that of the square",
            "neighbours are searched for exactly, theirs approximately",
        ),
    }


PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "hummingbird": _hummingbird(512),
    "hummingbird-14": _hummingbird(504),
}
"""Those of open-hummingbird-eval for patches of 16 and of 14 pixels, with sources in
`phreg/evaluation/README.md`."""

CROP_AREA = (0.5, 2.0)
"""Range of a crop's share of the image; where none fits, it is the middle."""

JITTER = 0.1
"""Range of brightness, contrast, saturation and hue, each in half of the crops."""


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Fills the bank from the training split and labels the validation split.

    Raises:
        DataError: The dataset is of no known layout, or a file of it is wrong.
    """
    train, test = settings.open(data, "train"), settings.open(data, "val")
    bank, shares = _fill(reader, train, settings, seed)

    def score(dense: Dense) -> Tensor:
        queries = dense.grid.flatten(0, 1).to(reader.device)
        found = look_up(bank, shares, queries, settings.neighbours, settings.temperature)
        return found.unflatten(0, dense.grid.shape[:2]).permute(2, 0, 1)

    found = measure_segmentation(reader, test, settings.reading, score)
    return replace(found, notes={**found.notes, "bank": len(bank)})


def look_up(
    bank: Float[Tensor, "patches dim"],
    shares: Float[Tensor, "patches classes"],
    queries: Float[Tensor, "queries dim"],
    neighbours: int,
    temperature: float,
) -> Float[Tensor, "queries classes"]:
    """Averages what the nearest patches of a bank show, weighted by softmax(cosine / temperature).

    Args:
        bank: Features of length 1.
        shares: What each shows.
        queries: Features of any length.
        neighbours: How many are averaged.
        temperature: How much more the nearer ones count.
    """
    found = []
    at_once = max(1, min(AT_ONCE, SIMILARITIES // len(bank)))
    for part in normalize(queries, dim=1).split(at_once):
        cosines, nearest = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        weights = (cosines / temperature).softmax(dim=1)
        found.append((weights.unsqueeze(-1) * shares[nearest]).sum(1))
    return torch.cat(found)


def _fill(reader: FeatureReader, train: Segmentation, settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the same number of patches from each image; those that show nothing that counts are left out."""
    each = max(1, settings.bank_size // (len(train) * settings.epochs))
    features, shares = [], []
    views = _crops if settings.augment else _whole
    for epoch in range(settings.epochs):
        for number, (grid, shown) in enumerate(views(reader, train, settings, seed, epoch)):
            counted = (shown.sum(1) > 0).nonzero().flatten()
            generator = keyed_generator("bank", seed, number, *([epoch] if epoch else []))
            order = _order(shown[counted], generator, rare_first=settings.rare_first)
            chosen = counted[order[:each]]
            features.append(normalize(grid[chosen], dim=1))
            shares.append(shown[chosen])
    if not any(map(len, shares)):
        raise DataError(
            f"none of the patches of the {len(train)} training images shows a class, of masks such as "
            f"{train.masks[0]}, which are read at the size of the canvas; raise reading.size, or label more "
            "pixels"
        )
    return torch.cat(features).to(reader.device), torch.cat(shares).to(reader.device)


def _order(
    shown: Float[Tensor, "patches classes"], generator: torch.Generator, *, rare_first: bool
) -> Int64[Tensor, " patches"]:
    """Orders the patches of an image by chance, or by how many patches have their classes, times chance."""
    if not rare_first:
        return torch.randperm(len(shown), generator=generator)
    present = (shown > 0).float()
    patches_of = present.sum(0)
    return (present @ patches_of * torch.rand(len(shown), generator=generator)).argsort()


LabelledPatches = Iterator[tuple[Float[Tensor, "patches dim"], Float[Tensor, "patches classes"]]]
"""Patches of training images, and the share of each class in them."""


def _whole(
    reader: FeatureReader, train: Segmentation, settings: Settings, _seed: int, _epoch: int
) -> LabelledPatches:
    for number, dense in enumerate(reader.stream(train.images, settings.reading, "training images")):
        size = dense.placement.picture_size
        classes = _known(train.mask(number, size), settings)
        canvas = dense.placement.put(classes[None].float(), IGNORE)[0].long()
        grid = dense.grid.shape[0], dense.grid.shape[1]
        yield dense.grid.flatten(0, 1), class_shares(canvas, grid, len(train.classes)).flatten(0, 1)


def _crops(
    reader: FeatureReader, train: Segmentation, settings: Settings, seed: int, epoch: int
) -> LabelledPatches:
    """Crops of random area and shape, resampled to the square, and recoloured."""
    height, width = reader.snap(settings.reading.size or reader.backbone.spec.input_size)
    recolour = [
        RandomApply([ColorJitter(**{name: JITTER})])
        for name in ("brightness", "contrast", "saturation", "hue")
    ]
    numbers = range(len(train))
    coming = reader.read_ahead(train.pair, numbers, reader.batch_size)
    for number, (picture, mask) in zip(track("training images", numbers), coming, strict=True):
        classes = _known(mask, settings)
        with torch.random.fork_rng(devices=[]):
            draw = torch.randint(2**31, (), generator=keyed_generator("crop", seed, epoch, number))
            torch.manual_seed(int(draw))  # torchvision draws from the global state
            box = RandomResizedCrop.get_params(picture, list(CROP_AREA), [3 / 4, 4 / 3])
            pixels = resized_crop(picture, *box, [height, width], antialias=True)
            for change in recolour:
                pixels = change(pixels)
        shown = resized_crop(classes[None], *box, [height, width], InterpolationMode.NEAREST_EXACT)[0]
        whole = settings.reading.model_copy(update={"window": None})
        grid = reader(reader.normalise(pixels[None]), whole).grids[0].cpu()
        shares = class_shares(shown, (grid.shape[0], grid.shape[1]), len(train.classes))
        yield grid.flatten(0, 1), shares.flatten(0, 1)


def _known(classes: Int64[Tensor, "height width"], settings: Settings) -> Int64[Tensor, "height width"]:
    """Says what pixels that do not count are."""
    return classes if settings.void == "left-out" else torch.where(classes == IGNORE, 0, classes)
