"""Linear depth: how well a linear map of frozen patch tokens tells how far away each pixel is.

The head is that of DINOv2's linear evaluation (Oquab et al. 2024, arXiv 2304.07193, section 7.4): a 1x1
convolution of patch and CLS token scores 256 depths, and their mean is the answer. Head and losses stand in
`depth_head`.

    images ──backbone──► [patch, CLS] ──head──► depths ──compared with the truth, at its resolution──► figures

The head learns from features read once, or from crops read anew each step. The answer to a picture is the
mean of the depths of the picture and of its mirror image, at its own resolution. Figures are means over
pictures.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import interpolate

from phreg.data.sources import ImageSource
from phreg.errors import DataError
from phreg.evaluation.artifacts import artifact_places
from phreg.evaluation.bootstrap import PerPicture, resample
from phreg.evaluation.datasets.augmentation import PairedCrops
from phreg.evaluation.datasets.depth import LAYOUTS, DepthMaps, open_depths
from phreg.evaluation.datasets.layouts import other_layouts
from phreg.evaluation.dense import Dense
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.metrics.scores import DepthErrors, depth_errors
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.evaluation.tasks.depth_head import DepthHead, gradient_loss, scale_loss
from phreg.evaluation.tasks.depth_settings import PROTOCOLS as PROTOCOLS
from phreg.evaluation.tasks.depth_settings import Settings, first_beta, learning_rate
from phreg.progress import tell
from phreg.seeding import keyed_generator

logger = logging.getLogger(__name__)

DATA = "images with depth maps, for training and testing: a folder in one of the layouts"
TREE = f"""dataset/
  images/train/0001.jpg …  to train on
  images/val/0002.jpg …    to test on
  depths/train/0001.png …  PNG of 16 bits in millimetres, or .npy in metres
  depths/val/0002.png …

{other_layouts(LAYOUTS, "folder")}"""

METRICS = (
    MetricSpec("rmse", "m", better="lower", about="root mean square error of a picture, mean of pictures"),
    MetricSpec("abs_rel", "ratio", better="lower", about="error relative to the true depth"),
    MetricSpec("log10", "decades", better="lower", about="difference of the logarithms of depth"),
    MetricSpec("delta1", about="share of pixels within a factor of 1.25 of the true depth"),
    MetricSpec("delta2", about="share of pixels within a factor of 1.25^2"),
    MetricSpec("delta3", about="share of pixels within a factor of 1.25^3"),
    MetricSpec(
        "artifact_rmse",
        "m",
        better="lower",
        about="root mean square error where the baseline has artifacts",
    ),
)


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Trains a head on the training split and tests it on the validation split.

    Raises:
        DataError: The dataset is of no known layout, or a file of it is wrong.
    """
    train, test = (
        open_depths(data, split, layout=settings.layout, unit=settings.unit) for split in ("train", "val")
    )
    _check_depths(train, settings)
    batches = (_crops if settings.augment else _cached)(reader, train, settings, seed)
    found: dict[int, Metrics] = {}

    def check(step: int, head: DepthHead) -> None:
        if step == settings.steps or (settings.keep_best and step % settings.keep_best == 0):
            found[step] = _measure(reader, test, settings, head)

    train_head(batches, settings, seed, reader, check)
    return _kept(found, settings)


def _kept(found: Mapping[int, Metrics], settings: Settings) -> Metrics:
    """Keeps the best of the heads that were tested, and says how it was chosen."""
    last = found[settings.steps]
    if settings.keep_best is None:
        return last
    step = min(found, key=lambda step: found[step].figures["abs_rel"])
    chosen = {
        "step": step,
        "by": f"least abs_rel on the test pictures, of every {settings.keep_best} steps",
        "last": dict(last.figures),
    }
    return replace(found[step], notes={**found[step].notes, "kept": chosen})


def _check_depths(train: DepthMaps, settings: Settings) -> None:
    """Refuses training pictures none of which has a pixel that counts, after reading the first that has."""
    for number in range(len(train)):
        width, height = train.images.read(number).size
        if _counted(train.depth(number, (height, width)), settings).any():
            return
    raise DataError(
        f"none of the {len(train)} training pictures has a depth between {settings.min_depth:g} and "
        f"{settings.max_depth:g} m, from {train.names[0]} on; correct unit or max_depth, or the depths"
    )


def _counted(truth: Float[Tensor, "*shape"], settings: Settings) -> Bool[Tensor, "*shape"]:
    """Tells which depths count."""
    return (truth > settings.min_depth) & (truth < settings.max_depth)


def train_head(
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: Settings,
    seed: int,
    reader: FeatureReader,
    check: Callable[[int, DepthHead], None] = lambda _step, _head: None,
) -> DepthHead:
    """Trains a head.

    Args:
        batches: Features (batch, dim, rows, cols), and depths in metres (batch, 1, height, width).
        settings: Bins, steps and optimiser.
        seed: Seed of the first weights.
        reader: Says on which device.
        check: Called after each step with how many are done, and the head in eval mode.

    Raises:
        DataError: No depth that was seen counts.
    """
    first = next(batches)
    bins = torch.linspace(settings.min_depth, settings.max_depth, settings.bins)
    head = DepthHead(first[0].shape[1], bins, seed, finer=settings.finer, batch_norm=settings.batch_norm).to(
        first[0].device
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    learned = torch.zeros((), dtype=torch.bool, device=reader.device)
    for step, (features, truth) in enumerate(itertools.chain([first], batches)):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate(step, settings)
            group["betas"] = first_beta(step, settings), settings.beta2
        head.train()
        predicted = interpolate(head(features), truth.shape[-2:], mode="bilinear", align_corners=False)
        counted = _counted(truth, settings)
        learned |= counted.any()
        offset = settings.log_offset
        errors = (predicted + offset).log() - (truth.where(counted, 1) + offset).log()
        loss = scale_loss(errors, counted, mean_only=step < settings.scale_only)
        loss = loss + settings.gradient_weight * gradient_loss(errors, counted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), settings.clip)
        optimizer.step()
        tell("training the head", step + 1, settings.steps)
        check(step + 1, head.eval())
    if not learned:
        raise DataError(
            f"none of the depths that were seen in {settings.steps} steps of training is between "
            f"{settings.min_depth:g} and {settings.max_depth:g} m; raise steps, or give depths of more pixels"
        )
    return head.eval()


@dataclass(frozen=True)
class Mirrored:
    """Images of a source, each mirrored left to right."""

    source: ImageSource

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Names an image as the source does."""
        return self.source.name(index)

    def read(self, index: int) -> Image.Image:
        """Decodes an image and mirrors it."""
        return ImageOps.mirror(self.source.read(index))


class _Squares(NamedTuple):
    """Squared errors at the baseline's artifacts."""

    total: float
    pixels: int


@torch.no_grad()
def _measure(reader: FeatureReader, test: DepthMaps, settings: Settings, head: DepthHead) -> Metrics:
    """Compares with the truth picture by picture, and the pixels at the baseline's artifacts on their own."""

    def predict(dense: Dense) -> Tensor:
        features = _features(dense.grid[None], dense.cls[None], settings).to(reader.device)
        return dense.placement.restore(head(features)[0])[0].cpu()

    places = artifact_places(reader, test.images, settings.reading)
    seen = reader.stream(test.images, settings.reading, "test images")
    mirrored: Iterator[Dense | None] = itertools.repeat(None)
    if settings.flip:
        mirrored = reader.stream(Mirrored(test.images), settings.reading, "mirrored test images")
    found: list[DepthErrors] = []
    pixels = 0
    repaired: list[_Squares] = []
    for number, (dense, other) in enumerate(zip(seen, mirrored, strict=False)):
        truth = dense.placement.cut(test.depth(number, dense.placement.picture_size))
        counted = _counted(truth, settings)
        if not counted.any():
            raise DataError(
                f"depths {test.names[number]} have no pixel between {settings.min_depth:g} and "
                f"{settings.max_depth:g} m, found up to {float(truth.max()):g} m; correct unit or "
                "max_depth, or remove the image"
            )
        predicted = predict(dense)
        if other is not None:
            predicted = (predicted + predict(other).flip(-1)) / 2
        predicted = predicted.clamp(settings.min_depth, settings.max_depth)
        pixels += int(counted.sum())
        found.append(depth_errors(predicted[counted], truth[counted]))
        if places is not None:
            there = dense.placement.restore(places[number][None].float(), "nearest")[0] > 0
            squares = (predicted - truth)[counted & there].double().square()
            repaired.append(_Squares(float(squares.sum()), squares.numel()))
    names = asdict(found[0])
    figures = {name: float(np.mean([getattr(errors, name) for errors in found])) for name in names}
    counts = {name: {"pixels": pixels, "images": len(found)} for name in names}
    notes: dict[str, Any] = {"images": len(found), "readout": reader.readout(settings.reading)}
    if test.remark is not None:
        notes["limits"] = [test.remark]
    if places is not None:
        there = [squares for squares in repaired if squares.pixels]
        notes["pixels_at_artifacts"] = at_artifacts = sum(squares.pixels for squares in there)
        if there:
            figures["artifact_rmse"] = math.sqrt(sum(squares.total for squares in there) / at_artifacts)
            counts["artifact_rmse"] = {"pixels": at_artifacts, "images": len(there)}
        else:
            reason = "no depth that counts lies at an artifact of the baseline"
            logger.warning("artifact_rmse is left out: %s", reason)
            notes["left_out"] = {"artifact_rmse": reason}
    pictures = [test.images.name(number) for number in range(len(test))]
    shares = {name: PerPicture.mean([getattr(errors, name) for errors in found]) for name in names}
    return Metrics(figures, notes=notes, counts=counts, **resample(pictures, shares))


def _features(
    grids: Float[Tensor, "batch rows cols dim"], cls: Float[Tensor, "batch dim"], settings: Settings
) -> Float[Tensor, "batch both rows cols"]:
    """Puts the CLS beside each patch, where asked for."""
    if not settings.class_token:
        return grids.permute(0, 3, 1, 2)
    beside = cls[:, None, None].expand_as(grids)
    return torch.cat([grids, beside], dim=-1).permute(0, 3, 1, 2)


def _cached(
    reader: FeatureReader, train: DepthMaps, settings: Settings, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of features read once, with depths at the resolution of the canvas."""
    stored = reader.features(train.images, settings.reading, "training images")
    # Pictures of one canvas make a batch; those of others, another.
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, grid in enumerate(stored.grids):
        groups.setdefault(grid, []).append(number)
    members = list(groups.values())
    sizes = torch.tensor([len(group) for group in members], dtype=torch.float)
    for step in range(settings.steps):
        generator = keyed_generator("batch", seed, step)
        group = members[int(torch.multinomial(sizes, 1, generator=generator))]
        chosen = torch.randperm(len(group), generator=generator)[: settings.train_batch_size].tolist()
        items = [stored[group[place]] for place in chosen]
        truths = [
            item.placement.put(train.depth(group[place], item.placement.picture_size)[None], 0)
            for place, item in zip(chosen, items, strict=True)
        ]
        features = _features(
            torch.stack([item.grid for item in items]), torch.stack([item.cls for item in items]), settings
        )
        yield features.to(reader.device), torch.stack(truths).to(reader.device)


def _crops(
    reader: FeatureReader, train: DepthMaps, settings: Settings, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of features of random crops, with the depths of their pixels."""
    spec = reader.backbone.spec
    exact = settings.reading.fit == "centred"  # which pads what it reads to whole patches
    size = settings.crop.sides if exact else settings.crop.whole_patches(spec.patch_size)
    crops = PairedCrops(settings.crop, size, spec.mean, unknown=0)
    whole = settings.reading.model_copy(update={"window": None})
    mean, std = (torch.tensor(values, device=reader.device).view(3, 1, 1) for values in (spec.mean, spec.std))
    order = (
        number
        for epoch in itertools.count()
        for number in torch.randperm(len(train), generator=keyed_generator("order", seed, epoch)).tolist()
    )

    def read(number: int) -> tuple[Tensor, Tensor]:
        picture = torch.from_numpy(np.array(train.images.read(number))).permute(2, 0, 1)
        return picture, train.depth(number, (picture.shape[1], picture.shape[2]))

    wanted = itertools.islice(order, settings.steps * settings.train_batch_size)
    coming = reader.read_ahead(read, wanted, settings.train_batch_size)
    for step in range(settings.steps):
        pictures, truths = [], []
        for picture, truth in itertools.islice(coming, settings.train_batch_size):
            pictures.append(picture[:, *train.counted].to(reader.device).float() / 255)
            truths.append(truth[None, *train.counted].to(reader.device))
        images, truth = crops(pictures, truths, seed, step)
        seen = reader((images - mean) / std, whole)
        yield _features(seen.grids, seen.cls, settings), truth
