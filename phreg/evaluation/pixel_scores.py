"""Scores of pixels: what a task says of patches, laid onto pictures and averaged over windows.

With windows of whole patches, features are averaged where windows overlap, and scored once. Windows of
`fit=centred` begin at any pixel, as in mmseg, so that their patches do not coincide: each is scored on its
own, its scores are resampled to its pixels, and those are averaged.

    picture ──resampled──► windows of pixels ──padded──► grids ──score──► scores of pixels ──mean──► picture
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from phreg.data.sources import ImageSource
from phreg.evaluation.canvas import window_starts
from phreg.evaluation.dense import Box, Dense, Placement
from phreg.evaluation.feature_config import FeatureConfig
from phreg.evaluation.features import FeatureReader
from phreg.progress import track

Score = Callable[[Dense], Float[Tensor, "classes rows cols"]]
"""Scores the classes of each patch of a picture or a window."""


def score_pictures(
    reader: FeatureReader, source: ImageSource, reading: FeatureConfig, score: Score
) -> Iterator[tuple[Float[Tensor, "classes height width"], Placement]]:
    """Scores every pixel that is shown of each picture, at the picture's own resolution.

    Args:
        reader: The model.
        source: The pictures.
        reading: How they are read.
        score: Scores patches.

    Yields:
        Scores, and where the picture lies on its canvas, for each picture in order.

    Raises:
        DataError: A picture cannot be read.
        PhregError: The model takes no such size.
    """
    if reading.fit != "centred" or reading.window is None:
        for dense in reader.stream(source, reading, "test images"):
            yield dense.placement.restore(score(dense)), dense.placement
        return
    numbers = range(len(source))
    coming = reader.read_ahead(lambda number: reader.place(source.read(number), reading), numbers)
    for _, (pixels, placement) in zip(track("test images", numbers), coming, strict=True):
        scores = _score_windows(reader, reader.normalise(pixels[None]), reading, score)
        yield (
            interpolate(scores[None], placement.part[2:], mode="bilinear", align_corners=False)[0],
            placement,
        )


def window_boxes(size: tuple[int, int], window: int, stride: int) -> list[Box]:
    """Lays windows over a canvas, row by row; those at the far ends are moved back inside."""
    height, width = (min(window, side) for side in size)
    return [
        (top, left, height, width)
        for top in window_starts(size[0], height, stride)
        for left in window_starts(size[1], width, stride)
    ]


def _score_windows(
    reader: FeatureReader, image: Float[Tensor, "1 3 height width"], reading: FeatureConfig, score: Score
) -> Float[Tensor, "classes height width"]:
    """Averages the scores of the pixels of a normalised picture over all windows."""
    size = (image.shape[-2], image.shape[-1])
    window = reading.window or max(size)
    boxes = window_boxes(size, window, reading.stride or window * 2 // 3)
    alone = reading.model_copy(update={"window": None, "stride": None})
    total = count = torch.zeros(1, *size, device=image.device)
    for first in range(0, len(boxes), reader.batch_size):
        some = boxes[first : first + reader.batch_size]
        views = [image[0, :, top : top + rows, left : left + cols] for top, left, rows, cols in some]
        seen = reader(torch.stack(views), alone)
        for place, (top, left, rows, cols) in enumerate(some):
            where = Placement((rows, cols), (rows, cols), (0, 0, rows, cols), (0, 0, rows, cols))
            dense = Dense(seen.grids[place], seen.pooled[place], seen.cls[place], where)
            scores = where.restore(score(dense))
            around = (left, size[1] - left - cols, top, size[0] - top - rows)
            total = total + torch.nn.functional.pad(scores, around)
            count = count + torch.nn.functional.pad(torch.ones_like(scores[:1]), around)
    return total / count
