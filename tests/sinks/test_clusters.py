"""Clusters of sinks, by values worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES

from phreg.backbones.resolve import adapt
from phreg.sinks import clusters
from phreg.sinks.locate import Sinks
from phreg.sinks.units import Unit

MASK = [torch.ones(1, 8, dtype=torch.bool)]
"""One image, all of whose eight patches are outliers."""


def sorted_by(levels, monkeypatch):
    """Sorts units that reach these shares of their sink level, (outliers, units)."""
    levels = torch.tensor(levels)
    monkeypatch.setattr(clusters, "_relative_activations", lambda *_: iter([levels]))
    units = tuple(
        Unit(0, index, sink_level=10.0, baseline=0.0, share=0.5) for index in range(levels.shape[1])
    )
    found, members = clusters.sink_clusters(adapt(FAMILIES["timm/vit"]()), [], MASK, units)
    return [unit.cluster for unit in found], [mask[0].tolist() for (mask,) in members]


@pytest.mark.parametrize(
    ("shared", "expected"),
    [(0, [0, 1]), (1, [0, 1]), (2, [0, 1]), (3, [0, 0]), (4, [0, 0])],
)
def test_units_are_alike_that_share_more_than_half_of_the_outliers_of_the_rarer_one(
    shared, expected, monkeypatch
):
    # The first answers to outliers 0 to 3, the second to four others, of which it shares some.
    levels = [[float(outlier < 4), float(4 - shared <= outlier < 8 - shared)] for outlier in range(8)]
    assert sorted_by(levels, monkeypatch)[0] == expected


def test_units_are_one_cluster_over_any_number_of_steps(monkeypatch):
    # Each of four units shares two of three outliers with the next; the first and the last share none.
    levels = [[float(unit <= outlier < unit + 3) for unit in range(4)] for outlier in range(8)]
    assert sorted_by(levels, monkeypatch)[0] == [0, 0, 0, 0]


def test_a_clusters_outliers_are_those_that_its_units_respond_to(monkeypatch):
    # More than half of its sink level counts as a response, and so does a unit's largest.
    levels = [[0.6, 0.0], [0.5, 0.0], [0.9, 0.0], [0.0, 0.1], [0.0, 0.4], [0.0, 0.0], [0.0, 0.3], [0.0, 0.2]]
    found, members = sorted_by(levels, monkeypatch)
    assert found == [0, 1]
    assert [[outlier for outlier, own in enumerate(mask) if own] for mask in members] == [[0, 2], [4]]


@torch.no_grad()
def test_a_relative_activation_is_0_at_the_baseline_and_1_at_the_sink_level():
    backbone = adapt(FAMILIES["timm/vit"]())
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, backbone.layout(images).num_patches, dtype=torch.bool)
    mask[0, 3] = mask[1, [0, 7]] = True
    units = tuple(
        Unit(block, index, sink_level=level, baseline=baseline, share=0.5)
        for block, index, level, baseline in ((1, 5, 4.0, -3.0), (2, 9, -2.0, 5.0))
    )
    hidden = {}
    for unit in units:
        layer = backbone.mlp(unit.block).down
        layer.register_forward_pre_hook(lambda _, args, block=unit.block: hidden.update({block: args[0]}))
    backbone.run(images)
    patches = [(0, 3), (1, 0), (1, 7)]  # CLS comes before the patches
    at = [[hidden[unit.block][image, 1 + patch, unit.index] for unit in units] for image, patch in patches]
    expected = [[(one - -3.0) / (4.0 - -3.0), (other - 5.0) / (-2.0 - 5.0)] for one, other in at]
    (found,) = clusters._relative_activations(backbone, [images], [mask], units)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("rare", "fixed"), [(0.5, True), (0.4, False), (0.3, True)])
def test_position_sets_sinks_off_where_more_than_half_of_them_lie_at_fixed_patches(rare, fixed):
    # One patch is an outlier in every second image; three others in fewer, or in as many.
    histogram = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    histogram[1] = torch.tensor([rare / 2, rare / 2]) if rare < 0.5 else torch.tensor([0.5, 0.0])
    if rare == 0.4:
        histogram[0, 1] = 0.1  # now exactly half of all
    sinks = SimpleNamespace(norms=SimpleNamespace(position_histogram=histogram))
    assert Sinks.fixed.fget(sinks) is fixed
