"""Features on disk: read once, mapped into memory, checked on every use.

An entry is a folder named by a hash of the model's identity, the reading, and the images' paths, sizes and
times; a change to any of these makes another name, and only an image replaced by one of the same size and
time goes unnoticed. It is written beside its place and renamed when complete. Who writes holds a lock on the
unfinished folder, which the system takes back when a process ends, however it ends; so what nobody holds was
left behind by one that was killed, and is deleted.

    stream of Dense ──► .<key>.tmp/ grids.f16 · globals.safetensors · index.json ──rename──► <key>/
                                                          StoredFeatures[i] ◄──mapped, crc checked──┘

Features are kept in half precision, and the first use reads them back from there, so that a rerun gives the
same figures to the last digit. Masks of patches are kept too, bit by bit, a file a set of images.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phreg.data.sources import Files, ImageSource, Subset
from phreg.data.tar_shards import TarShards
from phreg.errors import DataError, PhregError
from phreg.evaluation.dense import Dense, Placement
from phreg.evaluation.processes import ALONE, Processes
from phreg.parsing import parse_json
from phreg.storage import write_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
GRIDS, GLOBALS, INDEX = "grids.f16", "globals.safetensors", "index.json"
MASKS = "masks"
GIGABYTE = 10**9


@runtime_checkable
class Stamped(Protocol):
    """A source of images that tells its own pictures from others."""

    def stamps(self) -> Iterable[tuple[Any, ...]]:
        """Tells each picture from others, and from changed ones, without reading it."""
        ...


class StoredFeatures(Sequence[Dense]):
    """The features of many pictures, mapped from disk.

    Args:
        folder: A complete entry.

    Raises:
        PhregError: The index or a file cannot be read, or a file is shorter or longer than the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index: dict[str, Any] = parse_json((folder / INDEX).read_bytes())
            self._globals = load_file(folder / GLOBALS)
            self.dim: int = self._index["dim"]
            """Channels of a patch feature."""
            sizes = [rows * cols * self.dim for rows, cols in self._index["grids"]]
            found = (folder / GRIDS).stat().st_size
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        values = sum(sizes)
        if found != 2 * values:
            raise self._damaged(f"{GRIDS} has {found} bytes instead of {2 * values}")
        self._values = np.memmap(folder / GRIDS, np.float16, "r", shape=(values,))
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return len(self._index["grids"])

    def __getitem__(self, number: int) -> Dense:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Reads the features of one picture.

        Raises:
            IndexError: There is no such picture.
            PhregError: The file was damaged since it was written.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        raw = self._values[self._starts[number] : self._starts[number + 1]]
        if zlib.crc32(raw.tobytes()) != self._index["crc32"][number]:
            raise self._damaged(f"picture {number} in {GRIDS} fails its checksum")
        grid = torch.from_numpy(raw.astype(np.float32)).view(*self._index["grids"][number], self.dim)
        placement = Placement(*map(tuple, self._index["placements"][number]))
        pooled, cls = (self._globals[key][number].float() for key in ("pooled", "cls"))
        return Dense(grid, pooled, cls, placement)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each picture."""
        return [(rows, cols) for rows, cols in self._index["grids"]]

    @property
    def pooled(self) -> Tensor:
        """All global outputs, (pictures, pooled_dim)."""
        return self._globals["pooled"].float()

    @property
    def cls(self) -> Tensor:
        """All CLS features, (pictures, dim)."""
        return self._globals["cls"].float()

    def _damaged(self, found: str) -> PhregError:
        return PhregError(f"features in {self.folder} are damaged: {found}; delete this folder and run again")


class FeatureCache:
    """A folder of entries that never grows beyond a limit.

    Args:
        folder: Where entries are; made when needed.
        limit: Bytes that all entries may take together.
        processes: Those that make the features together; the main one writes them, and all see the folder.
    """

    def __init__(self, folder: Path, limit: int = 20 * GIGABYTE, processes: Processes = ALONE) -> None:
        self.folder = folder
        self.limit = limit
        self.processes = processes

    def get(
        self, run: Mapping[str, Any], source: ImageSource, read: Callable[[], Iterable[Dense]]
    ) -> StoredFeatures:
        """Finds features, or reads and keeps them.

        Args:
            run: What the features depend on beside the pictures.
            source: The pictures.
            read: Makes the features, in the pictures' order.

        Raises:
            DataError: The pictures lie where a change to them would not be noticed.
            PhregError: There is not space enough, or the entry is damaged.
        """
        folder = self.folder / _key(run, source)
        if not self.processes.from_main(folder.is_dir):
            if self.processes.is_main:
                self._write(folder, dict(run), read(), len(source))
            else:
                deque(read(), maxlen=0)
            self.processes.wait()
        return StoredFeatures(folder)

    def masks(
        self, run: Mapping[str, Any], source: ImageSource, find: Callable[[], Sequence[Tensor] | None]
    ) -> list[Tensor] | None:
        """Finds a mask of each picture, or makes and keeps them; None is kept as well.

        Args:
            run: What the masks depend on beside the pictures.
            source: The pictures.
            find: Makes the masks, in the pictures' order.

        Raises:
            DataError: The pictures lie where a change to them would not be noticed.
            PhregError: They cannot be written, or are damaged.
        """
        path = self.folder / MASKS / f"{_key(run, source)}.safetensors"
        if not self.processes.from_main(path.is_file):
            found = {str(number): mask.cpu().contiguous() for number, mask in enumerate(find() or ())}
            self.processes.from_main(lambda: self._write_masks(path, found))
        try:
            masks = load_file(path)
        except SafetensorError as error:
            raise PhregError(f"masks in {path} are damaged ({error}); delete it and run again") from error
        return [masks[str(number)] for number in range(len(masks))] or None

    def _write_masks(self, path: Path, found: dict[str, Tensor]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent):  # since others may be writing the same
                write_file(path, lambda temporary: save_file(found, temporary))
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, folder: Path, run: dict[str, Any], items: Iterable[Dense], count: int) -> None:
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as writing:
                with _locked(self.folder):  # so that none is deleted between its making and its lock
                    self._delete_left_behind()
                    temporary.mkdir()
                    writing.enter_context(_locked(temporary))
                self._fill(temporary, run, items, count)
                with _locked(self.folder):
                    if not folder.is_dir():  # since another run may have read the same meanwhile
                        temporary.rename(folder)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _unwritable(self, error: OSError) -> PhregError:
        return PhregError(
            f"cannot keep features in {self.folder} ({error}); free space, or choose another place"
        )

    def _delete_left_behind(self) -> None:
        for unfinished in self.folder.glob(".*.tmp"):
            with suppress(BlockingIOError, FileNotFoundError), _locked(unfinished, wait=False):
                logger.info("deleting %s, which a run that was killed left behind", unfinished)
                shutil.rmtree(unfinished)

    def _fill(self, folder: Path, run: dict[str, Any], items: Iterable[Dense], count: int) -> None:
        index: dict[str, Any] = {"run": run, "dim": 0, "grids": [], "crc32": [], "placements": []}
        pooled, cls = [], []
        room, written = self.limit - self.size(), 0
        with (folder / GRIDS).open("wb") as file:
            for number, item in enumerate(items, start=1):
                half = item.grid.half().numpy()
                if not np.isfinite(half).all():
                    raise PhregError(
                        f"features of picture {number - 1} do not fit into half precision, in which they "
                        "are kept: largest "
                        f"{float(item.grid.abs().max()):.3g}; read them after the final norm (norm=true)"
                    )
                written += file.write(half.tobytes())
                # Pictures of a set are of similar size: what is too much is known long before the end.
                if written * count > room * number:
                    raise PhregError(
                        f"features of {count} pictures would take about "
                        f"{written * count / number / GIGABYTE:.3g} GB in {self.folder}, whose limit leaves "
                        f"{max(0, room) / GIGABYTE:.3g} GB; raise "
                        "--cache-limit, delete entries, or lower the size"
                    )
                index["dim"] = half.shape[-1]
                index["grids"].append(half.shape[:2])
                index["crc32"].append(zlib.crc32(half.tobytes()))
                index["placements"].append(item.placement)
                pooled.append(item.pooled)
                cls.append(item.cls)
            file.flush()
            os.fsync(file.fileno())
        save_file({"pooled": torch.stack(pooled), "cls": torch.stack(cls)}, folder / GLOBALS)
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def size(self) -> int:
        """Counts the bytes of all entries."""
        return sum(path.stat().st_size for path in self.folder.glob("*/*") if path.is_file())


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a folder's lock; raises BlockingIOError where another has it and one is not to wait."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _key(run: Mapping[str, Any], source: ImageSource) -> str:
    described = {"version": FORMAT_VERSION, **run, "pictures": list(stamps(source))}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def stamps(source: ImageSource) -> Iterator[tuple[Any, ...]]:
    """Tells pictures from others, and from changed ones, without reading them.

    Raises:
        DataError: They lie where a change to them would not be noticed.
    """
    match source:
        case Files():
            for number, path in enumerate(source.paths):
                status = Path(path).stat()
                lies = ("as stored",) if number in source.unturned else ()
                yield os.path.realpath(path), status.st_size, status.st_mtime_ns, *lies
        case TarShards():
            for member in source.members:
                yield os.path.realpath(member.shard), Path(member.shard).stat().st_mtime_ns, *member[1:]
        case Subset():
            whole = list(stamps(source.source))
            yield from (whole[index] for index in source.indices)
        case Stamped():
            yield from source.stamps()
        case _:
            raise DataError(
                f"cannot keep features of {type(source).__name__}: a change to its pictures would not be "
                "noticed; give a folder of images, or tar shards"
            )
