"""Charts of norms, of a model or of several side by side.

NormReport ──► norm_quantiles, norm_series     histograms of norms ──► norm_histograms
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from phreg.analysis.norms import QUANTILES, BlockNorms, NormReport
from phreg.report.canvas import (
    FONT_SIZE,
    INK,
    PANEL,
    ChartFigure,
    colour,
    label,
    legend,
    legend_above,
    paint,
    panels,
    titles,
    wrapped,
)

BANDS = ((1, 7, 0.18), (2, 6, 0.3), (3, 5, 0.45))
"""Bands of 98, 90 and 50 % of the values: their bounds' indices in `QUANTILES`, and how opaque they are."""

MEDIAN = QUANTILES.index(0.5)

TOKEN_STYLES = {"CLS": ("#3d7fd9", "--"), "register": ("#b04fc9", ":")}
"""Colour and dashes of tokens that are no patches; all others look like registers."""

Tokens = Mapping[str, Sequence[float]]
"""Median norm in each block of the tokens that are no patches, by name: `CLS`, `register 1`, …"""


@runtime_checkable
class HistogramLike(Protocol):
    """Counts of values."""

    @property
    def edges(self) -> Sequence[float]:
        """Where bins begin and end, ascending, one more than there are counts."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """Values in each bin."""
        ...


# -- norms ---------------------------------------------------------------------------------------------------


def norm_quantiles(
    *reports: NormReport, names: Sequence[str] = (), tokens: Sequence[Tokens] = (), normed: bool = False
) -> Figure:
    """Charts the norms of patch tokens from block to block.

    Bands hold 50, 90 and 98 % of the tokens, the line is the median, dots are the longest and shortest token,
    and crosses the norm that separates outliers, in blocks that have any.

    Args:
        reports: One a model.
        names: What the models are called.
        tokens: For each model, the tokens that are no patches, drawn as lines of their own.
        normed: Whether to chart norms after the final norm, instead of before.
    """
    figure, drawn = panels(len(reports), sharey=True)
    for index, (axes, report) in enumerate(zip(drawn, reports, strict=True)):
        blocks = report.normed if normed else report.blocks
        _fan(axes, blocks, colour(index))
        if tokens:
            _token_lines(axes, [block.block for block in blocks], tokens[index])
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label(axes, title=titles(len(reports), names)[index], x="block")
        legend(axes)
    label(drawn[0], y=f"norm, {'after' if normed else 'before'} the final norm")
    return figure


def norm_histograms(
    *models: Sequence[HistogramLike],
    names: Sequence[str] = (),
    tokens: Sequence[Tokens] = (),
    log: bool = True,
) -> Figure:
    """Charts how the norms of patch tokens are distributed in every block, one small panel a block.

    Args:
        models: For each model, the histograms of its blocks, first to last.
        names: What the models are called.
        tokens: For each model, the tokens that are no patches, marked by lines.
        log: Whether the axis of norms is logarithmic; that of their density always is, or else the few
            outliers among so many tokens could not be seen.
    """
    figure, drawn = panels(max(map(len, models)), columns=4, size=(2.1, 1.6), sharex=True, sharey=True)
    labels = titles(len(models), names)
    for index, blocks in enumerate(models):
        for block, (axes, histogram) in enumerate(zip(drawn, blocks, strict=False)):
            edges = np.log10(histogram.edges) if log else np.asarray(histogram.edges)
            density = np.asarray(histogram.counts) / np.diff(edges) / max(sum(histogram.counts), 1)
            axes.stairs(
                density, histogram.edges, fill=True, color=colour(index), alpha=0.6, label=labels[index]
            )
            for name, norms in tokens[index].items() if tokens else ():
                shade, dashes = _token_style(name)
                axes.axvline(norms[block], color=shade, linestyle=dashes, linewidth=1, label=_kind(name))
    for block, axes in enumerate(drawn):
        axes.set(xscale="log" if log else "linear", yscale="log")
        label(axes, title=f"block {block}")
    figure.supxlabel("norm, before the final norm", color=INK, fontsize=FONT_SIZE)
    figure.supylabel("density of patch tokens", color=INK, fontsize=FONT_SIZE)
    legend_above(figure, drawn[0])
    return figure


def norm_series(*reports: NormReport, names: Sequence[str] = ()) -> Figure:
    """Charts norms and outlier rate over many models: a family's sizes, or a training's checkpoints.

    Each is read in the block that its report looks at (`NormReport.focus`). Bands, median, dots and crosses
    are those of `norm_quantiles`. After figures 4 and 15 of Darcet et al. 2024 (arXiv 2309.16588).

    Args:
        reports: One a model, in the order of the series.
        names: What the models are called.
    """
    figure = ChartFigure(max(PANEL[0], 1.5 + 1.1 * len(reports)), 4.6)
    norms, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
    called = titles(len(reports), names)
    blocks = [report.blocks[report.focus] for report in reports]
    for place, block in enumerate(blocks):
        quantile_bands(norms, place, block.quantiles, colour(0), vertical=True)
        if block.gap:
            norms.plot(place, block.gap.threshold, "x", color=INK, markersize=5)
    shares = [100 * block.outlier_rate for block in blocks]
    rates.plot(shares, "o-", color=colour(0), markersize=4, clip_on=False)
    for place, share in enumerate(shares):
        note = {"textcoords": "offset points", "xytext": (0, 5), "ha": "center"}
        rates.annotate(f"{share:.3g}", (place, share), color=INK, fontsize=FONT_SIZE - 1, **note)
    for axes in (norms, rates):
        paint(axes)
        axes.set_xlim(-0.6, len(reports) - 0.4)
    norms.set_yscale("log")
    rates.set_ylim(0, max(1.4 * max(shares), 0.1))
    ticks = [f"{wrapped(name, 16)}\nblock {block.block}" for name, block in zip(called, blocks, strict=True)]
    rates.set_xticks(range(len(reports)), [tick.strip() for tick in ticks])
    label(norms, y="norm of patch tokens,\nbefore the final norm")
    label(rates, y="outliers, %")
    return figure


def _fan(axes: Axes, blocks: Sequence[BlockNorms], shade: str) -> None:
    numbers = [block.block for block in blocks]
    quantiles = np.array([block.quantiles for block in blocks]).clip(min=1e-12)
    for lower, upper, strength in BANDS:
        axes.fill_between(
            numbers, quantiles[:, lower], quantiles[:, upper], color=shade, alpha=strength, linewidth=0
        )
    axes.plot(numbers, quantiles[:, MEDIAN], color=shade)
    for end in (0, -1):
        axes.plot(numbers, quantiles[:, end], ".", color=shade, markersize=3)
    gaps = [(block.block, block.gap.threshold) for block in blocks if block.gap]
    if gaps:
        axes.plot(*zip(*gaps, strict=True), "x", color=INK, markersize=5)


def _token_lines(axes: Axes, numbers: Sequence[int], tokens: Tokens) -> None:
    explained = {_kind(name): name for name in reversed(list(tokens))}  # the first of each kind
    for name, norms in tokens.items():
        shade, dashes = _token_style(name)
        text = _kind(name) if explained[_kind(name)] == name else None
        axes.plot(numbers, norms, color=shade, linestyle=dashes, linewidth=1.3, label=text)


def _kind(name: str) -> str:
    """`register` of `register 3`."""
    return name.rstrip("0123456789 ")


def _token_style(name: str) -> tuple[str, str]:
    return TOKEN_STYLES.get(_kind(name), TOKEN_STYLES["register"])


def quantile_bands(axes: Axes, place: int, quantiles: Sequence[float], shade: str, *, vertical: bool) -> None:
    """Draws quantiles as bands within each other, with median and extremes."""
    for lower, upper, strength in BANDS:
        low, high = quantiles[lower], quantiles[upper]
        look = {"color": shade, "alpha": strength, "linewidth": 0}
        if vertical:
            axes.bar(place, high - low, 0.6, bottom=low, **look)
        else:
            axes.barh(place, high - low, 0.6, left=low, **look)
    lines = axes.hlines if vertical else axes.vlines
    lines(quantiles[MEDIAN], place - 0.3, place + 0.3, color=shade)
    ends = (quantiles[0], quantiles[-1])
    axes.plot(*((place, place), ends) if vertical else (ends, (place, place)), ".", color=shade, markersize=3)


# -- positions -----------------------------------------------------------------------------------------------
