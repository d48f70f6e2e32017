"""The frozen teacher: the unpatched model reads moved views; their features are aligned and averaged.

    images ──views──► moved copies ──backbone──► token grids ──undo──► masked mean (batch, rows, cols, dim)
                                 in micro-batches

The forward passes run under inference mode and autocast. Sums and means are fp32. Nothing here waits for the
device.
"""

import logging

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Backbone, Features
from phreg.config import TargetConfig, ViewsConfig
from phreg.errors import PhregError
from phreg.view_sampling import context_margin, sample_views
from phreg.views import aligned_sum

logger = logging.getLogger(__name__)

MICRO_BATCH = {"cpu": 16, "cuda": 256}
"""Default number of views per forward: few stay in a CPU's cache, many fill a GPU."""


class Teacher:
    """A frozen backbone read under test-time augmentation.

    Args:
        backbone: The model to read; its weights are not touched.
        views: How views are drawn.
        target: Which block is read, and how many views per forward.
        bf16: Whether to run the forward passes under bf16 autocast.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: ViewsConfig,
        target: TargetConfig | None = None,
        *,
        bf16: bool = False,
    ) -> None:
        self.backbone = backbone
        self.views = views
        self.target = target or TargetConfig()
        self.bf16 = bf16
        self.micro_batch = self.target.micro_batch or MICRO_BATCH.get(
            backbone.device.type, MICRO_BATCH["cpu"]
        )

    @torch.no_grad()
    def __call__(
        self,
        images: Float[Tensor, "batch 3 height width"],
        generator: torch.Generator,
        margin: tuple[int, int] = (0, 0),
    ) -> Features:
        """Makes the target of a batch.

        Args:
            images: Normalised images on the backbone's device, with their context margin.
            generator: CPU generator that decides the views.
            margin: Context margin, rows and columns, in pixels on each side.

        Returns:
            The mean over views of the aligned patch features, in fp32; each position is averaged over the
            views that saw it. And the pooled output of the unmoved view.

        Raises:
            PhregError: The views show context that the images do not have.
        """
        size = (images.shape[-2] - 2 * margin[0], images.shape[-1] - 2 * margin[1])
        needed = context_margin(self.views, self.backbone.spec, size)
        if margin != needed:
            raise PhregError(
                f"views.fill = {self.views.fill} needs images of {size[0]}x{size[1]} with {needed} pixels of "
                f"context on each side (rows, columns); found {margin}; add the context, or choose "
                "another views.fill, such as white"
            )
        while True:
            state = generator.get_state()
            try:
                total, count, pooled = self._read(images, size, generator)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self.micro_batch //= 2
                logger.warning(
                    "teacher forward ran out of memory; going on with %d views at a time", self.micro_batch
                )
                generator.set_state(state)
                torch.cuda.empty_cache()
                continue
            # Outside inference mode: the quotients are normal tensors that autograd can save.
            return Features(total / count.unsqueeze(-1), pooled.clone())

    @torch.inference_mode()
    def _read(
        self, images: Tensor, size: tuple[int, int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums aligned features over views, micro-batch by micro-batch, in a fixed order."""
        groups = sample_views(self.views, self.backbone.spec, size, len(images), generator)
        totals, counts, pooled = [], [], []
        # All views of a few images, not a few views of all images: each image is padded only once.
        at_once = max(1, self.micro_batch // self.views.count)
        for first in range(0, len(images), at_once):
            part = slice(first, first + at_once)
            chunks = [
                group.part(part, slice(view, view + self.micro_batch))
                for group in groups
                for view in range(0, group.count, self.micro_batch)
            ]
            total = count = 0
            for chunk in chunks:
                features = self._forward(chunk.apply(images[part]))
                summed, seen = aligned_sum(chunk, features.patches)
                total, count = total + summed, count + seen
                if chunk is chunks[0]:
                    pooled.append(features.pooled[:, 0])
            totals.append(total)
            counts.append(count)
        return torch.cat(totals), torch.cat(counts), torch.cat(pooled)

    def _forward(self, views: Float[Tensor, "batch views 3 height width"]) -> Features:
        with torch.autocast(views.device.type, torch.bfloat16, enabled=self.bf16):
            patches, pooled = self.backbone(views.flatten(0, 1), self.target.layer, self.target.norm)
        shape = views.shape[:2]
        return Features(patches.float().unflatten(0, shape), pooled.float().unflatten(0, shape))
