"""J and F of videos against DAVIS 2017's definition: dilated boundaries, void left out, means over frames."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from phreg.evaluation.metrics.scores import IGNORE, boundary_accuracy, region_similarity
from phreg.evaluation.tasks.video_propagation import _score

CLOSE = 1e-6


def j_of(predicted, truth):
    union = np.logical_or(predicted, truth).sum()
    return 1.0 if union == 0 else np.logical_and(predicted, truth).sum() / union


def outline(mask):
    """Pixels that differ from the next to the right, below, or diagonally, as far as there is one."""
    rows, cols = mask.shape
    found = np.zeros_like(mask)
    for row in range(rows):
        for col in range(cols):
            others = [(row, col + 1), (row + 1, col), (row + 1, col + 1)]
            found[row, col] = any(mask[row, col] != mask[r, c] for r, c in others if r < rows and c < cols)
    return found


def f_of(predicted, truth):
    radius = math.ceil(0.008 * math.hypot(*predicted.shape))
    reach = np.arange(-radius, radius + 1)
    disk = reach[:, None] ** 2 + reach[None] ** 2 <= radius**2
    ours, theirs = outline(predicted), outline(truth)
    if not ours.any() and not theirs.any():
        return 1.0
    if not ours.any() or not theirs.any():
        return 0.0
    precision = (ours & binary_dilation(theirs, disk)).sum() / ours.sum()
    recall = (theirs & binary_dilation(ours, disk)).sum() / theirs.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def blob(seed, size):
    """A mask of a few overlapping ellipses, some of which touch the frame."""
    generator = np.random.default_rng(seed)
    rows, cols = np.mgrid[: size[0], : size[1]]
    found = np.zeros(size, dtype=bool)
    for _ in range(3):
        row, col = generator.uniform(0, size)
        height, width = generator.uniform(3, 15, 2)
        found |= ((rows - row) / height) ** 2 + ((cols - col) / width) ** 2 < 1
    return found


@pytest.mark.parametrize("size", [(48, 60), (90, 160), (270, 480)])
def test_masks_of_several_sizes(size):
    for seed in range(4):
        predicted, truth = blob(seed, size), blob(seed + (seed != 3), size)  # the last pair is equal
        pair = torch.from_numpy(predicted), torch.from_numpy(truth)
        assert region_similarity(*pair) == pytest.approx(j_of(predicted, truth), abs=CLOSE)
        assert boundary_accuracy(*pair) == pytest.approx(f_of(predicted, truth), abs=CLOSE)


@pytest.mark.parametrize("empty", [(True, False), (False, True), (True, True)])
def test_masks_of_nothing(empty):
    masks = [np.zeros((30, 40), dtype=bool) if nothing else blob(0, (30, 40)) for nothing in empty]
    pair = [torch.from_numpy(mask) for mask in masks]
    assert region_similarity(*pair) == pytest.approx(j_of(*masks), abs=CLOSE)
    assert boundary_accuracy(*pair) == pytest.approx(f_of(*masks), abs=CLOSE)


def test_an_object_with_void_over_the_frames_of_a_sequence():
    size, frames = (60, 90), range(1, 6)
    scores, j, f = [], [], []
    for number in frames:
        predicted, truth = blob(number, size), blob(number + 1, size)
        void = blob(number + 50, size)
        labels = np.where(truth, 2, 0)
        labels[void] = IGNORE
        # DAVIS leaves void out of union and intersection, and of both outlines.
        j.append(j_of(predicted & ~void, truth & ~void))
        f.append(f_of(predicted & ~void, truth & ~void))
        shown, known = torch.from_numpy(predicted), torch.from_numpy(labels)
        scores.append(_score(shown & (known != IGNORE), known == 2))
    means = [sum(side) / len(scores) for side in zip(*scores, strict=True)]
    assert means == pytest.approx([np.mean(j), np.mean(f)], abs=CLOSE)
