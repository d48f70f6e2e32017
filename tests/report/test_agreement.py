"""What the page shows of a model's moved views: the right figures, maps and averaged features."""

import dataclasses

import numpy as np
import pytest
import torch
from families import FAMILIES
from looking import looked_at, moved, noise

from phreg.backbones.resolve import adapt
from phreg.report import maps
from phreg.report import page as pages
from phreg.report.agreement import LAYER, agreement_pictures, averaged_features
from phreg.report.figures import AGREEMENT, figures
from phreg.report.html import Report
from phreg.report.page import inspection_page
from phreg.report.verdict import advice


@pytest.fixture(scope="module")
def other():
    backbone = adapt(FAMILIES["open_clip/siglip"]())
    return looked_at(backbone, "other", noise(backbone, 3))


@pytest.fixture
def page_of(monkeypatch):
    """Builds a page with no charts but those of the section."""
    monkeypatch.setattr(
        pages, "figures", lambda models: (c for c in figures(models) if c.section == AGREEMENT)
    )
    return inspection_page


def section(page):
    (found,) = [section for section in page.sections if section.title == AGREEMENT]
    return found


def test_the_section_holds_the_figures_that_were_measured(alone, page_of):
    found, page = alone.consistency, page_of(alone)
    assert page.verdict.endswith(advice(alone))
    assert f"agree to {found.mean:.3f} with" in page.verdict
    assert {line.name: line.values[0] for line in section(page).lines} == {
        "agreement with moved views, mean cosine": found.mean,
        "agreement with moved views, worst 1 % of patches": found.worst_mean,
        "noise floor: agreement of averages over either half of the views": found.floor,
        "noise floor, worst 1 % of patches": found.floor_worst_mean,
        "headroom: noise floor less agreement": found.headroom,
        "headroom, standard error over images": found.headroom_error,
        "share of the disagreement that is fixed to the frame": found.frame_fixed,
        "that share, if images had nothing in common": 1 / 12,
    }
    assert section(page).text.startswith("Measured on 12 images, in 16 moved views of each. ")
    assert [chart.name for chart in section(page).charts] == ["agreement", "frame-fixed"]
    assert f'<td data-value="{found.mean}">{found.mean:.4g}</td>' in Report.of(page).html


def test_more_agreement_and_less_headroom_are_better(alone, page_of):
    better = dataclasses.replace(alone, consistency=moved(0.001))
    lines = section(page_of(dataclasses.replace(alone, against=(better,)))).lines
    judged = {line.name: line.judgement(1) for line in lines}
    assert judged["agreement with moved views, mean cosine"] == "better"
    assert judged["headroom: noise floor less agreement"] == "better"
    assert judged["that share, if images had nothing in common"] == ""


def test_a_model_that_cannot_be_measured_says_why_and_has_no_figures(alone, page_of):
    page = page_of(dataclasses.replace(alone, consistency=None, not_moved="its grid is too small"))
    assert section(page).text == "Not measured: its grid is too small."
    assert (section(page).lines, section(page).charts) == ([], [])
    assert "was not measured: its grid is too small." in page.verdict
    assert AGREEMENT in Report.of(page).html


def test_of_a_model_that_nobody_measured_there_is_no_section(alone, page_of):
    page = page_of(dataclasses.replace(alone, consistency=None))
    assert page.sections == []
    assert page.sides == page.models


def test_maps_are_those_of_the_images_shown_on_one_scale(alone, other):
    both = [alone, other, dataclasses.replace(other, consistency=None)]
    first, second, unmoved = agreement_pictures(both, 3)
    assert unmoved is None
    every = torch.cat([model.consistency.maps[:3].flatten() for model in both[:2]])
    low = float(np.quantile(every[~every.isnan()].numpy(), 0.01))
    for model, pictures in ((alone, first), (other, second)):
        for picture, grid in zip(pictures, model.consistency.maps[:3], strict=True):
            np.testing.assert_array_equal(picture.pixels, maps.agreement_map(grid, low))
            known = grid[~grid.isnan()]
            assert picture.reading == f"{known.min():.3f} (dark) to {known.max():.3f} (bright)"


def test_averaged_features_stand_beside_the_models_own_and_nowhere_else(alone, page_of):
    page = page_of(alone)
    assert page.sides == ("sinking", "averaged over views")
    raw = torch.stack([shown.features for shown in alone.survey.shown])
    for number, card in enumerate(page.images):
        for name, draw in (("features", maps.pca_maps), ("first component", maps.component_maps)):
            for picture, drawn in zip(card.maps[name], draw(raw, alone.consistency.denoised), strict=True):
                np.testing.assert_array_equal(picture.pixels, drawn[number])
        for name in ("norms", LAYER, "attention of CLS"):
            own, averaged = card.maps[name]
            assert own is not None
            assert averaged is None
        assert len(card.patches) == 2
        assert card.patches[1].norms is None


def test_averaged_sides_of_several_models_are_named_after_them(alone, other):
    named = averaged_features([alone, other], 3)
    assert list(named) == ["sinking, averaged over views", "other, averaged over views"]
    torch.testing.assert_close(named["other, averaged over views"], other.consistency.denoised)
    assert list(averaged_features([alone, dataclasses.replace(other, consistency=None)], 3)) == [
        "sinking, averaged over views"
    ]
    assert averaged_features([alone], 4) == {}, "only three images are shown"
