"""Colours of training crops: what depth probes do to them, and what lies outside of the picture."""

import pytest
import torch

from phreg.evaluation.datasets.augmentation import CropConfig, PairedCrops

PLAIN = {"size": 8, "scale": (1.0, 1.0), "flip": 0.0, "colour": 0.0}


def crop(picture, key, **changes):
    crops = PairedCrops(CropConfig(**PLAIN | changes), (8, 8), (0.4, 0.5, 0.6))
    return crops([picture], [torch.zeros(1, *picture.shape[1:])], key)[0][0]


def test_half_of_the_crops_change_their_gamma_brightness_and_tint():
    picture = torch.full((3, 8, 8), 0.2)
    changed = []
    for key in range(40):
        found = crop(picture, key, gamma=(0.9, 1.1), brightness=(0.75, 1.25), tint=(0.9, 1.1))
        torch.testing.assert_close(found, found[:, :1, :1].expand_as(found))
        colour = found[:, 0, 0]
        if torch.allclose(colour, picture[:, 0, 0]):  # up to rounding
            continue
        changed.append(colour)
        # Pixels from 0 to 255 are raised to the power, which brightens or darkens a good deal.
        low, high = (51**gamma * rest / 255 for gamma, rest in ((0.9, 0.75 * 0.9), (1.1, 1.25 * 1.1)))
        assert (colour >= low - 1e-6).all()
        assert (colour <= high + 1e-6).all()
        assert len(set(colour.tolist())) == 3, "a tint of each channel"
    assert 10 < len(changed) < 30


def test_a_range_of_one_value_is_that_power():
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = ((255 * picture) ** 0.9 * 2 * 0.5 / 255).clamp(0, 1)
    found = [crop(picture, key, gamma=(0.9, 0.9), brightness=(2, 2), tint=(0.5, 0.5)) for key in range(8)]
    kept = [image for image in found if torch.allclose(image, picture)]
    changed = [image for image in found if not torch.allclose(image, picture)]
    assert kept
    assert changed
    for image in changed:
        torch.testing.assert_close(image, expected)


@pytest.mark.parametrize(("outside", "expected"), [("mean", (0.4, 0.5, 0.6)), ("black", (0.0, 0.0, 0.0))])
def test_what_lies_outside_keeps_its_colour_whatever_becomes_of_the_picture(outside, expected):
    picture = torch.full((3, 8, 4), 0.7)
    for key in range(8):
        # The shorter side, the width, becomes half of the crop's.
        found = crop(picture, key, scale=(0.5, 0.5), colour=1.0, outside=outside)
        torch.testing.assert_close(found[:, :, 4:], torch.tensor(expected).view(3, 1, 1).expand(3, 8, 4))
        assert not torch.allclose(found[:, 0, 0], torch.tensor(expected))
