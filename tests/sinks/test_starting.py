"""Registers start from triggers of sinks, or where the model does not notice them."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from known_sinks import sinks

from phreg.backbones.base import Features
from phreg.backbones.resolve import adapt
from phreg.registers import initial_registers
from phreg.sinks.starting import (
    add_starting_registers,
    assign_registers,
    distance,
    mean_patch,
    starting_tokens,
    unnoticed,
)

BATCHES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(3)


@pytest.mark.parametrize(
    ("registers", "an_image", "assigned"),
    [
        (4, [4], [[0], [0], [0], [0]]),
        (4, [1], [[0], [], [], []]),
        (4, [2, 3], [[0], [1], [0], [1]]),
        (4, [4, 1], [[0], [1], [0], [0]]),
        (2, [5, 1, 1], [[0, 2], [1]]),
        (1, [1, 1], [[0, 1]]),
        (6, [2, 1], [[0], [1], [0], [], [], []]),
    ],
)
def test_clusters_are_assigned_in_turn_and_each_as_often_as_an_image_has_it(registers, an_image, assigned):
    assert assign_registers(registers, an_image) == assigned


def test_registers_start_from_triggers_the_most_frequent_first_and_free_ones_at_random(tiny):
    two, backbone = sinks((1, 5, 10.0, 0), (1, 6, 10.0, 1)), adapt(tiny())
    # Cluster 0 has triggers 0 and 1, cluster 1 has 10, 11 and 12.
    tokens = starting_tokens(backbone, two, BATCHES, 7, "triggers", seed=3)
    assert tokens[:5, 0].tolist() == [0, 10, 1, 11, 12]
    assert torch.equal(tokens[5:], initial_registers(7, 32, seed=3)[5:])
    one = starting_tokens(backbone, two, BATCHES, 1, "triggers", seed=3)
    assert one[:, 0].tolist() == [5], "halfway between the first of both"
    assert starting_tokens(backbone, sinks((1, 5, 10.0)), BATCHES, 2, "neutral", seed=3)[:, 0].tolist() == [
        0,
        1,
    ]


def test_neutral_registers_beside_triggers_are_fitted_without_them(tiny):
    backbone, found = adapt(tiny()), sinks((1, 5, 10.0))
    tokens = starting_tokens(backbone, found, BATCHES, 4, "neutral", seed=3)
    beside = mean_patch(backbone, BATCHES) + 0.1 * initial_registers(4, 32, seed=3)[2:]
    assert tokens[:2, 0].tolist() == [0, 1]
    assert torch.equal(tokens[2:], unnoticed(backbone, beside, BATCHES))
    assert backbone.num_registers == 0


@pytest.mark.parametrize(
    "name",
    [
        "timm/vit",
        "timm/dinov2-reg4",
        "transformers/dinov2-registers",
        "transformers/dinov3",
        "open_clip/clip",
    ],
)
def test_fitted_registers_change_a_model_less_than_where_they_started(name):
    backbone = adapt(FAMILIES[name]())
    size = backbone.image_size(None)
    images = torch.randn(8, 3, *size, generator=torch.Generator().manual_seed(1))
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    start = mean_patch(backbone, [images]) + initial_registers(16, backbone.spec.width, seed=0) / 10

    def changed_by(tokens):
        with torch.no_grad():
            original = backbone(images)
            backbone.insert_registers(tokens)
            changed = backbone(images)
            backbone.remove_registers()
        return max(
            (1 - torch.cosine_similarity(old, new, dim=-1)).mean().item()
            for old, new in zip(original, changed, strict=True)
        )

    fitted = unnoticed(backbone, start, images.split(3))
    assert changed_by(fitted) < 0.5 * changed_by(start)
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items()), "the model is as it was"


def test_the_mean_patch_is_the_mean_of_what_enters_the_first_block():
    """By hand: patch embedding plus position embedding, of a model without a norm ahead of its blocks."""
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    backbone = adapt(FAMILIES["timm/vit"]())
    model = backbone.model
    embedded = model.patch_embed(images) + model.pos_embed[:, -16:]
    assert torch.allclose(mean_patch(backbone, images.split(3)), embedded.mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("init", ["triggers", "neutral", "randn", "trunc-normal", "zeros"])
@pytest.mark.parametrize("known", [True, False])
def test_registers_start_as_asked_where_triggers_are_known_and_where_not(tiny, init, known):
    backbone = adapt(tiny())
    found = replace(sinks((1, 5, 10.0)), triggers=(torch.full((1, 32), 7.0),)) if known else None
    expected = initial_registers(2, 32, "randn" if init in ("triggers", "neutral") else init, seed=3)
    free = slice(1, None) if known else slice(None)
    if init == "neutral":
        expected[free] = unnoticed(backbone, mean_patch(backbone, BATCHES) + 0.1 * expected[free], BATCHES)
    if init in ("triggers", "neutral") and known:
        expected[0] = 7.0
    add_starting_registers(backbone, found, BATCHES, 2, init, seed=3)
    assert torch.allclose(backbone.registers[0], expected, atol=1e-6)


def test_no_registers_are_added_where_none_are_asked_for(tiny):
    backbone = adapt(tiny())
    add_starting_registers(backbone, sinks((1, 5, 10.0)), BATCHES, 0, "triggers", seed=3)
    assert backbone.num_registers == 0


def test_the_fit_compares_each_patch_by_itself_and_adds_the_pooled_output():
    generator = torch.Generator().manual_seed(0)
    patches, pooled = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 4, 8), (2, 8)))
    louder = Features(patches * torch.rand(2, 3, 4, 1, generator=generator), pooled * 5)
    assert distance(louder, Features(patches, pooled)).item() == pytest.approx(0, abs=1e-6)
    turned = Features(patches, -pooled)
    assert distance(turned, Features(patches, pooled)).item() == pytest.approx(2, abs=1e-6)
    half = Features(torch.cat([patches[:, :, :2], -patches[:, :, 2:]], dim=2), pooled)
    assert distance(half, Features(patches, pooled)).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.real
@pytest.mark.slow
def test_sixteen_neutral_registers_change_a_real_dinov2_by_less_than_a_thousandth(real_data):
    from phreg import api
    from phreg.data.crops import centre_crops
    from phreg.data.sources import Subset, open_images

    backbone, _ = api.open_model(str(real_data / "models" / "dinov2-small"))
    source = open_images(real_data / "imagenet_samples")
    fitted_on = list(centre_crops(backbone, Subset(source, range(0, 640, 20)), 224))
    others = torch.cat(list(centre_crops(backbone, Subset(source, range(5, 640, 40)), 224)))
    with torch.no_grad():
        before = backbone(others)
    add_starting_registers(backbone, None, fitted_on, 16, "neutral", seed=0)
    with torch.no_grad():
        after = backbone(others)
    assert torch.cosine_similarity(before.patches, after.patches, dim=-1).mean() > 0.999
    assert torch.cosine_similarity(before.pooled, after.pooled, dim=-1).mean() > 0.999
