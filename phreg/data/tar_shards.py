"""Images in tar files. These are indexed once, by their headers, and read at random; nothing is streamed."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from phreg.data.decode import MAX_MEGAPIXELS, decode, unreadable
from phreg.data.paths import ADVICE, is_image, printable
from phreg.data.tar_headers import TarFile, Unusual, regular_files
from phreg.errors import DataError

TAR = re.compile(r"\.(tar|tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)


class Member(NamedTuple):
    """Where an image lies in a tar file, in bytes."""

    shard: str
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarShards:
    """Images in uncompressed tar files, read at random by their offsets."""

    members: tuple[Member, ...]
    max_megapixels: float = MAX_MEGAPIXELS

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """Gives the path of the shard, then the name inside it."""
        return printable(f"{self.members[index].shard}/{self.members[index].name}")

    def read(self, index: int) -> Image.Image:
        """Decodes an image in a shard."""
        member = self.members[index]
        try:
            with Path(member.shard).open("rb") as shard:
                shard.seek(member.offset)
                content = shard.read(member.size)
        except OSError as error:
            raise unreadable(self.name(index), str(error)) from error
        return decode(content, self.name(index), max_megapixels=self.max_megapixels)


def open_tars(shards: Sequence[str], asked: str) -> TarShards:
    """Indexes tar files.

    Args:
        shards: Their paths.
        asked: What the user asked for, for messages.

    Raises:
        DataError: One is compressed or damaged, or none holds an image.
    """
    members = tuple(member for shard in shards for member in _index(shard))
    if not members:
        raise DataError(f"no images in {asked}: found none in {len(shards)} tar files; {ADVICE}")
    return TarShards(members)


def _index(shard: str) -> Iterator[Member]:
    """Lists the images of a tar file by its headers."""
    if not shard.lower().endswith(".tar"):
        raise DataError(
            f"cannot read images from {shard}: it is compressed, so no image can be read without all before "
            "it; decompress it to .tar (images hardly shrink anyway)"
        )
    try:
        try:
            files = list(regular_files(shard))
        except Unusual:
            files = list(_by_tarfile(shard))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"cannot index {shard}: {error}; fetch or pack it anew, uncompressed") from error
    for name, offset, size in files:
        if is_image(name) and not _is_hidden(name):
            yield Member(shard, name, offset, size)


def _by_tarfile(shard: str) -> Iterator[TarFile]:
    """Lists the files of an archive that has unusual headers or is damaged."""
    with tarfile.open(shard, "r:") as archive:
        for entry in archive:
            if entry.isreg():
                yield TarFile(entry.name, entry.offset_data, entry.size)
        end = archive.offset
    with Path(shard).open("rb") as file:
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a broken header for the end, in silence
            raise tarfile.ReadError(f"broken header at byte {end}")


def _is_hidden(name: str) -> bool:
    if not name.startswith(".") and "/." not in name:  # nearly all, and a million are fast to tell
        return False
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
