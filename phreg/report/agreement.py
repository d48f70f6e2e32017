"""What a page shows of models' agreement with their own moved views.

    ConsistencyReport ──┬─ figures ──────────────► a table of its own, and a sentence or two
                        ├─ agreement of patches ─► a layer of maps
                        └─ averaged features ────► sides of the images, beside the models' own features

Charts by position are drawn in `phreg.report.figures`.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from phreg.analysis.feature_maps import joint_limits
from phreg.analysis.inspection import Inspection
from phreg.report import maps
from phreg.report.html import Picture
from phreg.report.verdict import disagreement

LAYER = "agreement with moved views"
"""Name of the layer of maps."""

CAPTION = (
    "Cosine of each patch to the average over moved views, from dark to bright at 1; one scale for all "
    "images and models. Grey where half of the views never saw the patch."
)


def averaged_features(
    models: Sequence[Inspection], count: int
) -> dict[str, Float[Tensor, "images _rows _cols _dim"]]:
    """Takes the features of the images shown, averaged over views, of each model that has them, by name.

    Args:
        models: The models.
        count: Images shown.
    """
    known = [(model.name, model.consistency) for model in models if model.consistency is not None]
    return {
        f"{name}, averaged over views" if len(models) > 1 else "averaged over views": found.denoised[:count]
        for name, found in known
        if len(found.denoised) >= count
    }


def agreement_pictures(models: Sequence[Inspection], count: int) -> list[list[Picture] | None]:
    """Draws the agreement of the patches of the images shown; None for a model that was not measured."""
    grids = [model.consistency.maps[:count] if model.consistency is not None else None for model in models]
    known = [grid[~grid.isnan()] for grid in grids if grid is not None]
    low = joint_limits(*known, trim=0.01).low if known else 0.0
    return [None if side is None else [_picture(grid, low) for grid in side] for side in grids]


def agreement_text(model: Inspection) -> str:
    """Says what was measured, or why nothing was; nothing where nobody asked."""
    if model.not_moved:
        return f"Not measured: {model.not_moved}."
    return disagreement(model.consistency) if model.consistency is not None else ""


HOW_TO_READ = (
    "Views are shifted by whole patches, and half of them flipped; beyond its border the image is reflected. "
    "The noise floor is what no student of such averages can exceed. Headroom is that floor less the "
    "agreement; ± is its standard error over images. Maps are among the layers of the images: "
    f"“{LAYER}”, and in “features” the model's own beside those averaged over views."
)
"""What the section says below what was measured."""


def agreement_figures(model: Inspection) -> dict[str, float | None]:
    """Lists the figures of one model, None where one does not exist."""
    found = model.consistency
    several = found if found is not None and len(found.maps) > 1 else None
    return {
        "agreement with moved views, mean cosine": found.mean if found else None,
        "agreement with moved views, worst 1 % of patches": found.worst_mean if found else None,
        "noise floor: agreement of averages over either half of the views": found.floor if found else None,
        "noise floor, worst 1 % of patches": found.floor_worst_mean if found else None,
        "headroom: noise floor less agreement": found.headroom if found else None,
        "headroom, standard error over images": found.headroom_error if found else None,
        "share of the disagreement that is fixed to the frame": several.frame_fixed if several else None,
        "that share, if images had nothing in common": several.frame_fixed_by_chance if several else None,
    }


LOWER_IS_BETTER = {
    "agreement with moved views, mean cosine": False,
    "agreement with moved views, worst 1 % of patches": False,
    "headroom: noise floor less agreement": True,
    "share of the disagreement that is fixed to the frame": True,
}
"""Figures of which lower is better (True) or higher (False); of the others neither is."""


def _picture(cosines: Float[Tensor, "rows cols"], low: float) -> Picture:
    known = cosines[~cosines.isnan()]
    return Picture(
        maps.agreement_map(cosines, low), f"{known.min():.3f} (dark) to {known.max():.3f} (bright)"
    )
