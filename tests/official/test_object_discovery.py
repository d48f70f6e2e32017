"""LOST and TokenCut against implementations written from the papers: slow, obvious, in numpy and fp64."""

import numpy as np
import pytest
import torch

from phreg.evaluation.tasks.lost import lost
from phreg.evaluation.tasks.tokencut import tokencut

CLOSE = 1e-6


def grid_of(seed, rows=9, cols=12, dim=16):
    """Features of an object that stands out from a background, with noise."""
    generator = np.random.default_rng(seed)
    background, thing = generator.normal(size=(2, dim))
    mask = np.zeros((rows, cols), dtype=bool)
    top, left = generator.integers(0, (rows - 4, cols - 4))
    mask[top : top + 4, left : left + 4] = True
    return np.where(mask[..., None], thing, background) + generator.normal(size=(rows, cols, dim))


def flood(mask, start):
    """The places of a mask that are reached from one of them by steps along rows and columns."""
    reached, border = {start}, [start]
    while border:
        row, col = border.pop()
        for place in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
            inside = 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]
            if inside and mask[place] and place not in reached:
                reached.add(place)
                border.append(place)
    return reached


def box_of(places):
    rows, cols = zip(*places, strict=True)
    return min(cols), min(rows), max(cols) + 1, max(rows) + 1


def lost_by_the_paper(grid, k, bias):
    """Section 3.2 of Siméoni et al. 2021, similarities lowered by a bias as Darcet et al. 2024 do."""
    rows, cols, _ = grid.shape
    places = [(row, col) for row in range(rows) for col in range(cols)]
    likeness = {(p, q): float(grid[p] @ grid[q]) + bias for p in places for q in places}
    degree = {p: sum(likeness[p, q] > 0 or p == q for q in places) for p in places}
    total = {p: sum(likeness[p, q] for q in places) for p in places}
    ranked = sorted(places, key=lambda p: (degree[p], total[p]))  # ties: the paper leaves them open
    seed = ranked[0]
    expanded = [q for q in ranked[:k] if likeness[seed, q] > 0 or q == seed]
    mask = np.zeros((rows, cols), dtype=bool)
    for q in places:
        mask[q] = sum(likeness[q, s] for s in expanded) > 0
    mask[seed] = True
    return seed, degree, box_of(flood(mask, seed))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("k", "bias"), [(100, 0.0), (20, 0.0), (20, -0.3)])
def test_lost(seed, k, bias):
    grid = grid_of(seed)
    grid = grid / np.linalg.norm(grid, axis=-1, keepdims=True) if bias else grid
    start, degree, box = lost_by_the_paper(grid, k, bias)
    found = lost(torch.from_numpy(grid).float(), bias=bias, expansion=k)
    assert found.seed == start
    assert found.box == box
    expected = [[degree[row, col] for col in range(grid.shape[1])] for row in range(grid.shape[0])]
    assert found.maps["degree"].int().tolist() == expected


def tokencut_by_the_paper(grid, tau):
    """Section 3.2 of Wang et al. 2022, by the symmetric form of Shi and Malik's eigenproblem."""
    rows, cols, _ = grid.shape
    patches = grid.reshape(rows * cols, -1)
    edges = np.empty((rows * cols, rows * cols))
    for i, one in enumerate(patches):
        for j, other in enumerate(patches):
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            edges[i, j] = 1 if cosine >= tau else 1e-5
    inverse_root = np.diag(edges.sum(1) ** -0.5)
    laplacian = inverse_root @ (np.diag(edges.sum(1)) - edges) @ inverse_root
    values, vectors = np.linalg.eigh(laplacian)
    assert values[2] - values[1] > 1e-3, "the second eigenvector is one"
    vector = inverse_root @ vectors[:, 1]
    start = int(np.argmax(np.abs(vector)))
    vector = vector * np.sign(vector[start])
    mask = (vector > vector.mean()).reshape(rows, cols)
    seed = divmod(start, cols)
    return seed, vector.reshape(rows, cols), box_of(flood(mask, seed))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tau", [0.2, 0.4])
def test_tokencut(seed, tau):
    grid = grid_of(seed)
    start, vector, box = tokencut_by_the_paper(grid, tau)
    found = tokencut(torch.from_numpy(grid), tau=tau)
    np.testing.assert_allclose(found.maps["eigenvector"], vector, atol=CLOSE)
    assert found.box == box
    if np.sum(np.isclose(np.abs(vector), np.abs(vector).max(), atol=CLOSE)) == 1:
        assert found.seed == start
