import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from phreg.backbones.resolve import adapt
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.tasks import quantised
from phreg.evaluation.tasks.classification import Settings as Classification
from phreg.evaluation.tasks.quantised import Settings, int8, round_input, round_weight


@given(seed=st.integers(0, 1000))
def test_weights_take_255_steps_a_row_and_zero_is_one_of_them(seed):
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    weight[0, 0] = 0
    rounded, scale = round_weight(weight), weight.abs().amax(1, keepdim=True) / 127
    assert rounded[0, 0] == 0
    steps = rounded / scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)  # fp32 of numbers up to 127
    assert ((rounded - weight).abs() <= 0.5001 * scale).all()


@given(seed=st.integers(0, 1000), offset=st.floats(-3, 3))
def test_inputs_take_256_steps_an_image_whatever_the_others(seed, offset):
    inputs = offset + torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))
    rounded = round_input(inputs)
    low, high = inputs.amin((1, 2)).clamp(max=0), inputs.amax((1, 2)).clamp(min=0)
    # Half a step, and another half at the ends, where zero was rounded to a step.
    assert ((rounded - inputs).abs() <= 1.001 * ((high - low) / 255)[:, None, None]).all()
    assert all(len(image.unique()) <= 256 for image in rounded)
    beside_larger = torch.cat([inputs[:1], 1000 * inputs[1:]])
    assert torch.equal(round_input(beside_larger)[0], rounded[0])


def test_linear_layers_compute_with_integers_and_come_back_to_the_bit():
    layer, images = nn.Linear(16, 4), torch.randn(2, 5, 16)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    full = layer(images)
    with int8(nn.Sequential(layer)):
        found = layer(images)
    expected = round_input(images) @ round_weight(before["weight"]).T + before["bias"]
    torch.testing.assert_close(found, expected)
    assert 0 < (found - full).abs().max() < 0.2  # 16 products, each off by a hundredth at most
    assert torch.equal(layer(images), full)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_weights_come_back_after_an_error():
    layer = nn.Linear(8, 8)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="interrupted"), int8(layer):
        raise RuntimeError("interrupted")
    assert torch.equal(layer.weight, before)
    assert not layer._forward_pre_hooks


def test_fused_attention_is_quantised_too():
    attention, tokens = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
    mask = torch.zeros(5, 5)
    full = attention(tokens, tokens, value=tokens, attn_mask=mask, need_weights=False)[0]
    with int8(attention):
        found = attention(tokens, tokens, value=tokens, attn_mask=mask, need_weights=False)[0]
    assert 0 < (found - full).abs().max() < 0.1  # a mean of values, each off by some hundredths
    assert torch.equal(attention(tokens, tokens, value=tokens, attn_mask=mask, need_weights=False)[0], full)


def test_one_huge_token_costs_all_others_their_precision():
    torch.manual_seed(0)
    layer, tokens = nn.Linear(32, 32), torch.randn(1, 20, 32)
    artifact = tokens.clone()
    artifact[:, 7] *= 100
    errors = []
    for images in (tokens, artifact):
        full = layer(images)
        with int8(layer):
            errors.append((layer(images) - full)[:, :7].norm() / full[:, :7].norm())
    assert errors[1] > 10 * errors[0]


def test_classification_is_measured_before_and_after(tiny, tmp_path):
    for name, colour in (("blue", (20, 20, 220)), ("red", (220, 20, 20))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(5):
            tint = tuple(part + 3 * number for part in colour)
            Image.new("RGB", (32, 32), tint).save(tmp_path / "set" / name / f"{number}.png")
    reader = FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=4)
    settings = Settings(classification=Classification(methods=("knn",), neighbours=3))
    found = quantised.run(reader, str(tmp_path / "set"), settings, seed=0)
    assert found.figures == {"int8_top1": 1, "top1": 1, "lost_top1": 0}
    assert set(found.detail) == {"full", "int8"}
    assert found.counts == {key: {"images": 2, "classes": 2} for key in found.figures}
    assert set(found.detail["int8"]) == {"top1", "top5", "knn_pooled_top1", "knn_pooled_top5"}
    assert ("lost_top1", "lower") in [(spec.name, spec.better) for spec in quantised.METRICS]
    assert set(found.resampled) == set(found.figures)
    assert set(found.resampled["lost_top1"]) == {0.0}


def test_what_is_lost_is_before_less_after(tiny, tmp_path, monkeypatch):
    backbone = adapt(tiny())
    weight = backbone.model.blocks[0].mlp.fc1.weight.detach().clone()

    def measured(reader, data, settings, seed):
        assert (reader.reference is None) == (reader.identity == "tiny-int8"), "which may be quantised too"
        changed = not torch.equal(backbone.model.blocks[0].mlp.fc1.weight, weight)
        assert reader.identity == ("tiny-int8" if changed else "tiny"), "features are kept apart"
        return quantised.Metrics({"top1": 0.5 if changed else 0.75})

    monkeypatch.setattr("phreg.evaluation.tasks.classification.run", measured)
    reader = FeatureReader(backbone, "tiny", FeatureCache(tmp_path / "cache"), reference=backbone)
    found = quantised.run(reader, "", Settings(), seed=0)
    assert found.figures == {"int8_top1": 0.5, "top1": 0.75, "lost_top1": 0.25}
    assert found.guarded == ("top1",)
