"""Charts what a model's sinks are: the chain of hidden units that makes them, and what they draw.

chain        upstream units ──► causes, over the blocks they are in; the block where sinks emerge is framed
levels       each unit's activation on outliers, against that on other patches
written      what each population of sinks holds, by what wrote it
attention    share that falls on outliers, from block to block
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from phreg.report.canvas import COLOURS, FONT_SIZE, INK, ChartFigure, label, legend, paint
from phreg.sinks.locate import Population, Sinks, Unit

CAUSE, UPSTREAM = COLOURS[:2]

MAX_UNITS = 8
"""Causes and upstream units that are drawn, at most: those with the largest shares."""


def sink_chart(sinks: Sinks, name: str = "") -> Figure:
    """Charts where sinks emerge, which hidden units cause them, what sets those off, and what sinks draw.

    Units are named block:unit. Above, each upstream unit points at what it sets off, with its share of that;
    each cause has its share of what is written into sinks. Below are their activations, and, where it is
    known, the share of attention that falls on outliers, and what wrote what they hold.

    Args:
        sinks: What was found.
        name: What the model is called.
    """
    causes = sorted(sinks.units, key=lambda unit: -unit.share)[:MAX_UNITS]
    chain = sorted(sinks.chain[:MAX_UNITS], key=lambda unit: (unit.block, -unit.share))
    height = 0.9 + 0.3 * max(len(causes), len(chain), 1)
    written = [each for each in sinks.populations if each.kind.mlp is not None]
    known = ["levels"] * bool(causes) + ["attention"] * bool(sinks.attention) + ["written"] * bool(written)
    rows: list[Any] = [["chain"] * len(known), known] if known else [["chain"]]
    figure = ChartFigure(8.5, height + 2.8 * bool(known))
    drawn = figure.subplot_mosaic(rows, height_ratios=[height, 2.8][: len(rows)])
    _chain(drawn["chain"], sinks, causes, chain)
    label(drawn["chain"], title=name)
    if causes:
        _levels(drawn["levels"], causes, chain)
    if sinks.attention:
        _attention(drawn["attention"], sinks.attention, sinks.block)
    if written:
        _written(drawn["written"], written)
    return figure


def _chain(axes: Axes, sinks: Sinks, causes: Sequence[Unit], chain: Sequence[Unit]) -> None:
    last = sinks.norms.blocks[-1].block
    shown = sorted({0, last, sinks.block} | {unit.block for unit in (*causes, *chain)})
    columns = {block: column for column, block in enumerate(shown)}
    for block, column in columns.items():
        frame = {"boxstyle": "round,pad=0.4", "facecolor": "none", "edgecolor": INK}
        if block == sinks.block:
            frame |= {"edgecolor": CAUSE, "linewidth": 2}
        axes.text(
            column, 0, f"block {block}", color=INK, fontsize=FONT_SIZE, ha="center", va="center", bbox=frame
        )
        if block and block - 1 not in columns:
            axes.text(column - 0.5, 0, "…", color=INK, ha="center", va="center")
    # A row each, the earliest lowest: so no arrow passes through another unit.
    upstream = [_unit(axes, columns[unit.block], row, unit, UPSTREAM) for row, unit in enumerate(chain, 1)]
    heights = Counter[int]()
    boxes = []
    for unit in causes:
        heights[unit.block] += 1
        boxes.append(_unit(axes, columns[unit.block], heights[unit.block], unit, CAUSE))
    if causes:
        first = min(range(len(causes)), key=lambda index: causes[index].block)
        for box, unit in zip(upstream, chain, strict=True):
            _arrow(axes, box, boxes[first], unit.share)
    else:
        axes.text((len(shown) - 1) / 2, 0.9, "no hidden unit explains them", color=INK, ha="center")
    axes.set(xlim=(-0.6, len(shown) - 0.4), ylim=(-0.7, max(len(chain), *heights.values(), 1) + 0.6))
    axes.set_axis_off()


def _unit(axes: Axes, column: int, row: int, unit: Unit, shade: str) -> Text:
    frame = {"boxstyle": "round,pad=0.3", "facecolor": shade, "edgecolor": "none"}
    look = {"color": "white", "fontsize": FONT_SIZE - 1, "ha": "center", "va": "center"}
    return axes.text(column, row, f"{_name(unit)}  {_percent(unit.share)}", bbox=frame, **look)


def _arrow(axes: Axes, start: Text, end: Text, share: float) -> None:
    """Draws an arrow between the boxes of two units, behind all boxes; the wider, the more it stands for."""
    look = {"arrowstyle": "-|>", "color": UPSTREAM, "linewidth": 0.8 + 6 * min(share, 1.0), "alpha": 0.7}
    connections = {"xy": (0, 0.5), "xycoords": end, "xytext": (1, 0.5), "textcoords": start}
    axes.annotate("", **connections, arrowprops=look | {"shrinkA": 3, "shrinkB": 4}, zorder=2)


def _levels(axes: Axes, causes: Sequence[Unit], chain: Sequence[Unit]) -> None:
    units = [(unit, CAUSE) for unit in causes] + [(unit, UPSTREAM) for unit in reversed(chain)]
    for row, (unit, shade) in enumerate(units):
        first = row == 0
        axes.plot((unit.baseline, unit.sink_level), (row, row), color=shade, linewidth=1.5)
        axes.plot(unit.sink_level, row, "o", color=shade, label="on outliers" if first else None)
        axes.plot(
            unit.baseline, row, "o", color=INK, markersize=4, label="on other patches" if first else None
        )
    axes.set_yticks(range(len(units)), [_name(unit) for unit, _ in units])
    axes.set_ylim(len(units) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=1)
    axes.margins(x=0.08)
    paint(axes)
    label(axes, x="activation", y="block:unit")
    legend(axes, loc="lower right")


def _attention(axes: Axes, shares: Sequence[float], emergence: int) -> None:
    axes.plot([100 * share for share in shares], "o-", color=CAUSE, markersize=3)
    axes.axvline(emergence, color=INK, linestyle="--", linewidth=1, label="sinks emerge")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    paint(axes)
    label(axes, x="block", y="attention that falls on outliers, %")
    legend(axes, loc="upper left")


def _written(axes: Axes, populations: Sequence[Population]) -> None:
    """Draws what each population holds, by what wrote it: bars that add up to 100 %."""
    parts = (("MLP", CAUSE), ("attention", UPSTREAM), ("earlier blocks", INK))
    for row, population in enumerate(populations):
        kind, start = population.kind, 0.0
        for (name, shade), share in zip(parts, (kind.mlp, kind.attention, kind.input), strict=True):
            length = 100 * max(share or 0.0, 0.0)
            axes.barh(row, length, left=start, height=0.5, color=shade, label=None if row else name)
            start += length
    axes.set_yticks(range(len(populations)), [f"block {each.block}" for each in populations])
    axes.set_ylim(len(populations) - 0.5, -1.2)
    paint(axes)
    label(axes, x="of what sinks hold, written by, %")
    legend(axes, loc="upper right")


def _name(unit: Unit) -> str:
    return f"{unit.block}:{unit.index}"


def _percent(share: float) -> str:
    """A unit that others work against can have a share of many times the whole."""
    if share > 1:
        return "> 100 %"
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"
