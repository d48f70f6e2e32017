"""phreg.data.sources: folders, lists and patterns."""

import logging
import os
import sys
from pathlib import Path

import pytest
from pictures import encoded, noise, pixels, plain, saved_dataset, tar_of

from phreg.data.sources import Files, Subset, open_images
from phreg.errors import DataError


def test_a_folder_lists_images_of_all_levels_by_path_and_leaves_out_the_rest(mixed_photos, caplog):
    (mixed_photos / "results.csv").write_text("a,b", encoding="utf-8")
    (mixed_photos / "._0.png").write_bytes(b"a resource fork")
    (mixed_photos / ".cache").mkdir()
    plain().save(mixed_photos / ".cache" / "thumbnail.png")
    with caplog.at_level(logging.INFO, "phreg.data.sources"):
        images = open_images(mixed_photos)
    expected = ["0.png", "1.bmp", "2.PNG", "more/0.png", "more/1.bmp", "more/2.PNG"]
    assert [Path(images.name(i)).relative_to(mixed_photos).as_posix() for i in range(len(images))] == expected
    assert images.read(3).size == (40, 30)
    assert "ignored 1 files that are no images: .csv" in caplog.text


def test_the_order_of_a_folder_does_not_depend_on_the_order_of_its_entries(mixed_photos, monkeypatch):
    expected = open_images(mixed_photos)
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", Reversed)
    assert open_images(mixed_photos) == expected


def test_links_are_followed_and_loops_of_links_end(mixed_photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    plain().save(elsewhere / "linked.png")
    (mixed_photos / "link").symlink_to(elsewhere)
    (mixed_photos / "more" / "up").symlink_to(mixed_photos)
    images = open_images(mixed_photos)
    assert len(images) == 7
    assert any(images.name(i).endswith("link/linked.png") for i in range(7))


def test_a_name_that_is_no_text_is_read_and_can_be_printed(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(path)).write_bytes(encoded(plain()))
    images = open_images(tmp_path)
    assert images.read(0).size == (6, 4)
    assert images.name(0).encode().endswith(b"/caf\\xe9.png")


def test_a_text_file_lists_paths_relative_to_itself_in_its_own_order(mixed_photos):
    listing = mixed_photos / "list.txt"
    text = f"\ufeff# chosen\n\nmore/2.PNG\n  0.png  \r\n{mixed_photos}/1.bmp\n"
    listing.write_text(text, encoding="utf-8")
    images = open_images(listing)
    assert [Path(images.name(i)).name for i in range(len(images))] == ["2.PNG", "0.png", "1.bmp"]
    assert images.read(0).size == (40, 32)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_may_be_of_any_unicode_and_name_files_by_anything(tmp_path, encoding, end):
    names = ["#1.png", "a # b.png", "café 1.png", " 2.png", "2.png", "line\u2028 separator.png"]
    for number, name in enumerate(names):
        noise((4 + number, 4)).save(tmp_path / name)
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    text = mark + end.join(["# 2.png", "", *names, "#2.png"])
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    images = open_images(tmp_path / "list.txt")
    assert [images.read(number).width for number in range(len(images))] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("content", ["a.png".encode("utf-16-le"), "café.png".encode("latin-1"), b"\xff\xfea"])
def test_a_list_of_another_encoding_says_which_are_read(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match="nor text in UTF-8 or UTF-16"):
        open_images(tmp_path / "list.txt")


def test_all_missing_files_of_a_list_are_reported_together(mixed_photos):
    listing = mixed_photos / "list.txt"
    listing.write_text("0.png\n" + "".join(f"gone{i}.png\n" for i in range(7)) + "more\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"8 of 9 files are missing: .*gone0\.png, .*gone4\.png, and 3 more"):
        open_images(listing)


def test_a_list_of_paths_one_image_and_a_pattern_are_sources_too(mixed_photos):
    chosen = [mixed_photos / "1.bmp", mixed_photos / "0.png"]
    assert open_images(chosen) == Files(tuple(map(str, chosen)))
    assert open_images(mixed_photos / "0.png") == Files((str(mixed_photos / "0.png"),))
    assert open_images(f"{mixed_photos}/*.[bp]*") == Files(
        (str(mixed_photos / "0.png"), str(mixed_photos / "1.bmp"))
    )
    assert len(open_images(f"{mixed_photos}/{{0.png,more/1.bmp}}")) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "it is empty; give a folder of images"),
        (
            ["a.csv", "b.json", "c.json", "README"],
            r"found 4 files, none an image: \(no suffix\) .csv .json; give",
        ),
        (
            ["a.png", "b.tar"],
            r"found 1 image files and 1 tar files \(.*b.tar\); keep them apart, or name one",
        ),
    ],
)
def test_a_folder_without_a_clear_kind_of_image_says_what_it_found(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "there is no such file or folder"),
        ("/no/such/folder", "there is no such file or folder; give"),
        ("./mixed_photos", "there is no such file or folder"),
        ("mixed_photos.tar", "there is no such file or folder"),
        ("https://example.org/{0..3}.tar", "4 of 4 files are missing"),
        ("none-*.jpg", "the pattern 'none-.*' ?: it names no file"),
        ([], "the 0 paths given: it names no file"),
    ],
)
def test_a_source_that_is_not_there_is_refused_without_asking_the_network(source, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=message):
        open_images(source)


def test_a_file_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "mixed_photos.zip").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(DataError, match="neither image, tar file, nor text"):
        open_images(tmp_path / "mixed_photos.zip")


def test_a_folder_that_may_not_be_read_is_an_error_not_an_empty_folder(mixed_photos, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        open_images(mixed_photos)


def test_a_subset_reads_and_names_as_the_whole_does(mixed_photos):
    whole = open_images(mixed_photos)
    part = Subset(whole, [4, 1])
    assert len(part) == 2
    assert part.name(0) == whole.name(4)
    assert (pixels(part.read(1)) == pixels(whole.read(1))).all()


def test_every_kind_of_source_reads_large_images_within_the_limit_asked_for(tmp_path):
    (tmp_path / "photos").mkdir()
    noise((160, 80)).save(tmp_path / "photos" / "a.jpg")
    tar_of(tmp_path / "photos", tmp_path / "a.tar")
    saved_dataset(tmp_path / "saved", [(tmp_path / "photos" / "a.jpg").read_bytes()])
    for source in ("photos", "photos/a.jpg", "photos/*.jpg", "a.tar", "saved"):
        assert open_images(tmp_path / source).read(0).size == (160, 80)
        assert open_images(tmp_path / source, max_megapixels=0.01).read(0).size == (80, 40)
