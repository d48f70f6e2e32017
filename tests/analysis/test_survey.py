"""One pass has to find what each analysis finds alone, whatever kind of model it looks at."""

import json
import logging

import pytest
import torch
from families import FAMILIES
from planted import CORNERS, DEPTH, Planted, pictures
from sinking import photographs

from phreg import demo
from phreg.analysis.attention import attention_maps, attention_weights
from phreg.analysis.neighbours import contrast
from phreg.analysis.norms import outliers
from phreg.analysis.survey import survey
from phreg.backbones.resolve import adapt
from phreg.errors import DataError
from phreg.registers import add_registers

KINDS = [
    "transformers/dinov2-registers",
    "transformers/dinov3",
    "transformers/siglip2-vision",
    "transformers/deit",
    "timm/dinov2-reg4",
    "timm/eva02",
    "timm/naflexvit-reg",
    "open_clip/clip",
    "open_clip/siglip",
]


@pytest.fixture(scope="module")
def backbone():
    return adapt(demo.demo_model())


@pytest.fixture(scope="module")
def images():
    return photographs()[:6]


@pytest.fixture(scope="module")
def found(backbone, images):
    return survey(backbone, images.split(4), show=3)


def test_norms_are_those_that_outliers_measures(found, backbone, images):
    alone = outliers(backbone, images.split(4), show=3)
    assert found.norms.to_json() == alone.to_json()
    assert torch.equal(found.norms.maps, alone.maps)


def test_outliers_are_marked_image_by_image_in_the_block_to_look_at(found):
    assert found.norms.emergence_block == demo.SINK_BLOCK
    assert found.outliers.shape == (6, demo.GRID, demo.GRID)
    assert torch.equal(found.outliers.float().mean(0), found.norms.position_histogram)


def test_artifacts_that_are_gone_at_the_end_are_marked_where_they_are():
    hidden = survey(Planted({1: (CORNERS, 100.0), 3: (CORNERS, -100.0)}), [pictures()])
    expected = torch.zeros(64, dtype=torch.bool)
    expected[list(CORNERS)] = True
    assert torch.equal(hidden.outliers, expected.reshape(8, 8).expand(12, -1, -1))


def test_attention_is_what_the_models_weights_say(found, backbone, images):
    weights = attention_weights(backbone, images, slice(0, 1))
    on_outliers = [
        (block[:, :, 0, 1:].mean(1) * found.outliers.flatten(1)).sum(1).mean() for block in weights
    ]
    report = found.attention
    assert report.queries == ("CLS",)
    assert report.share == pytest.approx([float(share) for share in on_outliers], abs=1e-5)
    focus = attention_maps(backbone, images).mean((0, 2))
    # Means of shares of 1, taken in batches.
    torch.testing.assert_close(report.focus, focus, atol=1e-5, rtol=0)


def test_sinks_draw_more_attention_than_is_their_fair_share_once_they_are_there(found):
    report, tokens = found.attention, demo.GRID**2 + 1
    assert report.fair == pytest.approx(float(found.outliers.sum()) / 6 / tokens)
    assert max(report.share[: demo.SINK_BLOCK + 1]) < 2 * report.fair
    assert min(report.share[demo.SINK_BLOCK + 1 :]) > 3 * report.fair


def test_sinks_that_flat_patches_become_are_found_on_flat_patches_that_resemble_their_neighbours(found):
    # Most of the plant's sinks are flat by construction; the corners are not.
    report = found.neighbours
    assert report.outliers_low_information > 2 * report.low_information
    assert report.outliers.mean > report.others.mean


def test_contrast_counts_over_all_images(found, backbone, images):
    contrasts = contrast(backbone, images)
    low = contrasts <= contrasts.quantile(0.1)
    assert found.neighbours.low_information == pytest.approx(float(low.float().mean()))
    assert found.neighbours.outliers_low_information == pytest.approx(
        float(low[found.outliers].float().mean())
    )


def test_the_first_images_are_kept_whole(found, backbone, images):
    with torch.no_grad():
        features = backbone(images[:3]).patches
    maps = attention_maps(backbone, images[:3])
    assert len(found.shown) == 3
    for index, shown in enumerate(found.shown):
        assert torch.equal(shown.image, images[index])
        assert torch.equal(shown.norms, found.norms.maps[index])
        # fp32, in batches of four and of three.
        torch.testing.assert_close(shown.features, features[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(shown.attention, maps[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("show", [0, 5, 50])
def test_as_many_images_are_kept_as_asked_for_and_there_are(show: int):
    found = survey(Planted(), pictures(8).split(3), show=show)
    assert len(found.shown) == len(found.norms.maps) == min(show, 8)


def test_how_images_are_batched_does_not_matter(found, backbone, images):
    one_by_one = survey(backbone, images.split(1))
    assert torch.equal(one_by_one.outliers, found.outliers)
    assert one_by_one.attention.share == pytest.approx(found.attention.share, abs=1e-5)
    assert one_by_one.neighbours.outliers.mean == pytest.approx(found.neighbours.outliers.mean, abs=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_model_is_surveyed_at_any_size(family: str, registers: int):
    backbone = add_registers(adapt(FAMILIES[family]()), registers)
    (height, width), patch = backbone.spec.input_size, backbone.spec.patch_size
    images = torch.randn(3, 3, height + patch[0], width, generator=torch.Generator().manual_seed(0))
    found = survey(backbone, images.split(2), show=1)
    rows, cols = backbone.layout(images).grid
    names = backbone.special_tokens
    assert [token.name for token in found.norms.tokens] == list(names)
    assert found.attention.queries == (names if "CLS" in names else ("patches", *names))
    assert found.attention.focus.shape == (len(found.attention.queries), rows, cols)
    assert len(found.attention.share) == len(found.norms.blocks) == len(backbone.blocks)
    (shown,) = found.shown
    heads = backbone.spec.num_heads
    assert shown.attention.shape == (len(found.attention.queries), heads, rows, cols)
    assert shown.features.shape == (rows, cols, backbone.spec.width)
    assert (found.neighbours.outliers is not None) == bool(found.outliers.any())


def test_where_attention_cannot_be_captured_the_rest_is_measured_in_the_same_pass(caplog, monkeypatch):
    backbone, runs = Planted({2: (CORNERS, 100.0)}), []
    monkeypatch.setattr(backbone, "run", lambda images: runs.append(len(images)) or backbone.model(images))
    with caplog.at_level(logging.WARNING):
        found = survey(backbone, pictures().split(5))
    assert found.attention is None
    assert {shown.attention for shown in found.shown} == {None}
    assert found.norms.outlier_rate == pytest.approx(4 / 64)
    assert runs == [5, 5, 2]
    (message,) = caplog.messages
    assert f"{DEPTH} blocks called torch's scaled_dot_product_attention 0 times" in message


def test_a_survey_runs_the_model_once_for_each_batch_and_leaves_nothing_behind(backbone, images, monkeypatch):
    runs, run = [], backbone.run
    monkeypatch.setattr(backbone, "run", lambda images: runs.append(len(images)) or run(images))
    hooks = [len(module._forward_hooks) for module in backbone.modules()]
    survey(backbone, images.split(4))
    assert runs == [4, 2]
    assert [len(module._forward_hooks) for module in backbone.modules()] == hooks


def test_the_reports_are_plain_json_with_the_norms_on_top(found):
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert read["outlier_rate"] == found.norms.outlier_rate
    assert read["emergence_block"] == demo.SINK_BLOCK
    assert len(read["attention"]["focus"][0]) == demo.GRID
    assert read["neighbours"]["low_information"] == found.neighbours.low_information
    silent = survey(Planted(), [pictures()]).to_json()
    assert json.loads(json.dumps(silent, allow_nan=False))["attention"] is None


def test_no_images_and_images_of_two_sizes_are_refused():
    with pytest.raises(DataError, match="found no images"):
        survey(Planted(), [])
    with pytest.raises(DataError, match="8x8 and 4x4"):
        survey(Planted(), [pictures(), pictures(size=16)])


@pytest.mark.real
def test_the_corner_sinks_of_a_real_model_draw_attention(real_model, real_data):
    from phreg.data.crops import centre_crops
    from phreg.data.sampling import subsample
    from phreg.data.sources import open_images
    from phreg.formats.load import open_model

    backbone, _ = open_model(real_model)
    source = subsample(open_images(str(real_data / "imagenet_samples")), 16)
    found = survey(backbone.eval(), centre_crops(backbone, source, 224))

    # The four corners of 14 x 14 patches are 2.04 %; few images lack one of them.
    assert found.norms.outlier_rate == pytest.approx(0.02, abs=0.002)
    assert found.norms.emergence_block == 7
    assert found.norms.blocks[5].bimodality < 5 / 9 < found.norms.blocks[7].bimodality
    # 28 to 31 % of the attention of CLS in blocks 8 to 11, as measured on other images.
    assert min(found.attention.share[8:]) > 0.2
    assert max(found.attention.share[:6]) < 0.06
    assert found.attention.fair == pytest.approx(4 / 197, rel=0.1)
