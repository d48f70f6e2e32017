"""phreg.data.hub_images: images in Hugging Face datasets."""

import os
import sys
from pathlib import Path

import pytest
from pictures import encoded, noise, pixels, plain, saved_dataset
from PIL import Image

from phreg.data.hub_images import HubImages
from phreg.data.sources import open_images
from phreg.errors import DataError


def test_a_saved_dataset_gives_the_pixels_that_the_folder_gives(mixed_photos, tmp_path):
    folder = open_images(mixed_photos)
    contents = [Path(folder.name(i)).read_bytes() for i in range(len(folder))]
    images = open_images(saved_dataset(tmp_path / "saved", contents))
    assert isinstance(images, HubImages)
    assert len(images) == 6
    for index in (5, 0, 3):
        assert (pixels(images.read(index)) == pixels(folder.read(index))).all()
    assert images.name(3) == f"{tmp_path}/saved[3]"


def test_a_broken_or_empty_row_of_a_dataset_is_named(tmp_path):
    images = open_images(saved_dataset(tmp_path / "saved", [b"broken", None, encoded(plain())]))
    with pytest.raises(DataError, match=r"saved\[0\]: no image of a known format"):
        images.read(0)
    with pytest.raises(DataError, match=r"saved\[1\]: it is empty"):
        images.read(1)
    assert images.read(2).size == (6, 4)


def test_a_dataset_decodes_as_our_decoder_does_not_as_its_own(tmp_path):
    transparent = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    images = open_images(saved_dataset(tmp_path / "saved", [encoded(transparent)]))
    assert images.read(0).getpixel((0, 0)) == (255, 255, 255)


def test_a_wrong_column_or_split_of_a_dataset_names_the_right_ones(tmp_path):
    import datasets

    saved = saved_dataset(tmp_path / "saved", [encoded(plain())])
    with pytest.raises(DataError, match="found columns label, picture, with images: picture;"):
        open_images(saved, column="label")
    assert open_images(saved, column="picture").column == "picture"

    splits = datasets.DatasetDict(validation=datasets.load_from_disk(os.fspath(saved)))
    splits.save_to_disk(os.fspath(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"no split 'train' in .*: found validation; choose by --data\.split"):
        open_images(tmp_path / "splits")
    assert len(open_images(tmp_path / "splits", split="validation")) == 1


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    (saved_dataset(tmp_path / "bad", [b"x"]) / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="the dataset cannot be loaded"):
        open_images(tmp_path / "bad")


def test_a_dataset_is_loaded_by_its_id_and_split(mixed_photos, monkeypatch, tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"image": [f"{mixed_photos}/0.png"]}).cast_column(
        "image", datasets.Image()
    )
    splits = {"test": table, "test[:0]": table.select([])}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: splits[split])
    images = open_images("me/mixed_photos", split="test")
    assert images.name(0) == "me/mixed_photos[0]"
    assert (pixels(images.read(0)) == pixels(noise((30, 40), 0))).all()
    with pytest.raises(DataError, match=r"split 'test\[:0\]' has no rows"):
        open_images("me/mixed_photos", split="test[:0]")


@pytest.mark.parametrize("name", ["photos", "me/mixed_photos"])
def test_a_name_that_is_no_path_says_how_to_get_datasets_where_they_are_missing(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r'no file or folder.*pip install "phreg\[datasets\]", or correct the'
    ):
        open_images(name)


def test_a_path_wins_over_a_dataset_of_the_same_name(mixed_photos, monkeypatch):
    monkeypatch.chdir(mixed_photos.parent)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(open_images("photos")) == 6


def test_an_id_is_loaded_with_its_split_and_its_failure_is_explained(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"no file or folder, and as a dataset \(split 'val'\).*doesn't exist"
    ):
        open_images("me/mixed_photos", split="val")
    assert asked == [("me/mixed_photos", "val")]
