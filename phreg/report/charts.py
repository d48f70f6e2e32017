"""Charts of a model, or of several side by side: norms, positions, attention, neighbours, probes and cost.

Every chart is a figure that shows itself in a notebook. It takes one model or several, what is compared has
one scale, and `names` says what the models are called; without, two are before and after.

    NormReport ──► norm_quantiles, norm_series     histograms of norms ──► norm_histograms
    positions  ──► position_map, stripes           attention ──► attention_focus, attention_share
    quantiles  ──► neighbour_cosines               probes ──► probe_bars        cost ──► cost_lines

Sinks have a chart of their own in `phreg.report.sink_chart`; single images are drawn by `phreg.report.maps`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from phreg.analysis.feature_maps import attention_limits
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

ACROSS = 6
"""Maps in a row, at most."""

Positions = Float[Tensor, "_rows _cols"]

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
    labels = titles(len(reports), names)
    blocks = [report.blocks[report.focus] for report in reports]
    for index, block in enumerate(blocks):
        _nested(norms, index, block.quantiles, colour(0), vertical=True)
        if block.gap:
            norms.plot(index, block.gap.threshold, "x", color=INK, markersize=5)
    shares = [100 * block.outlier_rate for block in blocks]
    rates.plot(shares, "o-", color=colour(0), markersize=4, clip_on=False)
    for index, share in enumerate(shares):
        note = {"textcoords": "offset points", "xytext": (0, 5), "ha": "center"}
        rates.annotate(f"{share:.3g}", (index, share), color=INK, fontsize=FONT_SIZE - 1, **note)
    for axes in (norms, rates):
        paint(axes)
        axes.set_xlim(-0.6, len(reports) - 0.4)
    norms.set_yscale("log")
    rates.set_ylim(0, max(1.4 * max(shares), 0.1))
    ticks = [f"{wrapped(name, 16)}\nblock {block.block}" for name, block in zip(labels, blocks, strict=True)]
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


def _nested(axes: Axes, position: int, quantiles: Sequence[float], shade: str, *, vertical: bool) -> None:
    """Draws quantiles as bands within each other, with median and extremes."""
    for lower, upper, strength in BANDS:
        low, high = quantiles[lower], quantiles[upper]
        look = {"color": shade, "alpha": strength, "linewidth": 0}
        if vertical:
            axes.bar(position, high - low, 0.6, bottom=low, **look)
        else:
            axes.barh(position, high - low, 0.6, left=low, **look)
    lines = axes.hlines if vertical else axes.vlines
    lines(quantiles[MEDIAN], position - 0.3, position + 0.3, color=shade)
    ends = (quantiles[0], quantiles[-1])
    axes.plot(
        *((position, position), ends) if vertical else (ends, (position, position)),
        ".",
        color=shade,
        markersize=3,
    )


# -- positions -----------------------------------------------------------------------------------------------


def position_map(*histograms: Positions, names: Sequence[str] = ()) -> Figure:
    """Charts the share of images with an artifact at each position."""
    figure, drawn = panels(len(histograms))
    top = _top(histograms)
    for axes, histogram, name in zip(drawn, histograms, titles(len(histograms), names), strict=True):
        _heat(axes, histogram, top, name)
        paint(figure.colorbar(axes.images[0], ax=axes, format="%g %%").ax)
    return figure


def stripes(*histograms: Positions, names: Sequence[str] = ()) -> Figure:
    """Charts where artifacts lie, with their mean by column and by row beside the map.

    A position embedding resampled without antialiasing shows as stripes: artifacts come back at even steps
    along rows and columns (Darcet et al. 2024, arXiv 2309.16588, appendix A).

    Args:
        histograms: Share of images with an artifact at each position, for each model or way of resampling.
        names: What those are called.
    """
    figure = ChartFigure(PANEL[0] * len(histograms), 4.0)
    parts = figure.subfigures(1, len(histograms), squeeze=False)[0]
    top = _top(histograms)
    edge = max(float(histogram.mean(dim).max()) for histogram in histograms for dim in (0, 1))
    for part, histogram, name in zip(parts, histograms, titles(len(histograms), names), strict=True):
        (above, corner), (centre, beside) = part.subplots(2, 2, width_ratios=(4, 1), height_ratios=(1, 4))
        corner.remove()
        _heat(centre, histogram, top)
        centre.set_aspect("auto")
        columns, rows = (100 * histogram.mean(dim).cpu().numpy() for dim in (0, 1))
        above.bar(range(len(columns)), columns, 1.0, color=INK)
        beside.barh(range(len(rows)), rows, 1.0, color=INK)
        above.set(xlim=centre.get_xlim(), xticks=[], ylim=(0, 110 * max(edge, 1e-4)))
        beside.set(ylim=centre.get_ylim(), yticks=[], xlim=(0, 110 * max(edge, 1e-4)))
        for axes in (above, beside):
            paint(axes)
        label(above, title=name, y="columns, %")
        label(beside, x="rows, %")
    return figure


def _top(histograms: Sequence[Positions]) -> float:
    return max(0.01, *(float(histogram.max()) for histogram in histograms))


def _heat(axes: Axes, shares: Positions, top: float, title: str = "") -> None:
    axes.imshow(100 * shares.cpu().numpy(), cmap="inferno", vmin=0, vmax=100 * top)
    axes.set(xticks=[], yticks=[])
    paint(axes)
    axes.spines[:].set_visible(True)
    label(axes, title=title)


# -- attention and neighbours --------------------------------------------------------------------------------


def attention_focus(*models: Mapping[str, Positions], names: Sequence[str] = ()) -> Figure:
    """Charts where in the image tokens attend, averaged over images and heads, one row of maps a model.

    After figure 16 of Darcet et al. 2024 (arXiv 2309.16588). All maps share one scale, the top of which the
    few most attended patches exceed (`feature_maps.attention_limits`).

    Args:
        models: For each model, the share of attention that each patch gets, by the name of the query: `CLS`,
            `register 1`, …
        names: What the models are called.
    """
    across = min(ACROSS, max(map(len, models)))
    rows = [-(-len(queries) // across) for queries in models]
    high = attention_limits(*(focus for queries in models for focus in queries.values())).high
    figure = ChartFigure(1.6 + 1.6 * across, 1.75 * sum(rows))
    grid = figure.subplots(sum(rows), across, squeeze=False)
    starts = np.cumsum([0, *rows])
    for queries, name, start, end in zip(
        models, titles(len(models), names), starts[:-1], starts[1:], strict=True
    ):
        panel = list(grid[start:end].flat)
        for axes, (query, focus) in zip(panel, queries.items(), strict=False):
            _heat(axes, focus, high, query)
        for axes in panel[len(queries) :]:
            axes.set_axis_off()
        label(panel[0], y=wrapped(name, 22))
    bar = figure.colorbar(grid[0, 0].images[0], ax=grid, format="%.2g %%", extend="max", aspect=30)
    paint(bar.ax)
    return figure


def attention_share(
    *models: Sequence[float], fair: Sequence[float], query: str = "CLS", names: Sequence[str] = ()
) -> Figure:
    """Charts the share of attention that falls on outliers, from block to block.

    Args:
        models: For each model, the share in each block.
        fair: For each model, the share that they would get by their number alone, a dotted line.
        query: Whose attention.
        names: What the models are called.
    """
    figure, (axes,) = panels(1, size=(5.5, PANEL[1]))
    for index, (shares, own, name) in enumerate(zip(models, fair, titles(len(models), names), strict=True)):
        axes.plot([100 * share for share in shares], "o-", markersize=3, color=colour(index), label=name)
        text = "" if index else "their share of all tokens"
        axes.axhline(100 * own, color=colour(index), linestyle=":", linewidth=1, label=text)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label(axes, x="block", y=f"attention of {query} that falls on outliers, %")
    legend_above(figure, axes)
    return figure


def neighbour_cosines(*models: Mapping[str, Sequence[float]], names: Sequence[str] = ()) -> Figure:
    """Charts how alike patch embeddings and their neighbours are, for outliers and for others.

    Bands hold 50, 90 and 98 % of the patches, the line is the median, dots are the extremes. After figure 5a
    of Darcet et al. 2024 (arXiv 2309.16588).

    Args:
        models: For each model, cosines at `norms.QUANTILES`, by kind of patch: `outliers`, `others`.
        names: What the models are called.
    """
    every = list(dict.fromkeys(kind for kinds in models for kind in kinds))
    size = (PANEL[0], 0.9 + 0.45 * len(every))
    figure, drawn = panels(len(models), size=size, sharex=True, sharey=True)
    for index, (axes, kinds) in enumerate(zip(drawn, models, strict=True)):
        for kind, quantiles in kinds.items():
            _nested(axes, every.index(kind), quantiles, colour(index), vertical=False)
        label(axes, title=titles(len(models), names)[index], x="cosine to the neighbours")
    drawn[0].set_yticks(range(len(every)), every)
    drawn[0].set_ylim(len(every) - 0.5, -0.5)
    return figure


# -- probes and cost -----------------------------------------------------------------------------------------


def probe_bars(
    *models: Mapping[str, tuple[float, float]],
    figure: str,
    names: Sequence[str] = (),
    chance: float | None = None,
) -> Figure:
    """Charts what linear probes read out of each kind of token, with the standard deviation over seeds.

    Args:
        models: For each model, mean and standard deviation by kind of token: `ordinary`, `outliers`, `CLS`, …
        figure: What is charted, such as `top-1, %`.
        names: What the models are called.
        chance: What guessing would give, a dotted line.
    """
    kinds = list(dict.fromkeys(kind for results in models for kind in results))
    chart, (axes,) = panels(1, size=(max(PANEL[0], 1.2 + 0.5 * len(kinds) * (len(models) + 0.6)), PANEL[1]))
    width = 0.8 / len(models)
    for index, (results, name) in enumerate(zip(models, titles(len(models), names), strict=True)):
        shift = (index - (len(models) - 1) / 2) * width
        positions = [kinds.index(kind) + shift for kind in results]
        means, stds = zip(*results.values(), strict=True)
        error = {"ecolor": INK, "elinewidth": 1, "capsize": 3}
        bars = axes.bar(
            positions, means, 0.9 * width, yerr=stds, color=colour(index), label=name, error_kw=error
        )
        axes.bar_label(bars, fmt="%.3g", padding=2, color=INK, fontsize=FONT_SIZE - 1)
    if chance is not None:
        axes.axhline(chance, color=INK, linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(range(len(kinds)), [wrapped(kind, 14) for kind in kinds])
    axes.margins(y=0.12)
    label(axes, y=figure)
    legend_above(chart, axes)
    return chart


def cost_lines(
    registers: Sequence[int], *models: Mapping[str, Sequence[float]], names: Sequence[str] = ()
) -> Figure:
    """Charts what registers add to a model's cost, one panel a kind of cost.

    After figure 12 of Darcet et al. 2024 (arXiv 2309.16588).

    Args:
        registers: Numbers of registers.
        models: For each model, how much more there is for each number, as a share of the model without
            registers, by name: `parameters`, `FLOPs`, `latency`; the same names for all.
        names: What the models are called.
    """
    figure, drawn = panels(len(models[0]), size=(3.2, 2.8))
    for axes, kind in zip(drawn, models[0], strict=True):
        for index, (costs, name) in enumerate(zip(models, titles(len(models), names), strict=True)):
            added = [100 * share for share in costs[kind]]
            axes.plot(registers, added, "o-", markersize=3, color=colour(index), label=name)
        axes.set_xticks(registers)
        label(axes, title=kind, x="registers")
    label(drawn[0], y="added, %")
    legend_above(figure, drawn[0])
    return figure
