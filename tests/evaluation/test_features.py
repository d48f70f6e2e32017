import dataclasses

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from pictures import noise
from PIL import Image

from phreg.backbones.readout import use_readout
from phreg.backbones.resolve import adapt
from phreg.data.sources import open_images
from phreg.errors import ConfigError, PhregError
from phreg.evaluation.dense import Placement
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.progress import told_to
from phreg.registers import add_registers
from phreg.settings import build

ROUNDING = 1e-5
"""fp32 forwards of the same tokens in batches of another size differ in the last digits."""


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=4)


def images(reader, rows=4, cols=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8 * rows, 8 * cols, generator=generator)


def test_tokens_are_what_the_backbone_gives(reader):
    pixels = images(reader)
    batch, direct = reader(pixels, FeatureConfig()), reader.backbone(pixels)
    torch.testing.assert_close(batch.grids, direct.patches, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(batch.pooled, direct.pooled, atol=ROUNDING, rtol=0)


def test_registers_are_never_in_the_grid(reader):
    before = reader(images(reader), FeatureConfig()).grids.shape
    add_registers(reader.backbone, 3)
    after = reader(images(reader), FeatureConfig(source="keys"))
    assert after.grids.shape == before
    assert after.cls.shape == (2, 32)


@pytest.mark.parametrize(
    "name", ["timm/vit", "transformers/dinov2", "transformers/clip-vision", "open_clip/clip"]
)
@pytest.mark.parametrize("layer", [0, -1])
def test_values_are_those_the_block_itself_computes(name, layer, tmp_path):
    backbone = adapt(FAMILIES[name]()).eval()
    add_registers(backbone, 2)
    reader = FeatureReader(backbone, "any", FeatureCache(tmp_path))
    side = backbone.spec.input_size
    pixels = torch.randn(1, 3, *side, generator=torch.Generator().manual_seed(0))
    index = backbone.block_index(layer)
    entered = []
    handle = backbone.blocks[index].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        backbone.run(pixels)
        handle.remove()
        attention = backbone.attention(index)
        expected = attention.values(attention.norm(entered[0])).transpose(1, 2).flatten(2)
    found = reader(pixels, FeatureConfig(source="values", layer=layer)).grids
    torch.testing.assert_close(found.flatten(1, 2), backbone.layout(pixels).patches(expected))


@pytest.mark.parametrize("window", [None, 16])
def test_reading_in_several_ways_at_once_gives_what_each_gives_alone(reader, photos, window, monkeypatch):
    source = open_images(photos)
    readings = [
        FeatureConfig(source="keys", layer=-2, unit=True, window=window),
        FeatureConfig(layer=0, norm=False, window=window),
        FeatureConfig(source="values", layer=-1, bias=False, window=window),
    ]
    alone = [list(reader.stream(source, reading)) for reading in readings]
    runs, run = [], reader.backbone.run
    monkeypatch.setattr(reader.backbone, "run", lambda pixels: runs.append(len(pixels)) or run(pixels))
    together = list(reader.stream_each(source, readings))
    for number, found in enumerate(together):
        for which, dense in enumerate(found):
            assert torch.equal(dense.grid, alone[which][number].grid)
            assert torch.equal(dense.cls, alone[which][number].cls)
            assert dense.placement == alone[which][number].placement
    if window is None:
        assert sum(runs) == len(source), "one forward for all"


@pytest.mark.parametrize("source", ["queries", "keys", "values"])
def test_without_bias_a_projection_is_its_weight_alone(reader, source):
    attention = reader.backbone.model.blocks[1].attn
    with torch.no_grad():
        attention.qkv.bias.normal_()
    pixels, reading = images(reader), FeatureConfig(source=source, layer=1)
    part = ["queries", "keys", "values"].index(source)
    bias = attention.qkv.bias.chunk(3)[part].detach()
    with_bias = reader(pixels, reading).grids
    without = reader(pixels, reading.model_copy(update={"bias": False})).grids
    torch.testing.assert_close(with_bias - without, bias.expand_as(without), atol=ROUNDING, rtol=0)


def test_a_bias_under_a_norm_cannot_be_taken_off(tmp_path):
    backbone = adapt(FAMILIES["timm/vit-qk-norm"]())
    reader = FeatureReader(backbone, "any", FeatureCache(tmp_path))
    with pytest.raises(PhregError, match="norms them after"):
        reader(torch.randn(1, 3, 32, 32), FeatureConfig(source="keys", bias=False))


def test_overlapping_windows_are_averaged_patch_by_patch(reader):
    pixels = images(reader, rows=4, cols=6)
    found = reader(pixels, FeatureConfig(window=32, stride=16)).grids
    left, right = (reader(pixels[..., start : start + 32], FeatureConfig()).grids for start in (0, 16))
    torch.testing.assert_close(found[:, :, :2], left[:, :, :2], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(
        found[:, :, 2:4], (left[:, :, 2:] + right[:, :, :2]) / 2, atol=ROUNDING, rtol=0
    )
    torch.testing.assert_close(found[:, :, 4:], right[:, :, 2:], atol=ROUNDING, rtol=0)


@given(rows=st.integers(4, 9), cols=st.integers(4, 9), stride=st.integers(1, 40))
def test_windows_cover_every_patch_whatever_the_stride(rows, cols, stride):
    from phreg.evaluation.canvas import window_starts

    starts = window_starts(max(rows, cols), 4, max(1, round(stride / 8)))
    covered = {place for start in starts for place in range(start, start + 4)}
    assert covered >= set(range(max(rows, cols))) or stride > 32  # a stride beyond the window leaves gaps
    assert max(covered) == max(rows, cols) - 1


@pytest.mark.parametrize(
    ("fit", "canvas", "part"),
    [
        ("keep", (32, 48), (0, 0, 30, 43)),
        ("square", (32, 32), (0, 0, 30, 43)),
        ("crop", (32, 32), (0, 6, 30, 30)),
        ("pad", (32, 48), (0, 0, 30, 43)),
    ],
)
def test_a_picture_of_any_size_lands_on_whole_patches(reader, fit, canvas, part):
    pixels, placement = reader.place(noise((43, 30)), FeatureConfig(fit=fit, size=30 if fit == "pad" else 32))
    assert pixels.shape[1:] == placement.canvas == canvas
    assert placement.part == part
    assert placement.picture_size == (30, 43)


@pytest.mark.parametrize(
    ("picture", "part"), [((64, 64), (24, 0, 16, 64)), ((80, 10), (0, 20, 10, 40)), ((9, 40), (19, 0, 2, 9))]
)
def test_a_crop_has_the_models_own_shape(tiny, reader, picture, part):
    oblong = dataclasses.replace(reader, backbone=adapt(tiny(img_size=(16, 64))))
    photo = noise(picture)
    top, left, height, width = part
    expected = photo.crop((left, top, left + width, top + height)).resize((64, 16), Image.Resampling.BICUBIC)

    pixels, placement = oblong.place(photo, FeatureConfig(fit="crop"))

    assert (placement.canvas, placement.part) == ((16, 64), part)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))
    asked, _ = reader.place(photo, FeatureConfig(fit="crop", size=(16, 64)))
    assert torch.equal(asked, pixels)


def test_two_sides_are_refused_where_the_picture_gives_the_ratio():
    with pytest.raises(ConfigError, match="fit=keep keeps each picture's ratio"):
        build(FeatureConfig, {"size": (16, 64)}, source="reading")


def test_padding_shows_the_picture_as_it_is_and_the_mean_colour_around(reader):
    picture = noise((43, 30))
    pixels, placement = reader.place(picture, FeatureConfig(fit="pad"))
    top, left, height, width = placement.inside
    assert (top, left, height, width) == (0, 0, 30, 43)
    np.testing.assert_array_equal(pixels[:, :30, :43].permute(1, 2, 0), np.asarray(picture))
    mean = torch.tensor([round(255 * value) for value in reader.backbone.spec.mean])
    assert (pixels[:, 30:] == mean[:, None, None]).all()


@pytest.mark.parametrize("fit", ["keep", "square", "crop", "pad"])
def test_maps_come_back_where_the_picture_shows_them(reader, fit):
    # The left half of the picture is white, so the map of brightness must be high there.
    white_left = Image.new("RGB", (64, 40))
    white_left.paste((255, 255, 255), (0, 0, 32, 40))
    pixels, placement = reader.place(white_left, FeatureConfig(fit=fit, size=32))
    bright = torch.nn.functional.avg_pool2d(pixels[:1].float()[None], 8)[0]
    restored = placement.restore(bright)
    shown = placement.cut(torch.from_numpy(np.array(white_left.convert("L"))))
    assert restored.shape[1:] == shown.shape
    # Pixels next to the edge are mixed over a patch.
    agree = ((restored[0] > 127) == (shown > 127)).float().mean()
    assert agree > 0.9


def test_truth_goes_onto_the_canvas_as_the_picture_does(reader):
    _, placement = reader.place(noise((64, 40)), FeatureConfig(fit="pad", size=20))
    truth = torch.arange(64.0).expand(1, 40, 64)
    placed = placement.put(truth, 255.0)
    assert placed.shape[1:] == placement.canvas
    assert placed[0, 0, 0] < 2
    assert placed[0, 0, 31] > 61
    assert (placed[0, 20:] == 255).all()


def test_pictures_of_many_sizes_come_in_their_order_and_the_same_as_alone(reader, mixed_photos):
    source = open_images(mixed_photos)
    told = []
    by_fours = FeatureReader(reader.backbone, "tiny", reader.cache, batch_size=4)
    with told_to(lambda *words: told.append(words)):
        together = list(by_fours.stream(source, FeatureConfig(size=32)))
    assert [words[1:] for words in told] == [(4, 6), (6, 6)]
    for number, dense in enumerate(together):
        pixels, placement = reader.place(source.read(number), FeatureConfig(size=32))
        alone = reader(reader.normalise(pixels[None]), FeatureConfig())
        assert dense.placement == placement
        torch.testing.assert_close(dense.grid, alone.grids[0], atol=ROUNDING, rtol=0)


def test_unit_features_have_length_one_even_through_windows(reader):
    grids = reader(images(reader), FeatureConfig(unit=True)).grids
    torch.testing.assert_close(grids.norm(dim=-1), torch.ones(grids.shape[:3]))


@pytest.mark.parametrize(
    "name", ["timm/vit", "transformers/vit-classifier", "transformers/dinov2-classifier"]
)
def test_class_scores_are_the_models_own(name, tmp_path, photos):
    reader = FeatureReader(adapt(FAMILIES[name]()).eval(), "any", FeatureCache(tmp_path), batch_size=5)
    reading = FeatureConfig(fit="square")
    scores = reader.logits(open_images(photos), reading)
    pixels, _ = reader.place(open_images(photos).read(3), reading)
    with torch.no_grad():
        own = reader.backbone.model(reader.normalise(pixels[None]))
    own = getattr(own, "logits", own)[0]
    torch.testing.assert_close(scores[3], own, atol=ROUNDING, rtol=0)


def test_a_model_without_classifier_says_so(tmp_path, photos):
    reader = FeatureReader(adapt(FAMILIES["timm/vit-headless"]()), "any", FeatureCache(tmp_path))
    with pytest.raises(PhregError, match="no classifier"):
        reader.logits(open_images(photos), FeatureConfig(fit="square"))


def test_a_placement_survives_json():
    placement = Placement((30, 43), (32, 48), (0, 0, 32, 48), (0, 0, 30, 43))
    assert Placement(*map(tuple, [list(part) for part in placement])) == placement


@pytest.fixture
def clip_reader(tmp_path):
    backbone = adapt(FAMILIES["open_clip/clip"]()).eval()
    return FeatureReader(backbone, "clip", FeatureCache(tmp_path / "cache"), batch_size=2)


@torch.no_grad()
def test_dense_features_are_read_as_phreg_trained_the_model_unless_asked_otherwise(clip_reader):
    backbone, pixels = clip_reader.backbone, images(clip_reader)
    plain = clip_reader(pixels, FeatureConfig())
    with use_readout(backbone, "value-only"):
        expected = backbone(pixels).patches
    assert clip_reader.readout(FeatureConfig()) == "plain"
    backbone.trained_readout = "value-only"
    assert clip_reader.readout(FeatureConfig()) == "value-only"
    torch.testing.assert_close(clip_reader(pixels, FeatureConfig()).grids, expected, atol=ROUNDING, rtol=0)
    asked = clip_reader(pixels, FeatureConfig(readout="plain"))
    assert torch.equal(asked.grids, plain.grids)
    assert torch.equal(asked.pooled, plain.pooled)
    assert backbone.readout == "plain"


def test_features_read_in_another_way_are_kept_apart(clip_reader, photos):
    source = open_images(photos)
    plain = clip_reader.features(source, FeatureConfig())
    clip_reader.backbone.trained_readout = "value-only"
    trained = clip_reader.features(source, FeatureConfig())
    assert (plain.dim, trained.dim) == (32, 16)
    assert clip_reader.features(source, FeatureConfig(readout="plain")).dim == 32
