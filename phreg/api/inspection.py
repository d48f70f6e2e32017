"""Inspects one or more models on the same images; what is looked at stands in `phreg.analysis`."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from phreg.analysis.inspection import Inspection, look
from phreg.api.arguments import ImagesPath, checked_batch, named_models, short_names, usable_device
from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.data.crops import MEASURED_AT_ONCE, centre_crops, larger
from phreg.data.sampling import subsample
from phreg.data.sources import open_images
from phreg.deprecated import accept_old_arguments
from phreg.errors import PhregError
from phreg.evaluation.datasets.labelled import read_labelled
from phreg.formats.load import Model, open_model
from phreg.progress import ProgressListener, told_to
from phreg.report.folder import check_output, write_inspection
from phreg.report.html import Origin
from phreg.report.page import InspectionReport
from phreg.rollback import unchanged


@accept_old_arguments("inspect")
def inspect(
    model: Model,
    images: ImagesPath | Float[Tensor, "batch 3 height width"],
    *,
    baseline: Model | Sequence[Model] = (),
    output: str | os.PathLike[str] | None = None,
    size: int | tuple[int, int] | None = None,
    count: int = 64,
    labels: ImagesPath | None = None,
    texts: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | None = None,
    observe: ProgressListener | None = None,
) -> InspectionReport:
    """Inspects a model: its artifacts, where they come from, and what they hold.

    Args:
        model: A model in any form that `distill` takes, a run, or an adapter.
        images: Where images are, or a batch of normalised ones.
        baseline: One or more models to compare it with, on the same images.
        output: Folder for inspect.json, report.html and pictures: new, empty, or of an earlier inspection.
            None writes nothing.
        size: Height and width of the images in pixels, or one number for both; None means each model's own.
        count: Images to look at, evenly spaced over those there are.
        labels: Labelled images, in any layout of the task `classification` (a folder a class), to ask what
            single tokens know of an image's class; None leaves that out.
        texts: Texts whose similarity to each patch is mapped, for models with a text tower.
        mean: Mean to normalise images with, RGB on a scale of 0 to 1, for all models; None means as each or
            its image processor says.
        std: Standard deviation to normalise them with, likewise.
        device: Where to run; None means a GPU where there is one, and for an instance, where it is.
        observe: Called with the progress: the name of the work, how much is done, and how much there is.

    Returns:
        What was found; in a notebook it shows itself as the report.

    Raises:
        PhregError: A model or the images cannot be read, or the output holds something else.
    """
    others = [baseline] if isinstance(baseline, str | os.PathLike | nn.Module) else [*baseline]
    _check_look(images, others, output, count, device)
    with told_to(observe) if observe else nullcontext():
        looks = [
            _look(name, given, images, size, count, labels, texts, mean, std, device)
            for name, given in short_names(named_models([model, *others])).items()
        ]
    inspection = InspectionReport.of(replace(looks[0], against=tuple(looks[1:])))
    if output is not None:
        shown = {"images": images if isinstance(images, str | os.PathLike) else "given as a tensor"}
        shown |= {"size": size, "mean": mean, "std": std, "count": count, "labels": labels}
        shown |= {"texts": ", ".join(texts) or None}
        write_inspection(Path(output), inspection, Origin.of("inspect", shown))
    return inspection


def _check_look(
    images: ImagesPath | Tensor,
    others: Sequence[Model],
    output: str | os.PathLike[str] | None,
    count: int,
    device: str | None,
) -> None:
    """Refuses what cannot be looked at, before the first look, so that a typo costs none."""
    if count < 1:
        raise PhregError(f"asked to look at {count} images; give a --count of 1 or more")
    if output is not None:
        check_output(Path(output), images if isinstance(images, str | os.PathLike) else None)
    if device is not None:
        usable_device(device)
    for other in others:
        if not isinstance(other, nn.Module) and os.fspath(other) != "demo":
            resolve.locate(other)


def _look(
    name: str,
    model: Model,
    images: ImagesPath | Tensor,
    size: int | tuple[int, int] | None,
    count: int,
    labels: ImagesPath | None,
    texts: Sequence[str],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    device: str | None,
) -> Inspection:
    """Looks at one of the models that `inspect` was asked about."""
    backbone = open_model(model, mean=mean, std=std)[0]
    with unchanged(*([backbone] if isinstance(model, nn.Module) else [])):
        if device is not None or not isinstance(model, nn.Module):
            backbone.to(usable_device(device))
        return _look_at(backbone.eval(), name, images, size, count, labels, texts)


def _look_at(
    backbone: Backbone,
    name: str,
    images: ImagesPath | Tensor,
    size: int | tuple[int, int] | None,
    count: int,
    labels: ImagesPath | None,
    texts: Sequence[str],
) -> Inspection:
    """Looks at an opened model, where it is."""
    if isinstance(images, str | os.PathLike):
        size = backbone.image_size(size)
        chosen = subsample(open_images(images), count)
        looked_at = list(centre_crops(backbone, chosen, size))
        # At another size than the model's own, positions are resampled as it is.
        resampled = looked_at[:1] if size != backbone.spec.input_size else larger(backbone, chosen)
    else:
        images = checked_batch(backbone, images)
        size = (images.shape[-2], images.shape[-1])
        looked_at = list(images.split(MEASURED_AT_ONCE))
        resampled = looked_at[:1] if size != backbone.spec.input_size else []
    return look(
        backbone,
        name,
        looked_at,
        resampled=resampled,
        labelled=read_labelled(backbone, os.fspath(labels), size) if labels is not None else None,
        queries=texts,
    )
