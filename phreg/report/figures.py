"""Pictures of a model: norm maps, PCA maps, where artifacts lie, and how norms grow from block to block.

Maps are plain uint8 RGB arrays, one flat square a patch; charts are matplotlib figures that carry their own
canvas, so that no global state (pyplot) is touched and none is needed to save them. Charts have no background
and mid-grey text, and so can be read on a light page and on a dark one.

    norms  (rows, cols)       ──► norm_map ──► (height, width, 3)
    grids  (rows, cols, dim)  ──► pca_maps ──► (height, width, 3) each, one basis for all
    report                    ──► position_map, norm_quantiles ──► Figure
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from phreg.analysis.norms import QUANTILES, BlockNorms, NormReport

INK = "#7a7a7a"
"""Colour of text and axes: mid-grey, readable on white and on black."""

COLOURS = ("#d95f02", "#1b9e77")
"""Before and after (ColorBrewer Dark2), told apart by the colour-blind too."""


def photo(
    image: Float[Tensor, "3 height width"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[np.ndarray, "height width 3"]:
    """Undoes an image's normalisation, so that it can be looked at."""
    scale, shift = (torch.tensor(values)[:, None, None] for values in (std, mean))
    pixels = (image.float().cpu() * scale + shift).clamp(0, 1) * 255
    return pixels.round().byte().permute(1, 2, 0).numpy()


def norm_map(
    norms: Float[Tensor, "rows cols"], low: float, high: float, side: int = 224
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws the norms of an image's patch tokens, dark to bright in log norm.

    Args:
        norms: Norm of each patch token.
        low: Norm drawn darkest; give maps that are compared the same limits.
        high: Norm drawn brightest.
        side: Pixels the longer side has at least.
    """
    lowest, highest = np.log([max(low, 1e-12), max(high, 1e-12)])
    logs = norms.double().cpu().clamp_min(1e-12).log().numpy()
    values = (logs - lowest) / max(highest - lowest, 1e-12)
    return _enlarge((colormaps["inferno"](values.clip(0, 1))[..., :3] * 255).round().astype(np.uint8), side)


def pca_maps(
    *grids: Float[Tensor, "_rows _cols dim"], side: int = 224
) -> list[UInt8[np.ndarray, "_height _width 3"]]:
    """Draws patch features as colours: their three principal components as red, green and blue.

    All grids share one basis, one sign and one scale, so colours mean the same in each: give a model's
    features before and after together. Each component is scaled to its 1st and 99th percentile, so that a few
    artifacts cannot drown the rest.

    Args:
        grids: Patch features of one or more images or models, at least three channels wide.
        side: Pixels the longer side has at least.
    """
    tokens = [grid.double().cpu().flatten(0, 1) for grid in grids]
    every = torch.cat(tokens)
    mean = every.mean(dim=0)
    # Eigenvectors come smallest first, with signs that mean nothing: point each along its largest channel.
    basis = torch.linalg.eigh(torch.cov(every.T)).eigenvectors[:, -3:].flip(1)
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    low, high = np.quantile(((every - mean) @ basis).numpy(), (0.01, 0.99), axis=0)
    maps = []
    for grid, values in zip(grids, tokens, strict=True):
        scaled = (((values - mean) @ basis).numpy() - low) / np.maximum(high - low, 1e-12)
        maps.append(
            _enlarge((scaled.clip(0, 1) * 255).round().astype(np.uint8).reshape(*grid.shape[:2], 3), side)
        )
    return maps


def position_map(*histograms: Float[Tensor, "rows cols"]) -> Figure:
    """Charts the share of images with an artifact at each position, for one model or before and after."""
    figure = _figure(width=4.25 * len(histograms), height=3.4)
    panels = figure.subplots(1, len(histograms), squeeze=False)[0]
    top = max(0.01, *(float(histogram.max()) for histogram in histograms))
    for axes, histogram, title in zip(panels, histograms, _titles(len(histograms)), strict=True):
        drawn = axes.imshow(100 * histogram.cpu().numpy(), cmap="inferno", vmin=0, vmax=100 * top)
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        bar = figure.colorbar(drawn, ax=axes, format="%g %%")
        _paint(bar.ax)
        _paint(axes)
    return figure


def norm_quantiles(*reports: NormReport) -> Figure:
    """Charts the norms of patch tokens from block to block, for one model or before and after.

    Bands hold 50, 90 and 98 % of the tokens, the line is the median, dots are the longest and shortest token,
    and crosses the norm that separates outliers, in blocks that have any.
    """
    figure = _figure(width=4.25 * len(reports), height=3.4)
    panels = figure.subplots(1, len(reports), squeeze=False, sharey=True)[0]
    for axes, report, title, colour in zip(panels, reports, _titles(len(reports)), COLOURS, strict=False):
        _fan(axes, report.blocks, colour)
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_xlabel("block", color=INK)
        axes.set_yscale("log")
        _paint(axes)
    panels[0].set_ylabel("norm of patch tokens, before the final norm", color=INK)
    return figure


def save_png(path: str | Path, picture: Figure | UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes a map or a chart as a PNG file."""
    Path(path).write_bytes(png(picture))


def png(picture: Figure | UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encodes a map or a chart as PNG."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=144, transparent=True)
    else:
        Image.fromarray(picture).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _fan(axes: Axes, blocks: Sequence[BlockNorms], colour: str) -> None:
    places = [block.block for block in blocks]
    quantiles = np.array([block.quantiles for block in blocks]).clip(min=1e-12)
    middle = len(QUANTILES) // 2
    for reach, strength in ((3, 0.18), (2, 0.3), (1, 0.45)):
        lower, upper = quantiles[:, middle - reach], quantiles[:, middle + reach]
        axes.fill_between(places, lower, upper, color=colour, alpha=strength, linewidth=0)
    axes.plot(places, quantiles[:, middle], color=colour)
    for end in (0, -1):
        axes.plot(places, quantiles[:, end], ".", color=colour, markersize=3)
    gaps = [(block.block, block.gap.threshold) for block in blocks if block.gap]
    if gaps:
        axes.plot(*zip(*gaps, strict=True), "x", color=INK, markersize=5)


def _titles(count: int) -> Sequence[str]:
    return ("",) if count == 1 else ("before", "after")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _paint(axes: Axes) -> None:
    axes.tick_params(colors=INK, which="both")
    for spine in axes.spines.values():
        spine.set_color(INK)


def _enlarge(pixels: np.ndarray, side: int) -> np.ndarray:
    """Repeats pixels a whole number of times, so that none is blurred."""
    times = -(-side // max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)
