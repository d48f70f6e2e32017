"""phreg.data.tar_shards: images in tar files."""

import tarfile

import pytest
from pictures import pixels, tar_of

from phreg.data.sources import open_images
from phreg.data.tar_shards import TarShards
from phreg.errors import DataError


def test_shards_give_the_pixels_that_the_folder_gives_in_any_order(mixed_photos, tmp_path):
    (mixed_photos / "0.json").write_text("{}", encoding="utf-8")
    (mixed_photos / "._0.png").write_bytes(b"a resource fork")
    tar_of(mixed_photos, tmp_path / "shard-000.tar", ["0.json", "._0.png", "0.png", "1.bmp", "2.PNG"])
    tar_of(mixed_photos, tmp_path / "shard-001.tar", ["more/0.png", "more/1.bmp", "more/2.PNG"])
    folder, shards = open_images(mixed_photos), open_images(f"{tmp_path}/shard-{{000..001}}.tar")
    assert isinstance(shards, TarShards)
    assert len(shards) == len(folder) == 6
    assert shards.name(4) == f"{tmp_path}/shard-001.tar/more/1.bmp"
    for index in (5, 0, 3, 4, 2, 1, 5):
        assert (pixels(shards.read(index)) == pixels(folder.read(index))).all()
    assert open_images(f"{tmp_path}/shard-*.tar") == shards
    assert open_images([tmp_path / "shard-000.tar", tmp_path / "shard-001.tar"]) == shards


def test_a_folder_of_shards_is_read_in_the_order_of_their_names(mixed_photos, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    tar_of(mixed_photos, folder / "b.tar", ["1.bmp"])
    tar_of(mixed_photos, folder / "a.tar", ["2.PNG"])
    (folder / "sizes.json").touch()
    images = open_images(folder)
    assert [images.name(i) for i in range(2)] == [f"{folder}/a.tar/2.PNG", f"{folder}/b.tar/1.bmp"]


def test_missing_shards_are_reported_together(mixed_photos, tmp_path):
    tar_of(mixed_photos, tmp_path / "s-1.tar")
    with pytest.raises(DataError, match=r"2 of 3 files are missing: .*s-0\.tar, .*s-2\.tar"):
        open_images(f"{tmp_path}/s-{{0..2}}.tar")


@pytest.mark.parametrize("name", ["mixed_photos.tar.gz", "mixed_photos.tgz", "mixed_photos.tar.zst"])
def test_a_compressed_shard_is_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).touch()
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=r"compressed.*decompress it to \.tar"):
            open_images(source)


@pytest.mark.parametrize("damage", ["empty", "cut", "no tar", "broken header"])
def test_a_damaged_shard_is_an_error_not_a_shorter_shard(mixed_photos, tmp_path, damage):
    path = tar_of(mixed_photos, tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    second = open_images(path).members[1].offset - tarfile.BLOCKSIZE
    if damage == "empty":
        data = bytearray()
    if damage == "cut":
        data = data[: second + tarfile.BLOCKSIZE + 10]
    if damage == "no tar":
        data = bytearray(b"not a tar" * 200)
    if damage == "broken header":
        data[second : second + 200] = b"x" * 200
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot index .*a\.tar: .*; fetch or pack it anew"):
        open_images(path)


def test_a_shard_without_images_is_refused(tmp_path):
    (tmp_path / "labels.csv").touch()
    path = tar_of(tmp_path, tmp_path / "a.tar", ["labels.csv"])
    with pytest.raises(DataError, match="found none in 1 tar files"):
        open_images(path)


def test_a_shard_that_vanishes_while_training_makes_its_images_unreadable(mixed_photos, tmp_path):
    images = open_images(tar_of(mixed_photos, tmp_path / "a.tar"))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.tar/0\.png: .*No such file"):
        images.read(0)
