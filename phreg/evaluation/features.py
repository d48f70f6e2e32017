"""The one way into a model: images of any size in; dense grid, pooled output and CLS out.

An image is placed on a canvas of whole patches, read whole or through overlapping windows, and comes back as
one grid. A `Placement` remembers which part of the picture the canvas shows, so that whatever a task makes of
the grid (scores, a heat map) can be laid back onto the picture, pixel by pixel.

    picture ──place──► canvas ──windows──► backbone ──source, norm──► averaged grid (rows, cols, dim) = Dense
                          └── Placement.restore: maps (channels, rows, cols) ──► (channels, height, width)

Windows begin at whole patches, so where they overlap their patches coincide and the average is exact; since a
linear head commutes with averaging, it sees what sliding-window inference would give it.

With `views`, each window is also read in moved copies; the mean of what they show is the features that
distillation teaches (`phreg.evaluation.view_average`).

Registers never leave the block stack, and the CLS and register tokens are not in the grid. A task gets a
`FeatureReader`, which reads in one of four ways:

    reader.stream(source, reading)         one `Dense` an image, nothing kept
    reader.stream_each(source, readings)   the same for several layers or sources, by one forward
    reader.features(source, reading)       the same kept on disk by `feature_cache`, for other seeds
    reader(images, reading)                a batch already on the device, e.g. after augmentation
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from phreg.backbones.base import Backbone, Readout
from phreg.backbones.identity import identify
from phreg.backbones.readout import dense_readout, use_readout
from phreg.data.crops import as_input
from phreg.data.sources import ImageSource
from phreg.deprecated import current_attribute
from phreg.errors import PhregError
from phreg.evaluation.canvas import pad_to_patches, place_picture, snap, window_starts
from phreg.evaluation.dense import Dense, Placement
from phreg.evaluation.feature_cache import FeatureCache, StoredFeatures
from phreg.evaluation.feature_config import OUTPUTS, FeatureConfig
from phreg.evaluation.processes import ALONE, Processes
from phreg.evaluation.projections import block_inputs, project
from phreg.evaluation.read_ahead import ItemType, ResultType, default_workers, read_ahead
from phreg.evaluation.view_average import average_views, draw_views
from phreg.progress import tell


class DenseBatch(NamedTuple):
    """What a model sees in a batch, on its device, in fp32."""

    grids: Float[Tensor, "batch rows cols dim"]
    pooled: Float[Tensor, "batch pooled_dim"]
    cls: Float[Tensor, "batch dim"]


@dataclass(frozen=True, eq=False)
class FeatureReader:
    """A model, and how it is run.

    Attributes:
        backbone: The model, in eval mode, on its device.
        identity: What tells this model from others, `phreg.backbones.identity`; keys the cache.
        cache: Where features are kept.
        batch_size: Pictures per forward.
        bf16: Whether to run forwards under bf16 autocast.
        workers: Threads that read pictures and what belongs to them.
        processes: Those that share the reading.
        reference: The baseline, in eval mode on the same device, where there is one: some figures say what
            became of places where it has artifacts.
    """

    backbone: Backbone
    identity: str
    cache: FeatureCache
    batch_size: int = 16
    bf16: bool = False
    workers: int = field(default_factory=default_workers)
    processes: Processes = ALONE
    reference: Backbone | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    def readout(self, reading: FeatureConfig) -> Readout:
        """Says how the last block is read."""
        return reading.readout or dense_readout(self.backbone)

    def of(self, backbone: Backbone) -> "FeatureReader":
        """Makes a reader of another model that is run in the same way."""
        return replace(self, backbone=backbone, identity=identify(backbone).whole)

    @cached_property
    def baseline(self) -> "FeatureReader | None":
        """Reads the baseline; None where there is none."""
        return None if self.reference is None else self.of(self.reference)

    def described(self, reading: FeatureConfig) -> dict[str, Any]:
        """Says what features depend on beside the pictures, as JSON holds it."""
        asked = reading.model_dump()
        for added in ("views", "resize", "floor"):
            if asked[added] == FeatureConfig.model_fields[added].default:
                del asked[added]  # as before there was any: what was kept then is found again
        return {
            "model": self.identity,
            "readout": self.readout(reading),
            "bf16": self.bf16,
            "reading": asked,
        }

    def features(self, source: ImageSource, reading: FeatureConfig, what: str = "reading") -> StoredFeatures:
        """Reads pictures once, keeps what was read on disk, and gives it as a sequence of `Dense`.

        Raises:
            DataError: A picture cannot be read, or their source cannot be told from a changed one.
            PhregError: The features would take more space than the cache may.
        """
        return self.cache.get(self.described(reading), source, lambda: self.stream(source, reading, what))

    def stream(self, source: ImageSource, reading: FeatureConfig, what: str = "reading") -> Iterator[Dense]:
        """Reads pictures in order, decoding ahead of the model.

        Raises:
            DataError: A picture cannot be read; a figure over the rest would not be comparable.
        """
        for (dense,) in self.stream_each(source, [reading], what):
            yield dense

    def stream_each(
        self, source: ImageSource, readings: Sequence[FeatureConfig], what: str = "reading"
    ) -> Iterator[tuple[Dense, ...]]:
        """Reads pictures in several ways at once, by one forward where no windows are asked for.

        Args:
            source: The pictures.
            readings: What is read; the first says on which canvas, through which read-out, and over how many
                views.
            what: What this is for, told with the progress.

        Yields:
            One `Dense` a reading, for each picture in order.

        Raises:
            DataError: A picture cannot be read; a figure over the rest would not be comparable.
            PhregError: Views are asked for of queries, keys or values, or more than there are.
        """
        yield from self._read_split(
            source, readings[0], what, lambda placed: list(self._read_placed(placed, readings))
        )

    def logits(
        self, source: ImageSource, reading: FeatureConfig, what: str = "classifying"
    ) -> Float[Tensor, "pictures classes"]:
        """Scores pictures by the model's own classifier; all must have one canvas (`crop` or `square`).

        Raises:
            DataError: A picture cannot be read.
            PhregError: The model has no classifier.
        """

        def classify(placed: Sequence[tuple[Tensor, Placement]]) -> list[Tensor]:
            images = self.normalise(torch.stack([pixels for pixels, _ in placed]))
            autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16)
            with torch.no_grad(), autocast, use_readout(self.backbone, reading.readout):
                return list(self.backbone.logits(images).float().cpu())

        return torch.stack(list(self._read_split(source, reading, what, classify)))

    def _read_split(
        self,
        source: ImageSource,
        reading: FeatureConfig,
        what: str,
        read: Callable[[list[tuple[Tensor, Placement]]], list[ResultType]],
    ) -> Iterator[ResultType]:
        """Reads pictures in order, batch by batch, one batch ahead; each process every so many batches."""
        size, rank, count = self.batch_size, self.processes.rank, self.processes.count
        turns = range(0, len(source), size * count)
        parts = [range(first + rank * size, first + (rank + 1) * size) for first in turns]
        own = (number for part in parts for number in part if number < len(source))
        coming = self.read_ahead(lambda number: self.place(source.read(number), reading), own, size)
        for first, part in zip(turns, parts, strict=True):
            here = min(part.stop, len(source)) - part.start

            def read_own(here: int = here) -> list[ResultType]:
                return read(list(itertools.islice(coming, here))) if here > 0 else []

            for found in self.processes.gather(read_own):
                yield from found
            tell(what, min(first + size * count, len(source)), len(source))

    def __call__(self, images: Float[Tensor, "batch 3 height width"], reading: FeatureConfig) -> DenseBatch:
        """Reads normalised images on the model's device; their sides must be whole patches.

        Raises:
            PhregError: The model takes no such size; or views are asked for of queries, keys or values, or
                more than there are.
        """
        patch = self.backbone.spec.patch_size
        if reading.fit == "centred":
            _check_whole(reading)
            images = pad_to_patches(images, self.backbone.spec)
        self.backbone.check_size((images.shape[-2], images.shape[-1]))
        rows, cols = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
        if reading.window is None:
            return self._forward(images, [reading])[0]
        size = self.snap(reading.window)
        window = min(size[0] // patch[0], rows), min(size[1] // patch[1], cols)
        step = self.snap(reading.stride or reading.window * 2 // 3)
        starts = [
            (top, left)
            for top in window_starts(rows, window[0], step[0] // patch[0])
            for left in window_starts(cols, window[1], step[1] // patch[1])
        ]
        total = count = torch.zeros(1, device=images.device)
        pooled, cls = [], []
        for top, left in starts:
            shown = images[
                ...,
                top * patch[0] : (top + window[0]) * patch[0],
                left * patch[1] : (left + window[1]) * patch[1],
            ]
            seen = self._forward(shown, [reading])[0]
            around = (0, 0, left, cols - left - window[1], top, rows - top - window[0])
            total = total + nn.functional.pad(seen.grids, around)
            count = count + nn.functional.pad(torch.ones_like(seen.grids[:1, :, :, :1]), around)
            pooled.append(seen.pooled)
            cls.append(seen.cls)
        return DenseBatch(total / count, torch.stack(pooled).mean(0), torch.stack(cls).mean(0))

    def read_ahead(
        self, read: Callable[[ItemType], ResultType], items: Iterable[ItemType], ahead: int = 0
    ) -> Iterator[ResultType]:
        """Reads items by as many threads as there are workers, see `phreg.evaluation.read_ahead`."""
        return read_ahead(read, items, self.workers, ahead)

    def normalise(
        self, pixels: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Puts 8-bit RGB onto the model's device and normalises it for the model."""
        return as_input(self.backbone, pixels)

    def place(
        self, picture: Image.Image, reading: FeatureConfig
    ) -> tuple[UInt8[Tensor, "3 height width"], Placement]:
        """Puts a picture onto a canvas, see `phreg.evaluation.canvas`."""
        return place_picture(picture, reading, self.backbone.spec)

    def snap(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """Rounds height and width, or one number for both, to whole patches, one at least."""
        return snap(size, self.backbone.spec)

    def _read_placed(
        self, placed: Sequence[tuple[Tensor, Placement]], readings: Sequence[FeatureConfig]
    ) -> Iterator[tuple[Dense, ...]]:
        """Reads placed pictures in their order, those of one canvas together."""
        read: dict[int, tuple[Dense, ...]] = {}
        whole = readings[0].window is None
        for canvas in {placement.canvas for _, placement in placed}:
            group = [number for number, (_, placement) in enumerate(placed) if placement.canvas == canvas]
            images = self.normalise(torch.stack([placed[number][0] for number in group]))
            if readings[0].fit == "centred":
                _check_whole(readings[0])
                images = pad_to_patches(images, self.backbone.spec)
            if whole:
                self.backbone.check_size((images.shape[-2], images.shape[-1]))
            batches = (
                self._forward(images, readings) if whole else [self(images, reading) for reading in readings]
            )
            on_cpu = [DenseBatch(*(part.cpu() for part in batch)) for batch in batches]
            for place, number in enumerate(group):
                read[number] = tuple(
                    Dense(batch.grids[place], batch.pooled[place], batch.cls[place], placed[number][1])
                    for batch in on_cpu
                )
        yield from (read[number] for number in range(len(placed)))

    @torch.no_grad()
    def _forward(self, images: Tensor, readings: Sequence[FeatureConfig]) -> list[DenseBatch]:
        """Runs the model, on moved views too where asked for, and reads it in every way asked for."""
        for reading in readings:
            reading.check_views(readings[0].views)
        backbone, layout = self.backbone, self.backbone.layout(images)
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16)
        with autocast, use_readout(backbone, readings[0].readout):
            pooled, unmoved = self._tokens(images, readings)
            found = self._in_its_space(unmoved, readings)
            averages: list[Tensor] = []
            if readings[0].views > 1:
                # Before the joint space, as a student's tokens are taught there.
                averages = self._in_its_space(self._view_average(images, readings, unmoved), readings)
        batches = []
        for number, reading in enumerate(readings):
            tokens = found[number].float()
            grids = layout.to_grid(tokens)
            cls = tokens[:, 0] if layout.num_prefix else grids.mean((1, 2))
            if averages:
                grids = averages[number].float().unflatten(1, layout.grid)
            grids = normalize(grids, dim=-1) if reading.unit else grids
            batches.append(DenseBatch(grids, pooled.float(), cls))
        return batches

    def _tokens(self, images: Tensor, readings: Sequence[FeatureConfig]) -> tuple[Tensor, list[Tensor]]:
        """Runs the model once: its pooled output, and the tokens of each reading, not yet in joint space."""
        backbone = self.backbone
        indices = [backbone.block_index(reading.layer) for reading in readings]
        asked = list(zip(indices, readings, strict=True))
        left = sorted({index for index, reading in asked if reading.source in OUTPUTS})
        entered = sorted({index for index, reading in asked if reading.source not in OUTPUTS})
        found = []
        with backbone.tap(left) as outputs, block_inputs(backbone.blocks, entered) as inputs:
            pooled = backbone.run(images)
        for index, reading in asked:
            if reading.source not in OUTPUTS:
                found.append(project(backbone, index, inputs[index], reading.source, bias=reading.bias))
                continue
            joint = reading.source == "joint"
            tokens = backbone.final_norm(outputs[index]) if reading.norm or joint else outputs[index]
            if not joint and backbone.readout != "plain" and backbone.projection is not None:
                tokens = tokens @ backbone.projection
            found.append(tokens)
        return pooled, found

    def _in_its_space(self, found: Sequence[Tensor], readings: Sequence[FeatureConfig]) -> list[Tensor]:
        """Takes tokens to the joint space where a reading asks for it."""
        return [
            self.backbone.to_joint(tokens) if reading.source == "joint" else tokens
            for tokens, reading in zip(found, readings, strict=True)
        ]

    def _view_average(
        self, images: Tensor, readings: Sequence[FeatureConfig], unmoved: Sequence[Tensor]
    ) -> list[Tensor]:
        """Averages patch tokens (batch, patches, dim) over the unmoved view, which is given, and moved ones.

        No forward takes more images than `batch_size`, or than are given.
        """
        size = (images.shape[-2], images.shape[-1])
        layout = self.backbone.layout(images)
        averages = average_views(
            draw_views(readings[0].views, self.backbone.spec, size, len(images)),
            images,
            [layout.to_grid(tokens) for tokens in unmoved],
            lambda moved: [layout.to_grid(tokens) for tokens in self._tokens(moved, readings)[1]],
            self.batch_size,
        )
        return [mean.flatten(1, 2).to(tokens.dtype) for mean, tokens in zip(averages, unmoved, strict=True)]


def _check_whole(reading: FeatureConfig) -> None:
    """Refuses windows that begin at any pixel, whose patches have no grid in common to be averaged on."""
    if reading.window is not None:
        raise PhregError(
            f"features asked for through windows of {reading.window} pixels with fit=centred, whose "
            "patches do not coincide; only segmentation averages scores of such windows: leave out "
            "reading.window, or set reading.fit=keep"
        )


def __getattr__(name: str) -> Any:
    """Finds a class by its old name, with a warning."""
    if (new := current_attribute(__name__, name)) is not None:
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
