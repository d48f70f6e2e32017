"""What a page says of models, side by side, and that each model's maps are its own."""

import dataclasses

import numpy as np
import pytest
import torch
from families import FAMILIES
from looking import BLOCK, UNIT, looked_at, noise, sinking_model
from torch.nn.functional import interpolate, normalize

from phreg.backbones.resolve import adapt
from phreg.evaluation.before_after import Comparison
from phreg.evaluation.metrics.agreement import agreement, drift
from phreg.registers import add_registers
from phreg.report import page as pages
from phreg.report.figures import figures
from phreg.report.html import MAX_SHOWN, Origin, Report
from phreg.report.page import InspectionReport, comparison_page, inspection_page
from phreg.report.verdict import advice, headline

SIDE = 48
"""Pixels of the images that the second model sees: a grid of 6x6 patches."""


@pytest.fixture(scope="module")
def both(alone):
    """Beside it, a model of another library, width and grid, without CLS."""
    other = adapt(FAMILIES["open_clip/siglip"]())
    images = interpolate(noise(other, 12), SIDE)
    return dataclasses.replace(alone, against=(looked_at(other, "other", images, show=2),))


@pytest.fixture(scope="module")
def page(both):
    with pytest.MonkeyPatch.context() as patch:  # charts take long to draw
        patch.setattr(pages, "figures", lambda models: (c for c in figures(models) if c.section == "Sinks"))
        return inspection_page(both, Origin("phreg inspect sinking --baseline other"))


@pytest.fixture(scope="module")
def sides():
    """The sinking model, and one without sinks but with registers, as a run measures them."""
    before, images = sinking_model()
    after = add_registers(adapt(FAMILIES["timm/vit"]()), 2)
    found = looked_at(before, "before", images), looked_at(after, "after", images)
    return tuple(dataclasses.replace(side, consistency=None) for side in found)


@pytest.fixture
def without_charts(monkeypatch):
    """Charts take long to draw."""
    monkeypatch.setattr(pages, "figures", lambda models: iter(()))


def compared(sides, **changes):
    features = torch.randn(8, 4, 4, 32, generator=torch.Generator().manual_seed(0))
    pooled = features.mean(dim=(1, 2))
    values = {
        "images": 12,
        "held_out": True,
        "reference": "the original averaged over 40 views",
        "surveys": (sides[0].survey, sides[1].survey),
        "agreement": (agreement(features, features + 1), agreement(features, features)),
        "drift": drift(pooled + 0.1, pooled),
        "shown": (features, features),
    }
    return Comparison(**values | changes)


def values(page):
    return {line.name: list(line.values) for line in page.lines}


# -- one model ----------------------------------------------------------------------------------------------


def test_the_verdict_tells_rate_block_place_and_cause(alone, without_charts):
    found = inspection_page(alone)
    assert found.title == "sinking"
    assert found.verdict.startswith("6.2 % of patch tokens are artifacts: their norm is ")
    assert f"from block {BLOCK} on (of 0 to 2)" in found.verdict
    assert "; 1 hidden unit causes 100.0 % of them. Sinks can be moved into registers" in found.verdict
    assert found.note.startswith("Measured on 12 images. ")


def test_the_table_holds_the_figures_of_the_inspection(alone, without_charts):
    lines = values(inspection_page(alone))
    probe, cls = alone.position, alone.classes.tokens[-1]
    assert lines["outlier rate, last block (share of patch tokens)"] == [1 / 16]
    assert lines["block where outliers emerge, from 0"] == [BLOCK]
    assert lines["share of outliers at fixed positions"] == [1.0]
    assert lines["largest share of attention on outliers, over blocks"] == [max(alone.survey.attention.share)]
    assert lines["distance of the predicted position, outliers, patches"] == [probe.outliers.distance]
    assert cls.token == "CLS"
    assert lines["class predicted from CLS, top-1"] == [cls.mean]
    assert lines["parameters without registers, millions"] == [alone.costs[0].parameters / 1e6]


def test_a_figure_that_no_model_has_is_left_out(alone, sides, without_charts):
    _, clean = sides
    lines = values(inspection_page(clean))
    assert None not in [value for line in lines.values() for value in line]
    assert "median norm of outliers" not in lines
    assert "median norm of outliers" in values(inspection_page(dataclasses.replace(clean, against=(alone,))))


def test_layers_are_those_that_there_are_maps_of(alone, sides, without_charts):
    always, moved = ["norms", "features", "first component"], "agreement with moved views"
    assert list(inspection_page(alone).layers) == [*always, moved, "attention of CLS"]
    uncaptured = dataclasses.replace(alone, survey=dataclasses.replace(alone.survey, attention=None))
    found = inspection_page(uncaptured)
    assert list(found.layers) == list(found.images[0].maps) == [*always, moved]
    unmoved = inspection_page(dataclasses.replace(uncaptured, consistency=None))
    assert list(unmoved.layers) == list(unmoved.images[0].maps) == always
    assert list(inspection_page(sides[1]).layers)[3:] == [
        f"attention of {query}" for query in ("CLS", "register 1", "register 2")
    ]


def test_no_more_images_are_shown_than_a_page_holds(alone, without_charts):
    outliers, pooled = alone.survey.outliers.repeat(3, 1, 1), alone.survey.pooled.repeat(3, 1)
    many = dataclasses.replace(alone.survey, shown=10 * alone.survey.shown, outliers=outliers, pooled=pooled)
    found = inspection_page(dataclasses.replace(alone, survey=many, photos=10 * alone.photos))
    assert len(found.images) == MAX_SHOWN


# -- models of different libraries, widths and grids ---------------------------------------------------------


def test_models_side_by_side_are_each_named_in_the_verdict_and_where_sinks_are_told(page, both):
    assert page.title == "sinking against other"
    assert page.models == ("sinking", "other")
    assert page.verdict.startswith("sinking: 6.2 % of patch tokens")
    assert " other: No sinks found" in page.verdict
    (text,) = [section.text for section in page.sections if section.title == "Sinks"]
    assert text.startswith(f"sinking: Sinks emerge in block {BLOCK}")
    assert f"(block:unit {BLOCK}:{UNIT})" in text


def test_only_images_that_all_models_show_are_shown_as_the_first_one_sees_them(page, both):
    assert len(page.images) == 2
    for number, card in enumerate(page.images):
        np.testing.assert_array_equal(card.photo, both.photos[number])


def test_maps_have_the_grid_of_their_model(page, both):
    for card in page.images:
        for name in ("norms", "features", "first component"):
            shapes = [picture.pixels.shape for picture in card.maps[name][:2]]
            # Whole squares, as few as make 224 pixels or more.
            assert shapes == [(224, 224, 3), (228, 228, 3)], name


def test_a_model_without_a_query_has_no_map_of_it(page):
    for card in page.images:
        have = [bool(picture) for picture in card.maps["attention of CLS"]]
        assert have == [True, False, False, False]
        assert [bool(picture) for picture in card.maps["attention of patches"]] == [False, True, False, False]


def test_similarities_are_those_of_each_models_own_features_as_true_as_the_page_says(page, both):
    stated = float(page.note.split("within ")[1].rstrip("."))
    for number, card in enumerate(page.images):
        for model, patches in zip(both.models, card.patches, strict=True):
            shown = model.survey.shown[number]
            unit = normalize(shown.features.flatten(0, 1), dim=-1)
            codes = normalize(torch.from_numpy(patches.codes).flatten(0, 1).float(), dim=-1)
            # The page rounds what it states to two digits.
            assert (codes @ codes.T - unit @ unit.T).abs().max() < stated + 0.005
            np.testing.assert_array_equal(patches.norms, shown.norms[model.norms.focus])
            np.testing.assert_array_equal(patches.outliers, model.survey.outliers[number])
    assert [patches.codes.shape[:2] for patches in page.images[0].patches] == [(4, 4), (6, 6)]


def test_codes_are_worked_out_once_an_image(both, without_charts, monkeypatch):
    made = []
    codes = pages.similarity_codes
    monkeypatch.setattr(pages, "similarity_codes", lambda features: made.append(features) or codes(features))
    inspection_page(both)
    assert len(made) == 2 * 2


def test_the_basis_of_colours_is_told(page, alone, sides, without_charts):
    assert "each model's own basis, aligned to the first" in page.layers["features"]
    same = inspection_page(dataclasses.replace(alone, against=sides[1:]))
    assert "one basis for all models" in same.layers["features"]


def test_the_block_of_each_models_norms_is_told(alone, without_charts):
    assert "after block 2, from dark" in inspection_page(alone).layers["norms"]
    blocks = list(alone.norms.blocks)
    blocks[-1] = dataclasses.replace(blocks[-1], gap=None)
    hidden = dataclasses.replace(alone.norms, blocks=tuple(blocks))
    inside = dataclasses.replace(
        alone, name="inside", survey=dataclasses.replace(alone.survey, norms=hidden), against=(alone,)
    )
    assert "after block 1 (inside), block 2 (sinking), from" in inspection_page(inside).layers["norms"]


def test_texts_have_maps_over_the_photo_that_are_marked_as_such(alone, both, without_charts):
    asked = dataclasses.replace(alone, texts={"a cat": torch.rand(3, 4, 4)})
    found = inspection_page(dataclasses.replace(asked, against=both.against))
    for card in found.images:
        own, other, *averaged = card.maps["text: a cat"]
        assert averaged == [None, None]
        assert own.photographic
        assert own.pixels.shape == card.photo.shape
        assert other is None
        assert not any(p.photographic for p in card.maps["norms"][:2])


# -- before and after ---------------------------------------------------------------------------------------


def test_a_comparison_tells_both_outlier_rates_and_what_was_kept(sides, without_charts):
    found = comparison_page("a model", compared(sides), *sides)
    assert found.verdict.startswith(
        "Artifacts went from 6.2 % to 0.0 % of patch tokens, in the block with most; "
    )
    assert "the global output keeps a cosine of " in found.verdict
    assert found.note.startswith("Measured on 12 images not trained on. ")
    seen = comparison_page("a model", compared(sides, held_out=False), *sides)
    assert seen.note.startswith("Measured on 12 images that were trained on too. ")
    assert found.models == ("before", "after")
    first = found.lines[0]
    assert (first.name, list(first.values)) == ("outlier rate (share of patch tokens)", [1 / 16, 0.0])
    assert first.judgement(1) == "better"
    assert len([line for line in found.lines if line.name.startswith("outlier rate")]) == 1


def test_maps_before_and_after_stand_side_by_side_and_registers_appear_after(sides, without_charts):
    found = comparison_page("a model", compared(sides), *sides)
    assert len(found.images) == 8
    for card in found.images:
        assert all(all(card.maps[name]) for name in ("norms", "features", "attention of CLS"))
        before, after = card.maps["attention of register 1"]
        assert before is None
        assert after is not None


# -- size ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_page_of_a_large_model_stays_below_ten_megabytes(both):
    generator = torch.Generator().manual_seed(0)

    def grown(model, name):
        """Shows 8 images of 37x37 patches, 768 channels, six queries; noise is what compresses worst."""
        grid, blocks = (37, 37), len(model.norms.blocks)
        shown = [
            dataclasses.replace(
                model.survey.shown[0],
                features=torch.randn(*grid, 768, generator=generator),
                norms=torch.rand(blocks, *grid, generator=generator) + 1,
                attention=torch.rand(6, 4, *grid, generator=generator),
            )
            for _ in range(8)
        ]
        queries = ("CLS", *(f"register {n}" for n in range(1, 6)))
        attention = dataclasses.replace(
            model.survey.attention, queries=queries, focus=torch.rand(6, *grid, generator=generator)
        )
        survey = dataclasses.replace(
            model.survey,
            shown=tuple(shown),
            outliers=torch.zeros(len(model.survey.pooled), *grid, dtype=torch.bool),
            attention=attention,
        )
        photos = np.random.default_rng(0).integers(0, 256, (8, 518, 518, 3), dtype=np.uint8)
        consistency = dataclasses.replace(
            model.consistency,
            by_position=torch.rand(*grid, generator=generator),
            frame_fixed_by_position=torch.rand(*grid, generator=generator),
            maps=torch.rand(8, *grid, generator=generator),
            denoised=torch.randn(8, *grid, 768, generator=generator),
        )
        return dataclasses.replace(
            model, name=name, survey=survey, photos=tuple(photos), consistency=consistency, against=()
        )

    first, second = grown(both, "first"), grown(both, "second")
    report = Report.of(inspection_page(dataclasses.replace(first, against=(second,))))
    assert len(report.html) < 10e6, len(report.html)


# -- in a notebook -------------------------------------------------------------------------------------------


def test_what_inspect_returns_shows_itself_as_its_report(alone, monkeypatch):
    monkeypatch.setattr(pages, "figures", lambda models: iter(()))  # charts take long to draw
    shown = InspectionReport.of(alone)._repr_html_()
    assert shown.startswith("<iframe")
    assert 'title="sinking"' in shown


def test_what_inspect_returns_prints_its_verdict(alone):
    printed = repr(InspectionReport.of(alone))
    assert printed == f"sinking: {headline(alone.norms, alone.sinks)} {advice(alone)}"
