"""The dense features of one picture, and where the picture lies on the canvas that a model read."""

from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

Box = tuple[int, int, int, int]
"""Top, left, height, width, in pixels."""


class Placement(NamedTuple):
    """Where a picture lies on its canvas."""

    picture_size: tuple[int, int]
    """Height and width of the picture."""
    canvas: tuple[int, int]
    """Height and width of the canvas."""
    inside: Box
    """The part of the canvas that shows the picture."""
    part: Box
    """The part of the picture that is shown, in the picture's own pixels."""

    def restore(
        self, maps: Float[Tensor, "channels rows cols"], mode: Literal["bilinear", "nearest"] = "bilinear"
    ) -> Float[Tensor, "channels height width"]:
        """Lays maps over patches onto the shown part of the picture, at the picture's own resolution."""
        corners = {} if mode == "nearest" else {"align_corners": False}
        top, left, height, width = self.inside
        over_canvas = interpolate(maps[None], self.canvas, mode=mode, **corners)
        shown = over_canvas[..., top : top + height, left : left + width]
        return interpolate(shown, self.part[2:], mode=mode, **corners)[0]

    def put(
        self, truth: Float[Tensor, "channels height width"], outside: float | int
    ) -> Float[Tensor, "channels rows cols"]:
        """Puts values over the picture (classes, depths) onto the canvas, resampled to the nearest."""
        inside = interpolate(self.cut(truth)[None], self.inside[2:], mode="nearest-exact")[0]
        top, left, height, width = self.inside
        below, right = self.canvas[0] - top - height, self.canvas[1] - left - width
        return nn.functional.pad(inside, (left, right, top, below), value=outside)

    def cut(self, picture: Any) -> Any:
        """Cuts the shown part out of an array or tensor (…, height, width) of the picture's size."""
        top, left, height, width = self.part
        return picture[..., top : top + height, left : left + width]


class Dense(NamedTuple):
    """What a model sees in one picture, on the CPU, in fp32."""

    grid: Float[Tensor, "rows cols dim"]
    pooled: Float[Tensor, " pooled_dim"]
    """The model's own global output."""
    cls: Float[Tensor, " dim"]
    """The first token, read as the patches are; the patches' mean where the model has no CLS."""
    placement: Placement
