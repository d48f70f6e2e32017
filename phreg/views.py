"""Test-time-augmentation views: how an image is moved, and how its tokens are moved back.

Artifacts stay at their position in the frame, while content moves with the image. The average over moved
views, each one undone, preserves the content and removes the artifacts. Shifts are whole patches, so both
ways are a gather of whole cells: nothing is resampled.

    images ──apply──► moved images ──teacher──► token grids ──undo──► aligned grids, and what they saw

All fills are one operation. The image is padded, or comes with a context margin; a view is a window of the
whole, mirrored or not. Views that shift by fractions of a patch or change scale are resampled: `AffineViews`,
by kornia.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import kornia.geometry.transform as kornia
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Fill = tuple[float, float, float] | str | None
"""What lies outside the image: a value per channel, or a padding mode of `torch.nn.functional.pad`. None
means that images come with a context margin."""


@runtime_checkable
class ViewGroup(Protocol):
    """Views of one shape: the same number for each image of a batch."""

    @property
    def count(self) -> int:
        """Views per image."""
        ...

    def part(self, images: slice, views: slice) -> "ViewGroup":
        """Takes some images' and some views' share."""
        ...

    def apply(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch views 3 h w"]:
        """Makes the views of normalised images, given with the context margin they need, on their device."""
        ...

    def undo(
        self, grids: Float[Tensor, "batch views rows cols dim"]
    ) -> tuple[
        Float[Tensor, "batch views grid_rows grid_cols dim"], Bool[Tensor, "batch views grid_rows grid_cols"]
    ]:
        """Moves the views' token grids back onto the image's grid, and says where each view saw the image."""
        ...


def aligned_sum(
    views: ViewGroup, grids: Float[Tensor, "batch views rows cols dim"]
) -> tuple[Float[Tensor, "batch grid_rows grid_cols dim"], Int[Tensor, "batch grid_rows grid_cols"]]:
    """Moves the views' token grids back and sums them over the views that saw each cell.

    Returns:
        The sums, and how many views saw each cell.
    """
    aligned, seen = views.undo(grids)
    return (aligned * seen.unsqueeze(-1)).sum(1), seen.sum(1)


@dataclass(frozen=True)
class Views:
    """Exact views: whole-patch shifts and mirrorings.

    Cell (r, c) of an unmirrored view shows cell (r + dy, c + dx) of the image.

    Attributes:
        offsets: Shift (dy, dx) of each view in patches; positive moves content up and left.
        flips: Whether a view is mirrored left to right, after the shift.
        grid: Rows and columns of the image, in patches.
        window: Rows and columns of a view, in patches.
        margin: Rows and columns of padding that the largest shift needs, in patches.
        fill: What the padding is made of.
    """

    offsets: Int[Tensor, "batch views 2"]
    flips: Bool[Tensor, "batch views"]
    grid: tuple[int, int]
    window: tuple[int, int]
    margin: tuple[int, int]
    fill: Fill

    @property
    def count(self) -> int:
        """Views per image."""
        return self.flips.shape[1]

    def part(self, images: slice, views: slice) -> "Views":
        """Takes some images' and some views' share."""
        return replace(self, offsets=self.offsets[images, views], flips=self.flips[images, views])

    def apply(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch views 3 h w"]:
        """Makes the views of normalised images, given with the context margin they need, on their device.

        There is no host synchronisation.
        """
        whole, (patch_h, patch_w) = padded(images, self.grid, self.margin, self.fill)
        cells = whole.unflatten(3, (-1, patch_w)).unflatten(2, (-1, patch_h)).permute(0, 2, 4, 1, 3, 5)
        # One cell a row, plain ones and mirrored ones; a view is a list of row numbers.
        table = torch.stack([cells, cells.flip(-1)], 1)
        device = images.device
        dy, dx = self.offsets.to(device, non_blocking=True).unsqueeze(-1).unbind(2)
        flip = self.flips.to(device, non_blocking=True).unsqueeze(-1)
        row = torch.arange(self.window[0], device=device) + dy + self.margin[0]
        col = torch.arange(self.window[1], device=device)
        col = torch.where(flip, self.window[1] - 1 - col, col) + dx + self.margin[1]
        kind = torch.arange(len(images), device=device).view(-1, 1, 1) * 2 + flip.long()
        index = ((kind * cells.shape[1] + row)[..., :, None] * cells.shape[2]) + col[..., None, :]
        moved = table.flatten(0, 3).index_select(0, index.flatten())
        moved = moved.unflatten(0, (len(images), self.count, *self.window))
        return moved.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    def undo(
        self, grids: Float[Tensor, "batch views rows cols dim"]
    ) -> tuple[
        Float[Tensor, "batch views grid_rows grid_cols dim"], Bool[Tensor, "batch views grid_rows grid_cols"]
    ]:
        """Moves the views' token grids back onto the image's grid.

        Returns:
            The aligned grids, and where each view saw the image; elsewhere the aligned values mean nothing.
        """
        batch, count, rows, cols, _ = grids.shape
        device = grids.device
        dy, dx = self.offsets.to(device, non_blocking=True).unsqueeze(-1).unbind(2)
        flip = self.flips.to(device, non_blocking=True).unsqueeze(-1)
        row = torch.arange(self.grid[0], device=device) - dy
        col = torch.arange(self.grid[1], device=device) - dx
        seen = ((row >= 0) & (row < rows))[..., :, None] & ((col >= 0) & (col < cols))[..., None, :]
        col = torch.where(flip, cols - 1 - col, col).clamp(0, cols - 1)
        view = torch.arange(batch * count, device=device).view(batch, count, 1)
        index = ((view * rows + row.clamp(0, rows - 1))[..., :, None] * cols) + col[..., None, :]
        aligned = grids.flatten(0, 3).index_select(0, index.flatten())
        return aligned.unflatten(0, (batch, count, *self.grid)), seen


@dataclass(frozen=True)
class AffineViews:
    """Views that shift by fractions of a patch and change scale, resampled bilinearly both ways.

    A point at distance d from the image's centre is shown at distance scale * d - shift, then mirrored.

    Attributes:
        offsets: Shift (dy, dx) of each view in patches, of any fraction; positive moves content up and left.
        scales: Enlargement of each view about the image's centre.
        flips: Whether a view is mirrored left to right, last.
        grid: Rows and columns of the image, in patches.
        margin: Rows and columns of padding, in patches, that the largest shift needs.
        fill: What the padding is made of.
    """

    offsets: Float[Tensor, "batch views 2"]
    scales: Float[Tensor, "batch views"]
    flips: Bool[Tensor, "batch views"]
    grid: tuple[int, int]
    margin: tuple[int, int]
    fill: Fill

    @property
    def count(self) -> int:
        """Views per image."""
        return self.flips.shape[1]

    def part(self, images: slice, views: slice) -> "AffineViews":
        """Takes some images' and some views' share."""
        offsets, scales, flips = (field[images, views] for field in (self.offsets, self.scales, self.flips))
        return replace(self, offsets=offsets, scales=scales, flips=flips)

    def apply(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch views 3 h w"]:
        """Makes the views of normalised images, given with the context margin they need, on their device."""
        # Scale after padding, so that a zoomed-out view shows fill beyond the image too.
        whole, patch = padded(images, self.grid, self.margin, self.fill)
        height, width = self.grid[0] * patch[0], self.grid[1] * patch[1]
        margin = (self.margin[0] * patch[0], self.margin[1] * patch[1])
        matrices = self._matrices((height, width), patch, images.device)
        matrices[:, :, 2] -= (matrices[:, :, :2] @ matrices.new_tensor([[margin[1]], [margin[0]]])).squeeze(
            -1
        )
        moved = kornia.warp_affine(
            whole.repeat_interleave(self.count, 0),
            matrices,
            (height, width),
            padding_mode="border",
            align_corners=True,
        )
        return self._mirror(moved.unflatten(0, (len(images), self.count)), -1)

    def undo(
        self, grids: Float[Tensor, "batch views rows cols dim"]
    ) -> tuple[
        Float[Tensor, "batch views grid_rows grid_cols dim"], Bool[Tensor, "batch views grid_rows grid_cols"]
    ]:
        """Warps the views' token grids back onto the image's grid.

        Cells count as unseen if they reach beyond the view, or blend in cells of the view that show fill.
        """
        batch, count = grids.shape[:2]
        matrices = self._matrices(self.grid, (1, 1), grids.device)
        planes = self._mirror(grids, 3).flatten(0, 1).movedim(-1, 1)
        planes = torch.cat([planes, self._free_of_fill(matrices).to(planes.dtype).unsqueeze(1)], 1)
        back = kornia.invert_affine_transform(matrices).to(grids.dtype)
        aligned = kornia.warp_affine(planes, back, self.grid, padding_mode="zeros", align_corners=True)
        aligned = aligned.movedim(1, -1).unflatten(0, (batch, count))
        # A cell is whole where all of its bilinear weight fell inside; the slack covers rounding of the warp.
        return aligned[..., :-1], aligned[..., -1] > 1 - 1e-5

    def _matrices(self, size: tuple[int, int], unit: tuple[int, int], device: torch.device) -> Tensor:
        """The (x, y) matrices from image to unmirrored view, on a raster of `size`, a patch being `unit`."""
        scale = self.scales.to(device, non_blocking=True).flatten()
        shift = self.offsets.to(device, non_blocking=True).flatten(0, 1).flip(-1) * scale.new_tensor(
            [unit[1], unit[0]]
        )
        centre = scale.new_tensor([(size[1] - 1) / 2, (size[0] - 1) / 2])
        linear = scale[:, None, None] * torch.eye(2, device=device)
        return torch.cat([linear, ((1 - scale[:, None]) * centre - shift)[..., None]], -1)

    def _free_of_fill(self, matrices: Float[Tensor, "views 2 3"]) -> Bool[Tensor, "views rows cols"]:
        """Says which cells of the unmirrored views lie wholly inside the image."""
        inside = []
        for axis, cells in ((1, self.grid[0]), (0, self.grid[1])):
            scale, shift = matrices[:, axis, axis, None], matrices[:, axis, 2, None]
            centre = (torch.arange(cells, device=matrices.device) - shift) / scale
            # An enlarged view's outermost pixels are read closer to the edge, and blend in what lies beyond.
            beside = (0.5 - 0.5 / scale).clamp_min(0) - 1e-5
            first, last = centre - 0.5 / scale, centre + 0.5 / scale
            inside.append((first > beside - 0.5) & (last < cells - 0.5 - beside))
        return inside[0][:, :, None] & inside[1][:, None, :]

    def _mirror(self, views: Tensor, axis: int) -> Tensor:
        flips = self.flips.to(views.device, non_blocking=True).view(
            *self.flips.shape, *[1] * (views.ndim - 2)
        )
        return torch.where(flips, views.flip(axis), views)


def padded(
    images: Float[Tensor, "batch 3 _ _"], grid: tuple[int, int], margin: tuple[int, int], fill: Fill
) -> tuple[Float[Tensor, "batch 3 _ _"], tuple[int, int]]:
    """Adds a margin of patches to images, unless they have one already.

    Args:
        images: Normalised images.
        grid: Rows and columns of an image, in patches.
        margin: Rows and columns of the margin, in patches.
        fill: What the margin is made of.

    Returns:
        The images with their margin, and the height and width of a patch in pixels.
    """
    if fill is not None:
        rows, cols = (
            side // cells * far for side, cells, far in zip(images.shape[-2:], grid, margin, strict=True)
        )
        images = _pad(images, rows, cols, fill)
    high, wide = (
        side // (cells + 2 * far) for side, cells, far in zip(images.shape[-2:], grid, margin, strict=True)
    )
    return images, (high, wide)


def _pad(images: Tensor, rows: int, cols: int, fill: tuple[float, float, float] | str) -> Tensor:
    if not rows and not cols:
        return images
    if isinstance(fill, str):
        return F.pad(images, (cols, cols, rows, rows), mode=fill)
    batch, channels, height, width = images.shape
    values = torch.tensor(fill, dtype=images.dtype).to(images.device, non_blocking=True)
    framed = values.view(1, channels, 1, 1).repeat(batch, 1, height + 2 * rows, width + 2 * cols)
    framed[:, :, rows : rows + height, cols : cols + width] = images
    return framed
