"""Charts of a model, or of several side by side: positions, attention, neighbours, probes and cost.

Every chart is a figure that shows itself in a notebook. It takes one model or several, what is compared has
one scale, and `names` says what the models are called; without, two are before and after.

    positions  ──► position_map, stripes           attention ──► attention_focus, attention_share
    agreement  ──► agreement_by_position           probes ──► probe_bars
    quantiles  ──► neighbour_cosines               cost ──► cost_lines

Norms have charts of their own in `phreg.report.norm_charts`, sinks in `phreg.report.sink_chart`; single
images are drawn by `phreg.report.maps`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from phreg.analysis.feature_maps import attention_limits
from phreg.report.canvas import (
    FONT_SIZE,
    INK,
    PANEL,
    ChartFigure,
    colour,
    label,
    legend_above,
    paint,
    panels,
    titles,
    wrapped,
)
from phreg.report.norm_charts import quantile_bands

ACROSS = 6
"""Maps in a row, at most."""

Positions = Float[Tensor, "_rows _cols"]


def position_map(*histograms: Positions, names: Sequence[str] = ()) -> Figure:
    """Charts the share of images with an artifact at each position."""
    figure, drawn = panels(len(histograms))
    top = _top(histograms)
    for axes, histogram, name in zip(drawn, histograms, titles(len(histograms), names), strict=True):
        _heat(axes, histogram, top, name)
        paint(figure.colorbar(axes.images[0], ax=axes, format="%g %%").ax)
    return figure


def agreement_by_position(*cosines: Positions, names: Sequence[str] = ()) -> Figure:
    """Charts how patches agree with moved views at each position, bright where they agree wholly.

    Args:
        cosines: For each model, the mean cosine at each position; NaN, where it is not known, stays empty.
        names: What the models are called.
    """
    figure, drawn = panels(len(cosines))
    low = min(float(grid[~grid.isnan()].min()) for grid in cosines)
    for axes, grid, name in zip(drawn, cosines, titles(len(cosines), names), strict=True):
        axes.imshow(grid.cpu().numpy(), cmap="viridis", vmin=min(low, 1 - 1e-6), vmax=1)
        _frame(axes, name)
        paint(figure.colorbar(axes.images[0], ax=axes, format="%.3g").ax)
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
    _frame(axes, title)


def _frame(axes: Axes, title: str) -> None:
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
            quantile_bands(axes, every.index(kind), quantiles, colour(index), vertical=False)
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
