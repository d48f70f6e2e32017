"""Targets that are made once and cached on disk, for runs that see each image many times.

A target costs many teacher forwards, a student step costs one and its backward. Where an image comes back in
a later epoch, cut the same, its target is read instead of made: eight epochs take little more than one.

    epoch 1    images ──teacher──► targets ──bf16──► one file an image
    later      indices ───────────────────────────► files ──► targets

The files belong to the run, so that a resumed run reads what the killed one made.
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
    """A folder of targets, filled as they are made; processes may share it.

    Each is rounded to bf16 as it is made, whether it is read again or not, so that it is the same every time.

    Args:
        folder: Where the files are, or will be.
        device: Where to put targets.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device

    def read(self, indices: Sequence[int], make: Callable[[], Features]) -> Features:
        """Returns the targets of a batch, in fp32.

        Args:
            indices: Numbers of the images.
            make: Makes the targets of the whole batch. It is called where any file is missing or damaged; the
                others stay. So a run that was killed between two files ends up with the same targets.

        Raises:
            CheckpointError: The disk does not take them.
        """
        found = [self._load(index) for index in indices]
        if not all(found):
            made = make()
            with writing_run(RunFolder(self.folder.parent)):
                self.folder.mkdir(parents=True, exist_ok=True)
                for index, there, *target in zip(indices, found, *made, strict=True):
                    if not there:
                        self._write(index, *target)
            found = [self._load(index) for index in indices]
        patches, pooled = (torch.stack([file[name] for file in found]) for name in ("patches", "pooled"))
        return Features(self._there(patches), self._there(pooled))

    def remove(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True).float()

    def _load(self, index: int) -> dict[str, Tensor]:
        """Reads a target; empty where there is none, or a power cut left half of it."""
        try:
            return load_file(self._path(index))
        except (OSError, SafetensorError):
            return {}

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08}.safetensors"

    def _write(
        self, index: int, patches: Float[Tensor, "rows cols dim"], pooled: Float[Tensor, " pooled"]
    ) -> None:
        """Writes a file that is there whole or not at all; it can be made again, so nothing is flushed."""
        path = self._path(index)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        tensors = {"patches": patches, "pooled": pooled}
        save_file({name: value.bfloat16().cpu().contiguous() for name, value in tensors.items()}, unfinished)
        unfinished.replace(path)
