import io
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from planted import CORNERS, DEPTH, Planted, pictures

from phreg.analysis.norms import QUANTILES, NormReport, outliers
from phreg.report import charts
from phreg.report.canvas import LINE_LENGTH, png, save_png, wrapped
from phreg.report.maps import norm_map
from phreg.report.norm_charts import norm_histograms, norm_quantiles, norm_series
from phreg.report.sink_chart import MAX_UNITS, sink_chart
from phreg.sinks.kinds import Kind
from phreg.sinks.locate import Population, Sinks, Unit

Histogram = namedtuple("Histogram", "edges counts")
LONG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="module")
def report() -> NormReport:
    return outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])


@pytest.fixture(scope="module")
def sinks(report: NormReport) -> Sinks:
    units = (Unit(2, 41, 167.0, 3.0, 0.9), Unit(3, 7, 12.0, 0.5, 0.05))
    chain = (Unit(1, 5, 8.0, 0.1, 0.4), Unit(0, 6, 4.0, 0.1, 0.2))
    return Sinks(report, 2, units, 1.0, chain, (0.0, 0.01, 0.2, 0.3), (torch.zeros(4, 16),))


def test_agreement_by_position_has_one_scale_up_to_one_for_all_models():
    grids = torch.tensor([[0.9, 0.8], [torch.nan, 0.95]]), torch.tensor([[0.7, 0.99]])
    figure = charts.agreement_by_position(*grids, names=("a", "b"))
    drawn = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in drawn] == [(pytest.approx(0.7), 1)] * 2
    for image, grid in zip(drawn, grids, strict=True):
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), grid.numpy())
    assert [axes.get_title() for axes in figure.axes if axes.images] == ["a", "b"]


def test_a_model_that_agrees_wholly_is_drawn_at_the_top_of_the_scale():
    figure = charts.agreement_by_position(torch.ones(2, 2))
    (image,) = figure.axes[0].images
    low, high = image.get_clim()
    assert low < high == 1


def quantiles(low: float, high: float) -> list[float]:
    return [low + share * (high - low) for share in QUANTILES]


TOKENS = {
    "CLS": [2.0, 3.0, 4.0, 5.0],
    "register 1": [2.0, 9.0, 9.0, 90.0],
    "register 2": [1.0, 9.0, 9.0, 80.0],
}
BLOCKS = [Histogram((1.0, 2.0, 4.0), (90, 10))] * DEPTH

CHARTS = {
    "norm_quantiles": lambda r, n, **names: norm_quantiles(*[r] * n, tokens=[TOKENS] * n, **names),
    "norm_histograms": lambda _, n, **names: norm_histograms(*[BLOCKS] * n, **names),
    "norm_series": lambda r, n, **names: norm_series(*[r] * n, **names),
    "position_map": lambda r, n, **names: charts.position_map(*[r.position_histogram] * n, **names),
    "stripes": lambda r, n, **names: charts.stripes(*[r.position_histogram] * n, **names),
    "attention_focus": lambda r, n, **names: charts.attention_focus(
        *[{"CLS": r.position_histogram}] * n, **names
    ),
    "attention_share": lambda _, n, **names: charts.attention_share(
        *[[0.1, 0.2]] * n, fair=[0.02] * n, **names
    ),
    "neighbour_cosines": lambda _, n, **names: charts.neighbour_cosines(
        *[{"others": quantiles(0.0, 1.0)}] * n, **names
    ),
    "probe_bars": lambda _, n, **names: charts.probe_bars(
        *[{"CLS": (80.0, 1.0), "outliers": (60.0, 1.0)}] * n, figure="top-1, %", **names
    ),
    "cost_lines": lambda _, n, **names: charts.cost_lines([0, 1], *[{"FLOPs": [0.0, 0.1]}] * n, **names),
}


def texts(figure: Figure) -> list[str]:
    """All that is written on a chart, in reading size."""
    figure.draw_without_rendering()
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return [" ".join(text.split()) for text in found if text.strip()]


# -- one look


def test_drawing_leaves_pyplot_and_its_global_state_alone():
    modules = "phreg.report.charts, phreg.report.maps, phreg.report.sink_chart"
    code = f"import sys, {modules}; sys.exit('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_takes_one_model_or_several_and_nothing_written_is_cut_off(name, count, report):
    figure = CHARTS[name](report, count, names=[LONG, f"{LONG} with registers"][:count])
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    # A pixel of slack for the rounding of letters.
    assert box.x0 > -0.01, box
    assert box.y0 > -0.01, box
    assert box.x1 < width + 0.01, box
    assert box.y1 < height + 0.01, box


def test_a_chart_shows_itself_in_a_notebook_without_background(report: NormReport):
    with Image.open(io.BytesIO(charts.position_map(report.position_histogram)._repr_png_())) as image:
        assert image.mode == "RGBA"
        assert image.getpixel((0, 0))[3] == 0


def test_pictures_are_saved_as_png(tmp_path: Path, report: NormReport):
    drawn = norm_map(report.maps[0, -1], 1.0, 100.0)
    save_png(tmp_path / "map.png", drawn)
    save_png(tmp_path / "chart.png", norm_quantiles(report))
    with Image.open(tmp_path / "map.png") as read, Image.open(tmp_path / "chart.png") as chart:
        np.testing.assert_array_equal(np.asarray(read), drawn)
        assert chart.format == "PNG"


def test_charts_of_two_models_are_twice_as_wide(report: NormReport):
    for chart, given in (
        (charts.position_map, report.position_histogram),
        (norm_quantiles, report),
    ):
        one, two = (Image.open(io.BytesIO(png(chart(*[given] * count)))) for count in (1, 2))
        assert two.size == (2 * one.width, one.height)


def test_models_are_called_by_their_names_or_else_before_and_after(report: NormReport):
    histogram = report.position_histogram
    assert {"before", "after"} <= set(texts(charts.position_map(histogram, histogram)))
    named = texts(charts.position_map(histogram, histogram, names=("DINOv2", "DINOv2-reg")))
    assert {"DINOv2", "DINOv2-reg"} <= set(named)
    assert "before" not in named
    assert "before" not in texts(charts.position_map(histogram))


def test_long_names_are_broken_where_checkpoints_have_their_joints():
    assert wrapped(LONG, 24) == "vit_tiny_patch16_224.\naugreg_in21k_ft_in1k"
    assert wrapped("a photograph of a cat", 14) == "a photograph\nof a cat"
    assert wrapped(LONG, LINE_LENGTH) == LONG
    assert wrapped("", 10) == ""


# -- norms


def lines(figure: Figure, marker: str) -> list[list[float]]:
    return [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == marker]


def test_the_fan_marks_the_threshold_in_blocks_with_outliers_alone(report: NormReport):
    expected = [[block.block, block.gap.threshold] for block in report.blocks if block.gap]
    assert [point[0] for point in expected] == [2, 3]
    assert lines(norm_quantiles(report), "x") == [expected]
    assert lines(norm_quantiles(outliers(Planted(), [pictures()])), "x") == []


def test_the_fan_can_be_read_after_the_final_norm(report: NormReport):
    figure = norm_quantiles(report, normed=True)
    median = figure.axes[0].lines[0].get_ydata().tolist()
    assert median == [block.median for block in report.normed]
    assert "norm, after the final norm" in texts(figure)


def test_cls_and_registers_are_lines_of_their_own_each_kind_explained_once(report: NormReport):
    figure = norm_quantiles(report, tokens=[TOKENS])
    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    assert all(any(list(norms) == list(line) for line in drawn) for norms in TOKENS.values())
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["CLS", "register"]


def test_histograms_have_a_panel_a_block_and_densities_that_add_up_to_one():
    blocks = [BLOCKS[0], Histogram((1.0, 10.0, 1000.0), (3, 1)), *BLOCKS[2:]]
    for log, widths in ((True, [1.0, 2.0]), (False, [9.0, 990.0])):
        figure = norm_histograms(blocks, log=log)
        assert [axes.get_title() for axes in figure.axes] == [f"block {number}" for number in range(DEPTH)]
        values = figure.axes[1].patches[0].get_data().values
        np.testing.assert_allclose(values * widths, [0.75, 0.25])
        assert figure.axes[1].get_xscale() == ("log" if log else "linear")


def test_histograms_explain_models_and_tokens_of_all_of_them():
    figure = norm_histograms(BLOCKS, BLOCKS, tokens=[{"CLS": TOKENS["CLS"]}, TOKENS], names=("a", "b"))
    explained = {text.get_text() for text in figure.legends[0].get_texts()}
    assert explained == {"a", "b", "CLS", "register"}


def test_a_series_shows_the_rate_of_each_model_in_order(report: NormReport):
    clean = outliers(Planted(), [pictures()])
    figure = norm_series(report, clean, report, names=("S", "B", "L"))
    rates = figure.axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(rates, [6.25, 0, 6.25])  # 4 of 64 patches
    labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert labels == ["S\nblock 3", "B\nblock 3", "L\nblock 3"]


# -- positions


def test_position_maps_of_two_models_share_one_scale(report: NormReport):
    figure = charts.position_map(report.position_histogram, report.position_histogram / 4)
    drawn = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in drawn] == [(0, 100), (0, 100)]
    assert drawn[1].get_array().max() == 25


def test_stripes_show_as_peaks_beside_the_map():
    histogram = torch.zeros(6, 8)
    histogram[:, ::4] = 0.5
    figure = charts.stripes(histogram)
    above, centre, beside = figure.axes
    assert [bar.get_height() for bar in above.patches] == [50, 0, 0, 0, 50, 0, 0, 0]
    assert [bar.get_width() for bar in beside.patches] == [12.5] * 6
    assert above.get_xlim() == centre.get_xlim()
    assert beside.get_ylim() == centre.get_ylim()


# -- attention and neighbours


def test_attention_maps_of_all_queries_and_models_share_one_scale():
    focus = torch.full((4, 4), 0.01)
    names = ["CLS", *(f"register {number}" for number in range(1, 9))]
    models = {"CLS": focus}, dict.fromkeys(names, 2 * focus)
    figure = charts.attention_focus(*models, names=("a", "b"))
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 10
    assert {image.get_clim() for image in images} == {images[0].get_clim()}
    assert {"a", "b", "CLS", "register 8"} <= set(texts(figure))


def test_attention_shares_are_drawn_against_the_fair_share():
    figure = charts.attention_share([0.02, 0.3], fair=[0.02])
    (axes,) = figure.axes
    np.testing.assert_allclose([line.get_ydata() for line in axes.lines], [[2, 30], [2, 2]])


def test_kinds_of_patches_keep_their_place_where_a_model_lacks_one():
    figure = charts.neighbour_cosines(
        {"outliers": quantiles(0.5, 0.9), "others": quantiles(0.0, 0.8)}, {"others": quantiles(0.1, 0.7)}
    )
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["outliers", "others"]
    assert {round(bar.get_y() + bar.get_height() / 2, 6) for bar in left.patches} == {0, 1}
    assert {round(bar.get_y() + bar.get_height() / 2, 6) for bar in right.patches} == {1}


# -- probes and cost


def test_probes_have_a_bar_a_model_and_token_and_the_standard_deviation_over_it():
    figure = charts.probe_bars(
        {"ordinary": (40.0, 2.0), "outliers": (60.0, 1.0)},
        {"ordinary": (44.0, 0.5), "registers": (70.0, 3.0)},
        figure="top-1, %",
        chance=0.1,
    )
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [40, 60, 44, 70]
    whiskers = [np.ptp(segment[:, 1]) for part in axes.collections for segment in part.get_segments()]
    np.testing.assert_allclose(whiskers, [4, 2, 1, 6])
    assert {"ordinary", "outliers", "registers", "top-1, %", "chance"} <= set(texts(figure))


def test_costs_are_per_cent_of_what_was_there():
    figure = charts.cost_lines([0, 4], {"parameters": [0.0, 0.0002], "FLOPs": [0.0, 0.02]})
    parameters, flops = (axes.lines[0].get_xydata().tolist() for axes in figure.axes)
    np.testing.assert_allclose(parameters, [[0, 0], [4, 0.02]])
    np.testing.assert_allclose(flops, [[0, 0], [4, 2]])


# -- sinks


def test_sinks_show_units_with_their_shares_and_levels_and_the_attention_they_draw(sinks: Sinks):
    figure = sink_chart(sinks, "DINOv2")
    written = set(texts(figure))
    assert {"2:41 90 %", "3:7 5 %", "1:5 40 %", "0:6 20 %", "block 2", "DINOv2"} <= written
    levels, attention = figure.axes[1:]
    ends = {tuple(line.get_xdata()) for line in levels.lines if len(line.get_xdata()) == 2}
    assert ends == {(3.0, 167.0), (0.5, 12.0), (0.1, 8.0), (0.1, 4.0)}
    assert attention.lines[0].get_ydata() == pytest.approx([0, 1, 20, 30])


def test_arrows_go_from_every_upstream_unit_to_the_first_cause(sinks: Sinks):
    arrows = [note for note in sink_chart(sinks).axes[0].texts if getattr(note, "arrow_patch", None)]
    assert len(arrows) == 2
    assert {" ".join(arrow.xycoords.get_text().split()) for arrow in arrows} == {"2:41 90 %"}


def test_a_share_beyond_the_whole_is_said_to_be_and_its_arrow_stays_narrow(sinks: Sinks):
    # Where a second unit works against it, one unit's share can be dozens of times the whole.
    chain = (replace(sinks.chain[0], share=36.35),)
    figure = sink_chart(replace(sinks, chain=chain))
    assert any("> 100 %" in text for text in texts(figure))
    (arrow,) = [note for note in figure.axes[0].texts if getattr(note, "arrow_patch", None)]
    assert arrow.arrow_patch.get_linewidth() < 10


def test_sinks_that_no_unit_explains_say_so(sinks: Sinks):
    figure = sink_chart(replace(sinks, units=(), chain=(), attention=None))
    assert "no hidden unit explains them" in texts(figure)
    assert len(figure.axes) == 1
    assert len(sink_chart(replace(sinks, attention=None)).axes) == 2
    assert len(sink_chart(replace(sinks, units=(), chain=())).axes) == 2


def test_what_wrote_each_population_is_drawn_as_bars_that_add_up(sinks: Sinks):
    kinds = [
        Kind("units", 0.9, 0.08, 0.02, "read", 0.3, 1.0),
        Kind("attention", 0.1, 0.9, 0.0, "parked", 0.9, 0.0),
    ]
    known = [
        Population(block, 3, "high", 0.02, (), 0.0, kind, (torch.zeros(1, 16),), ())
        for block, kind in zip((2, 3), kinds, strict=True)
    ]
    figure = sink_chart(replace(sinks, populations=tuple(known)))
    axes = figure.axes[-1]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["block 2", "block 3"]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([90, 8, 2, 10, 90, 0])
    starts = [bar.get_x() for bar in axes.patches]
    assert starts == pytest.approx([0, 90, 98, 0, 10, 100])
    unread = replace(known[0], kind=Kind(None, None, None, 0.1, None, None, None))
    assert len(sink_chart(replace(sinks, populations=(unread,))).axes) == len(sink_chart(sinks).axes)


def test_of_many_units_those_with_the_largest_shares_are_drawn(sinks: Sinks):
    many = tuple(Unit(2, index, 5.0, 0.0, index / 100) for index in range(20))
    written = texts(sink_chart(replace(sinks, units=many, chain=())))
    assert sum(text.startswith("2:") and text.endswith("%") for text in written) == MAX_UNITS
    assert "2:19 19 %" in written
    assert "2:1 1 %" not in written
