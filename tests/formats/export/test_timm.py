"""The timm format for models of other libraries: in plain timm they answer as they did before."""

import json
from functools import partial

import pytest
import timm
import torch
import transformers as hf
from families_open_clip import FAMILIES as OPEN_CLIP
from families_open_clip import clip_around_timm
from families_transformers import FAMILIES as TRANSFORMERS
from families_transformers import TINY, WIDE, build
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from phreg.backbones import resolve
from phreg.errors import PhregError
from phreg.formats.export import export, from_transformers, towers
from phreg.registers import add_registers
from phreg.storage import EXPORT_FILE

COUNT = 3
ROUNDING = 1e-5
"""Of fp32, absolute: outputs are of order 1, and timm stacks queries, keys and values into one product."""


def exported(model, folder):
    """Adds registers, exports to timm, and returns the backbone and what plain timm loads."""
    backbone, base = resolve.load(model)
    add_registers(backbone, COUNT)
    export(backbone, folder, "timm", base=base)
    return backbone, timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def pictures(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def settings(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def vit(model_class=hf.ViTForImageClassification, config_class=hf.ViTConfig, **changes):
    return build(model_class, config_class(**(WIDE | {"num_labels": 5, "layer_norm_eps": 1e-6} | changes)))


# -- answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("dinov2-swiglu", lambda model, images: model(images).pooler_output),
        ("dinov2-registers", lambda model, images: model(images).pooler_output),
        ("dinov3", lambda model, images: model(images).pooler_output),
        ("clip", lambda model, images: model.get_image_features(images).pooler_output),
        ("clip-vision", lambda model, images: model(images).pooler_output),
        ("clip-vision-projection", lambda model, images: model(images).image_embeds),
        ("metaclip2", lambda model, images: model.get_image_features(images).pooler_output),
        ("siglip", lambda model, images: model.get_image_features(images).pooler_output),
        ("siglip-classifier", lambda model, images: model(images).logits),
        ("vit-msn", lambda model, images: model(images).last_hidden_state[:, 0]),
    ],
)
def test_plain_timm_answers_as_transformers_did(family, call, tmp_path):
    backbone, stock = exported(TRANSFORMERS[family](), tmp_path / "out")
    images = pictures()
    assert torch.allclose(stock(images), call(backbone.model, images), atol=ROUNDING)


@pytest.mark.parametrize("family", ["clip-quickgelu", "no-pre-norm", "tower", "timm", "timm-head", "siglip"])
def test_plain_timm_answers_as_open_clip_did(family, tmp_path):
    backbone, stock = exported(OPEN_CLIP[family](), tmp_path / "out")
    images, model = pictures(), backbone.model
    encode = model if family == "tower" else model.encode_image
    assert torch.allclose(stock(images), encode(images), atol=ROUNDING)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_other_sizes_of_open_clip_are_those_of_timm(family, tmp_path):
    backbone, _ = exported(OPEN_CLIP[family](), tmp_path / "out")
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, dynamic_img_size=True).eval()
    tokens = stock.forward_features(pictures(48))[:, stock.num_prefix_tokens :]
    assert torch.allclose(tokens.unflatten(1, (6, 6)), backbone(pictures(48)).patches, atol=ROUNDING)


def test_a_model_is_equal_at_the_size_that_was_made_its_own(tmp_path):
    backbone, base = resolve.load(TRANSFORMERS["clip-vision"]())
    add_registers(backbone, COUNT)
    backbone.set_input_size(48)
    figures = export(backbone, tmp_path / "out", "timm", base=base)
    assert (figures[0].size, figures[0].claimed) == ((48, 48), True)


@pytest.mark.parametrize("family", ["vit-classifier", "clip", "siglip2", "dinov3"])
def test_transformers_loads_the_folder_as_it_loads_timms(family, tmp_path):
    _, stock = exported(TRANSFORMERS[family](), tmp_path / "out")
    images = pictures()
    wrapped = hf.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(wrapped).__name__ == "TimmWrapperModel"
    assert torch.equal(wrapped(images).last_hidden_state, stock.forward_features(images))
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    black = processor(Image.new("RGB", (50, 80)), return_tensors="pt")["pixel_values"]
    assert black.shape == (1, 3, 32, 32)
    if family == "vit-classifier":
        classifier = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(classifier(images).logits, stock(images))


# -- tokens and heads ----------------------------------------------------------------------------------------


def test_native_registers_stay_ahead_of_added_ones(tmp_path):
    backbone, stock = exported(TRANSFORMERS["dinov2-registers"](), tmp_path / "out")
    native, added = stock.reg_token.split([2, COUNT], dim=1)
    assert torch.equal(native, backbone.model.embeddings.register_tokens)
    assert torch.equal(added, backbone.registers)


def test_a_distillation_token_that_nothing_reads_becomes_the_first_register(tmp_path):
    model = vit(hf.DeiTForImageClassification, hf.DeiTConfig)
    _, stock = exported(model, tmp_path / "out")
    tokens = model.deit.embeddings
    assert torch.equal(stock.reg_token[:, :1], tokens.distillation_token + tokens.position_embeddings[:, 1:2])
    assert torch.allclose(stock(pictures()), model(pictures()).logits, atol=ROUNDING)


def test_a_model_without_registers_is_exported_without(tmp_path):
    backbone, base = resolve.load(vit())
    export(backbone, tmp_path / "out", "timm", base=base)
    assert settings(tmp_path / "out")["model_args"]["reg_tokens"] == 0
    assert "reg_token" not in load_file(tmp_path / "out" / "model.safetensors")


def test_tokens_are_exported_once_the_pooler_is_off(tmp_path):
    model = vit(hf.ViTModel)
    with pytest.raises(PhregError, match=r"model\.pooler = None"):
        exported(model, tmp_path / "out")
    model = vit(hf.ViTModel)
    model.pooler = None
    _, stock = exported(model, tmp_path / "out")
    assert torch.allclose(stock(pictures()), model(pictures()).last_hidden_state[:, 0], atol=ROUNDING)


@pytest.mark.parametrize(
    "changes",
    [{"qkv_bias": False}, {"hidden_act": "gelu_pytorch_tanh"}, {"image_size": 48, "patch_size": 16}],
    ids=str,
)
def test_settings_of_the_architecture_are_kept(changes, tmp_path):
    model = vit(**changes)
    _, stock = exported(model, tmp_path / "out")
    images = pictures(model.config.image_size)
    assert torch.allclose(stock(images), model(images).logits, atol=ROUNDING)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [{}, {"query_bias": False, "value_bias": False, "proj_bias": False}])
def test_dinov3_is_exported_with_any_mlp_and_biases(gated, biases, tmp_path):
    activation = "silu" if gated else "gelu"
    config = hf.DINOv3ViTConfig(**WIDE, **biases, use_gated_mlp=gated, hidden_act=activation)
    model = build(hf.DINOv3ViTModel, config)
    _, stock = exported(model, tmp_path / "out")
    assert torch.allclose(stock(pictures()), model(pictures()).pooler_output, atol=ROUNDING)


# -- what the folder says ------------------------------------------------------------------------------------


def test_it_says_what_the_base_says_of_its_images_and_classes_and_no_more(tmp_path):
    model = vit()
    model.config.id2label = {number: f"kind {number}" for number in range(5)}
    model.save_pretrained(tmp_path / "base")
    processor = hf.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size=32, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3
    )
    processor.save_pretrained(tmp_path / "base")
    backbone, base = resolve.load(tmp_path / "base")
    add_registers(backbone, COUNT)
    export(backbone, tmp_path / "out", "timm", base=base)
    config = settings(tmp_path / "out")
    assert config["label_names"] == [f"kind {number}" for number in range(5)]
    assert (config["num_classes"], config["num_features"], config["global_pool"]) == (5, 32, "token")
    assert config["pretrained_cfg"] == {
        "input_size": [3, 32, 32],
        "pool_size": None,
        "fixed_input_size": True,
        "num_classes": 5,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.4, 0.4],
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "crop_mode": "center",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    wrapped = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert wrapped.config.id2label[3] == "kind 3"


@pytest.mark.parametrize(
    ("family", "interpolation", "crop_pct", "crop_mode"),
    [
        ("dinov2", "bicubic", 0.875, "center"),
        ("clip", "bicubic", 1.0, "center"),
        ("siglip", "bicubic", 1.0, "squash"),
        ("vit-classifier", "bilinear", 1.0, "squash"),
    ],
)
def test_without_an_image_processor_images_are_prepared_as_the_familys(
    family, interpolation, crop_pct, crop_mode, tmp_path
):
    exported(TRANSFORMERS[family](), tmp_path / "out")
    found = settings(tmp_path / "out")["pretrained_cfg"]
    assert (found["interpolation"], found["crop_pct"], found["crop_mode"]) == (
        interpolation,
        crop_pct,
        crop_mode,
    )


def test_open_clips_images_are_prepared_as_it_noted(tmp_path):
    model = OPEN_CLIP["clip"]()
    noted = {"mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3}
    model.visual.preprocess_cfg = noted | {"interpolation": "bilinear", "resize_mode": "squash"}
    exported(model, tmp_path / "out")
    found = settings(tmp_path / "out")["pretrained_cfg"]
    assert found["mean"] == [0.1, 0.2, 0.3]
    assert (found["interpolation"], found["crop_mode"]) == ("bilinear", "squash")


def test_it_is_named_after_timms_own_model_of_that_size(tmp_path):
    small = TINY | {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 1, "patch_size": 16}
    model = build(hf.Dinov2Model, hf.Dinov2Config(**(small | {"patch_size": 14, "image_size": 28})))
    exported(model, tmp_path / "dinov2")
    assert settings(tmp_path / "dinov2")["architecture"] == "vit_small_patch14_dinov2"
    exported(vit(**small, intermediate_size=384), tmp_path / "vit")
    assert settings(tmp_path / "vit")["architecture"] == "vit_small_patch16_224"
    exported(TRANSFORMERS["vit-msn"](), tmp_path / "odd")
    assert settings(tmp_path / "odd")["architecture"] == "vit_base_patch16_224"


def test_norms_that_timm_cannot_build_widen_the_tolerance_and_the_record_says_so(tmp_path):
    exported(TRANSFORMERS["vit-classifier"](), tmp_path / "vit")
    exported(vit(), tmp_path / "same")
    assert settings(tmp_path / "vit", EXPORT_FILE)["tolerance"] == 1e-4
    assert settings(tmp_path / "same", EXPORT_FILE)["tolerance"] == 1e-5


def test_a_bf16_model_is_exported_in_bf16(tmp_path):
    backbone, base = resolve.load(TRANSFORMERS["dinov2"]().to(torch.bfloat16))
    add_registers(backbone, COUNT)
    # Stacked into one product, nothing is rounded differently for this family.
    assert export(backbone, tmp_path / "out", "timm", base=base)[0].difference == 0.0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.real
def test_the_wider_tolerance_is_no_wider_than_a_real_model_needs(real_model):
    stock = timm.create_model(f"local-dir:{real_model}", pretrained=True).eval()
    images = pictures(224)
    found = stock.forward_features(images)
    for layer in stock.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 1e-12  # as in a ViT of transformers
    expected = stock.forward_features(images)
    relative = (found - expected).abs().max() / expected.abs().max()
    assert towers.TOLERANCE < relative < towers.LOOSE


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (partial(vit, hidden_act="tanh"), "no activation 'tanh'"),
        (partial(vit, layer_norm_eps=1e-3), "norms add 0.001"),
        (lambda: build(hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**WIDE, key_bias=True)), "keys have a bias"),
        (
            lambda: build(hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**WIDE, layer_norm_eps=1e-6)),
            "norms add 1e-06",
        ),
        (
            lambda: build(hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**WIDE, use_gated_mlp=True)),
            "activation is gelu",
        ),
        (lambda: clip_around_timm(pool="token", proj="mlp"), "head is more than a projection"),
    ],
)
def test_what_timm_cannot_build_is_refused(model, reason, tmp_path):
    with pytest.raises(PhregError, match=reason):
        exported(model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_refusal_names_the_formats_that_can(tmp_path):
    with pytest.raises(PhregError, match=r"side by side.*It can be exported as transformers"):
        exported(TRANSFORMERS["dinov2-classifier"](), tmp_path / "out")


def test_a_conversion_gone_wrong_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(from_transformers.ACTIVATIONS, "gelu", "relu")
    with pytest.raises(PhregError, match="another model: at its own size"):
        exported(vit(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_trunk_that_timm_has_no_name_for_is_refused(tmp_path):
    model = OPEN_CLIP["timm"]()
    layer = nn.LayerNorm
    model.visual.trunk = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=4, num_classes=0, norm_layer=layer
    ).eval()
    with pytest.raises(PhregError, match="calling its class"):
        exported(model, tmp_path / "out")
