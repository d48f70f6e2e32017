"""Squares that move over a plain ground: colour alone tells them, so that any model's patches can follow."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate, normalize

from phreg.backbones.resolve import adapt
from phreg.errors import DataError
from phreg.evaluation.dense import Dense
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.tasks import video_propagation
from phreg.evaluation.tasks.table import resolve_settings
from phreg.evaluation.tasks.video_propagation import Settings, _objects, open_videos, propagate

COLOURS = np.array([(30, 120, 30), (220, 30, 30), (30, 30, 220)], dtype=np.uint8)
SIDE = 64
SMALL = Settings(reading=FeatureConfig(size=SIDE, unit=True))


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=4)


@pytest.fixture
def davis(tmp_path):
    """Two sequences of five frames: one square moves by a patch a frame; of two squares one stands still."""
    root = tmp_path / "davis"
    for name, places in (("one", [8]), ("two", [8, 40])):
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for number in range(5):
            mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
            for index, top in enumerate(places, start=1):
                left = 8 + (8 * number if index == 1 else 0)
                mask[top : top + 16, left : left + 16] = index
            Image.fromarray(COLOURS[mask]).save(root / "JPEGImages" / "480p" / name / f"{number:05}.png")
            image = Image.fromarray(mask)
            image.putpalette(COLOURS.tobytes())  # as DAVIS has them
            image.save(root / "Annotations" / "480p" / name / f"{number:05}.png")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("one\ntwo\n")
    return root


def test_moving_squares_are_followed(reader, davis):
    found = video_propagation.run(reader, str(davis), SMALL, seed=0)
    assert list(found.figures) == ["j_and_f", "j", "f"]
    # Patches fit the squares; only corners are lost, where scores of patches are resampled.
    assert found.figures["j"] > 0.8
    assert found.figures["j_and_f"] == pytest.approx((found.figures["j"] + found.figures["f"]) / 2)
    assert set(found.detail["j"]) == {"one/1", "two/1", "two/2"}
    assert found.notes == {"sequences": 2, "objects": 3, "readout": "plain"}
    over = {"frames": 2 * 3, "objects": 3, "sequences": 2}  # less the first and the last of five
    assert found.counts == dict.fromkeys(found.figures, over)


def test_what_moves_beyond_the_radius_is_lost(reader, davis):
    # Only the first frame to look at, whose square is more than a patch away from the third frame on.
    near = SMALL.model_copy(update={"radius": 1, "frames": 1})
    for path in (davis / "JPEGImages" / "480p" / "one").glob("*.png"):
        if path.stem in ("00002", "00003"):
            mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
            mask[40:56, 40:56] = 1  # elsewhere at once
            Image.fromarray(COLOURS[mask]).save(path)
            Image.fromarray(mask).save(davis / "Annotations" / "480p" / "one" / path.name)
    far = video_propagation.run(reader, str(davis), SMALL, seed=0).detail["j"]["one/1"]
    assert video_propagation.run(reader, str(davis), near, seed=0).detail["j"]["one/1"] < far - 0.3


def test_first_and_last_frame_and_void_do_not_count(reader, davis):
    before = video_propagation.run(reader, str(davis), SMALL, seed=0)
    masks = davis / "Annotations" / "480p" / "one"
    Image.new("L", (SIDE, SIDE)).save(masks / "00004.png")
    assert video_propagation.run(reader, str(davis), SMALL, seed=0) == before
    for number in range(1, 4):
        mask = np.full((SIDE, SIDE), 255, dtype=np.uint8)
        mask[-8:] = 0  # where there is nothing to find
        Image.fromarray(mask).save(masks / f"{number:05}.png")
    void = video_propagation.run(reader, str(davis), SMALL, seed=0)
    assert void.detail["j"]["one/1"] == 1, "nothing to find, and nothing that was found counts"


def test_a_frame_that_is_void_all_over_is_refused(reader, davis):
    Image.new("L", (SIDE, SIDE), 255).save(davis / "Annotations/480p/one/00002.png")
    with pytest.raises(DataError, match=r"00002\.png is void all over"):
        video_propagation.run(reader, str(davis), SMALL, seed=0)


def test_objects_of_255_are_void_and_the_error_says_what_to_write(reader, davis):
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(davis / "Annotations/480p/one/00000.png")
    with pytest.raises(DataError, match=r"00000\.png shows no object, only 255, .*number its objects from 1"):
        video_propagation.run(reader, str(davis), SMALL, seed=0)


@given(seed=st.integers(0, 1000), radius=st.integers(1, 4))
def test_labels_are_a_softmax_over_the_nearest_within_the_radius(seed, radius):
    generator = torch.Generator().manual_seed(seed)
    context = normalize(torch.randn(2, 4, 5, 6, generator=generator), dim=-1)
    labels = torch.rand(2, 4, 5, 3, generator=generator)
    queries = normalize(torch.randn(4, 5, 6, generator=generator), dim=-1)
    settings = Settings(radius=radius, neighbours=3, temperature=0.2)
    found = propagate(context, labels, queries, settings)
    row, col = 1, 3
    rows, cols = slice(max(0, row - radius), row + radius + 1), slice(max(0, col - radius), col + radius + 1)
    bank, shown = context[:, rows, cols].reshape(-1, 6), labels[:, rows, cols].reshape(-1, 3)
    cosines = bank @ queries[row, col]
    order = cosines.argsort(descending=True)[:3]
    expected = ((cosines[order] / 0.2).softmax(0)[:, None] * shown[order]).sum(0)
    torch.testing.assert_close(found[row, col], expected)


def test_frames_follow_each_other_by_number_not_as_text(davis):
    for kind in ("JPEGImages", "Annotations"):
        folder = davis / kind / "480p" / "one"
        first = (folder / "00000.png").read_bytes()
        for path in folder.iterdir():
            path.unlink()
        for number in range(12):
            (folder / f"frame{number}.png").write_bytes(first)
    video, _ = open_videos(str(davis), SMALL.sequences, SMALL.resolution)
    expected = [f"frame{number}" for number in range(12)]
    assert [Path(path).stem for path in video.frames.paths] == expected
    assert [Path(path).stem for path in video.masks] == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_names_of_sequences_may_have_spaces(davis, encoding):
    for kind in ("JPEGImages", "Annotations"):
        (davis / kind / "480p" / "one").rename(davis / kind / "480p" / "one more")
    (davis / SMALL.sequences).write_text("one more\ntwo\n", encoding=encoding)
    videos = open_videos(str(davis), SMALL.sequences, SMALL.resolution)
    assert [video.name for video in videos] == ["one more", "two"]


def test_a_frame_is_never_read_at_a_reduced_size(davis):
    frames = open_videos(str(davis), SMALL.sequences, SMALL.resolution)[0].frames
    with pytest.raises(DataError, match=r"64x64.* where a mask, depths or boxes go with them"):
        replace(frames, max_megapixels=64 * 64 / 1e6 - 1e-6).read(0)


def test_hidden_files_are_no_frames(davis):
    before = open_videos(str(davis), SMALL.sequences, SMALL.resolution)
    frames = davis / "JPEGImages/480p/one"
    (frames / "._00001.png").write_bytes(b"a resource fork")
    (frames / ".ipynb_checkpoints").mkdir()
    (frames / ".ipynb_checkpoints" / "00001-checkpoint.png").write_bytes((frames / "00001.png").read_bytes())
    assert open_videos(str(davis), SMALL.sequences, SMALL.resolution) == before


def test_a_frame_is_turned_by_exif_only_where_its_mask_is(davis):
    frame = davis / "JPEGImages/480p/one/00001.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (SIDE, 32)).save(frame, exif=exif)
    Image.new("L", (SIDE, 32), 1).save(davis / "Annotations/480p/one/00001.png")
    video = open_videos(str(davis), SMALL.sequences, SMALL.resolution)[0]
    assert video.frames.read(1).size == (SIDE, 32)
    assert video.mask(1, (32, SIDE)).shape == (32, SIDE)
    exif[0x0112] = 3
    Image.new("RGB", (SIDE, 32)).save(frame, exif=exif)
    with pytest.raises(DataError, match=r"EXIF says .*00001\.png"):
        open_videos(str(davis), SMALL.sequences, SMALL.resolution)


def test_usual_mistakes_are_errors_that_name_the_file(reader, davis):
    def opened():
        return open_videos(str(davis), SMALL.sequences, SMALL.resolution)

    with pytest.raises(DataError, match="no list of sequences"):
        open_videos(str(davis / "JPEGImages"), SMALL.sequences, SMALL.resolution)
    (davis / "Annotations/480p/two/00003.png").unlink()
    with pytest.raises(DataError, match=r"two has 5 frames.*00003\.png"):
        opened()
    (davis / SMALL.sequences).write_text("")
    with pytest.raises(DataError, match="which is empty"):
        opened()
    (davis / SMALL.sequences).write_text("one\n")
    Image.new("L", (32, 32), 1).save(davis / "Annotations/480p/one/00001.png")
    with pytest.raises(DataError, match=r"00001\.png measures 32x32"):
        video_propagation.run(reader, str(davis), SMALL, seed=0)
    Image.new("L", (SIDE, SIDE)).save(davis / "Annotations/480p/one/00000.png")
    with pytest.raises(DataError, match="shows no object"):
        video_propagation.run(reader, str(davis), SMALL, seed=0)


def test_objects_are_enlarged_to_the_nearest_pixel_of_the_canvas(reader):
    picture = Image.fromarray(np.zeros((51, 70, 3), dtype=np.uint8))
    _, placement = reader.place(picture, FeatureConfig(size=32, floor=16))
    assert placement.canvas == (32, 32)  # of 43.9 pixels
    shown = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(0))
    dense = Dense(torch.zeros(4, 4, 1), torch.zeros(1), torch.zeros(1), placement)
    found = _objects(shown, dense, Settings(enlarge="objects"))
    maps = interpolate(shown.permute(2, 0, 1)[None], (32, 32), mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    canvas = Image.fromarray(((maps - low) / (high - low)).argmax(0).byte().numpy())
    assert np.array_equal(found.numpy(), np.array(canvas.resize((70, 51), Image.Resampling.NEAREST)))


def test_moving_squares_are_followed_by_dinos_protocol_too(reader, davis):
    settings = resolve_settings("video-propagation", {"reading.size": SIDE}, "dino")
    found = video_propagation.run(reader, str(davis), settings, seed=0)
    # The canvas is as large as the frames, so that nothing is enlarged either way.
    assert found.figures == video_propagation.run(reader, str(davis), SMALL, seed=0).figures


def test_what_each_sequence_adds_makes_up_the_figures(reader, davis, whole_sample):
    found = video_propagation.run(reader, str(davis), SMALL, seed=0)
    whole_sample(found, "j_and_f", "j", "f")
