"""Scores through windows of any pixel, against mmseg's sliding inference written out slowly."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from phreg.backbones.resolve import adapt
from phreg.data.sources import open_images
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.pixel_scores import score_pictures, window_boxes


@pytest.fixture
def reader(tiny, tmp_path):
    model = adapt(tiny(dynamic_img_size=True))
    return FeatureReader(model, "tiny", FeatureCache(tmp_path / "cache"), batch_size=2)


def slide(model, image, head, window, stride):
    """Pads each window to patches of 8 pixels, evenly, and stretches its scores over it, as mmseg does."""
    height, width = image.shape[-2:]
    total, count = torch.zeros(2, height, width), torch.zeros(height, width)
    for row in range(max(height - window + stride - 1, 0) // stride + 1):
        for col in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + window, height), min(col * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            part = image[:, :, top:bottom, left:right]
            lacking = [math.ceil(side / 8) * 8 - side for side in part.shape[-2:]]
            canvas = torch.zeros(
                1, 3, *(side + more for side, more in zip(part.shape[-2:], lacking, strict=True))
            )
            up, aside = lacking[0] // 2, lacking[1] // 2
            canvas[:, :, up : up + part.shape[-2], aside : aside + part.shape[-1]] = part
            tokens = model.forward_features(canvas)[:, 1:]
            grid = tokens.unflatten(1, (canvas.shape[-2] // 8, canvas.shape[-1] // 8))
            scores = (grid @ head).permute(0, 3, 1, 2)
            scores = interpolate(scores, part.shape[-2:], mode="bilinear", align_corners=False)[0]
            total[:, top:bottom, left:right] += scores
            count[top:bottom, left:right] += 1
    return total / count


@torch.no_grad()
def test_scores_are_those_of_sliding_inference(reader, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(picture).save(tmp_path / "pictures" / "0.png")
    head = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    reading = FeatureConfig(size=36, fit="centred", window=20, stride=13)
    source = open_images(str(tmp_path / "pictures"))
    ((found, placement),) = score_pictures(
        reader, source, reading, lambda dense: (dense.grid @ head).permute(2, 0, 1)
    )
    pixels, _ = reader.place(source.read(0), reading)
    assert pixels.shape == (3, 36, 49)
    scores = slide(reader.backbone.model, reader.normalise(pixels[None]), head, 20, 13)
    expected = interpolate(scores[None], (45, 61), mode="bilinear", align_corners=False)[0]
    assert placement.picture_size == (45, 61)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # fp32 sums of 16 windows


def test_a_window_larger_than_the_picture_reads_it_whole():
    assert window_boxes((30, 50), 40, 27) == [(0, 0, 30, 40), (0, 10, 30, 40)]
