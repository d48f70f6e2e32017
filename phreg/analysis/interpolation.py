"""Checks whether resampled position embeddings leave stripes of artifacts, and what antialiasing changes.

A model run at another size than its own resamples its table of positions. Done without antialiasing this
aliases, and artifacts then lie in stripes along rows and columns (Darcet et al. 2024, arXiv 2309.16588,
appendix A, figures 10 and 11). Models of all three libraries resample through one function of torch; standing
in for it, for as long as a block of code lasts, runs any of them either way and leaves the model alone.

    images ──► run, antialiased ──► norms, outliers, stripes ┐
          └──► run, not so ───────► norms, outliers, stripes ┴─► cosine of the two, patch by patch

The two differ most where the grid shrinks. Where it grows there is nothing to alias, and only torch's
bicubic kernel differs (its parameter is -0.5 antialiased, else -0.75). Models with rotary positions have no
table to resample.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from phreg.analysis.gap import Gap, outlier_mask, outlier_threshold
from phreg.backbones.base import Backbone
from phreg.errors import DataError, PhregError, UnsupportedModelError

SHUFFLES = 999
"""Shuffled copies that a marginal is set against."""

CHANCE = 0.01
"""Share of its shuffled copies that may be as periodic as a marginal that counts as striped."""

MIN_STRENGTH = 0.3
"""Least strength that counts as striped, however few shuffled copies reach it."""

SMOOTHED = ("bilinear", "bicubic")
"""Modes of `torch.nn.functional.interpolate` that know antialiasing."""

# -- stripes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Periodicity:
    """How regularly outliers come and go along one side of the grid.

    Attributes:
        strength: 0 where they do not repeat, 1 where they do so exactly and swing from all to none evenly;
            single lines of outliers, p patches apart, come to p / (2 (p - 1)).
        period: Patches after which they repeat; None where strength is 0.
        threshold: Strength above which they count as striped: what one in a hundred shuffles of the same
            shares exceeds, at least `MIN_STRENGTH`. High for small grids, where much looks regular.
    """

    strength: float
    period: int | None
    threshold: float

    @property
    def striped(self) -> bool:
        """Whether they repeat more strongly than by chance."""
        return self.strength > self.threshold


@dataclass(frozen=True)
class Stripes:
    """Regular stripes in a map of where outliers lie.

    Attributes:
        rows: Along the grid's height: horizontal stripes.
        cols: Along its width: vertical stripes.
    """

    rows: Periodicity
    cols: Periodicity

    @property
    def found(self) -> bool:
        """Whether there are stripes in either direction."""
        return self.rows.striped or self.cols.striped

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return asdict(self) | {"found": self.found}


def stripes(histogram: Float[Tensor, "rows cols"]) -> Stripes:
    """Measures how regularly outliers repeat along rows and columns.

    The shares of each row, and of each column, are correlated with themselves moved by 1, 2, … up to half the
    grid. Something that repeats every p patches first loses likeness and regains it at p: `strength` is half
    of the largest rise of that correlation over its lowest value before. Slopes, humps, borders and corners
    only lose likeness, and score near 0. The yardstick is the same shares in random order, seeded.

    Args:
        histogram: Share of images whose patch at each position is an outlier
            (`NormReport.position_histogram`).
    """
    shares = histogram.double().cpu().numpy()
    return Stripes(rows=_periodicity(shares.mean(axis=1)), cols=_periodicity(shares.mean(axis=0)))


def _periodicity(marginal: np.ndarray) -> Periodicity:
    shuffles = np.random.default_rng(0).permuted(np.tile(marginal, (SHUFFLES, 1)), axis=1)
    rises = _rises(np.concatenate([marginal[None], shuffles]))
    strength, chance = float(rises[0].max()), np.quantile(rises[1:].max(axis=1), 1 - CHANCE)
    # Every multiple of the period does about as well; the shortest is meant.
    period = int(np.argmax(rises[0] >= 0.9 * strength)) + 1 if strength > 0 else None
    return Periodicity(strength, period, max(float(chance), MIN_STRENGTH))


def _rises(series: np.ndarray) -> np.ndarray:
    """Half the rise of each series' autocorrelation over its lowest value before: (series, lags from 1)."""
    length = series.shape[1]
    correlations = [np.ones(len(series))]
    for lag in range(1, length // 2 + 1):
        ends = [part - part.mean(axis=1, keepdims=True) for part in (series[:, :-lag], series[:, lag:])]
        scale = np.sqrt((ends[0] ** 2).sum(axis=1) * (ends[1] ** 2).sum(axis=1))
        products = (ends[0] * ends[1]).sum(axis=1)
        # A part that never changes is like nothing.
        correlations.append(np.divide(products, scale, out=np.zeros_like(scale), where=scale > 1e-12))
    found = np.stack(correlations, axis=1)
    lowest = np.minimum.accumulate(found, axis=1)[:, :-1]
    return np.maximum((found[:, 1:] - lowest) / 2, 0.0)


# -- the effect of antialiasing -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ResampledPositions:
    """A model's patch tokens with its positions resampled in one way.

    Attributes:
        antialias: Whether with antialiasing.
        norm: Median norm.
        gap: The gap between ordinary and outlying norms, or None where they show none.
        outlier_rate: Share of patch tokens beyond it.
        positions: Share of images whose patch is an outlier there.
        stripes: How regularly those repeat.
    """

    antialias: bool
    norm: float
    gap: Gap | None
    outlier_rate: float
    positions: Float[Tensor, "rows cols"]
    stripes: Stripes


@dataclass(frozen=True, eq=False)
class InterpolationEffect:
    """What antialiasing changes about a model at another size than its own.

    Attributes:
        block: Index of the block measured.
        images: Number of images.
        own_grid: Patch rows and columns that the model was made for.
        grid: Patch rows and columns here.
        library_antialiases: What the model does by itself.
        antialiased: Its tokens with antialiasing.
        plain: Its tokens without.
        cosine: Mean cosine of the same patch either way, behind the final norm.
        worst_cosine: Its lowest 1 %.
        norm_change: Median change of a patch's norm from antialiased to plain, as a share of it.
    """

    block: int
    images: int
    own_grid: tuple[int, int]
    grid: tuple[int, int]
    library_antialiases: bool
    antialiased: ResampledPositions
    plain: ResampledPositions
    cosine: float
    worst_cosine: float
    norm_change: float

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("antialiased", "plain"):
            way: ResampledPositions = found[name]
            found[name] = asdict(way) | {
                "positions": way.positions.tolist(),
                "stripes": way.stripes.to_json(),
            }
        return found


def interpolation_effect(
    backbone: Backbone, batches: Iterable[Float[Tensor, "_ 3 _ _"]], *, layer: int | None = None
) -> InterpolationEffect:
    """Runs a model at another size than its own, its positions resampled with antialiasing and without.

    Args:
        backbone: The model, in eval mode; left as it is.
        batches: Normalised images, all of one size, other than the model's own. DINOv2, made for 518 pixels,
            is mostly run at 224.
        layer: Block to measure, negative from the end; None means the last.

    Raises:
        DataError: There are no images, or their sizes differ.
        PhregError: There is no such block, or the images have the model's own size.
        UnsupportedModelError: The model resamples no positions: they are rotary or computed, or it is
            compiled.
    """
    index = backbone.block_index(layer)
    norms: dict[bool, list[Tensor]] = {True: [], False: []}
    cosines: list[Tensor] = []
    asked_for: list[bool] = []
    size = backbone.spec.input_size
    for batch in batches:
        images = batch.to(backbone.device)
        size = (images.shape[-2], images.shape[-1])
        features = {}
        for antialias in (True, False):
            with resampling(antialias=antialias) as asked:
                raw, features[antialias] = _patches(backbone, images, index)
            if not asked:
                raise _nothing_resampled(backbone, size)
            asked_for += asked
            norms[antialias].append(raw.norm(dim=-1).cpu())
        if norms[True][-1].shape[1:] != norms[True][0].shape[1:]:
            raise DataError(
                "the effect of resampled positions asked for on images of one size, found two; "
                "resize the images to one size"
            )
        cosines.append(functional.cosine_similarity(features[True], features[False], dim=-1).cpu())
    if not cosines:
        raise DataError(
            f"the effect of resampled positions asked for of {backbone.describe()}, found no images; "
            "give at least one"
        )
    both = {way: torch.cat(parts) for way, parts in norms.items()}
    cosine, patch = torch.cat(cosines).flatten(), backbone.spec.patch_size
    return InterpolationEffect(
        block=index,
        images=len(both[True]),
        own_grid=backbone.spec.grid,
        grid=(size[0] // patch[0], size[1] // patch[1]),
        library_antialiases=all(asked_for),
        antialiased=_resampled(both[True], antialias=True),
        plain=_resampled(both[False], antialias=False),
        cosine=float(cosine.mean()),
        worst_cosine=float(np.quantile(cosine.numpy(), 0.01)),
        norm_change=float((both[False] / both[True] - 1).abs().median()),
    )


@contextmanager
def resampling(*, antialias: bool) -> Iterator[list[bool]]:
    """Makes torch resample smoothly with antialiasing, or without, whatever its callers ask for.

    Yields:
        What they asked for, call by call.
    """
    asked: list[bool] = []
    original = functional.interpolate
    parameters = inspect.signature(original)

    def interpolate(*args: Any, **named: Any) -> Tensor:
        call = parameters.bind(*args, **named)
        call.apply_defaults()
        if call.arguments["mode"] in SMOOTHED:
            asked.append(call.arguments["antialias"])
            call.arguments["antialias"] = antialias
        return original(*call.args, **call.kwargs)

    functional.interpolate = interpolate
    try:
        yield asked
    finally:
        functional.interpolate = original


@torch.no_grad()
def _patches(backbone: Backbone, images: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Runs the model; a block's patch tokens (batch, rows, cols, width), before and behind the final norm."""
    layout = backbone.layout(images)
    patches = layout.to_grid(backbone.block_tokens(images, [layer])[layer])
    return patches.float(), backbone.final_norm(patches).float()


def _resampled(norms: Tensor, *, antialias: bool) -> ResampledPositions:
    gap = outlier_threshold(norms)
    mask = outlier_mask(norms, gap).float()
    positions = mask.mean(dim=0)
    return ResampledPositions(
        antialias, float(norms.median()), gap, float(mask.mean()), positions, stripes(positions)
    )


def _nothing_resampled(backbone: Backbone, size: tuple[int, int]) -> PhregError:
    asked = f"the effect of resampled positions asked for of {backbone.describe()} at {size[0]}x{size[1]}"
    if size == backbone.spec.input_size:
        return PhregError(f"{asked}, its own size, where it resamples none; give images of another size")
    return UnsupportedModelError(
        f"{asked}, which resampled none: its positions are rotary or computed, or it is compiled; leave this "
        "check out, or give the model uncompiled"
    )
