"""Linear segmentation: how well a linear map of frozen patch tokens names what each pixel shows.

The head is a batch norm and a 1x1 convolution, its scores resampled bilinearly, as DINOv2 evaluates dense
features (Oquab et al. 2024, arXiv 2304.07193, section 7.4). Two ways to train it:

    without crops   features read once, kept on disk; a patch's truth is the share of it each class covers
    with crops      pictures cropped, mirrored, recoloured and read anew each step; truth pixel by pixel

The first costs one reading of the images and a minute; the second is what papers do (`PROTOCOLS`). Testing is
the same: the picture whole or through windows, scores at its own resolution, IoU over the whole split.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from phreg.config import Fraction
from phreg.errors import DataError
from phreg.evaluation.datasets.augmentation import CropConfig, PairedCrops
from phreg.evaluation.datasets.masks import Segmentation
from phreg.evaluation.dense import Dense
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.scores import IGNORE
from phreg.evaluation.protocol import RESAMPLING
from phreg.evaluation.record import Metrics
from phreg.evaluation.tasks.schedules import decay, dinov3_rate, warm_up
from phreg.evaluation.tasks.segmentation import (
    SEGMENTATION_METRICS,
    SEGMENTATION_TREE,
    SegmentationSettings,
    measure_segmentation,
    patch_shares,
)
from phreg.progress import tell
from phreg.seeding import keyed_generator

DATA = "images with masks of classes, for training and testing: a folder in one of the layouts"
TREE = SEGMENTATION_TREE
METRICS = SEGMENTATION_METRICS


class Settings(SegmentationSettings):
    """A linear head on frozen patch tokens."""

    reading: FeatureConfig = FeatureConfig(size=448)
    """Canvas of the pictures when testing, and when training without crops."""
    augment: bool = False
    """Train on random crops, read anew each step, rather than on features read once."""
    crop: CropConfig = CropConfig()
    """Those crops."""
    steps: PositiveInt = 1000
    """Training steps."""
    train_batch_size: PositiveInt = 8
    """Pictures per training step."""
    lr: PositiveFloat = 1e-3
    """Learning rate of AdamW."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of AdamW."""
    power: PositiveFloat = 0.9
    """Exponent of the polynomial decay of the learning rate to 0."""
    warmup: NonNegativeInt = 0
    """Steps of linear warm-up."""
    warmup_start: Fraction | None = None
    """Share of the learning rate that the warm-up starts from; unset means one step's share."""
    schedule: Literal["poly", "dinov3"] = "poly"
    """Decay of the learning rate: poly is mmseg's, dinov3 DINOv3's one-cycle cosine, to 0 too, which does not
    use power."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of channels that are dropped in training, ahead of the batch norm."""


def _exact(size: int) -> dict[str, Any]:
    """Windows of pixels at strides of 341, and crops of their size."""
    reading = {"size": size, "fit": "centred", "window": size, "stride": 341}
    return {"reading": reading, "augment": True, "crop": {"size": size}, "differs": (RESAMPLING,)}


_DINOV2 = _exact(512) | {
    "steps": 40_000,
    "train_batch_size": 16,
    "power": 1.0,
    "warmup": 1500,
    "warmup_start": 1e-6,
}

PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "dinov2": _DINOV2,
    "dinov3": _exact(512)
    | {
        "steps": 40_000,
        "train_batch_size": 16,
        "weight_decay": 1e-3,
        "warmup": 1500,
        "warmup_start": 1e-6,
        "schedule": "dinov3",
        "dropout": 0.1,
    },
    "dvt": _DINOV2,
    "ph-reg": _exact(518) | {"steps": 20_000, "crop": {"size": 518, "outside": "black"}},
}
"""Published protocols, with sources in `phreg/evaluation/README.md`: DINOv2's configurations, which DVT
(arXiv 2401.02957) took over; DINOv3's; PH-Reg's for VOC, with twice the steps on ADE20K."""


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Trains a head on the training split and tests it on the validation split.

    Raises:
        DataError: The dataset is of no known layout, or a file of it is wrong.
    """
    train, test = settings.open(data, "train"), settings.open(data, "val")
    head = train_head(batches(reader, train, settings, seed), len(train.classes), settings, seed, reader)
    return try_head(head, reader, test, settings)


def try_head(head: nn.Module, reader: FeatureReader, test: Segmentation, settings: Settings) -> Metrics:
    """Tests a head on a model's features.

    Raises:
        DataError: A picture or a mask is wrong.
        PhregError: No pixel counts.
    """

    def score(dense: Dense) -> Tensor:
        return head(dense.grid.permute(2, 0, 1)[None].to(reader.device))[0]

    return measure_segmentation(reader, test, settings.reading, score)


def train_head(
    batches: Iterator[tuple[Tensor, Tensor]],
    num_classes: int,
    settings: Settings,
    seed: int,
    reader: FeatureReader,
    trained: nn.Module | None = None,
) -> nn.Module:
    """Trains batch norm and 1x1 convolution.

    Args:
        batches: As many as settings.steps: features (batch, dim, rows, cols), and their truth, classes of
            pixels (batch, height, width) or shares of patches (batch, classes, rows, cols).
        num_classes: Number of classes.
        settings: Steps and optimiser.
        seed: Seed of the first weights.
        reader: Says on which device.
        trained: A head to train on, which is changed; None starts a new one.

    Raises:
        DataError: Nothing that was seen shows a class.
    """
    first = next(batches)
    new = trained or _head(first[0].shape[1], num_classes, seed)
    head = new.to(first[0].device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    learned = torch.zeros((), dtype=torch.bool, device=reader.device)
    for step, (features, truth) in enumerate(itertools.chain([first], batches)):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate(step, settings)
        loss = head_loss(head(_drop(features, settings.dropout, seed, step)), truth)
        learned |= (truth != IGNORE).any() if truth.dtype == torch.long else truth.any()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tell("training the head", step + 1, settings.steps)
    if not learned:
        raise DataError(
            f"none of the pixels that were seen in {settings.steps} steps of training shows a class; label "
            "more pixels, or raise steps or the size of the canvas"
        )
    return head.eval()


def head_loss(scores: Float[Tensor, "batch classes rows cols"], truth: Tensor) -> Float[Tensor, ""]:
    """Computes the cross-entropy with classes of pixels, or with shares of patches.

    Args:
        scores: What the head says of each patch.
        truth: Classes (batch, height, width), `IGNORE` where they do not count, or shares like `scores`.
    """
    if truth.dtype == torch.long:
        scores = interpolate(scores, truth.shape[-2:], mode="bilinear", align_corners=False)
        # A crop may show nothing that counts.
        return cross_entropy(scores, truth, ignore_index=IGNORE, reduction="sum") / max(
            1, int((truth != IGNORE).sum())
        )
    return -(scores.log_softmax(1) * truth).sum() / truth.sum().clamp(min=1)


def _head(dim: int, num_classes: int, seed: int) -> nn.Module:
    convolution = nn.Conv2d(dim, num_classes, 1)
    weight, bias = convolution.parameters()
    nn.init.normal_(weight, std=0.01, generator=keyed_generator("head", seed))
    nn.init.zeros_(bias)
    return nn.Sequential(nn.BatchNorm2d(dim), convolution)


def learning_rate(step: int, settings: Settings) -> float:
    """Computes the share of the highest learning rate at a step, from 0."""
    steps, warmup, start = settings.steps, settings.warmup, settings.warmup_start
    if settings.schedule == "dinov3":
        # Its code skips the first update of the schedule.
        return dinov3_rate(max(0, step - 1), steps, warmup, start, final=0.0)
    return decay(step, steps, settings.power) * warm_up(step, warmup, start)


def _drop(
    features: Float[Tensor, "batch dim rows cols"], share: float, seed: int, step: int
) -> Float[Tensor, "batch dim rows cols"]:
    """Drops channels of each picture, and lengthens the rest, by a generator of its own."""
    if not share:
        return features
    draws = torch.rand(*features.shape[:2], 1, 1, generator=keyed_generator("dropout", seed, step))
    return features * ((draws >= share) / (1 - share)).to(features)


def batches(
    reader: FeatureReader, train: Segmentation, settings: Settings, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Makes the batches of a training, as `train_head` takes them."""
    return (_crops if settings.augment else _cached)(reader, train, settings, seed)


def _cached(
    reader: FeatureReader, train: Segmentation, settings: Settings, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of features read once, with the shares of classes in each patch."""
    stored = reader.features(train.images, settings.reading, "training images")
    shares: dict[int, Tensor] = {}
    # Pictures of one grid make a batch; those of others, another.
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, grid in enumerate(stored.grids):
        groups.setdefault(grid, []).append(number)
    members = list(groups.values())
    for step in range(settings.steps):
        generator = keyed_generator("batch", seed, step)
        sizes = torch.tensor([len(group) for group in members], dtype=torch.float)
        group = members[int(torch.multinomial(sizes, 1, generator=generator))]
        chosen = torch.randperm(len(group), generator=generator)[: settings.train_batch_size].tolist()
        items = [(group[place], stored[group[place]]) for place in chosen]
        for number, item in items:
            if number not in shares:
                grid = item.grid.shape[0], item.grid.shape[1]
                shares[number] = patch_shares(train, number, item.placement, grid).half()
        features = torch.stack([item.grid for _, item in items]).permute(0, 3, 1, 2)
        truth = torch.stack([shares[number] for number, _ in items]).permute(0, 3, 1, 2)
        yield features.to(reader.device), truth.to(reader.device).float()


def _crops(
    reader: FeatureReader, train: Segmentation, settings: Settings, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of features of random crops, with the classes of their pixels."""
    spec = reader.backbone.spec
    exact = settings.reading.fit == "centred"  # which pads what it reads to whole patches
    size = settings.crop.sides if exact else settings.crop.whole_patches(spec.patch_size)
    crops = PairedCrops(settings.crop, size, spec.mean)
    whole = settings.reading.model_copy(update={"window": None})
    mean, std = (torch.tensor(values, device=reader.device).view(3, 1, 1) for values in (spec.mean, spec.std))
    order = itertools.islice(_shuffled(len(train), seed), settings.steps * settings.train_batch_size)
    coming = reader.read_ahead(train.pair, order, settings.train_batch_size)
    for step in range(settings.steps):
        pictures, truths = [], []
        for picture, mask in itertools.islice(coming, settings.train_batch_size):
            pictures.append(picture.to(reader.device).float() / 255)
            truths.append(mask[None].float().to(reader.device))
        images, truth = crops(pictures, truths, seed, step)
        grids = reader((images - mean) / std, whole).grids
        yield grids.permute(0, 3, 1, 2), truth[:, 0].long()


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Goes through all numbers again and again, each time in another order."""
    for epoch in itertools.count():
        yield from torch.randperm(count, generator=keyed_generator("order", seed, epoch)).tolist()
