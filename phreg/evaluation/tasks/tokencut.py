"""TokenCut: one object of a picture, cut out of the graph of its patches.

Patches are joined where their features point much the same way. The second eigenvector of the graph's
normalised Laplacian splits it where the fewest edges are cut; the side with the most extreme patch is taken
for the object.

    grid ──cosine ≥ tau: 1, else almost 0──► graph ──second eigenvector──► split at its mean
                                                └── most extreme patch: seed ──► component of the seed ──► box

Wang et al. 2022, "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut", CVPR,
arXiv 2202.11539, section 3.2; Shi and Malik 2000 for the cut.
"""

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh
from torch import Tensor
from torch.nn.functional import normalize

from phreg.errors import PhregError
from phreg.evaluation.tasks.lost import Discovery, box_around, component_at

WEAK_EDGE = 1e-5
"""Weight of the edges between patches that are not alike; keeps the graph in one piece (eq. 5)."""


def tokencut(grid: Float[Tensor, "rows cols dim"], *, tau: float = 0.2) -> Discovery:
    """Finds the object that a normalised cut separates from the picture.

    Args:
        grid: Features of patches, of any length; the paper's are the keys of the last block. At least two.
        tau: Cosine from which two patches are joined.

    Returns:
        The object, with the maps `eigenvector` (of the side of the object positive at its seed) and
        `partition` (1 on the object's side).

    Raises:
        PhregError: There is one patch, which nothing can be cut from.
    """
    rows, cols, _ = grid.shape
    if rows * cols < 2:
        raise PhregError(
            f"TokenCut asked to part a grid of {rows}x{cols} patch, and needs two at least; raise "
            "reading.size"
        )
    patches = normalize(grid.flatten(0, 1).double(), dim=1)
    edges = torch.where(patches @ patches.T >= tau, 1.0, WEAK_EDGE).double().cpu().numpy()
    degrees = np.diag(edges.sum(1))
    vector = eigh(degrees - edges, degrees, subset_by_index=[1, 1])[1][:, 0]

    seed = int(np.abs(vector).argmax())
    vector = vector * np.sign(vector[seed])
    side = torch.from_numpy(vector > vector.mean()).view(rows, cols)

    place = divmod(seed, cols)
    component = component_at(side, place)
    maps = {"eigenvector": torch.from_numpy(vector).view(rows, cols).float(), "partition": side.float()}
    return Discovery(box_around(component), place, component, maps)
