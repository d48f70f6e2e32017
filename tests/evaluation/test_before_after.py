"""What a retrofit changed, in every block, and what its checks make of it."""

import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from planted import CORNERS, DEPTH, Planted, pictures

from phreg.analysis.norms import outliers
from phreg.analysis.survey import survey
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import adapt
from phreg.config import ChecksConfig, TargetConfig
from phreg.evaluation.before_after import Comparison, HeldOut, compare, failed_checks, table
from phreg.evaluation.metrics.agreement import Drift, agreement

INSIDE = {1: (CORNERS, 300.0), 2: (CORNERS, -300.0)}
"""Artifacts that one block makes and the next one takes away."""


@pytest.fixture(scope="module")
def seen():
    """A survey to put other norms into."""
    backbone = adapt(FAMILIES["timm/vit"]())
    return survey(backbone, [torch.randn(2, 3, *backbone.spec.input_size)])


def compared(seen, before, after, **changes):
    """Compares planted models, alike in all but their norms."""
    features = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    same = agreement(features, features)
    values = {
        "images": 12,
        "held_out": True,
        "reference": "the truth",
        "surveys": tuple(
            replace(seen, norms=outliers(Planted(pushes), [pictures()])) for pushes in (before, after)
        ),
        "agreement": (same, same),
        "drift": Drift(1.0, 1.0),
        "shown": (features, features),
    }
    return Comparison(**values | changes)


def pushed(tokens_of, strength: float) -> Backbone:
    """A tiny model in whose second block some patch tokens are lengthened."""
    backbone = adapt(FAMILIES["timm/vit"]()).eval()

    def push(_mlp, _inputs, tokens):
        tokens = tokens.clone()
        patches = tokens[:, backbone.model.num_prefix_tokens :]
        patches[tokens_of(patches)] += strength
        return tokens

    backbone.blocks[1].mlp.register_forward_hook(push)
    return backbone


def test_what_a_repair_left_is_judged_by_the_gap_of_the_original():
    images = torch.randn(8, 3, *adapt(FAMILIES["timm/vit"]()).spec.input_size)
    original = pushed(lambda patches: (slice(None), 0), 6.0)  # the first patch of every image
    student = pushed(lambda patches: (0, 0), 6.0)  # of one image

    measured = HeldOut([images], [original(images).patches], "the original")
    found = compare(original, student, measured, TargetConfig(), held_out=True)

    patches = original.layout(images).num_patches
    rates = pytest.approx([1 / patches, 1 / (8 * patches)])
    assert [norms.blocks[1].outlier_rate for norms in found.norms] == rates
    assert [block.outlier_rate for block in found.most_outliers] == rates
    assert int(found.surveys[1].outliers.sum()) == 1
    assert outliers(student, [images]).blocks[1].outlier_rate == 0, "one token has no gap of its own"


def test_artifacts_that_rise_inside_the_model_alone_fail_the_check_and_show_in_the_table(seen):
    found = compared(seen, {}, INSIDE)
    assert [report.outlier_rate for report in found.norms] == [0, 0]
    (failure,) = failed_checks(found, ChecksConfig())
    assert "inside the model rose from 0.0000" in failure
    assert "to 0.0625 (block 1)" in failure
    rows = {row.name: (row.before, row.after) for row in found.rows()}
    assert rows["the same, in the block with most"] == (0, len(CORNERS) / 64)
    assert found.to_json()["outlier_rate_by_block"] == [[0] * DEPTH, [0, 4 / 64, 0, 0]]


def test_a_rise_in_the_last_block_is_told_once_and_a_repair_inside_is_no_failure(seen):
    (failure,) = failed_checks(compared(seen, {}, {1: (CORNERS, 300.0)}), ChecksConfig())
    assert failure.startswith("the outlier rate rose from 0.0000 to 0.0625")
    assert failed_checks(compared(seen, INSIDE, {}), ChecksConfig()) == []
    assert failed_checks(compared(seen, INSIDE, INSIDE), ChecksConfig()) == []


def test_a_rise_in_the_last_block_is_not_hidden_by_as_many_inside_before(seen):
    (failure,) = failed_checks(compared(seen, INSIDE, {1: (CORNERS, 300.0)}), ChecksConfig())
    assert failure.startswith("the outlier rate rose from 0.0000 to 0.0625")


def test_figures_of_an_earlier_version_make_the_table_without_the_other_blocks(seen):
    figures = compared(seen, INSIDE, {}).to_json()
    rows = table(figures)
    del figures["outlier_rate_by_block"]
    assert table(figures) == [row for row in rows if row.name != "the same, in the block with most"]
    assert len(table(figures)) == len(rows) - 1


def test_a_figure_that_is_nan_fails_its_gate(seen):
    nothing = compared(seen, {}, {})
    assert failed_checks(nothing, ChecksConfig()) == []
    unknown = replace(nothing.agreement[1], mean=math.nan)
    for broken in (
        replace(nothing, agreement=(nothing.agreement[0], unknown)),
        replace(nothing, drift=Drift(math.nan, math.nan)),
    ):
        (failure,) = failed_checks(broken, ChecksConfig(agreement=1, drift=0))
        assert "nan" in failure
