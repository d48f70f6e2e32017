"""Dense and global nearest neighbours against scikit-learn's exact search."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate, normalize

from phreg.backbones.resolve import adapt
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.tasks import dense_nn
from phreg.evaluation.tasks.classification import knn_scores

CLOSE = 1e-6
neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")


def weighted_labels(bank, labels, queries, count, temperature):
    """Looks each query up, and averages labels by softmax(cosine / temperature) in fp64."""
    search = neighbors.NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(bank)
    distances, nearest = search.kneighbors(queries)
    weights = np.exp((1 - distances) / temperature)
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("qk,qkc->qc", weights, labels[nearest])


@pytest.mark.parametrize(("count", "temperature"), [(30, 0.02), (5, 0.1), (1, 0.02)])
def test_looking_patches_up(count, temperature):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(500, 24, generator=generator, dtype=torch.float64)
    shares = torch.rand(500, 6, generator=generator, dtype=torch.float64)
    queries = torch.randn(70, 24, generator=generator, dtype=torch.float64)
    found = dense_nn.look_up(normalize(bank, dim=1), shares, queries, count, temperature)
    expected = weighted_labels(bank.numpy(), shares.numpy(), queries.numpy(), count, temperature)
    np.testing.assert_allclose(found, expected, atol=CLOSE)


def test_votes_of_images():
    generator = torch.Generator().manual_seed(1)
    bank, queries = (torch.randn(size, 16, generator=generator) for size in (200, 40))
    labels = torch.randint(5, (200,), generator=generator)
    found = knn_scores(bank, labels, queries, 5, neighbours=20, temperature=0.07)
    shares = np.eye(5)[labels]
    expected = weighted_labels(bank.double().numpy(), shares, queries.double().numpy(), 20, 0.07)
    # Votes here are not divided by their sum, which changes no order.
    np.testing.assert_allclose(found / found.sum(1, keepdim=True), expected, atol=1e-5)  # fp32 cosines
    assert (found.argmax(1).numpy() == expected.argmax(1)).all()


@torch.no_grad()
def test_the_task_on_pictures_whose_bank_holds_every_patch(tiny, tmp_path):
    root, classes = tmp_path / "set", 3
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            picture = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            mask = generator.integers(0, classes, (8, 8), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(picture).save(root / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("a\nb\nc\n")
    model = tiny().double()
    backbone = adapt(model)
    reader = FeatureReader(backbone, "tiny", FeatureCache(tmp_path / "cache"), batch_size=2)
    settings = dense_nn.Settings(reading=FeatureConfig(size=32), bank_size=10_000, neighbours=4)

    def grid(split, number):
        pixels = np.array(Image.open(root / "images" / split / f"{number}.png")) / 255
        mean, std = np.array(backbone.spec.mean), np.array(backbone.spec.std)
        images = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None]
        return model.forward_features(images)[0, 1:].numpy()

    def truth(split, number):
        return np.array(Image.open(root / "masks" / split / f"{number}.png"))

    bank = np.concatenate([grid("train", number) for number in range(3)])
    patches = [truth("train", number).reshape(4, 8, 4, 8).transpose(0, 2, 1, 3) for number in range(3)]
    shares = np.concatenate([np.eye(classes)[mask].mean((2, 3)).reshape(16, classes) for mask in patches])
    matrix = np.zeros((classes, classes), dtype=int)
    for number in range(2):
        votes = weighted_labels(bank, shares, grid("val", number), 4, 0.02).reshape(4, 4, classes)
        maps = torch.from_numpy(votes).permute(2, 0, 1)[None]
        said = interpolate(maps, (32, 32), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
        np.add.at(matrix, (truth("val", number), said), 1)
    hits = np.diag(matrix)
    expected = (hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean()
    found = dense_nn.run(reader, str(root), settings, seed=0)
    assert found.figures["miou"] == pytest.approx(expected, abs=CLOSE)
    assert found.figures["pixel_accuracy"] == pytest.approx(hits.sum() / matrix.sum(), abs=CLOSE)
