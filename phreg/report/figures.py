"""Draws what was found about models, side by side: every chart, with the heading it stands under.

Each chart is a function of `phreg.report.charts`, which knows nothing of an `Inspection`; here each gets the
part of it that it shows.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from matplotlib.figure import Figure

from phreg.analysis.inspection import Inspection
from phreg.analysis.norms import QUANTILES
from phreg.analysis.probes import ReconstructionFigures, TokenProbe
from phreg.report import charts
from phreg.report.norm_charts import norm_histograms, norm_quantiles, norm_series
from phreg.report.sink_chart import sink_chart
from phreg.report.verdict import causes

AGREEMENT = "Agreement with moved views"
"""Heading of what the model's own moved views tell."""

ProbeFigures = TypeVar("ProbeFigures")
_Report = TypeVar("_Report")


class DrawnChart(NamedTuple):
    """A chart before it is encoded."""

    section: str
    """Heading that it stands under."""
    name: str
    """What its file is called."""
    figure: Figure
    alt: str
    caption: str


def figures(models: Sequence[Inspection]) -> Iterator[DrawnChart]:
    """Draws the charts of some models, side by side."""
    names = [model.name for model in models] if len(models) > 1 else [""]
    yield from _norm_figures(models, names)
    yield from _position_figures(models, names)
    yield from _agreement_figures(models, names)
    yield from _attention_figures(models, names)
    yield from _neighbour_figures(models, names)
    with_sinks = [(model.name, model.sinks) for model in models if model.sinks]
    for number, (name, sinks) in enumerate(with_sinks, start=1):
        yield DrawnChart(
            "Sinks",
            f"sinks-{number}" if len(models) > 1 else "sinks",
            sink_chart(sinks, name if len(models) > 1 else ""),
            f"Chart of the sinks of {name}: {causes(sinks)}",
            "Above: what sets the causes off, from block to block, and their shares. Below: how active these "
            "units are on outliers and elsewhere, and how much attention outliers draw.",
        )
    yield from _probe_figures(models, names)
    yield from _cost_figures(models, names)


def _norm_figures(models: Sequence[Inspection], names: Sequence[str]) -> Iterator[DrawnChart]:
    reports = [model.norms for model in models]
    fans = "bands hold 50, 90 and 98 % of the patch tokens, the line is the median, dots are the extremes"
    tokens = [{token.name: _medians(token.quantiles) for token in report.tokens} for report in reports]
    normed = [{token.name: _medians(token.normed) for token in report.tokens} for report in reports]
    yield DrawnChart(
        "Norms", "norms", norm_quantiles(*reports, names=names, tokens=tokens),
        "Chart of norms from block to block",
        f"Norms from block to block, before the final norm: {fans}, crosses separate outliers from the rest; "
        "CLS and registers are lines of their own (medians over images).",
    )  # fmt: skip
    yield DrawnChart(
        "Norms", "norms-after-norm", norm_quantiles(*reports, names=names, tokens=normed, normed=True),
        "Chart of norms from block to block, after the final norm",
        "The same, every block's tokens passed through the final norm.",
    )  # fmt: skip
    for scale in ("log", "linear"):
        histograms = [[getattr(block, scale) for block in report.blocks] for report in reports]
        yield DrawnChart(
            "Norms", f"norm-histograms-{scale}",
            norm_histograms(*histograms, names=names, tokens=tokens, log=scale == "log"),
            f"Histograms of norms in each block, {scale} scale",
            f"How many patch tokens have which norm ({scale} scale), block by block.",
        )  # fmt: skip
    if len(models) > 1:
        yield DrawnChart(
            "Norms", "norm-series", norm_series(*reports, names=names),
            "Chart of norms and outlier rates, model by model",
            f"The models side by side, each in the block where its outliers are clearest: {fans}.",
        )  # fmt: skip


def _medians(quantiles: Sequence[Sequence[float]]) -> list[float]:
    return [block[QUANTILES.index(0.5)] for block in quantiles]


def _position_figures(models: Sequence[Inspection], names: Sequence[str]) -> Iterator[DrawnChart]:
    histograms = [model.norms.position_histogram for model in models]
    yield DrawnChart(
        "Where", "positions", charts.position_map(*histograms, names=names),
        "Map of the positions of outliers",
        f"Share of images with an outlier at each patch, after {focus_blocks(models)}.",
    )  # fmt: skip
    resampled = [(model.name, model.interpolation) for model in models if model.interpolation]
    for number, (name, effect) in enumerate(resampled, start=1):
        yield DrawnChart(
            "Where",
            f"resampled-positions-{number}",
            charts.stripes(
                effect.antialiased.positions, effect.plain.positions, names=("antialiased", "not antialiased")
            ),
            f"Maps of outliers of {name}, its positions resampled with and without antialiasing",
            f"Outliers of {name} on a grid of {effect.grid[0]}x{effect.grid[1]} instead of its own "
            f"{effect.own_grid[0]}x{effect.own_grid[1]}, its position embedding resampled either way; its "
            f"library {'antialiases' if effect.library_antialiases else 'does not antialias'}. Mean cosine "
            f"between the two: {effect.cosine:.3f}. Stripes would show as even steps along the margins.",
        )


def _measured(reports: Sequence[_Report | None], names: Sequence[str]) -> tuple[list[_Report], list[str]]:
    """Keeps the reports that there are, and the names of their models."""
    found = [(report, name) for report, name in zip(reports, names, strict=True) if report is not None]
    return [report for report, _ in found], [name for _, name in found]


def _agreement_figures(models: Sequence[Inspection], names: Sequence[str]) -> Iterator[DrawnChart]:
    """Models that could not be measured are left out."""
    reports, names = _measured([model.consistency for model in models], names)
    if not reports:
        return
    yield DrawnChart(
        AGREEMENT, "agreement",
        charts.agreement_by_position(*(report.by_position for report in reports), names=names),
        "Map of the agreement with moved views at each position",
        "Cosine of each patch to the average over moved views, by its position in the frame, mean over "
        "images. Dark patches say something else there than where the same content lies elsewhere.",
    )  # fmt: skip
    if any(len(report.maps) > 1 for report in reports):
        yield DrawnChart(
            AGREEMENT, "frame-fixed",
            charts.position_map(*(report.frame_fixed_by_position for report in reports), names=names),
            "Map of the share of the disagreement that is fixed to the frame",
            "Share of the disagreement at each position that is the same in all images. By chance it is one "
            "over their number everywhere.",
        )  # fmt: skip


def _attention_figures(models: Sequence[Inspection], names: Sequence[str]) -> Iterator[DrawnChart]:
    """Models whose attention cannot be listened to are left out."""
    reports, names = _measured([model.survey.attention for model in models], names)
    if not reports:
        return
    focus = [dict(zip(report.queries, report.focus, strict=True)) for report in reports]
    yield DrawnChart(
        "Attention", "attention-focus", charts.attention_focus(*focus, names=names),
        "Maps of where CLS and registers look in the last block, mean over images",
        "Where CLS and each register look in the last block, mean over heads and images.",
    )  # fmt: skip
    if any(model.survey.outliers.any() for model in models):
        shares, fair = [report.share for report in reports], [report.fair for report in reports]
        query = " or ".join(dict.fromkeys(report.queries[0] for report in reports))
        yield DrawnChart(
            "Attention", "attention-share",
            charts.attention_share(*shares, fair=fair, query=query, names=names),
            "Chart of the share of attention that falls on outliers, block by block",
            "Share of attention that falls on the model's own outliers; dotted: their share of all tokens.",
        )  # fmt: skip


def _neighbour_figures(models: Sequence[Inspection], names: Sequence[str]) -> Iterator[DrawnChart]:
    reports = [model.survey.neighbours for model in models]
    kinds = [
        {
            kind: cosines.quantiles
            for kind, cosines in (("outliers", report.outliers), ("others", report.others))
            if cosines
        }
        for report in reports
    ]
    yield DrawnChart(
        "Neighbours", "neighbours", charts.neighbour_cosines(*kinds, names=names),
        "Chart of the cosine of patch embeddings to their neighbours'",
        "How alike a patch is to its four neighbours, by the patch embedding alone: outliers against others.",
    )  # fmt: skip


def _probe_figures(models: Sequence[Inspection], names: Sequence[str]) -> Iterator[DrawnChart]:
    section = "What tokens hold"
    positions = [
        {kind: (figures.distance, 0.0) for kind, figures in by_kind(model.position).items()}
        for model in models
    ]
    if all(positions):
        yield DrawnChart(
            section, "probe-position",
            charts.probe_bars(*positions, figure="distance of the predicted position, patches", names=names),
            "Chart of how well tokens tell their position",
            "How far from the truth a linear probe tells a position, on images it was not trained on. "
            "Lower is better.",
        )  # fmt: skip
    pixels = [
        {
            kind: (100 * relative_error(figures), 0.0)
            for kind, figures in by_kind(model.reconstruction).items()
        }
        for model in models
    ]
    if all(pixels):
        yield DrawnChart(
            section, "probe-pixels",
            charts.probe_bars(*pixels, figure="error of predicted pixels, % of guessing", names=names),
            "Chart of how well tokens tell their patch's pixels",
            "Error of a linear probe that predicts a patch's pixels from its token; 100 % is the mean patch"
            " every time. Lower is better.",
        )  # fmt: skip
    probes = [model.classes for model in models if model.classes]
    if probes and len(probes) == len(models):
        classes = [
            {entry.token: (100 * entry.mean, 100 * (entry.std or 0.0)) for entry in probe.tokens}
            for probe in probes
        ]
        yield DrawnChart(
            section, "probe-class",
            charts.probe_bars(
                *classes, figure="top-1 of the class, %", names=names, chance=100 * probes[0].chance
            ),
            "Chart of how well single tokens tell the class of their image",
            "Accuracy of a linear probe that is given one token of an image; bars show the standard "
            "deviation over "
            "seeds.",
        )  # fmt: skip


def _cost_figures(models: Sequence[Inspection], names: Sequence[str]) -> Iterator[DrawnChart]:
    if not all(model.costs for model in models):
        return
    counts = [cost.registers for cost in models[0].costs]
    timed = all(model.latency for model in models)
    added = []
    for model in models:
        kinds = {
            "parameters": [cost.parameters_added for cost in model.costs],
            "FLOPs": [cost.flops_added for cost in model.costs],
        }
        if timed:
            kinds["latency"] = [time.ratio - 1 for time in model.latency]
        added.append(kinds)
    yield DrawnChart(
        "Cost", "cost", charts.cost_lines(counts, *added, names=names), "Chart of what registers cost",
        "What registers add to the model without any: parameters and FLOPs are counted"
        f"{', latency is measured here on single images' if timed else ''}.",
    )  # fmt: skip


def focus_blocks(models: Sequence[Inspection]) -> str:
    """Names the block in which each model's outliers are looked at: `block 5`, or one for each model."""
    blocks = [model.norms.blocks[model.norms.focus].block for model in models]
    if len(set(blocks)) == 1:
        return f"block {blocks[0]}"
    return ", ".join(f"block {block} ({model.name})" for block, model in zip(blocks, models, strict=True))


def by_kind(probe: TokenProbe[ProbeFigures] | None) -> dict[str, ProbeFigures]:
    """Takes a probe's figures of ordinary tokens and of outliers, as far as there are any."""
    kinds = {"ordinary": probe.ordinary, "outliers": probe.outliers} if probe else {}
    return {kind: figures for kind, figures in kinds.items() if figures}


def relative_error(figures: ReconstructionFigures) -> float:
    """Error of the probe of pixels, as a share of what telling the mean patch every time gets."""
    return figures.error / max(figures.chance, 1e-12)
