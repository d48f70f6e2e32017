"""The sides that are timed against each other, all over one random model and the same photographs.

distil      phreg, as users call it
Floor       n teacher forwards on views at hand + student forward + backward, and nothing else
published   PH-Reg's procedure (published.py)
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import skimage.data
import torch
from jaxtyping import Float
from PIL import Image
from published import PlainViT, Published
from torch import Tensor, nn

import phreg
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import adapt
from phreg.config import DistillConfig
from phreg.methods import resolve
from phreg.registers import add_registers, initial_registers
from phreg.teacher import Teacher
from phreg.training.trainable import unlock

TURN = {"cpu": 1, "cuda": 8}
"""Steps in a turn."""
WARM_UP = {"cpu": 2, "cuda": 3}
"""First turns, left out: compilation, caches, and the batches that readers had ready."""
DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth and heads."""
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle")


@dataclass(frozen=True)
class Options:
    """What is asked for on the command line, see `run.read_options`."""

    model: str
    size: int
    batch_size: int
    views: int
    registers: int
    steps: int
    device: str
    precision: str
    compile: bool
    workers: int
    published: bool
    keep_freed_memory: bool
    alone: str | None

    @property
    def turn(self) -> int:
        """Steps in a turn."""
        return TURN[self.device]

    @property
    def turns(self) -> int:
        """Turns of each side, those left out included."""
        return WARM_UP[self.device] + math.ceil(self.steps / self.turn)

    def settings(self, steps: int) -> dict[str, Any]:
        """Settings of phreg's run: the paper's, so that all sides do the same; no checkpoint on the way."""
        same = ("size", "batch_size", "registers", "device", "precision", "compile", "keep_freed_memory")
        return {
            **{key: getattr(self, key) for key in same},
            "method": "paper",
            "force": True,  # a model with random weights has nothing to repair
            "steps": steps,
            "views.count": self.views,
            "data.workers": self.workers,
            "measure.images": 0,
            "checkpoint_every": steps,
        }

    def config(self) -> DistillConfig:
        """The same as a configuration, for the sides that are not phreg's."""
        return resolve(overrides=self.settings(1))


def build_model(options: Options) -> nn.Module:
    """Builds a model with random weights, always the same: `dinov2-base` and its kin, or a timm one."""
    torch.manual_seed(0)
    family, _, kind = options.model.partition("-")
    if family == "dinov2" and kind in DINOV2:
        from transformers import Dinov2Config, Dinov2Model

        width, depth, heads = DINOV2[kind]
        shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        return Dinov2Model(Dinov2Config(**shape, patch_size=14, image_size=518)).eval()
    import timm

    return timm.create_model(options.model, pretrained=False, img_size=options.size).eval()


def write_photos(folder: Path, count: int = 64) -> list[Path]:
    """Writes crops of real photographs as JPEGs of 500x375 pixels, about the size of Flickr30k's."""
    folder.mkdir(parents=True)
    sources = [getattr(skimage.data, name)() for name in PHOTOGRAPHS]
    pictures = [Image.fromarray(found[0] if isinstance(found, tuple) else found) for found in sources]
    draw = np.random.default_rng(0)
    paths = [folder / f"{number:03}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        picture = pictures[number % len(pictures)]
        width = int(min(picture.width, picture.height * 4 / 3) * draw.uniform(0.6, 1))
        height = width * 3 // 4
        left, top = draw.integers(picture.width - width + 1), draw.integers(picture.height - height + 1)
        picture.crop((left, top, left + width, top + height)).resize((500, 375)).save(path, quality=90)
    return paths


class Side(Protocol):
    """A side that phreg's loop makes way for."""

    readers: list[Any]
    """Its reader processes."""

    def step(self) -> object:
        """Runs one training step."""
        ...


class Floor:
    """What no implementation can do without: teacher forwards, student forward, backward.

    The forwards are the library's own; of phreg's there are the registers and what is unlocked.
    """

    def __init__(self, options: Options) -> None:
        config, side = options.config(), options.size
        self.bf16 = options.precision == "bf16"
        self.original = adapt(build_model(options)).requires_grad_(False).to(options.device)
        self.student = deepcopy(self.original)
        add_registers(self.student, options.registers)
        self.trained = list(unlock(self.student, config.unlock).values())
        micro_batch = Teacher(self.original, config.views, config.target).micro_batch
        everything = torch.randn(options.batch_size * options.views, 3, side, side, device=options.device)
        self.views = [chunk.clone() for chunk in everything.split(micro_batch)]
        self.pixels = everything[: options.batch_size].clone()
        with torch.no_grad():
            self.gradient = torch.randn_like(self.patches(self.student, self.pixels))
        self.readers: list[Any] = []

    def step(self) -> None:
        """Runs the arithmetic of one training step."""
        with torch.inference_mode():
            for chunk in self.views:
                self.patches(self.original, chunk)
        self.patches(self.student, self.pixels).backward(self.gradient)
        for parameter in self.trained:
            parameter.grad = None

    def patches(
        self, backbone: Backbone, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch patches dim"]:
        """Reads patch features as the model's library does, final norm included."""
        model: Any = backbone.model
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            if backbone.spec.library == "timm":
                tokens = model.forward_features(images)
            else:
                tokens = model(images).last_hidden_state
        return tokens[:, -backbone.layout(images).num_patches :]


def published(options: Options, photos: Sequence[Path]) -> Published:
    """Sets up the published procedure with the same model, registers, settings and number of readers."""
    spec = adapt(build_model(options)).spec
    tokens = initial_registers(options.registers, spec.width)
    teacher = PlainViT(build_model(options), spec, None).to(options.device)
    student = PlainViT(build_model(options), spec, tokens).to(options.device)
    # One epoch lasts for all steps, as it would with a real set of images: each new one starts new readers.
    epochs = options.turns * options.turn * options.batch_size // len(photos) + 1
    return Published(teacher, student, list(photos) * epochs, spec, options.config())


def distil(options: Options, photos: Sequence[Path], steps: int, pause: Callable[[int], None]) -> None:
    """Runs phreg as users do.

    Args:
        options: Model and settings.
        photos: Images, all of one folder.
        steps: Training steps.
        pause: Called with the number of each step, counted from 1, once the next one is under way.
    """
    with TemporaryDirectory() as output:
        phreg.distill(
            build_model(options), photos[0].parent, Path(output) / "run",
            observe=lambda record, _: pause(record.step), **options.settings(steps),
        )  # fmt: skip
