"""Zero-shot segmentation: each pixel is called by the words that its patch matches best, without training.

    class names ──vocabulary, templates──► queries (words, dim) ─┐
    picture ──windows──► patches in the joint space, length 1 ───┴─cosines──► restored to the picture's pixels
        ──softmax(cosine / temperature) over words──► best synonym of each class ──► best class, or background

What is measured is the last block's read-out as much as the model, so `head` names it. CLIP's patches match
text poorly as they are (`plain`); `maskclip`, `sclip`, `clearclip` and `naclip` read the last block otherwise
(`phreg.backbones.readout`), and `student` reads a model as phreg trained it. A SigLIP has no projection that
takes a token to its joint space but an attention pooling; its head is `plain`, where each patch is pooled
alone, which is the value path of that pooling (MaskCLIP does so with ResNets). The others are refused.

The defaults are those of PH-Reg (arXiv 2505.21501, table S.5) but for windows, which are averaged patch by
patch before they are resampled, not after; the protocols average pixels.
Pearson's correlation of a class's cosines with its mask is taken over the counted pixels of each picture that
shows the class and something else, and averaged over pictures, then over classes.
"""

import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import PositiveFloat
from torch import Tensor

from phreg.backbones.base import Readout
from phreg.backbones.readout import check_readout
from phreg.backbones.text import text_encoder
from phreg.config import Fraction
from phreg.evaluation.datasets.layouts import other_layouts
from phreg.evaluation.datasets.segmentation import LAYOUTS
from phreg.evaluation.datasets.vocabulary import Queries, embed_vocabulary, find_vocabulary
from phreg.evaluation.dense import Dense
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.scores import IGNORE, pearson
from phreg.evaluation.protocol import RESAMPLING
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.evaluation.tasks.segmentation import (
    SEGMENTATION_METRICS,
    SegmentationSettings,
    measure_segmentation,
)

logger = logging.getLogger(__name__)

DATA = "images with masks of named classes, for testing: a folder in one of the layouts"
TREE = f"""dataset/
  images/val/0001.jpg …
  masks/val/0001.png …  index of each pixel's class; 255 does not count
  classes.txt           names of the classes, one a line, from index 0

{other_layouts(LAYOUTS, "folder")}"""
METRICS = (
    *SEGMENTATION_METRICS,
    MetricSpec("pearson", "correlation", about="of a class's cosines with its mask"),
)

Head = Literal["plain", "maskclip", "sclip", "clearclip", "naclip", "student"]

READOUTS: Mapping[Head, Readout] = {
    "plain": "plain",
    "maskclip": "value-only",
    "sclip": "sclip",
    "clearclip": "clearclip",
    "naclip": "naclip",
}
"""How each head reads the last block; `student`, which is not here, is the model's own way."""


class Settings(SegmentationSettings):
    """Segmentation by the names of classes."""

    reading: FeatureConfig = FeatureConfig(size=448, window=336, stride=112)
    """Canvas of the pictures, and windows; source, layer, readout, norm and unit are set by the task."""
    head: Head = "maskclip"
    """How the last block is read; student is as phreg trained the model, plain is as it came."""
    words: str | None = None
    """A list of words for classes: one of phreg's by name, or a TOML file; unset finds it by the classes."""
    template: str | None = None
    """Sentence around a word, with {} for it; unset means open_clip's 80 for ImageNet."""
    synonyms: Literal["max", "mean"] = "max"
    """Whether a class's best word counts, or the mean of their embeddings."""
    temperature: PositiveFloat = 0.025
    """Temperature of the softmax over words."""
    threshold: Fraction = 0.1
    """Least probability of a class, below which a pixel is background; where the dataset has no background,
    it has no effect."""
    whole_layouts: tuple[str, ...] = ()
    """Layouts of datasets whose pictures are read whole, whatever the windows of reading are."""


NO_PAMR = "no PAMR, which NACLIP's README has in its table, and its evaluation leaves out by --pamr off"


def _windows(size: int, window: int) -> dict[str, Any]:
    reading = {"size": size, "fit": "centred", "window": window, "stride": 112}
    return {"reading": reading, "differs": (RESAMPLING,)}


PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "ph-reg": _windows(448, 336),
    "ph-reg-336": _windows(336, 336),
    "ph-reg-cityscapes": _windows(560, 224),
    "naclip": _windows(336, 224) | {"whole_layouts": ("voc20", "voc21"), "differs": (RESAMPLING, NO_PAMR)},
}
"""Published protocols, with sources in `phreg/evaluation/README.md`: PH-Reg's, with its sizes for VOC20 and
COCO-Object, and for Cityscapes; NACLIP's (arXiv 2404.08181), which reads Cityscapes as PH-Reg does. The head
that reads the model is no part of them."""


def is_stochastic(_data: str, _settings: Settings) -> bool:
    """Nothing is drawn."""
    return False


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:  # noqa: ARG001
    """Labels the validation split.

    Raises:
        DataError: The dataset is of no known layout, or a file of it is wrong; or a class has no words.
        PhregError: The model has no text tower, or cannot be read by the head.
    """
    test = settings.open(data, "val")
    vocabulary = find_vocabulary(test.classes, settings.words)
    readout = READOUTS.get(settings.head)
    check_readout(reader.backbone, readout or "plain")
    queries = embed_vocabulary(
        vocabulary, text_encoder(reader.backbone), settings.template, settings.synonyms
    )
    correlations: list[list[float]] = [[] for _ in test.classes]
    correlated = 0

    def score(patches: Dense) -> Tensor:
        grid = patches.grid.to(queries.embeddings)
        return torch.einsum("wd,rcd->wrc", queries.embeddings, grid)

    def decide(cosines: Tensor) -> Tensor:
        return choose_classes(
            cosines, queries, settings.temperature, settings.threshold, background=test.background
        )

    def watch(cosines: Tensor, truth: Tensor) -> None:
        nonlocal correlated
        counted = truth != IGNORE
        maps = queries.best(cosines).cpu()
        found = {
            number: pearson(maps[number][counted], (truth[counted] == number).float())
            for number in truth[counted].unique().tolist()
        }
        # One that is constant, as the mask of the only class in a picture is, correlates with nothing.
        valued = {number: value for number, value in found.items() if not math.isnan(value)}
        for number, value in valued.items():
            correlations[number].append(value)
        correlated += bool(valued)

    reading = settings.reading.model_copy(
        update={"source": "joint", "layer": None, "readout": readout, "norm": True, "unit": True}
    )
    if test.layout in settings.whole_layouts:
        reading = reading.model_copy(update={"fit": "keep", "window": None, "stride": None})
    found = measure_segmentation(reader, test, reading, score, decide=decide, watch=watch)
    means = [statistics.fmean(values) if values else math.nan for values in correlations]
    valued = [mean for mean in means if not math.isnan(mean)]
    figures, counts = dict(found.figures), dict(found.counts)
    notes = {**found.notes, "words": vocabulary.name, "queries": len(queries.classes)}
    if valued:
        figures["pearson"] = statistics.fmean(valued)
        pairs = sum(map(len, correlations))
        counts["pearson"] = {"pairs": pairs, "images": correlated, "classes": len(valued)}
    else:
        reason = "no image shows a class and something else, or no map varies"
        logger.warning("pearson is left out: %s", reason)
        notes["left_out"] = {**notes.get("left_out", {}), "pearson": reason}
    detail = {**found.detail, "pearson": dict(zip(test.classes, means, strict=True))}
    return replace(found, figures=figures, detail=detail, notes=notes, counts=counts)


def choose_classes(
    cosines: Float[Tensor, "words ..."],
    queries: Queries,
    temperature: float,
    threshold: float = 0.0,
    *,
    background: int | None = None,
) -> Int64[Tensor, "..."]:
    """Chooses the class of the most probable word; softmax(cosine / temperature) over all words.

    Args:
        cosines: With each word.
        queries: Class of each word.
        temperature: The lower, the surer.
        threshold: Least probability of a word; below, the class is background.
        background: That class; None where there is none.
    """
    probabilities = queries.best((cosines / temperature).softmax(0))
    best, classes = probabilities.max(0)
    return classes if background is None else torch.where(best < threshold, background, classes)
