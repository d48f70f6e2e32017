"""LOST: one object of a picture, found in its patch features without labels.

Patches of the background resemble most others, those of an object only each other. So the patch that
resembles the fewest is taken for part of an object; the object is what resembles it and its like.

    grid ──cosines + bias──► degree of each patch ──fewest──► seed
                                  └── k fewest, like the seed ──► sum of their similarities > 0
                                                                      └── component of the seed ──► box

Siméoni et al. 2021, "Localizing Objects with Self-Supervised Transformers and no Labels", BMVC, arXiv
2109.14279, section 3. The bias is of "Vision Transformers Need Registers" (Darcet et al. 2024, arXiv
2309.16588): where features of all patches point one way, nothing is dissimilar without it.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.ndimage import label
from torch import Tensor


class Discovery(NamedTuple):
    """An object found in a grid of patches, and how it was found."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom, in patches, ends exclusive."""
    seed: tuple[int, int]
    """Row and column of the patch it was grown from."""
    component: Bool[Tensor, "rows cols"]
    """The patches the box is drawn around."""
    maps: dict[str, Float[Tensor, "rows cols"]]
    """The steps, for a report: of LOST `degree`, `expansion` and `similarity`, of TokenCut `eigenvector` and
    `partition`."""


def lost(grid: Float[Tensor, "rows cols dim"], *, bias: float = 0.0, expansion: int = 100) -> Discovery:
    """Finds the object that stands out from a picture.

    As in the authors' code, patches are similar where their product is positive (eq. 1 has 0 too), and a
    patch resembles itself whatever the bias. Among patches of one degree the one whose similarities sum to
    less comes first, so that the result does not depend on the order of patches.

    Args:
        grid: Features of patches, e.g. the keys of the last block; of length 1 for a bias to mean the same
            everywhere.
        bias: Added to all similarities, at most 0 and, for features of length 1, above -1.
        expansion: Patches of lowest degree among which the seed's like are looked for (k of section 3.2).

    Returns:
        The object, with the maps `degree` (how many patches each resembles), `expansion` (1 where a patch is
        one of the seed's like) and `similarity` (to these in sum).
    """
    rows, cols, _ = grid.shape
    patches = grid.flatten(0, 1).float()
    similarity = patches @ patches.T + bias
    similar = (similarity > 0).fill_diagonal_(True)

    degree = similar.sum(1)
    order = _lowest(degree, similarity.sum(1))
    seed = int(order[0])

    among = torch.zeros_like(degree, dtype=torch.bool)
    among[order[:expansion]] = True
    alike = among & similar[seed]
    summed = similarity[alike].sum(0)
    foreground = summed > 0
    foreground[seed] = True

    place = divmod(seed, cols)
    component = component_at(foreground.view(rows, cols).cpu(), place)
    steps = {"degree": degree, "expansion": alike, "similarity": summed}
    maps = {name: step.view(rows, cols).float().cpu() for name, step in steps.items()}
    return Discovery(box_around(component), place, component, maps)


def component_at(mask: Bool[Tensor, "rows cols"], place: tuple[int, int]) -> Bool[Tensor, "rows cols"]:
    """Keeps the part of a mask that hangs together with a place in it, by edges."""
    parts = np.zeros(mask.shape, dtype=np.int32)
    label(mask.numpy(), output=parts)
    return torch.from_numpy(parts == parts[place])


def box_around(mask: Bool[Tensor, "rows cols"]) -> tuple[int, int, int, int]:
    """Draws the box around a mask that is not empty: left, top, right, bottom, ends exclusive."""
    rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def _lowest(degree: Int64[Tensor, " patches"], total: Float[Tensor, " patches"]) -> Int64[Tensor, " patches"]:
    """Orders patches by degree, those of one degree by their total."""
    by_total = total.argsort(stable=True)
    return by_total[degree[by_total].argsort(stable=True)]
