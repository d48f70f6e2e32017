"""A patched transformers model is loaded as another class, as its own library loads an unpatched one."""

import logging

import families_timm
import pytest
import torch
import transformers as hf
from families_transformers import FAMILIES
from torch import nn

import phreg
from phreg.backbones.resolve import adapt
from phreg.errors import LoadError, PhregError
from phreg.formats.load import open_model
from phreg.sinks import test_time

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

BASE_TO_HEAD = [
    ("vit", hf.ViTForImageClassification),
    ("vit", hf.AutoModelForImageClassification),
    ("vit", hf.ViTForMaskedImageModeling),
    ("deit", hf.DeiTForImageClassification),
    ("deit", hf.DeiTForImageClassificationWithTeacher),
    ("vit-msn", hf.ViTMSNForImageClassification),
    ("vit-mae", hf.ViTMAEForPreTraining),
    ("ijepa", hf.IJepaForImageClassification),
    ("dinov2", hf.Dinov2ForImageClassification),
    ("dinov2-swiglu", hf.Dinov2ForImageClassification),
    ("dinov2-registers", hf.Dinov2WithRegistersForImageClassification),
    ("clip", hf.CLIPForImageClassification),
    ("clip-vision", hf.CLIPForImageClassification),
    ("clip-vision", hf.CLIPVisionModelWithProjection),
    ("metaclip2", hf.MetaClip2ForImageClassification),
    ("siglip", hf.SiglipForImageClassification),
    ("siglip-vision", hf.SiglipForImageClassification),
    ("siglip2", hf.Siglip2ForImageClassification),
    ("siglip2-vision", hf.Siglip2ForImageClassification),
]
"""A model without a head, and a class with one."""

HEAD_TO_BASE = [
    ("vit-classifier", hf.ViTModel),
    ("deit-classifier", hf.DeiTModel),
    ("dinov2-classifier", hf.Dinov2Model),
    ("dinov2-classifier", hf.AutoModel),
    ("dinov2-classifier", hf.Dinov2Backbone),
    ("dinov2-backbone", hf.Dinov2Model),
    ("dinov2-registers-classifier", hf.Dinov2WithRegistersModel),
    ("dinov3-backbone", hf.DINOv3ViTModel),
    ("clip-classifier", hf.CLIPVisionModel),
    ("clip", hf.CLIPVisionModel),
    ("clip", hf.CLIPVisionModelWithProjection),
    ("clip-vision-projection", hf.CLIPVisionModel),
    ("metaclip2", hf.MetaClip2VisionModelWithProjection),
    ("metaclip2-vision-projection", hf.MetaClip2VisionModel),
    ("siglip", hf.SiglipVisionModel),
    ("siglip-classifier", hf.SiglipVisionModel),
    ("siglip2", hf.Siglip2VisionModel),
    ("siglip2-classifier", hf.Siglip2VisionModel),
    ("aimv2", hf.Aimv2VisionModel),
]
"""A model with a head or a text tower, and a class without."""


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def saved(name, folder, count=3):
    """Saves a model with registers that look trained, and returns it."""
    model = phreg.add_registers(FAMILIES[name](), count)
    model.save_pretrained(folder)
    return adapt(model)


def dense(backbone):
    """Patch features, which no head changes."""
    return backbone(IMAGES).patches


@pytest.mark.parametrize(("name", "model_class"), BASE_TO_HEAD + HEAD_TO_BASE)
def test_a_patched_model_is_loaded_as_another_class_with_its_registers_and_its_weights(
    name, model_class, tmp_path
):
    original = saved(name, tmp_path / "saved")

    loaded = adapt(phreg.load(tmp_path / "saved", cls=model_class))

    concrete = isinstance(model_class, type) and issubclass(model_class, hf.PreTrainedModel)
    assert not concrete or type(loaded.model) is model_class
    assert loaded.num_registers == 3
    assert torch.equal(loaded.registers, original.registers)
    assert torch.equal(dense(loaded), dense(original))
    for name, tensor in loaded.model.state_dict().items():
        own = original.model.state_dict().get(name)
        assert own is None or torch.equal(own, tensor), name
    assert not any(module.training for module in loaded.model.modules())
    assert all(tensor.isfinite().all() for tensor in loaded.model.state_dict().values())


NOT_BY_TRANSFORMERS = [("aimv2", hf.Aimv2VisionModel)] + [
    (name, model_class)
    for name, model_class in BASE_TO_HEAD
    if name in ("clip-vision", "siglip-vision", "siglip2-vision") and "Vision" not in model_class.__name__
]
"""Pairs for which its `from_pretrained` finds no weights: other names, or a config of both towers."""


@pytest.mark.parametrize(
    ("name", "model_class"),
    [pair for pair in BASE_TO_HEAD + HEAD_TO_BASE if pair not in NOT_BY_TRANSFORMERS],
)
def test_it_is_what_the_librarys_own_loading_makes_of_the_model_without_registers(
    name, model_class, tmp_path
):
    stock = FAMILIES[name]()
    stock.save_pretrained(tmp_path / "stock")
    saved(name, tmp_path / "saved")
    expected = model_class.from_pretrained(tmp_path / "stock")

    loaded = phreg.remove_registers(phreg.load(tmp_path / "saved", cls=model_class))

    assert type(loaded) is type(expected)
    fresh = {
        name for name in expected.state_dict() if name.startswith(("classifier", "cls_class", "distill"))
    } | {name for name in expected.state_dict() if "decoder" in name or "pooler" in name}
    found = loaded.state_dict()
    assert expected.state_dict().keys() - found.keys() <= fresh
    for name, tensor in found.items():
        if name not in fresh and "mask_token" not in name and "visual_projection" not in name:
            assert torch.equal(tensor, expected.state_dict()[name]), name


def test_a_new_head_has_as_many_classes_as_asked_for_and_transformers_says_that_it_is_new(tmp_path, caplog):
    saved("vit", tmp_path / "saved")
    logging.getLogger("transformers").propagate = True

    try:
        model = phreg.load(
            tmp_path / "saved", cls=hf.ViTForImageClassification, num_labels=10, hidden_dropout_prob=0.25
        )
    finally:
        logging.getLogger("transformers").propagate = False

    assert model.classifier.weight.shape == (10, 32)
    assert model(IMAGES).logits.shape == (2, 10)
    assert (model.config.num_labels, model.config.hidden_dropout_prob) == (10, 0.25)
    assert "MISSING" in caplog.text
    assert "classifier.weight" in caplog.text
    # transformers draws it around zero with the config's standard deviation; of 320 draws, five errors.
    assert model.classifier.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(phreg.load(tmp_path / "again")(IMAGES).logits, model(IMAGES).logits)


def test_the_saved_class_takes_another_number_of_classes_as_from_pretrained_does(tmp_path):
    original = saved("vit-classifier", tmp_path / "saved")
    with pytest.raises(LoadError, match=r"\['num_labels'\].*ignore_mismatched_sizes=True"):
        phreg.load(tmp_path / "saved", num_labels=10)

    model = phreg.load(tmp_path / "saved", num_labels=10, ignore_mismatched_sizes=True)

    assert model(IMAGES).logits.shape == (2, 10)
    assert torch.equal(dense(adapt(model)), dense(original))


def test_a_pooler_that_was_not_saved_is_left_out_unless_it_is_asked_for(tmp_path):
    saved("vit-classifier", tmp_path / "saved")

    without = phreg.load(tmp_path / "saved", cls=hf.ViTModel)
    with_pooler = phreg.load(tmp_path / "saved", cls=hf.ViTModel, add_pooling_layer=True)

    assert without.pooler is None
    assert with_pooler(IMAGES).pooler_output.shape == (2, 32)
    assert torch.equal(with_pooler(IMAGES).last_hidden_state, without(IMAGES).last_hidden_state)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])  # transformers takes both
def test_a_precision_that_is_asked_for_holds_for_registers_too(name, tmp_path):
    saved("vit", tmp_path / "saved")
    model = phreg.load(tmp_path / "saved", cls=hf.ViTForImageClassification, **{name: torch.bfloat16})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(IMAGES.bfloat16()).logits.dtype == torch.bfloat16


def test_what_phreg_noted_on_the_model_comes_along(tmp_path):
    backbone = adapt(phreg.add_registers(FAMILIES["clip"](), 3))
    backbone.set_normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    backbone.note_normalisation()
    backbone.trained_readout = "value-only"
    backbone.model.save_pretrained(tmp_path / "saved")

    loaded = adapt(phreg.load(tmp_path / "saved", cls=hf.CLIPVisionModelWithProjection))

    assert (loaded.spec.mean, loaded.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.trained_readout == "value-only"
    assert loaded.model.name_or_path == str(tmp_path / "saved")


def test_a_run_without_training_keeps_its_test_time_registers_in_another_class(tmp_path):
    backbone = adapt(FAMILIES["dinov2"]())
    test_time.install(backbone, {1: [(5, 1), (9, -1)]}, 2, (32, 32))
    phreg.export(backbone.model, tmp_path / "out", format="merged")

    loaded = adapt(phreg.load(tmp_path / "out", cls=hf.Dinov2ForImageClassification, num_labels=4))

    assert test_time.installed(loaded).units == {1: [(5, 1), (9, -1)]}
    assert torch.equal(dense(loaded), dense(backbone))


@pytest.mark.parametrize("format", ["transformers", "remote-code", "merged"])
def test_every_export_of_a_transformers_model_is_loaded_as_another_class(format, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = phreg.add_registers(FAMILIES["dinov2"](), 3)
    phreg.export(model, tmp_path / "out", format=format)
    head = {
        "transformers": hf.Dinov2WithRegistersForImageClassification,
    }.get(format, hf.Dinov2ForImageClassification)

    loaded = phreg.load(tmp_path / "out", cls=head, num_labels=7)

    assert type(loaded) is head
    assert loaded(IMAGES).logits.shape == (2, 7)
    # The export to a stock class rounds in another way: fp32 over three blocks.
    torch.testing.assert_close(dense(adapt(loaded)), dense(adapt(model)), atol=1e-5, rtol=1e-5)


# -- what cannot be


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("vit", hf.DeiTForImageClassification),  # another family
        ("vit", hf.Dinov2Model),
        ("vit", hf.DPTForDepthEstimation),
        ("vit", hf.BertModel),
        ("vit", nn.Linear),
        ("vit", int),
        ("clip-vision", hf.LlavaForConditionalGeneration),
        ("siglip-vision", hf.Siglip2VisionModel),
        ("vit-mae", hf.AutoModelForImageClassification),  # there is none
    ],
)
def test_a_class_that_cannot_hold_the_model_is_one_clear_error(name, model_class, tmp_path):
    saved(name, tmp_path / "saved")
    with pytest.raises(
        LoadError,
        match=rf"a {model_class.__name__} asked for.*{type(FAMILIES[name]()).__name__}.*(give|correct)",
    ):
        phreg.load(tmp_path / "saved", cls=model_class)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_label": 3}, "num_label"),
        ({"image_size": 64}, r"\['image_size'\]"),
        ({"image_size": 64, "ignore_mismatched_sizes": True}, "position_embeddings"),
        ({"num_hidden_layers": 4}, r"lacks 16 of the weights of its encoders, such as vit\.layers\.3"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"config": None}, "config"),
    ],
)
def test_a_setting_that_does_not_fit_the_weights_is_one_clear_error(settings, found, tmp_path):
    saved("vit", tmp_path / "saved")
    with pytest.raises(LoadError, match=found):
        phreg.load(tmp_path / "saved", cls=hf.ViTForImageClassification, **settings)


@pytest.mark.parametrize(
    ("name", "model_class"), [("clip-vision", hf.CLIPModel), ("siglip-vision", hf.SiglipModel)]
)
def test_a_text_tower_is_never_made_up(name, model_class, tmp_path):
    saved(name, tmp_path / "saved")
    with pytest.raises(LoadError, match=r"lacks \d+ of the weights of its encoders, such as text_model"):
        phreg.load(tmp_path / "saved", cls=model_class)


def test_classes_are_for_models_of_transformers_and_not_for_models_at_hand(tmp_path):
    model = phreg.add_registers(families_timm.FAMILIES["vit"](), 3)
    phreg.export(model, tmp_path / "out", format="merged")
    with pytest.raises(LoadError, match=r"with cls, num_labels, and it is a .*reset_classifier"):
        phreg.load(tmp_path / "out", cls=hf.ViTModel, num_labels=3)
    with pytest.raises(LoadError, match=r"with num_classes, and it is a .*reset_classifier"):
        phreg.load(tmp_path / "out", num_classes=3)
    with pytest.raises(PhregError, match=r"cls, num_labels along with into, a VisionTransformer"):
        phreg.load(tmp_path / "out", into=model, cls=hf.ViTModel, num_labels=3)


def test_a_timm_model_changes_its_head_by_timm(tmp_path):
    model = phreg.add_registers(families_timm.FAMILIES["vit"](), 3)
    phreg.export(model, tmp_path / "out", format="merged")
    loaded, _ = open_model(tmp_path / "out")
    loaded.model.reset_classifier(11)
    assert loaded.model(IMAGES).shape == (2, 11)
    assert torch.equal(loaded(IMAGES).patches, adapt(model)(IMAGES).patches)
