"""Consistency: whether patches say the same of the same content; no labels, so on any images.

    canvas ──► two windows, whole patches apart ──► cosine where both see the same      shift
    picture ──► and its mirror image, mirrored back ──► cosine of all patches           flip
    many moved views of the baseline, averaged ──► cosine of all patches, of the worst, reference
                                                   and where the baseline has artifacts

Content moves with the picture and artifacts keep to the frame, so they lower the first two; the third asks
how near one pass comes to what many views agree on. Without a baseline the model is its own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from phreg.analysis.norms import outlier_mask, outliers
from phreg.config import Config, ViewsConfig
from phreg.errors import PhregError
from phreg.evaluation.consistency import Agreement, AgreementMeter
from phreg.evaluation.features import FeatureReader, Reading
from phreg.evaluation.records import Metrics
from phreg.images import Subset, open_images
from phreg.seeding import keyed_generator
from phreg.teacher import Teacher


class Settings(Config):
    """Agreement of patch features with themselves and with a many-view reference."""

    size: PositiveInt | None = None
    """Side of the square pictures in pixels; unset means the model's own."""
    count: PositiveInt = 64
    """Pictures looked at, spread evenly over those there are."""
    shift: PositiveInt = 3
    """Patches by which windows are apart, along both axes."""
    views: PositiveInt = 40
    """Views of the reference."""


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Measures agreement under shift and flip and with the reference, and the outlier rate.

    Raises:
        DataError: A picture cannot be read.
        PhregError: The model takes no such size.
    """
    source = open_images(data)
    step = max(1, len(source) // settings.count)
    chosen = Subset(source, range(0, len(source), step)[: settings.count])
    spec = reader.backbone.spec
    side = round((settings.size or spec.input_size[0]) / spec.patch_size[0])
    if side <= settings.shift:
        raise PhregError(
            f"a shift of {settings.shift} patches asked of pictures of {side}; lower shift, or raise size"
        )
    wide = _batches(reader, chosen, side + settings.shift)
    rows, cols = (side * unit for unit in spec.patch_size)
    batches = [images[..., :rows, :cols].contiguous() for images in wide]
    moved = _moved(reader, wide, batches, side, settings.shift)
    flipped = _flipped(reader, batches)
    reference = _reference(reader, batches, settings, seed)
    figures = {
        "shift_agreement": moved.mean,
        "flip_agreement": flipped.mean,
        "reference_agreement": reference.mean,
        "reference_worst_percent": reference.worst_percent,
        "outlier_rate": outliers(reader.backbone, batches, show=1).outlier_rate,
    }
    if reference.masked is not None:
        figures["artifact_agreement"] = reference.masked
    worst = {"shift": moved.worst_percent, "flip": flipped.worst_percent}
    return Metrics(figures, {"worst_percent": worst}, {"images": len(chosen)})


def _batches(reader: FeatureReader, source: Subset, side: int) -> list[Float[Tensor, "_ 3 _ _"]]:
    """Reads central squares of so many patches."""
    patch = reader.backbone.spec.patch_size
    reading = Reading(fit="crop", size=side * patch[0])
    placed = [reader.place(source.read(number), reading)[0] for number in range(len(source))]
    return [
        reader.normalise(torch.stack(placed[first : first + reader.batch_size]))
        for first in range(0, len(placed), reader.batch_size)
    ]


def _grids(reader: FeatureReader, images: Tensor) -> Float[Tensor, "batch rows cols dim"]:
    return reader(images, Reading()).grids


def _moved(
    reader: FeatureReader, wide: Sequence[Tensor], batches: Sequence[Tensor], side: int, shift: int
) -> Agreement:
    """Compares windows at the top left with those at the bottom right of a wider canvas."""
    meter, seen = AgreementMeter(), side - shift
    for number, (images, first) in enumerate(zip(wide, batches, strict=True)):
        second = images[..., images.shape[-2] - first.shape[-2] :, images.shape[-1] - first.shape[-1] :]
        meter.update(
            _grids(reader, first)[:, shift:, shift:],
            _grids(reader, second.contiguous())[:, :seen, :seen],
        )
        reader.observe("shifts", number + 1, len(wide))
    return meter.compute()


def _flipped(reader: FeatureReader, batches: Sequence[Tensor]) -> Agreement:
    meter = AgreementMeter()
    for number, images in enumerate(batches):
        meter.update(_grids(reader, images.flip(-1)).flip(2), _grids(reader, images))
        reader.observe("flips", number + 1, len(batches))
    return meter.compute()


def _reference(reader: FeatureReader, batches: Sequence[Tensor], settings: Settings, seed: int) -> Agreement:
    """Compares with the mean of many views of the baseline; masked is where that has artifacts."""
    baseline = reader.reference or reader.backbone
    views = ViewsConfig(count=settings.views, sampler="uniform")
    teacher = Teacher(baseline, views, bf16=reader.bf16)
    last = len(baseline.blocks) - 1
    gap = outliers(baseline, batches, layers=[last], show=1).blocks[-1].gap
    meter = AgreementMeter()
    for number, images in enumerate(batches):
        target = teacher(images, keyed_generator("reference", seed, number)).patches
        with torch.no_grad():
            tokens = baseline.block_tokens(images, [last])[last]
        norms = baseline.layout(images).to_grid(tokens).float().norm(dim=-1)
        meter.update(_grids(reader, images), target, outlier_mask(norms, gap))
        reader.observe("many views", number + 1, len(batches))
    return meter.compute()
