"""Looks at a model from all sides: all that phreg can say of it from some images, as data.

Each part is an analysis of its own (`phreg.analysis`, `phreg.sinks.locate`); here is only the order, and what
becomes of the answers.

    images ──survey, one pass──► norms, attention, neighbours ──┬──► sinks and their causes
       ├──tokens of the outliers found, and of others ──────────┴──► what they hold
       ├──moved views of some of them ──► agreement, noise floor, averaged features
       ├──the same images larger──► what resampling the positions does
       └──one blank image─────────► what registers cost
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from phreg.analysis.advice import recommend
from phreg.analysis.class_probe import GlobalProbe, global_probe
from phreg.analysis.complexity import Cost, Latency, complexity, latency
from phreg.analysis.consistency import ConsistencyReport, consistency
from phreg.analysis.feature_maps import text_maps
from phreg.analysis.interpolation import InterpolationEffect, Stripes, interpolation_effect, stripes
from phreg.analysis.norms import NormReport
from phreg.analysis.probes import (
    PositionProbe,
    ReconstructionProbe,
    position_probe,
    reconstruction_probe,
    sample_tokens,
)
from phreg.analysis.survey import Survey, survey
from phreg.backbones.base import Backbone
from phreg.backbones.readout import dense_readout, use_readout
from phreg.config import ViewsConfig
from phreg.data.crops import denormalise
from phreg.data.sampling import subsample_indices
from phreg.errors import UnsupportedModelError
from phreg.progress import stage, track
from phreg.seeding import keyed_generator
from phreg.sinks.locate import Sinks, find_sinks
from phreg.tokens import ImageBatch
from phreg.view_sampling import distinct_views

logger = logging.getLogger(__name__)

PROBED = 8
"""Images that it takes at least to train a probe on some and measure it on others."""

MOVED_IMAGES = 16
"""Images whose agreement with their moved views is measured, or those shown if they are more."""

MOVED_VIEWS = 20
"""Moved views of each of them."""

MOVED = ViewsConfig(fill="reflect")
"""How they are moved. Images come without context, so views mirror them at the border."""

TIMED = 5
"""Times that a forward pass of one image is timed, for each number of registers."""


class LabelledImages(NamedTuple):
    """Images with their classes."""

    batches: Sequence[ImageBatch]
    classes: Int64[Tensor, " images"]


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """All that was found out about a model.

    Attributes:
        name: What the model is called.
        size: Height and width of the images, in pixels.
        survey: Norms, attention and neighbours of its patch tokens, and the images shown.
        photos: The images shown, as they look.
        sinks: Where its artifacts emerge and what causes them; None where it has none.
        position: What its tokens know of where they are; None of fewer than `PROBED` images.
        reconstruction: What they know of their patch's pixels; None likewise.
        classes: What single tokens know of the whole image; None without labelled images.
        consistency: How its patch features agree with its own moved views; None where not measured.
        not_moved: Why that could not be measured, in words; empty where nothing was in the way.
        interpolation: What antialiasing does where its positions are resampled; None where they are not.
        costs: What registers cost, counted.
        latency: What they cost, measured.
        texts: Cosine of each patch shown to each text asked about.
        against: What was found out about the models it is compared with.
    """

    name: str
    size: tuple[int, int]
    survey: Survey
    photos: tuple[UInt8[np.ndarray, "_height _width 3"], ...]
    sinks: Sinks | None
    position: PositionProbe | None = None
    reconstruction: ReconstructionProbe | None = None
    classes: GlobalProbe | None = None
    consistency: ConsistencyReport | None = None
    not_moved: str = ""
    interpolation: InterpolationEffect | None = None
    costs: tuple[Cost, ...] = ()
    latency: tuple[Latency, ...] = ()
    texts: Mapping[str, Float[Tensor, "images rows cols"]] = field(default_factory=dict)
    against: tuple["Inspection", ...] = ()

    @property
    def norms(self) -> NormReport:
        """Norms of its tokens, block by block."""
        return self.survey.norms

    @property
    def outlier_rate(self) -> float:
        """Share of patch tokens that are outliers in the last block, before the final norm."""
        return self.norms.outlier_rate

    @property
    def emergence_block(self) -> int | None:
        """Index of the block where outliers emerge; None where there are none."""
        return self.norms.emergence_block

    @property
    def stripes(self) -> Stripes:
        """How regularly its outliers repeat along rows and columns."""
        return stripes(self.norms.position_histogram)

    @property
    def models(self) -> tuple["Inspection", ...]:
        """This model, and those it is compared with."""
        return (self, *self.against)

    def to_json(self) -> dict[str, Any]:
        """Returns the figures, without maps, as JSON can hold them."""
        parts = {
            "sinks": self.sinks,
            "stripes": self.stripes,
            "position_probe": self.position,
            "reconstruction_probe": self.reconstruction,
            "class_probe": self.classes,
            "consistency": self.consistency,
            "interpolation": self.interpolation,
        }
        return {
            "model": self.name,
            "size": list(self.size),
            **self.survey.to_json(),
            **{name: part.to_json() if part is not None else None for name, part in parts.items()},
            "recommended_method": recommend(self.norms, self.sinks, self.consistency),
            "cost": [cost.to_json() for cost in self.costs],
            "latency": [time.to_json() for time in self.latency],
            "against": [other.to_json() for other in self.against],
        }


@torch.no_grad()
def look(
    backbone: Backbone,
    name: str,
    batches: Sequence[ImageBatch],
    *,
    resampled: Sequence[ImageBatch] = (),
    labelled: LabelledImages | None = None,
    queries: Sequence[str] = (),
    show: int = 8,
) -> Inspection:
    """Runs all analyses of a model.

    Args:
        backbone: The model, in eval mode; left as it is.
        name: What to call it.
        batches: Normalised images of one size, on the model's device.
        resampled: Images at another size than the model's own, to see what resampling its positions does;
            none leaves that out.
        labelled: Images with classes, for the probe of what single tokens know of the whole image.
        queries: Texts whose likeness to each patch is mapped; takes a whole image-text model.
        show: Images, from the first on, that are kept to be shown.

    Raises:
        PhregError: There are no images, their sizes differ, a norm is not finite, or the model has no text
            tower for the queries.
    """
    first = list(batches[:show])
    # Ahead of all else, as a model without a text tower is refused.
    drawn = text_maps(backbone, torch.cat(first)[:show], queries) if queries and first else None
    surveyed = survey(backbone, track(f"{name}: norms, attention, neighbours", batches), show=show)
    with stage(f"{name}: sinks"):
        sinks = find_sinks(backbone, batches, surveyed.norms)
    with stage(f"{name}: probes"):
        position, reconstruction = _patch_probes(backbone, batches, surveyed.norms)
        classes = global_probe(backbone, *labelled, surveyed.norms) if labelled else None
    moved, not_moved = _consistency(backbone, name, batches, show)
    with stage(f"{name}: resampled positions"):
        effect = _interpolation(backbone, resampled)
    shown = torch.cat(first)[:show]
    with stage(f"{name}: cost"):
        return replace(
            of_survey(backbone, name, surveyed, _trained_features(backbone, shown), sinks=sinks),
            position=position,
            reconstruction=reconstruction,
            classes=classes,
            consistency=moved,
            not_moved=not_moved,
            interpolation=effect,
            latency=latency(backbone, shown[:1], repeats=TIMED),
            texts={} if drawn is None else dict(zip(queries, drawn.unbind(dim=1), strict=True)),
        )


def of_survey(
    backbone: Backbone,
    name: str,
    surveyed: Survey,
    features: Float[Tensor, "images rows cols dim"] | None = None,
    *,
    sinks: Sinks | None,
) -> Inspection:
    """Puts together what a survey alone tells, and what registers cost.

    Args:
        backbone: The model that was surveyed.
        name: What to call it.
        surveyed: The survey.
        features: Features of the images shown, where the model is meant to be read in another way.
        sinks: Its sinks, where they are known.
    """
    shown = surveyed.shown
    if features is not None:
        shown = tuple(replace(one, features=own) for one, own in zip(shown, features, strict=False))
    height, width = shown[0].image.shape[-2:]
    return Inspection(
        name=name,
        size=(height, width),
        survey=replace(surveyed, shown=shown),
        photos=tuple(denormalise(one.image, backbone.spec.mean, backbone.spec.std) for one in shown),
        sinks=sinks,
        costs=complexity(backbone, size=(height, width)),
    )


def _patch_probes(
    backbone: Backbone, batches: Sequence[ImageBatch], norms: NormReport
) -> tuple[PositionProbe | None, ReconstructionProbe | None]:
    """Asks patches what they know of themselves, where there are images enough to learn from."""
    if norms.images < PROBED:
        return None, None
    sample = sample_tokens(backbone, batches, norms)
    return position_probe(sample), reconstruction_probe(sample)


def _consistency(
    backbone: Backbone, name: str, batches: Sequence[ImageBatch], show: int
) -> tuple[ConsistencyReport | None, str]:
    """Measures the agreement with moved views, of features as the model was trained; or says why not."""
    images = _some_images(batches, show)
    size = (images.shape[-2], images.shape[-1])
    random = keyed_generator("consistency", 0)
    views = distinct_views(MOVED, backbone.spec, size, 1, MOVED_VIEWS, random).count // 2 * 2
    if not views:
        rows, cols = backbone.layout(images[:1]).grid
        return None, (
            f"a grid of {rows}x{cols} patches is too small for two different views that are moved by whole "
            "patches; give larger images, if the model takes them"
        )
    parts = images.split(4)
    what = f"{name}: agreement with moved views ({len(images)} images, {views + 1} forward passes each)"
    with use_readout(backbone):
        return consistency(backbone, track(what, parts), MOVED, size, count=MOVED_VIEWS, show=show), ""


def _some_images(batches: Sequence[ImageBatch], show: int) -> ImageBatch:
    """Takes the images shown, and of the others as many as are to be moved, evenly spaced."""
    every = [image for images in batches for image in images]
    shown, others = every[:show], every[show:]
    more = subsample_indices(len(others), max(0, MOVED_IMAGES - len(shown)))
    return torch.stack([*shown, *(others[index] for index in more)])


def _trained_features(backbone: Backbone, shown: ImageBatch) -> Float[Tensor, "images rows cols dim"] | None:
    """Reads features as the model was trained, where that is not plainly."""
    if dense_readout(backbone) == "plain":
        return None
    with use_readout(backbone):
        return backbone(shown).patches.float().cpu()


def _interpolation(backbone: Backbone, resampled: Sequence[ImageBatch]) -> InterpolationEffect | None:
    if not resampled:
        return None
    try:
        return interpolation_effect(backbone, resampled)
    except UnsupportedModelError as error:
        logger.info("the effect of antialiasing is left out: %s", error)
        return None
