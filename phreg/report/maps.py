"""Draws maps: norms, components, attention, cosines and positions, one flat square a patch.

A map is a plain uint8 RGB array. Its limits are given, not found, so that maps that are compared can share
them (`phreg.analysis.feature_maps.joint_limits`) and a caption can name them; values beyond are drawn like
the limits.

    numbers (rows, cols) ──limits, palette──► colours ──each repeated, none blurred──► (height, width, 3)
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from torch import Tensor

from phreg.analysis.feature_maps import REACH, colours, components

Pixels = UInt8[np.ndarray, "height width 3"]


GREY = 122
"""Brightness of what lies between maps: readable on white and on black."""


def norm_map(norms: Float[Tensor, "rows cols"], low: float, high: float, side: int = 224) -> Pixels:
    """Draws the norms of an image's patch tokens, dark to bright in log norm.

    Args:
        norms: Norm of each patch token.
        low: Norm drawn darkest; give maps that are compared the same limits.
        high: Norm drawn brightest.
        side: Pixels the longer side has at least.
    """
    lowest, highest = np.log([max(low, 1e-12), max(high, 1e-12)])
    return _paint(norms.double().clamp_min(1e-12).log(), lowest, highest, "inferno", side)


def share_map(
    shares: Float[Tensor, "*maps rows cols"], high: float, side: int = 224
) -> UInt8[np.ndarray, "*maps _height _width 3"]:
    """Draws shares, none dark to `high` bright: of attention, or of the images with an outlier there.

    Attention "queries heads rows cols" becomes one map a query and head; see also `attention_maps`.

    Args:
        shares: Share of each patch.
        high: Share drawn brightest.
        side: Pixels the longer side has at least.
    """
    return _paint(shares, 0.0, high, "inferno", side)


def agreement_map(cosines: Float[Tensor, "rows cols"], low: float, side: int = 224) -> Pixels:
    """Draws the agreement of each patch with moved views: dark at `low` and below to bright at 1.

    Args:
        cosines: Agreement of each patch; NaN, where it is not known, is drawn grey.
        low: Agreement drawn darkest; give maps that are compared the same.
        side: Pixels the longer side has at least.
    """
    return _paint(cosines, low, 1.0, "viridis", side)


def attention_maps(
    attention: Float[Tensor, "queries heads rows cols"], high: float, side: int = 224
) -> UInt8[np.ndarray, "queries mean_and_heads _height _width 3"]:
    """Draws where each query attends: the mean over heads first, then head by head."""
    return share_map(torch.cat([attention.mean(dim=1, keepdim=True), attention], dim=1), high, side)


def sheet(
    tiles: UInt8[np.ndarray, "down across height width 3"], margin: int = 6
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Puts maps of one size side by side in rows, apart by a mid-grey margin of some pixels."""
    down, across, height, width, _ = tiles.shape
    drawn = np.full(
        (down * (height + margin) - margin, across * (width + margin) - margin, 3), GREY, dtype=np.uint8
    )
    for row, col in np.ndindex(down, across):
        top, left = row * (height + margin), col * (width + margin)
        drawn[top : top + height, left : left + width] = tiles[row, col]
    return drawn


def pca_maps(
    *models: Float[Tensor, "*images _rows _cols _dim"], side: int = 224
) -> list[UInt8[np.ndarray, "*images _height _width 3"]]:
    """Draws patch features as colours: their three principal components as red, green and blue.

    Colours mean the same in all maps, as far as models allow: see `phreg.analysis.feature_maps.components`.

    Args:
        models: Patch features of the same image, or the same images, by each model.
        side: Pixels the longer side has at least.
    """
    coloured = colours(components([_images(model) for model in models]))
    return [
        _enlarge((255 * part).round().byte().view(*model.shape[:-1], 3).numpy(), side)
        for part, model in zip(coloured, models, strict=True)
    ]


def component_maps(
    *models: Float[Tensor, "*images _rows _cols _dim"], side: int = 224
) -> list[UInt8[np.ndarray, "*images _height _width 3"]]:
    """Draws the first principal component alone, whitened: blue at -3 standard deviations, red at 3.

    After figure 20 of Darcet et al. 2024 (arXiv 2309.16588); what is shared is as in `pca_maps`.
    """
    first = [part[..., 0] for part in components([_images(model) for model in models])]
    return [
        _paint(part.view(model.shape[:-1]), -REACH, REACH, "RdBu_r", side)
        for part, model in zip(first, models, strict=True)
    ]


def cosine_map(cosines: Float[Tensor, "rows cols"], row: int, col: int, side: int = 224) -> Pixels:
    """Draws cosines to a chosen patch, which is framed: dark at 0 and below to bright at 1."""
    drawn = _paint(cosines, 0.0, 1.0, "viridis", side)
    step = drawn.shape[0] // cosines.shape[0]
    thick = max(1, step // 8)
    frame = drawn[row * step : (row + 1) * step, col * step : (col + 1) * step]
    for shade in (0, 255):  # black around white shows on any map
        border = np.ones(frame.shape[:2], dtype=bool)
        border[thick:-thick, thick:-thick] = False
        frame[border] = shade
        frame = frame[thick:-thick, thick:-thick]
    return drawn


def text_map(
    pixels: Pixels, cosines: Float[Tensor, "rows cols"], low: float, high: float
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws the cosine of each patch to a text over the photo: grey where it is low, bright where it is high.

    Args:
        pixels: The photo, as `phreg.data.crops.denormalise` gives it.
        cosines: Cosine of each patch.
        low: Cosine, and those below, where only a dark grey photo shows.
        high: Cosine, and those above, that shows brightest.
    """
    height, width = pixels.shape[:2]
    rows, cols = (np.arange(n) * m // n for n, m in zip((height, width), cosines.shape, strict=True))
    values = _scaled(cosines, low, high)[rows][:, cols]
    grey = pixels.mean(axis=2, keepdims=True)
    heat = 255 * colormaps["inferno"](values)[..., :3]
    return (0.45 * grey + 0.55 * heat).round().astype(np.uint8)


def _images(features: Tensor) -> Tensor:
    return features.reshape(-1, *features.shape[-3:])


def _scaled(values: Tensor, low: float, high: float) -> np.ndarray:
    return ((values.double().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1).numpy()


def _paint(values: Tensor, low: float, high: float, palette: str, side: int) -> np.ndarray:
    coloured = colormaps[palette].with_extremes(bad=str(GREY / 255))(_scaled(values, low, high))[..., :3]
    return _enlarge((coloured * 255).round().astype(np.uint8), side)


def _enlarge(pixels: np.ndarray, side: int) -> np.ndarray:
    """Repeats pixels a whole number of times, so that none is blurred."""
    times = -(-side // max(pixels.shape[-3:-1]))
    return pixels.repeat(times, axis=-3).repeat(times, axis=-2)
