"""Says where in the image artifacts lie: always at the same patches, or wherever the content sends them.

Both kinds are known. Some models use fixed patches, such as the corners, whatever the image shows; others use
patches with little content, which differ from image to image (Darcet et al. 2024, arXiv 2309.16588).
"""

from jaxtyping import Float
from torch import Tensor

USUAL = 0.5
"""Share of images from which on a position counts as fixed."""


def fixed_share(histogram: Float[Tensor, "rows cols"]) -> float:
    """Measures how far artifacts keep to fixed positions, whatever the image shows.

    Args:
        histogram: Share of images whose patch at each position is an outlier.

    Returns:
        Share of all outliers that lie where at least half of the images have one: 1 for artifacts that the
        input does not move, 0 where there are none.
    """
    total = float(histogram.sum())
    return float(histogram[histogram >= USUAL].sum()) / total if total else 0.0


def describe_positions(histogram: Float[Tensor, "rows cols"]) -> str:
    """Names the part of the image that holds most of the artifacts.

    Args:
        histogram: Share of images whose patch at each position is an outlier.

    Returns:
        `at the corners`, `at fixed patches`, `along the border` or `anywhere in the image`, by the first that
        holds more than half of them; the border also has to hold twice its share of the patches.
    """
    total = float(histogram.sum())
    corners = float(histogram[[0, 0, -1, -1], [0, -1, 0, -1]].sum())
    inner = histogram[1:-1, 1:-1]
    border = total - float(inner.sum())
    border_patches = 1 - inner.numel() / histogram.numel()
    if corners > total / 2:
        return "at the corners"
    if fixed_share(histogram) > 0.5:
        return "at fixed patches"
    if border > total * max(0.5, 2 * border_patches):
        return "along the border"
    return "anywhere in the image"
