"""Targets that are made once and cached on disk, for runs that see each image many times.

A target costs many teacher forwards; a student step costs one forward and its backward. In later epochs each
image is cut the same and its target is read from the disk: eight epochs take little more than one.

    epoch 1    images ──teacher──► targets ──bf16──► one file an image
    later      indices ───────────────────────────► files ──► targets

The files belong to the run. A resumed run reads what the killed one made. Where the disk has no room for all
images, `target.cache_limit` bounds how many are cached; the others' targets are made anew at each visit.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phreg.backbones.base import Backbone, Features
from phreg.config import DistillConfig
from phreg.data.sampling import Order
from phreg.errors import CheckpointError
from phreg.training.checkpoint import RunFolder, writing_run

logger = logging.getLogger(__name__)

GB = 1e9
"""Bytes."""

HEADER = 160
"""Bytes of a file that are no target, about."""


@dataclass(frozen=True)
class CachePlan:
    """How much of a run's targets is cached.

    Attributes:
        images: Images of the run.
        cached: Those that are cached: the ones with the lowest numbers.
        bytes_per_image: Bytes of a target, the mean over the run's sizes.
    """

    images: int
    cached: int
    bytes_per_image: float

    @property
    def gigabytes(self) -> float:
        """What all cached targets take on disk."""
        return self.cached * self.bytes_per_image / GB


def plan_cache(student: Backbone, images: int, config: DistillConfig, processes: int) -> CachePlan:
    """Computes how many targets a run caches.

    None are where no image is seen twice. Their number is bounded by `target.cache_limit`.

    Args:
        student: The model.
        images: Images that the run trains on.
        config: The run's settings.
        processes: Processes that train together, and share the files.
    """
    sizes = [student.image_size(size) for size in (config.size, *config.mixed_sizes)]
    rows, cols = student.spec.patch_size
    patches = sum((height // rows) * (width // cols) for height, width in sizes) / len(sizes)
    each = 2 * student.spec.width * (patches + 1) + HEADER  # bf16
    order = Order(images, config.batch_size, world_size=processes, num_sizes=len(sizes))
    seen_again = config.num_steps(order.steps_per_epoch) * config.optim.accumulate > order.steps_per_epoch
    cached = images if config.target.cache and seen_again else 0
    if config.target.cache_limit is not None:
        cached = min(cached, int(config.target.cache_limit * GB / each))
    return CachePlan(images, cached, each)


def check_room(plan: CachePlan, run: RunFolder) -> None:
    """Checks that the disk takes the cached targets of a run, and says how much they take.

    Raises:
        CheckpointError: It does not.
    """
    if not plan.cached:
        return
    folder = run.path / "targets"
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GB
    parent = next(one for one in (run.path.absolute(), *run.path.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(parent).free / GB
    needed = plan.gigabytes - there
    whole = f"targets of {plan.cached} of {plan.images} images"
    if needed > free:
        raise CheckpointError(
            f"cached {whole} take {plan.gigabytes:.3g} GB in {folder}, and {free:.3g} GB are free there; "
            f"set --target.cache-limit {0.9 * (free + there):.2g} (targets beyond it are made anew each "
            "time), take fewer images (--data.limit), switch the cache off (--no-target.cache), or choose "
            "another --output"
        )
    logger.info("%s are cached until the run ends: %.3g GB of %.3g GB free", whole, plan.gigabytes, free)


class TargetCache:
    """A folder of targets, filled as they are made. Processes can share it.

    A target is rounded to bf16 when it is made, so it is the same the first time as when it is read again.

    Args:
        folder: Folder of the files.
        device: Device of the returned targets.
        cached: How many images are cached, those with the lowest numbers; None means all.
    """

    def __init__(self, folder: Path, device: torch.device, cached: int | None = None) -> None:
        self.folder = folder
        self.device = device
        self.cached = cached

    def read(self, indices: Sequence[int], make: Callable[[Sequence[int]], Features]) -> Features:
        """Returns the targets of a batch, in fp32.

        Args:
            indices: Numbers of the images.
            make: Makes the targets of some images of the batch, by their places in it. It is called for all
                images that are cached if any file of theirs is missing or damaged. Other files stay, so a run
                that was killed between two files gets the same targets. And it is called for all that are
                not cached. So what is made never depends on what the folder holds.

        Raises:
            CheckpointError: The disk does not take them.
        """
        is_cached = [self.cached is None or index < self.cached for index in indices]
        parts: list[tuple[list[int], Features]] = []
        if places := [place for place, cached in enumerate(is_cached) if cached]:
            parts.append((places, self._read_cached([indices[place] for place in places], places, make)))
        if places := [place for place, cached in enumerate(is_cached) if not cached]:
            made = make(places)
            parts.append((places, Features(*(self._to_device(tensor.bfloat16()) for tensor in made))))
        if len(parts) == 1:
            return parts[0][1]
        order = torch.tensor([place for places, _ in parts for place in places]).argsort().to(self.device)
        return Features(
            *(torch.cat(tensors)[order] for tensors in zip(*(part for _, part in parts), strict=True))
        )

    def _read_cached(
        self, indices: Sequence[int], places: Sequence[int], make: Callable[[Sequence[int]], Features]
    ) -> Features:
        found = [self._load(index) for index in indices]
        if not all(found):
            made = make(places)
            with writing_run(RunFolder(self.folder.parent)):
                self.folder.mkdir(parents=True, exist_ok=True)
                for index, exists, *target in zip(indices, found, *made, strict=True):
                    if not exists:
                        self._write(index, *target)
            found = [self._load(index) for index in indices]
        patches, pooled = (torch.stack([file[name] for file in found]) for name in ("patches", "pooled"))
        return Features(self._to_device(patches), self._to_device(pooled))

    def remove(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True).float()

    def _load(self, index: int) -> dict[str, Tensor]:
        """Reads a target; empty if there is none, or if a power cut damaged it."""
        try:
            return load_file(self._path(index))
        except (OSError, SafetensorError):
            return {}

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08}.safetensors"

    def _write(
        self, index: int, patches: Float[Tensor, "rows cols dim"], pooled: Float[Tensor, " pooled"]
    ) -> None:
        """Writes a file whole or not at all. It can be made again, so nothing is flushed."""
        path = self._path(index)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        tensors = {"patches": patches, "pooled": pooled}
        save_file({name: value.bfloat16().cpu().contiguous() for name, value in tensors.items()}, unfinished)
        unfinished.replace(path)
