"""Canvases of published protocols: sizes kept to the pixel, the middle of a picture, multiples of 64."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.evaluation.canvas import pad_to_patches
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader


@pytest.fixture
def reader(tiny, tmp_path):
    """Patches of 8 pixels, of any number."""
    model = adapt(tiny(dynamic_img_size=True))
    return FeatureReader(model, "tiny", FeatureCache(tmp_path / "cache"), batch_size=4)


def noise(width, height):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_dinos_frames_are_480_by_832(reader):
    reading = FeatureConfig(size=480, floor=64)
    assert reader.place(noise(854, 480), reading)[1].canvas == (480, 832)
    assert reader.place(noise(480, 854), reading)[1].canvas == (832, 480), "the longer side, whichever it is"
    assert reader.place(noise(480, 480), reading)[1].canvas == (480, 480)
    assert reader.place(noise(854, 480), FeatureConfig(size=480))[1].canvas == (480, 856), "the nearest"


def test_the_middle_of_a_resized_picture_is_torchvisions(reader):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    theirs = Compose([Resize(48, InterpolationMode.BICUBIC, antialias=True), CenterCrop(32), PILToTensor()])
    for size in ((70, 51), (51, 70), (60, 60)):
        picture = noise(*size)
        pixels, placement = reader.place(picture, FeatureConfig(fit="crop", size=32, resize=48))
        assert torch.equal(pixels, theirs(picture))
        # The middle two thirds of the shorter side.
        assert placement.part[2:] == (round(32 / 48 * min(size)),) * 2


def test_centred_pictures_keep_their_size_to_the_pixel(reader):
    pixels, placement = reader.place(noise(45, 30), FeatureConfig(fit="centred", size=27))
    assert pixels.shape[1:] == placement.canvas == (27, 41)  # 40.5, as mmcv rounds it


def test_padding_is_even_and_an_odd_pixel_goes_below_and_right(reader):
    padded = pad_to_patches(torch.ones(1, 3, 27, 32), reader.backbone.spec)
    assert padded.shape == (1, 3, 32, 32)
    assert (padded[0, 0, :, 0] == 1).nonzero().flatten().tolist() == list(range(2, 29))


def test_a_centred_picture_is_read_as_its_padded_one_and_its_grid_covers_it(reader):
    picture, reading = noise(41, 27), FeatureConfig(fit="centred", size=27)
    pixels, placement = reader.place(picture, reading)
    images = reader.normalise(pixels[None])
    whole = torch.zeros(1, 3, 32, 48)
    whole[:, :, 2:29, 3:44] = images
    expected = reader(whole, FeatureConfig()).grids
    assert torch.equal(reader(images, reading).grids, expected)
    grid = expected[0].permute(2, 0, 1)
    covering = interpolate(grid[None], (27, 41), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(placement.restore(grid), covering)


def test_features_through_windows_of_any_pixel_are_refused(reader):
    reading = FeatureConfig(fit="centred", size=30, window=20)
    with pytest.raises(PhregError, match="only segmentation averages scores of such windows"):
        reader(torch.zeros(1, 3, 30, 40), reading)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"resize": 40}, "resize gives a shorter side"), ({"floor": 64, "fit": "square"}, "floor rounds")],
)
def test_settings_that_a_fit_does_not_use_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        FeatureConfig(**wrong)
