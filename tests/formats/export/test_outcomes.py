"""Every family in every format: equal as the table says, or refused for the reason that it gives."""

import re

import jaxtyping
import pytest
from export_outcomes import (
    END,
    EVERY_SIZE,
    EXPECTED,
    GROUPS,
    OWN_SIZE,
    REFUSED,
    SAME_OPERATIONS,
    START,
    Refused,
    allowed,
    expected,
    outcome,
    shown,
)
from families import FAMILIES

from phreg.backbones import resolve
from phreg.errors import LoadError
from phreg.formats import FORMATS
from phreg.formats.load import open_saved

QUICK = {
    "transformers/dinov2",
    "transformers/clip",
    "transformers/siglip2",
    "transformers/aimv2",
    "transformers/vit-classifier",
    "transformers/dinov3-backbone",
    "timm/vit",
    "timm/eva02",
    "timm/naflexvit",
    "open_clip/clip",
    "open_clip/siglip",
}
"""One of each kind, for formats that go by no table of families; the others are marked slow."""

QUICK_GRAPHS = {"timm/vit", "transformers/siglip2"}
"""A graph takes seconds."""


def pairs():
    quick = dict.fromkeys(SAME_OPERATIONS, QUICK) | {"onnx": QUICK_GRAPHS}
    for format in EXPECTED:
        for family in FAMILIES:
            slow = family not in quick.get(format, FAMILIES)
            yield pytest.param(family, format, marks=pytest.mark.slow if slow else ())


# onnxscript calls what it deprecates itself, on the way through torch's exporter.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")
@pytest.mark.parametrize(("family", "format"), list(pairs()))
def test_a_family_is_exported_as_the_table_says_and_phreg_reads_it_back(
    family, format, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    if format == "onnx":  # as users have it; checking shapes would fix them in the graph
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    should, found = expected(family, format), outcome(family, format, tmp_path / "out")
    if isinstance(should, Refused):
        assert found.claimed == REFUSED
        assert re.search(should, found.reason)
        assert not (tmp_path / "out").exists()
        return
    assert found.claimed == should
    assert found.difference <= allowed(family, format)
    if format == "onnx":
        with pytest.raises(LoadError, match="run it with onnxruntime"):
            open_saved(resolve.locate(tmp_path / "out"))
    else:  # which checks that the weights are those that were measured
        open_saved(resolve.locate(tmp_path / "out"))


def test_the_table_has_every_format_and_no_family_that_is_not_there():
    libraries = {family[: family.index("/") + 1] for family in FAMILIES}
    assert set(EXPECTED) == set(FORMATS)
    for outcomes in EXPECTED.values():
        assert outcomes.keys() <= FAMILIES.keys() | libraries
        assert {type(should) for should in outcomes.values()} <= {str, Refused}
        assert {should for should in outcomes.values() if type(should) is str} <= {EVERY_SIZE, OWN_SIZE}


def test_every_family_is_in_one_row_of_the_short_table():
    for family in FAMILIES:
        assert sum(bool(re.fullmatch(pattern, family)) for pattern in GROUPS.values()) == 1, family


@pytest.mark.parametrize("file", shown(), ids=lambda file: file.parent.name)
def test_readers_are_shown_the_table_under_test(file):
    assert file.read_text().split(START)[1].split(END)[0].strip() == shown()[file]
