import numpy as np
import torch

from phreg.evaluation.tasks.lost import lost
from phreg.evaluation.tasks.object_discovery import Example
from phreg.report.canvas import png
from phreg.report.discoveries import FOUND, TRUE, discovery_figure


def example(seed: int) -> Example:
    grid = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(seed))
    picture = np.full((32, 40, 3), 90, dtype=np.uint8)
    return Example(
        picture, torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 24]]), torch.tensor([8.0, 8, 24, 32]), lost(grid)
    )


def boxes(axes, colour):
    return [patch.get_bbox().bounds for patch in axes.patches if patch.get_edgecolor()[:3] == rgb(colour)]


def rgb(colour):
    return tuple(int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))


def test_each_picture_has_its_boxes_and_the_maps_that_led_to_them():
    found = example(0)
    figure = discovery_figure({"vit": [found]})
    picture, *maps = figure.axes
    assert boxes(picture, TRUE) == [(-0.5, -0.5, 8, 8), (7.5, 7.5, 8, 16)]
    assert boxes(picture, FOUND) == [(7.5, 7.5, 16, 24)]
    assert [axes.get_title() for axes in maps] == ["degree", "expansion", "similarity"]
    for axes, step in zip(maps, found.discovery.maps.values(), strict=True):
        assert np.array_equal(axes.images[0].get_array(), step.numpy())
        (seed,) = axes.lines
        assert (seed.get_ydata()[0], seed.get_xdata()[0]) == found.discovery.seed
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "true box",
        "box found",
        "patch it was grown from",
    ]


def test_models_stand_side_by_side_a_row_a_picture():
    figure = discovery_figure({"raw": [example(0), example(1)], "patched": [example(2), example(3)]})
    assert len(figure.axes) == 2 * 2 * 4
    assert [figure.axes[index].get_title() for index in (0, 4, 8)] == ["raw", "patched", ""]
    assert png(figure).startswith(b"\x89PNG")


def test_a_long_name_does_not_reach_into_the_picture_beside_it():
    figure = discovery_figure({"vit_tiny_patch16_224.augreg_in21k_ft_in1k": [example(0)]})
    title = figure.axes[0].get_title()
    assert title.replace("\n", "") == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    figure.draw_without_rendering()
    assert figure.axes[0].title.get_window_extent().width < figure.get_window_extent().width / 4
