"""The training step of PH-Reg as it was published, to be timed against phreg's.

Written anew from the paper (Chen et al. 2025, arXiv 2505.21501) and from what its public code does where: the
same algorithm as `method = "paper"`, with the work placed as it is there. None of that code is used.

    reader, CPU   JPEG ─► crop, normalise ─► for each view: shift, flip, fill; the same for a map of positions
    device        all views of a batch at once, eager attention ─► token grids
                  nonzero() of the maps ─► index_put into zeros, and a count ─► target
                  student [registers | CLS | patches] ─► 1 - cosine + MSE, NaN and Inf checks ─► AdamW
"""

import random
from collections.abc import Iterator, Sequence
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as transforms

from phreg.backbones.base import Spec
from phreg.config import DistillConfig

OUTSIDE = -100.0
"""Marks pixels that a shift left empty, until they are made white."""

Sample = tuple[Tensor, Tensor, Tensor]


class MovedImages(Dataset[Sample]):
    """Images with their moved copies, made one by one on the CPU.

    Args:
        paths: Image files.
        spec: Patch size and normalisation of the model.
        config: Size, number of views and range of shifts.
    """

    def __init__(self, paths: Sequence[Path], spec: Spec, config: DistillConfig) -> None:
        self.paths, self.views, self.patch = paths, config.views, spec.patch_size[0]
        self.size = config.size or spec.input_size[0]
        self.white = (1 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
        self.transform = transforms.Compose(
            [
                transforms.Resize(self.size, transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(self.size),
                transforms.PILToTensor(),
                transforms.ToDtype(torch.float32, scale=True),
                transforms.Normalize(spec.mean, spec.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        image = self.transform(Image.open(self.paths[index]).convert("RGB"))
        reach = round(self.views.max_shift * (self.size // self.patch))
        offsets = spread_out(reach, self.views.count)
        flips = [False, *(random.random() < self.views.flip for _ in range(self.views.count - 1))]
        return image, *moved_copies(image, offsets, flips, self.patch, self.white)


def spread_out(reach: int, count: int) -> Int[Tensor, "count 2"]:
    """Draws shifts by farthest-point sampling from a pool ten times as large; the first is then made zero."""
    pool = torch.tensor([[random.randint(-reach, reach) for _ in "yx"] for _ in range(10 * count)])
    chosen = [random.randrange(len(pool))]
    nearest = torch.full((len(pool),), torch.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (pool - pool[chosen[-1]]).square().sum(-1).float())
        chosen.append(int(nearest.argmax()))
    offsets = pool[chosen]
    offsets[0] = 0
    return offsets


def moved_copies(
    image: Float[Tensor, "3 height width"],
    offsets: Int[Tensor, "views 2"],
    flips: Sequence[bool],
    patch: int,
    white: Float[Tensor, "3"],
) -> tuple[Float[Tensor, "views 3 height width"], Int[Tensor, "views rows cols 2"]]:
    """Moves an image, and a map of its patches' positions, once for each view; -1 marks positions outside."""
    rows, cols = image.shape[-2] // patch, image.shape[-1] // patch
    positions = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"))
    views, maps = [], []
    for (dy, dx), flip in zip(offsets.tolist(), flips, strict=True):
        view, seen = shifted(image, dy * patch, dx * patch, OUTSIDE), shifted(positions, dy, dx, -1)
        if flip:
            view, seen = view.flip(-1), seen.flip(-1)
        views.append(torch.where(view == OUTSIDE, white.view(3, 1, 1), view))
        maps.append(seen.permute(1, 2, 0))
    return torch.stack(views), torch.stack(maps)


def shifted(planes: Tensor, dy: int, dx: int, fill: float) -> Tensor:
    """Moves planes (..., height, width) so that place (y, x) shows what was at (y + dy, x + dx)."""
    height, width = planes.shape[-2:]
    moved = torch.full_like(planes, fill)
    top, bottom, left, right = max(0, -dy), min(height, height - dy), max(0, -dx), min(width, width - dx)
    moved[..., top:bottom, left:right] = planes[..., top + dy : bottom + dy, left + dx : right + dx]
    return moved


class PlainViT(nn.Module):
    """A stock model of timm or transformers, taken apart at its token sequence, with eager attention.

    Args:
        model: The model; its attention is switched in place.
        spec: What phreg found out about it.
        registers: Tokens put in front of the sequence; None for a teacher.
    """

    def __init__(self, model: Any, spec: Spec, registers: Float[Tensor, "registers width"] | None) -> None:
        super().__init__()
        self.model, self.patch, self.is_timm = model, spec.patch_size[0], spec.library == "timm"
        self.prefix = spec.num_prefix + (0 if registers is None else len(registers))
        self.registers = None if registers is None else nn.Parameter(registers.clone())
        if self.is_timm:
            self.blocks, self.norm = model.blocks, model.norm
            for block in self.blocks:
                block.attn.fused_attn = False
        else:
            self.blocks, self.norm = model.encoder.layer, model.layernorm
            model.set_attn_implementation("eager")

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch rows cols dim"]:
        """Reads the patch features after the final norm."""
        tokens = self._embed(images)
        if self.registers is not None:
            tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        rows = images.shape[-2] // self.patch
        return self.norm(tokens)[:, self.prefix :].unflatten(1, (rows, -1))

    def unlock(self) -> list[nn.Parameter]:
        """Leaves registers, position and patch embedding and the last block to train, and nothing else."""
        self.requires_grad_(False)
        embed = self.model if self.is_timm else self.model.embeddings
        position = embed.pos_embed if self.is_timm else embed.position_embeddings
        patches = embed.patch_embed.proj if self.is_timm else embed.patch_embeddings.projection
        trained = [self.registers, position, *patches.parameters(), *self.blocks[-1].parameters()]
        return [parameter.requires_grad_(True) for parameter in trained if parameter is not None]

    def _embed(self, images: Tensor) -> Tensor:
        if self.is_timm:
            return self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images)))
        return self.model.embeddings(images)


def aligned_mean(
    grids: Float[Tensor, "batch views rows cols dim"], maps: Int[Tensor, "batch views rows cols 2"]
) -> Float[Tensor, "batch rows cols dim"]:
    """Puts every token back to its place and averages: a buffer of zeros, filled at what nonzero finds."""
    shape = grids.shape[:2]
    grids, maps = grids.flatten(0, 1).float(), maps.flatten(0, 1)
    view, row, col = (maps[..., 0] >= 0).nonzero(as_tuple=True)
    to_row, to_col = maps[view, row, col].unbind(-1)
    aligned = torch.zeros_like(grids)
    count = torch.zeros(*grids.shape[:3], 1, device=grids.device)
    aligned[view, to_row, to_col] = grids[view, row, col]
    count[view, to_row, to_col] = 1
    return aligned.unflatten(0, shape).sum(1) / count.unflatten(0, shape).sum(1)


def loss_terms(student: Tensor, target: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """One minus the mean cosine, and the mean squared error, in fp32."""
    student, target = student.float(), target.float()
    norms = (student.norm(dim=-1) + 1e-8) * (target.norm(dim=-1) + 1e-8)
    return 1 - ((student * target).sum(-1) / norms).mean(), (student - target).square().mean()


class Published:
    """The published loop, a step at a time.

    Args:
        teacher: The frozen model.
        student: The same with registers.
        paths: Image files, enough for all steps: its readers do not outlive an epoch.
        spec: What phreg found out about the model.
        config: The settings that phreg's side has.
    """

    def __init__(
        self, teacher: PlainViT, student: PlainViT, paths: Sequence[Path], spec: Spec, config: DistillConfig
    ) -> None:
        self.teacher, self.student, self.config = teacher.requires_grad_(False), student, config
        self.device = next(student.parameters()).device
        self.optimizer = torch.optim.AdamW(
            student.unlock(), config.optim.lr, config.optim.betas, weight_decay=config.optim.weight_decay
        )
        self.data = DataLoader(
            MovedImages(paths, spec, config), config.batch_size, shuffle=True, drop_last=True,
            num_workers=config.data.workers or 0,
        )  # fmt: skip
        self.batches: Iterator[Sample] | None = None
        self.readers: list[Any] = []

    def step(self) -> tuple[float, float]:
        """Runs one training step.

        Returns:
            The loss terms, cosine and MSE.
        """
        if self.batches is None:
            before = active_children()
            self.batches = iter(self.data)
            self.readers = [process for process in active_children() if process not in before]
        images, views, maps = (part.to(self.device) for part in next(self.batches))
        with torch.no_grad():
            target = self.target(views, maps)
        with self._autocast():
            features = self.student(images)
        cosine, mse = loss_terms(features, target)
        loss = cosine + mse
        for tensor in (images, target, features, cosine, mse, loss):
            if torch.isnan(tensor).any() or torch.isinf(tensor).any():
                raise FloatingPointError("NaN or infinity")
        loss.backward()
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr
        self.optimizer.zero_grad()
        return cosine.item(), mse.item()

    def target(
        self, views: Float[Tensor, "batch views 3 height width"], maps: Int[Tensor, "batch views rows cols 2"]
    ) -> Float[Tensor, "batch rows cols dim"]:
        """Reads all views at once and averages their features."""
        with self._autocast():
            grids = self.teacher(views.flatten(0, 1))
        return aligned_mean(grids.unflatten(0, views.shape[:2]), maps)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
