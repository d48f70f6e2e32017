"""phreg.data.tar_headers: what it lists is what Python's tarfile lists, or it says that it cannot."""

import io
import tarfile

import pytest

from phreg.data import tar_shards
from phreg.data.sources import open_images
from phreg.data.tar_headers import Unusual, regular_files

LONG = "folder/" * 40 + "a picture.jpg"
"""A name that does not fit into a header, in two parts either."""

NAMES = ["a.jpg", "./b.jpg", "f/" * 60 + "split.jpg", LONG, "ä ü.jpg", "\udcff.jpg", "x.txt"]


def archive(path, format, names=NAMES, **fields):
    """An archive of files, each holding its name's number of bytes, and things that are no files."""
    with tarfile.open(path, "w", format=format) as tar:
        for kind, name in (
            (tarfile.DIRTYPE, "folder"),
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a.jpg" if kind != tarfile.DIRTYPE else ""
            tar.addfile(entry)
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = 100 + 511 * number
            for field, value in fields.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(bytes([number + 1]) * entry.size))
    return path


def by_tarfile(path):
    with tarfile.open(path) as tar:
        return [(entry.name, entry.offset_data, entry.size) for entry in tar if entry.isreg()]


@pytest.mark.parametrize("mtime", [0, 1.5])  # a fraction makes a PAX header, as webdataset's archives have
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_lists_what_tarfile_lists(tmp_path, format, mtime):
    # USTAR has no room for the long name, and PAX marks the one that is no text as unusual.
    left_out = {tarfile.USTAR_FORMAT: LONG, tarfile.PAX_FORMAT: "\udcff.jpg"}.get(format)
    names = [name for name in NAMES if name != left_out]
    path = archive(tmp_path / "a.tar", format, names, mtime=mtime)
    assert list(regular_files(str(path))) == by_tarfile(path)
    assert len(by_tarfile(path)) == len(names)


def test_an_archive_without_an_end_mark_is_read_to_its_end(tmp_path):
    path = archive(tmp_path / "a.tar", tarfile.USTAR_FORMAT, ["a.jpg"])
    whole = by_tarfile(path)
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content + bytes(-len(content) % 512))
    assert list(regular_files(str(path))) == whole


@pytest.mark.parametrize(
    "odd",
    [
        {"pax_headers": {"GNU.sparse.name": "other"}},
        {"pax_headers": {"hdrcharset": "BINARY"}},
        {"type": b"V"},  # a label of GNU tar
    ],
    ids=str,
)
def test_an_unusual_header_is_left_to_tarfile_which_lists_the_shard(tmp_path, odd):
    path = archive(tmp_path / "a.tar", tarfile.PAX_FORMAT, ["a.jpg"], **odd)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("last.jpg"))
    with pytest.raises(Unusual):
        list(regular_files(str(path)))
    assert open_images(path).members[-1].name == "last.jpg"


def test_size_and_name_of_a_pax_header_count(tmp_path):
    path = archive(tmp_path / "a.tar", tarfile.PAX_FORMAT, ["a.jpg"], pax_headers={"comment": "x = y\nz"})
    assert list(regular_files(str(path))) == by_tarfile(path)


def test_usual_archives_are_never_given_to_tarfile(tmp_path, monkeypatch):
    names = [name for name in NAMES if name != "\udcff.jpg"]
    paths = [
        archive(tmp_path / f"{kind}.tar", kind, names, mtime=1.5)
        for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]

    def never(_):
        raise AssertionError("slow")

    monkeypatch.setattr(tar_shards, "_by_tarfile", never)
    assert len(open_images(paths)) == 2 * (len(names) - 1)


@pytest.mark.parametrize("damage", ["cut in a header", "cut in a file", "another byte", "empty", "no tar"])
def test_damage_is_never_read_as_an_end(tmp_path, damage):
    path = archive(tmp_path / "a.tar", tarfile.USTAR_FORMAT, ["a.jpg", "b.jpg"])
    content = bytearray(path.read_bytes())
    second = by_tarfile(path)[1][1] - 512
    changed = {
        "cut in a header": content[: second + 100],
        "cut in a file": content[: second + 512 + 100],
        "another byte": content[:second] + bytes([content[second] + 1]) + content[second + 1 :],
        "empty": b"",
        "no tar": b"not a tar" * 200,
    }
    path.write_bytes(changed[damage])
    with pytest.raises(Unusual):
        list(regular_files(str(path)))
