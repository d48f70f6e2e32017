"""The average over moved views: what a slow reading by hand gives, whatever the batch; else refused."""

import dataclasses

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch.nn.functional import conv2d, normalize

from phreg.backbones.readout import use_readout
from phreg.backbones.resolve import adapt
from phreg.config import TargetConfig, ViewsConfig
from phreg.data.sources import open_images
from phreg.errors import PhregError
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.view_average import draw_views
from phreg.seeding import keyed_generator
from phreg.teacher import Teacher

ROUNDING = 1e-5
"""fp32 forwards and sums in another order differ in the last digits of values around 1."""


def made(model, tmp_path, batch_size=4):
    return FeatureReader(adapt(model).eval(), "any", FeatureCache(tmp_path / "cache"), batch_size)


@pytest.fixture
def reader(tiny, tmp_path):
    return made(tiny(), tmp_path)


def images(rows=4, cols=4, batch=2, patch=8):
    return torch.randn(batch, 3, patch * rows, patch * cols, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def forwards(monkeypatch):
    """Lets a reader note every batch of images that its model is run on."""

    def note(reader):
        seen, run = [], reader.backbone.run
        monkeypatch.setattr(reader.backbone, "run", lambda pixels: seen.append(pixels) or run(pixels))
        return seen

    return note


def hand_views(image):
    """Every view of an image of 4x4 patches by at most one patch: pixels, shift, mirroring."""
    padded = np.pad(image.numpy(), ((0, 0), (8, 8), (8, 8)), mode="reflect")
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            shifted = padded[:, 8 * (1 + dy) :, 8 * (1 + dx) :][:, :32, :32]
            yield shifted, (dy, dx), False
            yield shifted[:, :, ::-1], (dy, dx), True


def test_the_average_of_a_linear_model_is_that_by_hand(tiny, tmp_path, forwards):
    model = tiny()
    with torch.no_grad():  # blocks that add nothing: a patch and its position in the frame, which is artifact
        model.pos_embed.normal_()
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_(), layer.bias.zero_()
    reader, pixels = made(model, tmp_path), images()
    seen = forwards(reader)

    found = reader(pixels, FeatureConfig(views=6, norm=False)).grids

    views = torch.cat([batch.unflatten(0, (2, -1)) for batch in seen], 1)
    assert views.shape[:2] == (2, 6)
    assert torch.equal(views[:, 0], pixels), "the unmoved one first"
    weight, bias, position = model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.pos_embed
    moved_ones = set()
    for image, of_image, average in zip(pixels, views, found, strict=True):
        total, count = torch.zeros(4, 4, 32), torch.zeros(4, 4, 1)
        for view in of_image:
            # Which one it is, pixel by pixel: nothing is resampled.
            (match,) = [each[1:] for each in hand_views(image) if np.array_equal(each[0], view.numpy())]
            moved_ones.add(match)
            (dy, dx), mirrored = match
            with torch.no_grad():
                grid = conv2d(view[None], weight, bias, stride=8)[0].permute(1, 2, 0)
                grid = grid + position[0, 1:].unflatten(0, (4, 4))
            for row in range(4):
                for col in range(4):
                    to = row + dy, (3 - col if mirrored else col) + dx
                    if 0 <= to[0] < 4 and 0 <= to[1] < 4:
                        total[to] += grid[row, col]
                        count[to] += 1
        torch.testing.assert_close(average, total / count, atol=ROUNDING, rtol=0)
    assert len(moved_ones) > 3, "not one view over and over"
    assert {mirrored for _, mirrored in moved_ones} == {False, True}


@pytest.mark.parametrize("settings", [{}, {"layer": 1}, {"layer": -2, "norm": False}])
def test_it_is_what_the_teacher_of_a_distillation_gives(reader, settings):
    pixels = images(rows=5, cols=6, batch=1)
    views = ViewsConfig(count=7, fill="reflect")
    target = Teacher(reader.backbone, views, TargetConfig(**settings))(
        pixels, keyed_generator("view average")
    ).patches
    found = reader(pixels, FeatureConfig(views=7, **settings)).grids
    torch.testing.assert_close(found, target, atol=ROUNDING, rtol=0)
    assert (found - reader(pixels, FeatureConfig(**settings)).grids).abs().max() > 100 * ROUNDING


def test_a_read_out_of_clip_is_averaged_too(tmp_path):
    reader, pixels = made(FAMILIES["open_clip/clip"](), tmp_path), images(batch=1)
    with use_readout(reader.backbone, "value-only"):
        target = Teacher(reader.backbone, ViewsConfig(count=5, fill="reflect"))(
            pixels, keyed_generator("view average")
        )
    found = reader(pixels, FeatureConfig(views=5, readout="value-only"))
    torch.testing.assert_close(found.grids, target.patches, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("name", ["open_clip/clip", "transformers/clip", "transformers/siglip"])
def test_tokens_are_averaged_before_the_joint_space_whatever_leads_there(name, tmp_path):
    reader = made(FAMILIES[name](), tmp_path)
    spec = reader.backbone.spec
    pixels = images(*spec.grid, batch=2, patch=spec.patch_size[0])
    tokens = reader(pixels, FeatureConfig(views=2)).grids
    joint = reader(pixels, FeatureConfig(views=2, source="joint"))
    with torch.no_grad():
        expected = reader.backbone.to_joint(tokens.flatten(1, 2)).unflatten(1, tokens.shape[1:3])
    torch.testing.assert_close(joint.grids, expected, atol=ROUNDING, rtol=0)
    assert torch.equal(joint.cls, reader(pixels, FeatureConfig(source="joint")).cls)


def test_one_view_is_the_model_as_it_is_bit_by_bit(reader, forwards):
    pixels, backbone = images(), reader.backbone
    with torch.no_grad():
        tokens = backbone.final_norm(backbone.block_tokens(pixels, [2])[2])
        pooled = backbone.run(pixels)
    seen = forwards(reader)
    found = reader(pixels, FeatureConfig(views=1))
    assert len(seen) == 1
    assert torch.equal(found.grids, backbone.layout(pixels).to_grid(tokens))
    assert torch.equal(found.pooled, pooled)
    assert torch.equal(found.cls, tokens[:, 0])


@pytest.mark.parametrize("name", ["timm/vit", "timm/vit-headless", "transformers/siglip-vision"])
def test_pooled_outputs_and_cls_are_those_of_the_unmoved_view(name, tmp_path):
    reader = made(FAMILIES[name](), tmp_path)
    spec = reader.backbone.spec
    pixels = images(*spec.grid, patch=spec.patch_size[0])
    once, averaged = (reader(pixels, FeatureConfig(views=views)) for views in (1, 2))
    assert torch.equal(averaged.pooled, once.pooled)
    assert torch.equal(averaged.cls, once.cls)
    assert not torch.equal(averaged.grids, once.grids)


def test_each_window_is_averaged_over_its_own_views(reader):
    pixels, reading = images(cols=6), FeatureConfig(views=5)
    found = reader(pixels, FeatureConfig(views=5, window=32, stride=16)).grids
    left, right = (reader(pixels[..., start : start + 32], reading).grids for start in (0, 16))
    expected = torch.cat([left[:, :, :2], (left[:, :, 2:] + right[:, :, :2]) / 2, right[:, :, 2:]], 2)
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


def test_averages_are_scaled_to_length_one_not_views(reader):
    average, unit = (reader(images(), FeatureConfig(views=5, unit=unit)).grids for unit in (False, True))
    torch.testing.assert_close(unit, normalize(average, dim=-1))


def test_several_layers_share_the_views_and_their_forwards(reader, photos, forwards):
    source, layers = open_images(photos), (0, -1)
    readings = [FeatureConfig(size=32, layer=layer, views=3, norm=layer == -1) for layer in layers]
    alone = [list(reader.stream(source, reading)) for reading in readings]
    seen = forwards(reader)
    for number, found in enumerate(reader.stream_each(source, readings)):
        for which, dense in enumerate(found):
            assert torch.equal(dense.grid, alone[which][number].grid)
    assert sum(map(len, seen)) == 3 * len(source)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_no_forward_is_larger_than_the_batch_size(tiny, tmp_path, photos, forwards, batch_size):
    reader = made(tiny(), tmp_path, batch_size)
    seen = forwards(reader)
    list(reader.stream(open_images(photos), FeatureConfig(size=32, views=7)))
    assert sum(map(len, seen)) == 7 * 12
    assert max(map(len, seen)) <= batch_size


def test_neither_another_call_nor_another_batch_size_changes_it(tiny, tmp_path, mixed_photos):
    source, reading = open_images(mixed_photos), FeatureConfig(size=32, views=6)
    read = {size: list(made(tiny(), tmp_path, size).stream(source, reading)) for size in (4, 1, 100)}
    again = list(made(tiny(), tmp_path, 4).stream(source, reading))
    for number, dense in enumerate(read[4]):
        assert torch.equal(dense.grid, again[number].grid)
        for other in (read[1], read[100]):
            torch.testing.assert_close(dense.grid, other[number].grid, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("source", ["queries", "keys", "values"])
def test_parts_of_attention_are_not_averaged(reader, source):
    with pytest.raises(PhregError, match=rf"views = 4 .* {source} .* which no student .*; read tokens"):
        reader(images(), FeatureConfig(source=source, views=4))


def test_more_views_than_there_are_are_refused(reader):
    reader(images(), FeatureConfig(views=18))  # 3x3 shifts, mirrored or not
    with pytest.raises(PhregError, match=r"views = 19 .* 4x4 patches, have 18 .*; lower reading\.views"):
        reader(images(), FeatureConfig(views=19))
    with pytest.raises(PhregError, match=r"16x16 pixels, which are 2x2 patches, have 2 different"):
        reader(images(), FeatureConfig(views=3, window=16))


def test_the_views_of_windows_of_the_usual_size_are_all_different(reader):
    spec = dataclasses.replace(reader.backbone.spec, patch_size=(16, 16))
    views = draw_views(10, spec, (224, 224), 1)
    moves = [(*offset, flip) for offset, flip in zip(views.offsets[0].tolist(), views.flips[0], strict=True)]
    assert len({(dy, dx, bool(flip)) for dy, dx, flip in moves} | {(0, 0, False)}) == 10
    assert {abs(shift) for dy, dx, _ in moves for shift in (dy, dx)} == {0, 1, 2}, "15 % of 14 patches"


def test_averages_are_kept_apart_and_what_was_kept_before_there_were_any_is_found(reader, photos):
    asked = reader.described(FeatureConfig(size=32))
    assert asked["reading"] == {
        "size": 32, "fit": "keep", "window": None, "stride": None, "source": "tokens", "layer": None,
        "readout": None, "norm": True, "bias": True, "unit": False,
    }  # fmt: skip
    source = open_images(photos)
    once, averaged = (reader.features(source, FeatureConfig(size=32, views=views)) for views in (1, 3))
    assert once.folder != averaged.folder
    expected = next(reader.stream(source, FeatureConfig(size=32, views=3))).grid
    assert torch.equal(averaged[0].grid, expected.half().float())
    assert not torch.equal(averaged[0].grid, once[0].grid)
