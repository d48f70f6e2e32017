"""Targets that are made once and cached on disk, for runs that see each image many times.

A target costs many teacher forwards; a student step costs one forward and its backward. In later epochs each
image is cut the same and its target is read from the disk: eight epochs take little more than one.

    epoch 1    images ──teacher──► targets ──bf16──► one file an image
    later      indices ───────────────────────────► files ──► targets

The files belong to the run. A resumed run reads what the killed one made.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phreg.backbones.base import Features
from phreg.training.checkpoint import RunFolder, writing_run


class TargetCache:
    """A folder of targets, filled as they are made. Processes can share it.

    A target is rounded to bf16 when it is made, so it is the same the first time as when it is read again.

    Args:
        folder: Folder of the files.
        device: Device of the returned targets.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device

    def read(self, indices: Sequence[int], make: Callable[[], Features]) -> Features:
        """Returns the targets of a batch, in fp32.

        Args:
            indices: Numbers of the images.
            make: Makes the targets of the whole batch. It is called if any file is missing or damaged. Other
                files stay, so a run that was killed between two files gets the same targets.

        Raises:
            CheckpointError: The disk does not take them.
        """
        found = [self._load(index) for index in indices]
        if not all(found):
            made = make()
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
