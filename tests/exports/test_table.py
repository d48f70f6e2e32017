"""Every family in every format that goes by a table: the very model, or the reason why not."""

import jaxtyping
import pytest
from families import FAMILIES

from phreg.backbones import resolve
from phreg.errors import PhregError
from phreg.exports import export
from phreg.registers import add_registers

BACKBONES = {"dinov2-backbone", "dinov2-registers-backbone", "dinov3-backbone"}
FIXED = {
    "transformers/aimv2",
    "transformers/aimv2-vision",
    "transformers/dinov2-registers",
    "transformers/dinov2-registers-classifier",
    "transformers/dinov2-registers-backbone",
    "transformers/vit-mae",
    "timm/dinov3",
}
"""Families, or in ONNX their graphs, that take their own size alone."""

QUICK = {
    "transformers/dinov2",
    "transformers/clip",
    "transformers/siglip2",
    "transformers/aimv2",
    "transformers/dinov3-backbone",
    "timm/vit",
    "timm/eva02",
    "timm/naflexvit",
    "open_clip/clip",
    "open_clip/siglip",
}
"""One of each kind; the others are marked slow."""

QUICK_GRAPHS = {"timm/vit", "transformers/siglip2"}
"""A graph takes seconds."""


def refusal(family, format):
    """Words of the reason why a family is not exported as a format; None where it is."""
    library, name = family.split("/")
    if format == "adapter":
        return "not loaded from a run or an adapter"
    if format == "remote-code" and library != "transformers":
        return f"it is a model of {library}"
    if format == "remote-code" and name in BACKBONES:
        return "AutoBackbone takes no code"
    if format == "merged" and library == "open_clip":
        return "an open_clip instance does not say what it was built from"
    if format == "onnx" and name.startswith("siglip2"):
        return "image by image"
    return None


def cases():
    for format in ("remote-code", "merged", "adapter", "onnx"):
        for family in FAMILIES:
            quick = family in (QUICK_GRAPHS if format == "onnx" else QUICK)
            yield pytest.param(family, format, marks=() if quick else pytest.mark.slow)


# onnxscript calls what it deprecates itself, on the way through torch's exporter.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")
@pytest.mark.parametrize(("family", "format"), list(cases()))
def test_a_family_is_exported_to_the_bit_or_refused_with_a_reason(family, format, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    if format == "onnx":  # as users have it; checking shapes would fix them
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    backbone, base = resolve.load(FAMILIES[family]())
    add_registers(backbone, 3)
    reason = refusal(family, format)
    if reason:
        with pytest.raises(PhregError, match=reason):
            export(backbone, tmp_path / "out", format, base=base)
        assert not (tmp_path / "out").exists()
        return
    figures = export(backbone, tmp_path / "out", format, base=base)
    fixed = not backbone.spec.any_size or (format == "onnx" and family in FIXED)
    assert len(figures) == (1 if fixed else 3)
    assert all(figure.claimed for figure in figures)
    if format != "onnx":  # the same operations on the same weights
        assert {figure.difference for figure in figures} == {0.0}
