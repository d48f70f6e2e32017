"""Settings of how dense features are read: the canvas, the windows, the views, and what is read of the model.

Tasks hold them as `reading`; `phreg.evaluation.features` does what they say.
"""

from typing import Literal

from pydantic import PositiveInt, model_validator

from phreg.backbones.base import Readout
from phreg.config import Config, Size
from phreg.errors import PhregError

OUTPUTS = ("tokens", "joint")
"""Sources that are read off what a block puts out; the others, off what enters it."""


class FeatureConfig(Config):
    """What is read of a model, and on which canvas. Sizes are rounded to whole patches of the model."""

    size: Size | None = None
    """Shorter side of the canvas in pixels or, with `fit=crop` or `fit=square`, its height and width, one
    number for both; unset means the model's own (`fit=pad`: the picture's own)."""
    fit: Literal["keep", "square", "crop", "pad", "centred"] = "keep"
    """How a picture gets onto the canvas: resampled with its ratio kept, the longer side too rounded to whole
    patches; resampled to a square; cut to its central square, or to the middle in the shape of the canvas, if
    that is none; or resampled and padded with the mean colour at
    the right and the bottom. centred keeps ratio and size to the pixel: what is read, the picture or a window
    that begins at any pixel, is padded to whole patches evenly on all sides after normalising, and its grid
    is laid over the unpadded pixels, as DINOv2's linear evaluations do."""
    resize: PositiveInt | None = None
    """With `fit=crop`, the shorter side that a picture is resampled to before its middle is cut out; unset
    means as small as just covers the cut."""
    floor: PositiveInt | None = None
    """Where the ratio is kept, the longer side is rounded down to a multiple of so many pixels, before it is
    rounded to whole patches; unset rounds to whole patches alone."""
    window: PositiveInt | None = None
    """Side of the windows through which the canvas is read; unset reads it whole."""
    stride: PositiveInt | None = None
    """Distance of windows; unset means two thirds of a window."""
    source: Literal["tokens", "queries", "keys", "values", "joint"] = "tokens"
    """What is read: a block's output, the queries, keys or values of its attention, heads merged, or tokens
    in the space that a CLIP-type model shares with text."""
    layer: int | None = None
    """Block that is read, 0-based or negative from the end; unset means the last."""
    readout: Readout | None = None
    """How a CLIP-type model's last block is read (phreg.backbones.readout); unset means as phreg trained the
    model, and plain where it did not. Pooled outputs mean something when read plain alone."""
    norm: bool = True
    """Apply the final norm to tokens."""
    bias: bool = True
    """Keep the bias of the query, key or value projection."""
    unit: bool = False
    """Scale each patch feature to length 1, before windows are averaged."""
    views: PositiveInt = 1
    """Patch features are averaged over this many moved views of each window, the unmoved one first (test-time
    augmentation; the bound of what distillation from views reaches). 1 reads the model as it is. Pooled
    outputs and CLS are those of the unmoved view."""

    @model_validator(mode="after")
    def _one_side_where_the_ratio_is_kept(self) -> "FeatureConfig":
        if isinstance(self.size, tuple) and self.fit in ("keep", "pad", "centred"):
            raise ValueError(
                f"size gives height and width {self.size}, and fit={self.fit} keeps each picture's ratio; "
                "give one number, or fit=crop or fit=square"
            )
        if self.resize is not None and self.fit != "crop":
            raise ValueError(
                f"resize gives a shorter side {self.resize} to cut the middle from, and fit={self.fit} cuts "
                "none; set fit=crop, or leave resize out"
            )
        if self.floor is not None and self.fit in ("crop", "square"):
            raise ValueError(
                f"floor rounds the longer side down to multiples of {self.floor}, and fit={self.fit} has no "
                "ratio to keep; set fit=keep, or leave floor out"
            )
        return self

    def check_views(self, views: int) -> None:
        """Refuses to average over views what no student is taught.

        Args:
            views: Views in the average, which may be those of another reading by the same forwards.

        Raises:
            PhregError: Queries, keys or values are to be averaged.
        """
        if views > 1 and self.source not in OUTPUTS:
            raise PhregError(
                f"reading.views = {views} asks for the average of {self.source} over moved views, which no "
                "student is taught: attention compares them within one view; read tokens or joint, or leave "
                "reading.views at 1"
            )
