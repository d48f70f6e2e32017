"""What every method is measured by: one split of the images, one set of references, one set of figures.

    folder ──NNN % 5──► measured, all of them           training, up to 500 drawn by seed ──► a method
                            │                                                                    │
    raw model (or twin) ────┴──► references, gap, former outliers, their ring ──────► figures ◄──┘

The references are made once and kept beside the results, under a name that hashes all that decides them.
"""

import hashlib
import json
import random
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from phreg.analysis.gap import Gap, outlier_mask
from phreg.analysis.norms import NormReport, outliers
from phreg.backbones.base import Backbone
from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import weights_sha256
from phreg.config import TargetConfig, ViewsConfig
from phreg.data.crops import centre_crops
from phreg.data.paths import SUFFIXES
from phreg.data.sources import open_images
from phreg.evaluation.metrics.agreement import AgreementMeter, drift
from phreg.methods import resolve
from phreg.seeding import keyed_generator
from phreg.view_sampling import sample_views
from phreg.views import Views, aligned_sum

MEASURED = 5
"""Images whose number is a multiple of this are measured on, and never trained on."""

TRAINING = 500
"""Most images that a method trains on."""

REFERENCES = {"all views": ViewsConfig(count=50, max_shift=0.15)}
"""Averages of the raw model over different views; a 14x14 grid has 50, so that 60 would repeat some."""


# -- images --------------------------------------------------------------------------------------------------


def number(path: str | Path) -> int | None:
    """Reads the number that an image's file name starts with; None where it starts with none."""
    found = re.match(r"\d+", Path(path).name)
    return int(found[0]) if found else None


def split(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Splits a folder's numbered images into those to train on and those to measure on, in order of path."""
    paths = sorted(path for path in Path(folder).resolve().rglob("*") if path.suffix.lower() in SUFFIXES)
    numbered = [(path, at) for path in paths if (at := number(path)) is not None]
    measured = [path for path, at in numbered if at % MEASURED == 0]
    return [path for path, at in numbered if at % MEASURED], measured


def training_list(paths: Sequence[Path], seed: int, to: Path, limit: int = TRAINING) -> Path:
    """Writes a text file of up to `limit` training images, drawn with the seed."""
    drawn = sorted(random.Random(seed).sample(list(paths), min(limit, len(paths))))
    to.write_text("".join(f"{path}\n" for path in drawn))
    return to


# -- references ----------------------------------------------------------------------------------------------


def shifts(config: ViewsConfig, grid: tuple[int, int]) -> Tensor:
    """Lists all different views as (dy, dx, mirrored), the image as it is first."""
    reach = [round(config.max_shift * side) for side in grid]
    spans = [torch.arange(-far, far + 1) for far in reach]
    every = torch.cartesian_prod(*spans, torch.arange(2))
    return every[every.abs().sum(1).argsort(stable=True)]


@torch.inference_mode()
def average(
    backbone: Backbone, images: Tensor, config: ViewsConfig, key: int, margin: tuple[int, int] = (0, 0)
) -> Tensor:
    """Averages patch features over `config.count` different views, drawn without repetition for each image.

    A position counts in the views that saw it. The first view is the image as it is. Images come with
    the context margin that views show, in pixels, where they show any.
    """
    size = (images.shape[-2] - 2 * margin[0], images.shape[-1] - 2 * margin[1])
    random = keyed_generator("reference", key)
    (group,) = sample_views(config, backbone.spec, size, len(images), random.clone_state())
    assert isinstance(group, Views)
    every = shifts(config, group.grid)
    orders = torch.stack([1 + torch.randperm(len(every) - 1, generator=random) for _ in images])
    chosen = F.pad(orders, (1, 0))[:, : config.count]  # the image as it is first
    drawn = every[chosen]
    views = replace(group, offsets=drawn[..., :2], flips=drawn[..., 2].bool())
    total, count = 0, 0
    at_once = max(1, 16 // len(images))
    for first in range(0, views.count, at_once):
        part = views.part(slice(None), slice(first, first + at_once))
        seen_by = backbone(part.apply(images).flatten(0, 1)).patches.float().unflatten(0, (len(images), -1))
        summed, seen = aligned_sum(part, seen_by)
        total, count = total + summed, count + seen
    return total / count.unsqueeze(-1)


def ring(mask: Tensor) -> Tensor:
    """Marks the patches that touch a marked one, at a side or corner, and are not marked themselves."""
    near = F.max_pool2d(mask.float().unsqueeze(1), 3, stride=1, padding=1).squeeze(1) > 0
    return near & ~mask


@dataclass(eq=False)
class Yardstick:
    """The raw model on the measured images, and what others are compared with.

    Attributes:
        raw: The model as it is.
        images: Measured images, normalised, in batches.
        labels: Their classes, where the model has a classifier for them.
        norms: The raw model's norms.
        pooled: Its pooled outputs.
        were: Former outliers, batch by batch.
        twin: The clean twin of a planted model; None for others, whose references are averages over views.
        folder: Where references are kept.
        key: What decides the references: weights and images.
    """

    raw: Backbone
    images: list[Tensor]
    labels: Tensor | None
    norms: NormReport
    pooled: Tensor
    were: list[Tensor]
    twin: Backbone | None
    folder: Path
    key: dict[str, Any]
    _known: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def gap(self) -> Gap | None:
        """The gap in the raw model's last block."""
        return self.norms.blocks[-1].gap

    def references(self, readout: str) -> dict[str, Tensor]:
        """Returns the references by name, (images, rows, cols, dim), read as asked; made once, then read."""
        if readout not in self._known:
            views = {name: config.model_dump() for name, config in REFERENCES.items()}
            decides = self.key | {"readout": readout, "views": None if self.twin else views}
            digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
            path = self.folder / f"{digest}.safetensors"
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(f".{time.time_ns()}.tmp")
                save_file(self._make(readout), unfinished)
                unfinished.replace(path)
            self._known[readout] = load_file(path)
        return self._known[readout]

    def _make(self, readout: str) -> dict[str, Tensor]:
        source = self.twin or self.raw
        set_readout(source, readout)
        made: dict[str, list[Tensor]] = {}
        for number, images in enumerate(self.images):
            if self.twin is not None:
                with torch.inference_mode():
                    made.setdefault("clean twin", []).append(source(images).patches.float())
                continue
            for name, config in REFERENCES.items():
                count = min(config.count, len(shifts(config, source.layout(images).grid)))
                views = config.model_copy(update={"count": count})
                made.setdefault(name, []).append(average(source, images, views, number))
        set_readout(source, "plain")
        return {name: torch.cat(parts).contiguous() for name, parts in made.items()}


@torch.no_grad()
def outlying(raw: Backbone, images: Sequence[Tensor], norms: NormReport) -> list[Tensor]:
    """Marks the outliers of the last block, batch by batch."""
    last, gap = len(raw.blocks) - 1, norms.blocks[-1].gap
    tokens = [raw.layout(part).to_grid(raw.block_tokens(part, [last])[last]) for part in images]
    return [outlier_mask(part.norm(dim=-1), gap) for part in tokens]


@torch.no_grad()
def yardstick(
    raw: Backbone, paths: Sequence[Path], size: int, *, labelled: bool, twin: Backbone | None, folder: Path
) -> Yardstick:
    """Measures the raw model once, on centre crops of all measured images."""
    raw.eval()
    images = list(centre_crops(raw, open_images([str(path) for path in paths]), size))
    if sum(map(len, images)) != len(paths):
        raise SystemExit("some measured images cannot be read; remove them, so that all methods see the same")
    norms = outliers(raw, images, show=1)
    were = outlying(raw, images, norms)
    names = hashlib.sha256("\n".join(path.name for path in paths).encode()).hexdigest()
    weights = weights_sha256((twin or raw).disk_state())
    return Yardstick(
        raw=raw,
        images=images,
        labels=torch.tensor([number(path) for path in paths]) if labelled else None,
        norms=norms,
        pooled=torch.cat([raw(part).pooled for part in images]),
        were=were,
        twin=twin,
        folder=folder,
        key={"weights": weights, "images": names, "size": size},
    )


# -- figures -------------------------------------------------------------------------------------------------


@torch.no_grad()
def figures(stick: Yardstick, model: Backbone, target: TargetConfig) -> dict[str, Any]:
    """Measures a model in fp32: plainly read but for its patches, which are read as they were trained."""
    model.eval()
    last = len(model.blocks) - 1
    beyond = total = right = 0
    pooled = []
    for images in stick.images:
        with model.tap([last]) as found:
            pooled.append(model.run(images))
        norms = model.layout(images).to_grid(found[last]).norm(dim=-1)
        beyond += int(outlier_mask(norms, stick.gap).sum())
        total += norms.numel()
    if stick.labels is not None:
        sizes = [len(part) for part in stick.images]
        for images, labels in zip(stick.images, stick.labels.split(sizes), strict=True):
            output = model.model(images)
            right += int((getattr(output, "logits", output).argmax(1) == labels).sum())
    moved = drift(torch.cat(pooled), stick.pooled)
    set_readout(model, target.student_readout)
    cosine = against(
        stick, lambda images, _: model(images, target.layer, target.norm).patches, target.teacher_readout
    )
    set_readout(model, "plain")
    return {
        "outlier_rate": beyond / total,
        "pooled": {"mean": moved.mean, "worst": moved.min},
        "top1": None if stick.labels is None else right / len(stick.labels),
        "cosine": cosine,
    }


@torch.no_grad()
def against(stick: Yardstick, read: Callable[[Tensor, int], Tensor], readout: str) -> dict[str, Any]:
    """Mean cosine of patch features to each reference: over all, former outliers, and the ring about them."""
    sizes = [len(part) for part in stick.images]
    patches = [read(images, number) for number, images in enumerate(stick.images)]
    return {
        name: agreement(patches, whole.split(sizes), stick.were)
        for name, whole in stick.references(readout).items()
    }


def agreement(
    patches: Sequence[Tensor], references: Sequence[Tensor], were: Sequence[Tensor]
) -> dict[str, float | None]:
    """Mean cosine of patch features to a reference, batch by batch, given the former outliers."""
    whole, beside = AgreementMeter(), AgreementMeter()
    for part, reference, mask in zip(patches, references, were, strict=True):
        whole.update(part, reference, mask)
        beside.update(part, reference, ring(mask))
    at, near = whole.compute(), beside.compute()
    return {
        "all": at.mean,
        "former outliers": at.masked,
        "ring": near.masked,
        "worst 1 %": at.worst_percent,
    }


# -- cost ----------------------------------------------------------------------------------------------------


@contextmanager
def metering() -> Iterator[dict[str, float]]:
    """Counts what runs inside: seconds, CPU seconds with those of worker processes, and images forwarded.

    A teacher's forwards run in inference mode and a student's with gradients; what finds the sinks reads the
    model by other ways and is in the seconds alone.
    """
    cost: dict[str, float] = {
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "teacher_forwards": 0,
        "student_forwards": 0,
    }

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, Backbone) and args:
            if torch.is_inference_mode_enabled():
                cost["teacher_forwards"] += len(args[0])
            elif torch.is_grad_enabled():
                cost["student_forwards"] += len(args[0])

    handle = register_module_forward_pre_hook(count)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    try:
        yield cost
    finally:
        handle.remove()
        cost["seconds"] = round(time.perf_counter() - wall, 1)
        cost["cpu_seconds"] = round(_cpu_seconds() - cpu, 1)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def target_of(settings: dict[str, Any], *, clip: bool) -> TargetConfig:
    """Says which features a method distils."""
    return resolve(overrides=settings, clip=clip).target
