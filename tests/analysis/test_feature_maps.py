"""Numbers behind maps: components of one basis or of several, short codes, and texts against patches."""

import families_transformers
import numpy as np
import pytest
import torch
from families import FAMILIES
from torch.nn.functional import normalize

from phreg.analysis.feature_maps import (
    REACH,
    attention_limits,
    colours,
    components,
    joint_limits,
    similarity_codes,
    similarity_map,
    text_maps,
)
from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import adapt
from phreg.errors import PhregError

EXACT = {"atol": 1e-9, "rtol": 0}  # fp64, after an eigendecomposition


def grids(images=2, rows=6, cols=8, dim=12, seed=0):
    """Features whose channels differ in strength, so that their components have an order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, rows, cols, dim, generator=generator) * 0.7 ** torch.arange(dim)


def turned(features, dim, seed=1):
    """The same features in other channels, as many as asked for: no inner product changes."""
    matrix = torch.randn(dim, features.shape[-1], generator=torch.Generator().manual_seed(seed))
    return features @ torch.linalg.qr(matrix)[0].T


# -- principal components


def test_components_are_whitened_over_all_models_that_share_a_basis():
    maps = components([grids(seed=0), 3 * grids(seed=1)])
    every = torch.cat([part.flatten(0, 2) for part in maps])
    torch.testing.assert_close(every.mean(0), torch.zeros(3).double(), **EXACT)
    torch.testing.assert_close(every.T @ every / len(every), torch.eye(3).double(), **EXACT)
    assert maps[1].std() > 2 * maps[0].std(), "each model was whitened alone"


def test_components_are_those_of_a_singular_value_decomposition_strongest_first():
    features = grids(images=1)
    centred = (features - features.mean((0, 1, 2))).flatten(0, 2).double()
    left = torch.linalg.svd(centred, full_matrices=False).U[:, :4] * len(centred) ** 0.5
    found = components([features], 4)[0].flatten(0, 2)
    torch.testing.assert_close(found.abs(), left.abs(), atol=1e-5, rtol=0)  # features are fp32


def test_models_of_other_widths_get_the_first_models_order_and_signs():
    first = grids()
    # The same content in more channels, its first two components swapped in strength.
    left = components([first], 3)[0].float() * torch.tensor([2.0, 3.0, 1.0])
    maps = components([first, -turned(left, 20)])
    torch.testing.assert_close(maps[1], maps[0], atol=1e-4, rtol=0)  # fp32 features, through two bases


def test_models_are_aligned_across_grids_of_other_sizes():
    rows = torch.linspace(-1, 1, 8)
    smooth = torch.stack([rows[:, None].expand(8, 8), 0.5 * rows.expand(8, 8)], dim=-1)[None]
    fine = smooth.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    coarse_maps, fine_maps = components([smooth, -turned(fine, 5)], 2)
    torch.testing.assert_close(fine_maps[:, ::2, ::2], coarse_maps, atol=1e-4, rtol=0)


def test_equally_wide_models_can_have_a_basis_each():
    first = grids()
    other = turned(first, 12)
    aligned = components([first, other], shared=False)
    torch.testing.assert_close(aligned[1], aligned[0], atol=1e-4, rtol=0)
    assert (components([first, other])[1] - components([first, other])[0]).abs().max() > 1


def test_one_basis_for_models_of_other_widths_is_refused():
    with pytest.raises(PhregError, match="12 and 20 channels wide; leave `shared` unset"):
        components([grids(dim=12), grids(dim=20)], shared=True)


def test_components_of_rounding_errors_are_zero():
    features = torch.randn(1, 4, 4, 1) * torch.ones(8)  # one direction, seven of rounding
    maps = components([features])[0]
    assert maps[..., 0].std() > 0.9
    assert not maps[..., 1:].any()


def test_colours_fill_the_scale_and_mean_the_same_in_all_models():
    first = grids()
    second = first.clone()
    second[0, 5, 7] = first[1, 0, 0]
    left, right = colours(components([first, second]))
    torch.testing.assert_close(right[0, 5, 7], left[1, 0, 0], **EXACT)
    assert left.min() == 0
    assert left.max() == 1


def test_one_wild_token_does_not_drown_the_colours_of_the_others():
    features = grids(rows=20, cols=20)
    features[0, 0, 0, 0] = 1000.0
    (drawn,) = colours(components([features]))
    # Scaled from the least to the largest value, the others' red would differ by less than .01.
    assert drawn[1].flatten(0, 1).std(0).min() > 0.1
    assert components([features])[0][0, 0, 0].abs().max() > REACH, "the first component needs its cut"


# -- cosines to a patch


def test_a_similarity_map_holds_cosines_and_1_at_the_patch_itself():
    features = grids(images=1)[0]
    found = similarity_map(features, 2, 3)
    for row, col in ((0, 0), (5, 7), (2, 3)):
        expected = torch.cosine_similarity(features[row, col], features[2, 3], dim=0)
        torch.testing.assert_close(found[row, col], expected, atol=1e-6, rtol=0)
    assert found[2, 3] == pytest.approx(1, abs=1e-6)


def decoded(codes):
    """What a browser makes of codes: cosines of all pairs."""
    unit = normalize(codes.flatten(0, 1).double(), dim=-1)
    return unit @ unit.T


@pytest.mark.parametrize("family", ["timm/dinov2", "transformers/dinov3", "open_clip/clip"])
@torch.no_grad()
def test_codes_of_tiny_models_keep_every_cosine_within_5_hundredths(family):
    backbone = adapt(FAMILIES[family]())
    images = torch.randn(1, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    features = backbone(images).patches[0]
    codes, error = similarity_codes(features)
    assert codes.dtype == torch.int8
    assert error <= 0.05
    cosines = normalize(features.flatten(0, 1).double(), dim=-1)
    # Rounded to fp32 on the way.
    assert (decoded(codes) - cosines @ cosines.T).abs().max().item() == pytest.approx(error, abs=1e-5)


def test_codes_are_as_short_as_the_tolerance_allows():
    features = grids(images=1, rows=10, cols=10, dim=200)[0]  # 40 channels hold all but 1e-6 of it
    flat = torch.randn(10, 10, 200, generator=torch.Generator().manual_seed(0))
    assert similarity_codes(features, tolerance=0.05).codes.shape == (10, 10, 16)
    assert similarity_codes(flat, tolerance=0.05).codes.shape[-1] > 48
    short = similarity_codes(flat, dims=32)
    assert short.codes.shape == (10, 10, 32)
    assert short.error > 0.05


def test_codes_use_all_eight_bits_whatever_the_length_of_a_feature():
    features = grids(images=1)[0]
    features[0, 0] *= 1e-4
    codes = similarity_codes(features).codes
    assert (codes.int().abs().amax(-1) == 127).all()


def test_a_patch_of_zeros_has_a_code_of_zeros():
    features = grids(images=1)[0]
    features[0, 0] = 0
    codes, error = similarity_codes(features)
    assert not codes[0, 0].any()
    assert error <= 0.05


@pytest.mark.real
def test_codes_of_a_real_model_keep_every_cosine_within_5_hundredths_at_80_bytes(real_model, real_data):
    from PIL import Image

    from phreg.backbones.resolve import load

    backbone, _ = load(str(real_model))
    backbone.model.eval()
    path = sorted((real_data / "imagenet_samples").glob("*.jpg"))[100]
    pixels = np.asarray(Image.open(path).convert("RGB").resize((224, 224)))
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        codes, error = similarity_codes(backbone(images).patches[0])
    assert codes.shape[-1] <= 80
    assert error <= 0.05


# -- cosines to a text


def letters(texts):
    """A tokenizer of a text's first 5 characters."""
    return {"input_ids": torch.tensor([[ord(letter) % 64 for letter in text[:5].ljust(5)] for text in texts])}


def image_text_model(family):
    from phreg.backbones.text import text_encoder

    backbone = adapt(families_transformers.FAMILIES[family]())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return backbone, images, text_encoder(backbone, letters)


@torch.no_grad()
@pytest.mark.parametrize(("family", "usual"), [("clip", "value-only"), ("siglip", "plain")])
def test_text_maps_are_cosines_of_patches_and_texts_in_the_joint_space(family, usual):
    backbone, images, encode = image_text_model(family)
    found = text_maps(backbone, images, ["a cat", "a dog", "grass"], encode=encode)
    assert found.shape == (2, 3, 4, 4)
    if usual == "plain":
        patches = backbone.to_joint(backbone(images).patches.flatten(1, 2))
    else:
        set_readout(backbone, usual)
        patches = backbone(images).patches.flatten(1, 2)
    expected = torch.cosine_similarity(
        patches[:, None], encode(["a cat", "a dog", "grass"])[None, :, None], -1
    )
    torch.testing.assert_close(found.flatten(2), expected, atol=1e-5, rtol=0)  # fp32 sums in another order


@torch.no_grad()
def test_text_maps_leave_a_model_as_it_was_even_when_they_fail():
    backbone, images, encode = image_text_model("clip")
    set_readout(backbone, "clearclip")
    before = backbone(images).patches
    text_maps(backbone, images, ["a cat"], encode=encode)
    with pytest.raises(PhregError):
        text_maps(backbone, images[..., :30], ["a cat"], encode=encode)
    assert backbone.readout == "clearclip"
    assert torch.equal(backbone(images).patches, before)


@torch.no_grad()
def test_a_model_is_read_as_phreg_trained_it_unless_asked_otherwise():
    backbone, images, encode = image_text_model("clip")
    backbone.trained_readout = "naclip"
    trained = text_maps(backbone, images, ["a cat"], encode=encode)
    torch.testing.assert_close(
        text_maps(backbone, images, ["a cat"], readout="naclip", encode=encode), trained
    )
    assert not torch.allclose(
        text_maps(backbone, images, ["a cat"], readout="plain", encode=encode), trained, atol=1e-3
    )


def test_text_maps_of_a_model_without_texts_are_refused(tiny):
    with pytest.raises(PhregError, match="no text tower"):
        text_maps(adapt(tiny()), torch.zeros(1, 3, 32, 32), ["a cat"])


# -- limits


def test_limits_are_joint_over_maps_of_any_shape():
    assert joint_limits(torch.tensor([[2.0, 5.0]]), torch.tensor([1.0, 3.0])) == (1, 5)
    assert joint_limits(torch.tensor([2.0, 5.0]), low=0.0) == (0, 5)
    assert joint_limits(torch.arange(101.0), trim=0.1) == pytest.approx((10, 90))


def test_attention_limits_let_a_few_artifacts_go_beyond():
    attention = torch.full((14, 14), 0.005)
    attention[[0, 0, -1, -1], [0, -1, 0, -1]] = 0.2
    low, high = attention_limits(attention)
    assert (low, high) == pytest.approx((0, 0.005))
