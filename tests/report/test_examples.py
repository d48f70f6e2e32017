import numpy as np
import pytest
import torch

from phreg.evaluation.examples import Example, LabelledBox, Mark, Panel
from phreg.report.canvas import png
from phreg.report.examples import FOUND, TRUE, examples_figure, write_examples

MAPS = ("degree", "similarity")


def example(seed: int) -> Example:
    picture = np.full((32, 40, 3), 90, dtype=np.uint8)
    boxes = [
        LabelledBox(torch.tensor([0.0, 0, 8, 8]), "true box", found=False),
        LabelledBox(torch.tensor([8.0, 8, 16, 24]), "true box", found=False),
        LabelledBox(torch.tensor([8.0, 8, 24, 32]), "box found", found=True),
    ]
    generator = torch.Generator().manual_seed(seed)
    maps = [Panel(torch.randn(4, 5, generator=generator), name, marks=[Mark(1, 3, "seed")]) for name in MAPS]
    return [Panel(picture, boxes=boxes), *maps]


def boxes(axes, colour):
    return [patch.get_bbox().bounds for patch in axes.patches if patch.get_edgecolor()[:3] == rgb(colour)]


def rgb(colour):
    return tuple(int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))


def test_a_picture_has_its_boxes_and_a_map_its_marks():
    found = example(0)
    figure = examples_figure({"vit": [found]})
    picture, *maps = figure.axes
    assert boxes(picture, TRUE) == [(-0.5, -0.5, 8, 8), (7.5, 7.5, 8, 16)]
    assert boxes(picture, FOUND) == [(7.5, 7.5, 16, 24)]
    assert [axes.get_title() for axes in figure.axes] == ["vit", *MAPS]
    for axes, panel in zip(maps, found[1:], strict=True):
        assert np.array_equal(axes.images[0].get_array(), panel.image.numpy())
        (mark,) = axes.lines
        assert (mark.get_ydata()[0], mark.get_xdata()[0]) == (1, 3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["true box", "box found", "seed"]


def test_models_stand_side_by_side_a_row_a_picture():
    figure = examples_figure({"raw": [example(0), example(1)], "patched": [example(2), example(3)]})
    assert len(figure.axes) == 2 * 2 * 3
    assert [axes.get_title() for axes in figure.axes] == ["raw", *MAPS, "patched", *MAPS, *[""] * 6]
    assert png(figure).startswith(b"\x89PNG")


def test_a_long_name_does_not_reach_into_the_picture_beside_it():
    figure = examples_figure({"vit_tiny_patch16_224.augreg_in21k_ft_in1k": [example(0)]})
    title = figure.axes[0].get_title()
    assert title.replace("\n", "") == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    figure.draw_without_rendering()
    assert figure.axes[0].title.get_window_extent().width < figure.get_window_extent().width / 3


@pytest.mark.parametrize(("models", "written"), [({}, False), ({"vit": [example(0)]}, True)])
def test_a_file_is_written_where_there_are_pictures(models, written, tmp_path):
    write_examples(tmp_path / "maps.png", models)
    assert (tmp_path / "maps.png").exists() is written
