"""Asks what kind of patch becomes an outlier: one like its neighbours, one with little to see.

Vision transformers put artifacts where a patch adds nothing to what is around it (Darcet et al. 2024, arXiv
2309.16588, section 2.2, figure 5a). Two measures of that, each one float a patch:

    images ──patch embedding──► (rows, cols, dim) ──► cosine to the neighbours   ─┬─► outliers against others
       └──► pixels of each patch ──────────────────► contrast                    ─┘

The patch embedding is read as it leaves its own module, ahead of any position embedding, which would make
neighbours alike whatever the image shows. The images measured are all that the 10th percentile of contrast
knows of: what counts as little to see is relative to them. Outliers that keep to fixed positions, such as the
corners, lie there for their position; then both measures only describe what the images show there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from phreg.analysis.norms import QUANTILES, Histogram
from phreg.backbones.base import Backbone
from phreg.errors import PhregError
from phreg.tokens import TokenLayout

LOW_INFORMATION = 0.1
"""Quantile of contrast up to which a patch counts as one of low information."""


@dataclass(frozen=True)
class Cosines:
    """How much some patches resemble their neighbours.

    Attributes:
        mean: Mean cosine.
        quantiles: Cosines at `norms.QUANTILES`.
        histogram: How many have which cosine, from -1 to 1.
    """

    mean: float
    quantiles: tuple[float, ...]
    histogram: Histogram


@dataclass(frozen=True)
class NeighbourReport:
    """What tells the patches of outliers from others before the model has seen them.

    Attributes:
        outliers: Cosine of the outliers' patch embeddings to their neighbours'; None where there are none.
        others: The same of all other patches.
        contrast: Contrast up to which a patch counts as one of low information: the 10th percentile over all
            patches measured.
        low_information: Share of all patches that is of low information: a tenth, or more where more than a
            tenth are equally flat.
        outliers_low_information: Share of the outliers that is; None where there are none.
    """

    outliers: Cosines | None
    others: Cosines
    contrast: float
    low_information: float
    outliers_low_information: float | None

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON can hold it."""
        return {"quantiles": list(QUANTILES)} | asdict(self)


@contextmanager
def patch_embeddings(
    backbone: Backbone, layout: TokenLayout
) -> Iterator[list[Float[Tensor, "batch rows cols dim"]]]:
    """Collects what the modules of the patch embedding put out while the model runs.

    What leaves the patch embedding comes last: a norm may follow the convolution.

    Args:
        backbone: The model.
        layout: Where its patches lie.

    Raises:
        PhregError: The model ran, and no grid of patches came out of the modules that hold the parameters of
            the role `patch_embed`.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, _args: Any, output: Tensor) -> None:
        output = output.clone()  # some models add positions in place
        grid = output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output
        found.append(grid.unflatten(1, layout.grid) if grid.dim() == 3 else grid)

    with ExitStack() as stack:
        for module in backbone.owners("patch_embed"):
            stack.callback(module.register_forward_hook(keep).remove)
        yield found
    if not found or found[-1].shape[1:3] != layout.grid:
        raise PhregError(
            f"patch embeddings asked of {backbone.describe()}; the modules with parameters of the role "
            f"patch_embed gave {tuple(found[-1].shape) if found else 'nothing'}, expected a grid of "
            f"{layout.grid[0]}x{layout.grid[1]}; correct roles() of its adapter"
        )


def neighbour_cosines(grid: Float[Tensor, "batch rows cols dim"]) -> Float[Tensor, "batch rows cols"]:
    """Measures the mean cosine of each patch to the patches above, below, left and right of it.

    At the border there are fewer of them; a patch that is alone gets 0.
    """
    unit = functional.normalize(grid.float(), dim=-1)
    vertical = (unit[:, 1:] * unit[:, :-1]).sum(dim=-1)
    horizontal = (unit[:, :, 1:] * unit[:, :, :-1]).sum(dim=-1)
    totals = _per_patch(vertical, horizontal)
    return totals / _per_patch(torch.ones_like(vertical), torch.ones_like(horizontal)).clamp_min(1)


def contrast(
    backbone: Backbone, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch rows cols"]:
    """Measures how much there is to see in each patch of normalised images.

    That is the standard deviation of its pixels, on a scale of 0 to 1, in each colour channel, and over the
    three channels the root of the mean square: 0 for a patch of one colour, whichever that is.
    """
    layout, (height, width) = backbone.layout(images), backbone.spec.patch_size
    rows, cols = layout.grid
    patches = images.float().unflatten(3, (cols, width)).unflatten(2, (rows, height))
    variance = patches.var(dim=(3, 5), correction=0)  # (batch, channel, rows, cols)
    scale = variance.new_tensor(backbone.spec.std).square()
    return torch.einsum("bcij,c->bij", variance, scale).div(3).sqrt()


def neighbour_report(
    cosines: Float[Tensor, "images rows cols"],
    contrasts: Float[Tensor, "images rows cols"],
    outliers: Bool[Tensor, "images rows cols"],
) -> NeighbourReport:
    """Compares outliers with all other patches.

    Args:
        cosines: Cosine of each patch embedding to its neighbours: `neighbour_cosines`.
        contrasts: Contrast of each patch: `contrast`.
        outliers: The patches to compare.
    """
    limit = float(np.quantile(contrasts.numpy(), LOW_INFORMATION))
    low = contrasts <= limit
    return NeighbourReport(
        outliers=_cosines(cosines[outliers]) if outliers.any() else None,
        others=_cosines(cosines[~outliers]),
        contrast=limit,
        low_information=float(low.float().mean()),
        outliers_low_information=float(low[outliers].float().mean()) if outliers.any() else None,
    )


def _cosines(values: Float[Tensor, " patches"]) -> Cosines:
    numbers = values.double().numpy()
    return Cosines(
        mean=float(numbers.mean()),
        quantiles=tuple(np.quantile(numbers, QUANTILES).tolist()),
        histogram=Histogram.of(numbers.clip(-1, 1), "linear", (-1.0, 1.0)),
    )


def _per_patch(
    vertical: Float[Tensor, "batch above cols"], horizontal: Float[Tensor, "batch rows left"]
) -> Float[Tensor, "batch rows cols"]:
    """Adds up the values of the pairs that each patch is in, given one for each pair of neighbours."""
    above, below = functional.pad(vertical, (0, 0, 1, 0)), functional.pad(vertical, (0, 0, 0, 1))
    left, right = functional.pad(horizontal, (1, 0)), functional.pad(horizontal, (0, 1))
    return above + below + left + right
