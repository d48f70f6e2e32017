"""Measures how well a model agrees with its own moved views, and how much of that a student could gain.

A model without artifacts says the same of a patch wherever the patch lies in the frame. What it says
differently is artifact, position or context. Averages over moved views have less of it; two averages over
disjoint halves of the views tell how much is left in them (the noise floor): a student that learns from such
averages cannot come nearer.

    image ──┬─ as it is ──────────► features ──────────┬─► agreement, worst 1 %, by position ──┐
            ├─ half of the views ──► average ─┬─ mean ─┘                                       ├─► headroom
            └─ the other half ─────► average ─┴─────────────► noise floor ─────────────────────┘

It needs no labels, and no gap in the norms. Disagreement that is the same in all images belongs to the frame,
like the position patterns that Yang et al. 2024 (DVT, arXiv 2401.02957) describe.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from phreg.backbones.base import Backbone
from phreg.config import ViewsConfig
from phreg.data.crops import center_crop
from phreg.errors import PhregError
from phreg.seeding import keyed_generator
from phreg.view_sampling import context_margin, distinct_views
from phreg.views import Views, aligned_sum

AT_ONCE = 16
"""Views in one forward pass."""

CERTAIN = 2.0
"""Headroom counts where its mean over images is so many standard errors above zero."""

WORTHWHILE = 0.005
"""Headroom below this is nothing to train for."""


@dataclass(frozen=True, eq=False)
class ConsistencyReport:
    """Agreement of a model with its own moved views, as cosines of patch features.

    Attributes:
        mean: Agreement of the model with the average over all views, mean over all patches.
        worst_mean: Mean over the worst 1 % of all patches.
        floor: Agreement of two averages over disjoint halves of the views, mean over all patches.
        floor_worst_mean: Mean over the worst 1 % of all patches.
        headroom: Mean over images of an image's floor less its agreement.
        headroom_error: Standard error of that mean; None where there is one image.
        frame_fixed: Share of the disagreement that is the same in all images: it belongs to the frame.
        frame_fixed_by_chance: What that share would be if images had nothing in common.
        views: Views in the average; the unmoved image is none of them.
        by_position: Agreement at each position, mean over images; NaN where half of the views never saw it.
        frame_fixed_by_position: Share of the disagreement at each position that is the same in all images.
        maps: Agreement of each patch; NaN where half of the views never saw it.
        denoised: Features of the first images, averaged over all views and the unmoved image.
    """

    mean: float
    worst_mean: float
    floor: float
    floor_worst_mean: float
    headroom: float
    headroom_error: float | None
    frame_fixed: float
    frame_fixed_by_chance: float
    views: int
    by_position: Float[Tensor, "rows cols"]
    frame_fixed_by_position: Float[Tensor, "rows cols"]
    maps: Float[Tensor, "images rows cols"]
    denoised: Float[Tensor, "shown rows cols dim"]

    @property
    def worthwhile(self) -> bool:
        """Says whether distillation has something to gain: headroom of some size, beyond its own spread."""
        error = self.headroom_error or 0.0
        return self.headroom >= WORTHWHILE and self.headroom > CERTAIN * error

    def to_json(self) -> dict[str, Any]:
        """Returns the figures, over all and by position; not the maps."""
        figures = {name: value for name, value in vars(self).items() if isinstance(value, float | int | None)}
        return figures | {
            "images": len(self.maps),
            "worthwhile": self.worthwhile,
            "by_position": _rows(self.by_position),
            "frame_fixed_by_position": _rows(self.frame_fixed_by_position),
        }


@torch.no_grad()
def consistency(
    backbone: Backbone,
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
    views: ViewsConfig,
    size: tuple[int, int],
    *,
    count: int = 40,
    seed: int = 0,
    show: int = 0,
) -> ConsistencyReport:
    """Measures a model's agreement with its own moved views.

    The model runs in the mode it is in; put it in eval mode first. Each image costs `count` + 1 forward
    passes.

    Args:
        backbone: The model.
        batches: Normalised images on the model's device, with the context that views show, where they do.
        views: How views are drawn; their number is not used.
        size: Height and width of the images without context, in pixels.
        count: Views an image, or as many different ones as there are; rounded down to an even number.
        seed: Seed of the views.
        show: Images, from the first on, whose averaged features are returned.

    Raises:
        PhregError: There are no images, or fewer than two moved views.
    """
    margin = context_margin(views, backbone.spec, size)
    cosines, floors, residuals, denoised = [], [], [], []
    drawn = 0
    for number, whole in enumerate(batches):
        random = keyed_generator("consistency", seed, number)
        group = distinct_views(views, backbone.spec, size, len(whole), count, random)
        drawn = group.count // 2 * 2
        if drawn < 2:
            raise PhregError(
                f"asked how a model agrees with its moved views; views.max_shift = {views.max_shift:g} "
                f"allows {group.count} at {size[0]}x{size[1]} pixels, which cannot be halved; raise it"
            )
        features = backbone(center_crop(whole, margin)).patches.float()
        (first, seen_first), (second, seen_second) = (
            _sum(backbone, whole, group.part(slice(None), part))
            for part in (slice(0, drawn // 2), slice(drawn // 2, drawn))
        )
        average = (first + second) / (seen_first + seen_second)
        # A patch that a half never saw is left out: 0 / 0 is not a number.
        known = seen_first.squeeze(-1) * seen_second.squeeze(-1) > 0
        cosines.append(_where(known, cosine_similarity(features, average, dim=-1)))
        floors.append(_where(known, cosine_similarity(first / seen_first, second / seen_second, dim=-1)))
        residual = normalize(features, dim=-1) - normalize(average, dim=-1)
        residuals.append(residual.where(known.unsqueeze(-1), 0).cpu())
        rest = slice(max(0, show - sum(map(len, denoised))))
        denoised.append(((features + first + second) / (1 + seen_first + seen_second))[rest].cpu())
    if not cosines:
        raise PhregError("asked how a model agrees with its moved views, of no images; give at least one")
    agreement, floor, residual = torch.cat(cosines), torch.cat(floors), torch.cat(residuals)
    headroom = (floor - agreement).double().flatten(1).nanmean(1)
    disagreement = residual.square().sum(-1).mean(0)
    frame_fixed = residual.mean(0).square().sum(-1)
    return ConsistencyReport(
        mean=float(agreement.double().nanmean()),
        worst_mean=worst_mean(agreement),
        floor=float(floor.double().nanmean()),
        floor_worst_mean=worst_mean(floor),
        headroom=float(headroom.mean()),
        headroom_error=float(headroom.std() / len(headroom) ** 0.5) if len(headroom) > 1 else None,
        frame_fixed=float(frame_fixed.sum() / disagreement.sum().clamp_min(1e-12)),
        frame_fixed_by_chance=1 / len(agreement),
        views=drawn,
        by_position=agreement.nanmean(0),
        frame_fixed_by_position=frame_fixed / disagreement.clamp_min(1e-12),
        maps=agreement,
        denoised=torch.cat(denoised),
    )


def worst_mean(cosines: Float[Tensor, "..."]) -> float:
    """Returns the mean of the lowest 1 % of all values that are numbers, at least one."""
    values = cosines[~cosines.isnan()].double().sort().values
    return float(values[: max(1, len(values) // 100)].mean())


def _rows(grid: Tensor) -> list[list[float | None]]:
    """Lists a grid row by row as JSON can hold it."""
    return [[None if isnan(value) else round(value, 5) for value in row] for row in grid.tolist()]


def _where(known: Tensor, values: Tensor) -> Tensor:
    return values.where(known, torch.nan).cpu()


def _sum(backbone: Backbone, images: Tensor, group: Views) -> tuple[Tensor, Tensor]:
    """Sums aligned features over views, and counts for each patch how many views saw it."""
    totals, counts = [], []
    at_once = max(1, AT_ONCE // len(images))
    for first in range(0, group.count, at_once):
        part = group.part(slice(None), slice(first, first + at_once))
        read = backbone(part.apply(images).flatten(0, 1)).patches.float().unflatten(0, (len(images), -1))
        total, seen = aligned_sum(part, read)
        totals.append(total)
        counts.append(seen.unsqueeze(-1))
    return torch.stack(totals).sum(0), torch.stack(counts).sum(0)
