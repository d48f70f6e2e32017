"""Consistency: whether patches say the same of the same content; no labels, so on any images.

    canvas ──► two windows, whole patches apart ──► cosine where both see the same      shift
    picture ──► and its mirror image, mirrored back ──► cosine of all patches           flip
    many moved views of the baseline, averaged ──► cosine of all patches, of the worst, reference
                                                   and where the baseline has artifacts

Content moves with the picture and artifacts keep to the frame, so they lower the first two; the third asks
how near one pass comes to what many views agree on. Without a baseline the model is its own; a baseline that
is another network is none, and the third is left out. The baseline is read through the model's read-out.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from phreg.analysis.gap import Gap, outlier_mask
from phreg.analysis.norms import outliers
from phreg.backbones.base import Backbone, Readout
from phreg.backbones.readout import use_readout
from phreg.config import Config, Size, ViewsConfig
from phreg.data.sampling import subsample
from phreg.data.sources import ImageSource, open_images
from phreg.errors import PhregError
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.agreement import Agreement, AgreementMeter, incomparable_reason
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.progress import track
from phreg.seeding import keyed_generator
from phreg.teacher import Teacher

logger = logging.getLogger(__name__)

DATA = "any images: a folder, a list, tar shards or a Hugging Face dataset"
TREE = """photos/
  0001.jpg …  in any sub-folders; or a text file of paths, or *.tar"""
METRICS = (
    MetricSpec("shift_agreement", about="cosine of patch features to those of the shifted image"),
    MetricSpec("flip_agreement", about="cosine of patch features to those of the mirrored image"),
    MetricSpec("reference_agreement", about="cosine to the baseline averaged over many views"),
    MetricSpec("reference_worst_percent", about="the same cosine, mean of the worst 1 % of patches"),
    MetricSpec("outlier_rate", better="lower", about="share of patch tokens that are artifacts"),
    MetricSpec("artifact_agreement", about="the same cosine, where the baseline has artifacts"),
    MetricSpec("worst_percent", about="cosine to the moved image, mean of the worst 1 % of patches"),
)


class Settings(Config):
    """Agreement of patch features with themselves and with a many-view reference."""

    size: Size | None = None
    """Size of the pictures in pixels: one number for a square, or height and width; unset means the model's
    own."""
    count: PositiveInt = 64
    """Pictures looked at, spread evenly over those there are."""
    shift: PositiveInt = 3
    """Patches by which windows are apart, along both axes."""
    views: PositiveInt = 40
    """Views of the reference."""
    readout: Readout | None = None
    """How a CLIP-type model's last block is read (phreg.backbones.readout); unset means as phreg trained the
    model, and plain where it did not."""


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Measures agreement under shift and flip and with the reference, and the outlier rate.

    Returns:
        `shift_agreement`, `flip_agreement`, `outlier_rate` and, unless the baseline is another network,
        `reference_agreement`, `reference_worst_percent` and, where it has artifacts, `artifact_agreement`.

    Raises:
        DataError: A picture cannot be read.
        PhregError: The model takes no such size.
    """
    chosen = subsample(open_images(data), settings.count)
    height, width = reader.snap(settings.size or reader.backbone.spec.input_size)
    high, wide = (settings.shift * unit for unit in reader.backbone.spec.patch_size)
    if height <= high or width <= wide:
        raise PhregError(
            f"a shift of {settings.shift} patches, {high}x{wide} pixels, asked of pictures of "
            f"{height}x{width}; lower shift, or raise size"
        )
    canvases = _batches(reader, chosen, (height + high, width + wide))
    batches = [images[..., :height, :width].contiguous() for images in canvases]
    reading = FeatureConfig(readout=settings.readout)
    moved = _moved(reader, reading, canvases, batches, settings.shift)
    flipped = _flipped(reader, reading, batches)
    figures = {"shift_agreement": moved.mean, "flip_agreement": flipped.mean}
    notes: dict[str, Any] = {"images": len(chosen), "readout": reader.readout(reading)}
    counts = {
        "shift_agreement": _over(moved, chosen),
        "flip_agreement": _over(flipped, chosen),
        "outlier_rate": _over(flipped, chosen),
    }
    baseline = reader.reference or reader.backbone
    reason = incomparable_reason(reader.backbone, baseline)
    before = outliers(baseline, batches, layers=[-1], show=1) if reason is None else None
    norms = outliers(reader.backbone, batches, layers=[-1], show=1, original=before)
    rate = {"outlier_rate": norms.outlier_rate}
    if before is not None:
        gap = before.blocks[-1].gap
        found = _reference(reader, reading, baseline, batches, settings.views, seed, gap)
        figures |= {"reference_agreement": found.mean, "reference_worst_percent": found.worst_percent} | rate
        counts |= dict.fromkeys(("reference_agreement", "reference_worst_percent"), _over(found, chosen))
        if found.masked is not None:
            figures["artifact_agreement"] = found.masked
            counts["artifact_agreement"] = {"patches": found.masked_patches}
    else:
        logger.warning("agreement with the baseline is left out: %s", reason)
        notes["reference"] = f"left out: {reason}"
        figures |= rate
    worst = {"shift": moved.worst_percent, "flip": flipped.worst_percent}
    return Metrics(figures, {"worst_percent": worst}, notes, counts=counts)


def _over(found: Agreement, images: ImageSource) -> dict[str, int]:
    return {"patches": found.patches, "images": len(images)}


def _batches(
    reader: FeatureReader, source: ImageSource, size: tuple[int, int]
) -> list[Float[Tensor, "_ 3 _ _"]]:
    """Reads the pictures' middles."""
    reading = FeatureConfig(fit="crop", size=size)
    placed = [reader.place(source.read(number), reading)[0] for number in range(len(source))]
    return [
        reader.normalise(torch.stack(placed[first : first + reader.batch_size]))
        for first in range(0, len(placed), reader.batch_size)
    ]


def _moved(
    reader: FeatureReader,
    reading: FeatureConfig,
    canvases: Sequence[Tensor],
    batches: Sequence[Tensor],
    shift: int,
) -> Agreement:
    """Compares windows at the top left with those at the bottom right of a wider canvas."""
    meter = AgreementMeter()
    for images, first in zip(track("shifts", canvases), batches, strict=True):
        second = images[..., images.shape[-2] - first.shape[-2] :, images.shape[-1] - first.shape[-1] :]
        meter.update(
            reader(first, reading).grids[:, shift:, shift:],
            reader(second.contiguous(), reading).grids[:, :-shift, :-shift],
        )
    return meter.compute()


def _flipped(reader: FeatureReader, reading: FeatureConfig, batches: Sequence[Tensor]) -> Agreement:
    meter = AgreementMeter()
    for images in track("flips", batches):
        meter.update(reader(images.flip(-1), reading).grids.flip(2), reader(images, reading).grids)
    return meter.compute()


def _reference(
    reader: FeatureReader,
    reading: FeatureConfig,
    baseline: Backbone,
    batches: Sequence[Tensor],
    views: int,
    seed: int,
    gap: Gap | None,
) -> Agreement:
    """Compares with the mean of many views of the baseline; masked is beyond the gap in its norms."""
    teacher = Teacher(baseline, ViewsConfig(count=views, sampler="uniform"), bf16=reader.bf16)
    last = len(baseline.blocks) - 1
    meter = AgreementMeter()
    for number, images in enumerate(track("many views", batches)):
        with use_readout(baseline, reader.readout(reading)):
            target = teacher(images, keyed_generator("reference", seed, number)).patches
        with torch.no_grad():
            tokens = baseline.block_tokens(images, [last])[last]
        norms = baseline.layout(images).to_grid(tokens).float().norm(dim=-1)
        meter.update(reader(images, reading).grids, target, outlier_mask(norms, gap))
    return meter.compute()
