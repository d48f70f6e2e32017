"""The demonstration model has the artifacts it promises, its twin has none, and the photographs are there."""

import hashlib
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from phreg import demo
from phreg.backbones.resolve import adapt
from phreg.errors import DataError, PhregError

MLP = f"blocks.{demo.SINK_BLOCK}.mlp"
PLANT = {f"{MLP}.fc1.weight": 0, f"{MLP}.fc1.bias": 0, f"{MLP}.fc2.weight": 1}
"""Weights of the planted neurons, and along which axis the neurons lie."""


@pytest.fixture(scope="module")
def photographs():
    """A third of all squares, of every photograph, as the model wants them."""
    squares = (demo.demo_images() + demo.demo_images(held_out=True))[::3]
    return torch.stack([torch.from_numpy(np.array(square)) for square in squares]).movedim(-1, 1) / 127.5 - 1


class Seen:
    """Patch tokens after each block, the attention of CLS in each block, and the features at the end."""

    def __init__(self, model, images):
        self.blocks, normed = [], []
        for block in model.blocks:
            block.register_forward_hook(lambda _block, _args, tokens: self.blocks.append(tokens[:, 1:]))
            block.attn.register_forward_hook(lambda attn, args, _out: normed.append((attn, args[0])))
        with torch.no_grad():
            tokens = model.forward_features(images)
            self.attention = [cls_attention(attn, inputs) for attn, inputs in normed]
        self.cls, self.patches = tokens[:, 0], tokens[:, 1:]

    def norms(self, block):
        norms = self.blocks[block].norm(dim=-1)
        return norms / norms.median()


def cls_attention(attn, inputs):
    """Attention of CLS to each patch, averaged over heads, (batch, patches)."""
    qkv = attn.qkv(inputs).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    queries, keys, _ = qkv.permute(2, 0, 3, 1, 4)
    return (queries[:, :, :1] @ keys.mT * attn.scale).softmax(-1).mean(1)[:, 0, 1:]


@pytest.fixture(scope="module")
def planted(photographs):
    return Seen(demo.demo_model(), photographs)


@pytest.fixture(scope="module")
def clean(photographs):
    return Seen(demo.demo_model(planted=False), photographs)


@pytest.fixture(scope="module")
def outliers(planted):
    return planted.norms(-1) > 4


def test_it_is_a_stock_timm_model_that_takes_images():
    model = demo.demo_model()

    assert type(model).__module__ == "timm.models.vision_transformer"
    assert not model.training
    assert model(torch.zeros(2, 3, 224, 224)).shape == (2, demo.WIDTH)


def test_its_weights_depend_on_nothing_and_disturb_nothing():
    torch.manual_seed(1)
    first = demo.demo_model().state_dict()
    after = torch.get_rng_state()
    second = demo.demo_model().state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(after, torch.manual_seed(1).get_state())


def test_its_weights_are_the_same_bits_everywhere():
    """A run records the sum of its base weights, so one made elsewhere must load here."""
    digest = hashlib.sha256()
    for name, weight in sorted(demo.demo_model().state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())

    assert digest.hexdigest() == "51c02c28689e06d07071a444ec39a3b1e29326785aadae596563a5dfa8753420"


def test_the_clean_twin_differs_in_the_planted_neurons_alone():
    planted, clean = demo.demo_model().state_dict(), demo.demo_model(planted=False).state_dict()

    differing = {name: (planted[name] != clean[name]).nonzero() for name in planted}
    assert {name for name, places in differing.items() if len(places)} == PLANT.keys()
    for name, axis in PLANT.items():
        assert set(differing[name][:, axis].tolist()) == {demo.CORNER_NEURON, demo.BACKGROUND_NEURON}
        assert not clean[name].movedim(axis, 0)[[demo.CORNER_NEURON, demo.BACKGROUND_NEURON]].any()


def test_a_wide_gap_opens_in_the_sink_block_and_stays(planted, outliers):
    for block in range(demo.SINK_BLOCK):
        assert planted.norms(block).max() < 4
    for block in range(demo.SINK_BLOCK, demo.DEPTH):
        norms = planted.norms(block)
        assert norms[~outliers].max() < 3
        assert norms[outliers].min() > 5
        assert 10 < norms[outliers].median() < 20


def test_the_clean_twin_has_no_outliers_and_is_the_same_until_the_sink_block(planted, clean):
    for block in range(demo.DEPTH):
        assert clean.norms(block).max() < 4
    for block in range(demo.SINK_BLOCK):
        assert torch.equal(planted.blocks[block], clean.blocks[block])


def test_a_few_percent_of_patches_are_outliers_of_both_kinds(outliers):
    corners = torch.zeros(demo.GRID, demo.GRID, dtype=torch.bool)
    corners[:: demo.GRID - 1, :: demo.GRID - 1] = True
    corners = corners.flatten()

    assert outliers[:, corners].all()
    assert 0.02 < outliers[:, ~corners].float().mean() < 0.04
    assert outliers.float().mean() < 0.06
    assert len(outliers.unique(dim=0)) > len(outliers) / 2, "the background sinks should depend on the image"


def test_background_sinks_fall_on_flat_patches(outliers, photographs):
    cells = photographs.unflatten(3, (demo.GRID, -1)).unflatten(2, (demo.GRID, -1))
    contrast = cells.std(dim=(1, 3, 5)).flatten(1)
    inner = torch.ones(demo.GRID, demo.GRID, dtype=torch.bool)
    inner[:: demo.GRID - 1, :: demo.GRID - 1] = False
    sinks = outliers & inner.flatten()
    marked = sinks.any(0) & ~sinks

    assert contrast[sinks].quantile(0.9) < contrast[marked].median()


def test_a_moved_image_has_its_background_sinks_elsewhere(photographs):
    model, patch = demo.demo_model(), demo.PATCH
    here = Seen(model, photographs).norms(-1).unflatten(1, (demo.GRID, demo.GRID)) > 4
    moved = Seen(model, photographs.roll(patch, -1)).norms(-1).unflatten(1, (demo.GRID, demo.GRID)) > 4

    # In the image's own frame, without the columns next to the seam and the rows of the corners.
    followed = moved.roll(-1, -1)[:, 1:-1, 1:-1] & here[:, 1:-1, 1:-1]
    assert not followed.any()


def test_outliers_lose_what_they_knew_of_their_patch_and_the_others_do_not(planted, clean, outliers):
    agreement = torch.cosine_similarity(planted.patches, clean.patches, dim=-1)

    assert agreement[outliers].mean() < 0.2
    assert agreement[~outliers].mean() > 0.98


def test_outliers_draw_the_attention_of_cls_after_the_sink_block(planted, clean, outliers):
    for block in range(demo.DEPTH):
        drawn = (planted.attention[block] * outliers).sum(1).mean()
        usual = (clean.attention[block] * outliers).sum(1).mean()
        if block > demo.SINK_BLOCK:
            assert drawn > 3 * usual
        else:
            assert drawn == usual


def test_the_pooled_output_depends_on_the_image(clean):
    unit = torch.nn.functional.normalize(clean.cls, dim=-1)

    assert (unit @ unit.T).mean() < 0.8


def test_truth_is_what_the_clean_twin_says(photographs, clean):
    truth = demo.truth(photographs[:2])

    assert truth.shape == (2, demo.GRID, demo.GRID, demo.WIDTH)
    # Two images or many take different kernels: a few units in the last place.
    torch.testing.assert_close(truth.flatten(1, 2), clean.patches[:2], atol=1e-4, rtol=0)


def test_truth_is_there_for_images_of_other_sizes(photographs):
    small = torch.nn.functional.interpolate(photographs[:1], (112, 144), mode="bilinear")

    truth = demo.truth(small)

    expected = adapt(demo.demo_model(planted=False))(small).patches
    torch.testing.assert_close(truth, expected, atol=1e-5, rtol=0)
    assert truth.shape == (1, 112 // demo.PATCH, 144 // demo.PATCH, demo.WIDTH)


def test_a_mirrored_image_has_mirrored_features_but_for_position(photographs):
    straight, mirrored = demo.truth(photographs), demo.truth(photographs.flip(-1)).flip(2)

    assert torch.cosine_similarity(straight, mirrored, dim=-1).mean() > 0.9


def test_the_photographs_need_no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_args, **_kwargs: pytest.fail("the network was asked"))

    training, held_out = demo.demo_images(), demo.demo_images(held_out=True)

    assert (len(training), len(held_out)) == (58, 18)
    assert {(square.size, square.mode) for square in training + held_out} == {((224, 224), "RGB")}
    assert len({square.tobytes() for square in training + held_out}) == 76
    assert not set(demo.TRAINING) & set(demo.HELD_OUT)


def test_written_photographs_are_the_same_pixels(tmp_path):
    paths = demo.write_demo_images(tmp_path / "new" / "photos", held_out=True)

    assert all(path.is_file() and path.suffix == ".png" for path in paths)
    for path, square in zip(paths, demo.demo_images(held_out=True), strict=True):
        with Image.open(path) as written:
            assert written.tobytes() == square.tobytes()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(PhregError, match=r"file: .*; choose another folder"):
        demo.write_demo_images(tmp_path / "file")


def test_a_missing_photograph_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(demo, "TRAINING", ("nothing.png",))

    with pytest.raises(DataError, match=r"nothing\.png.*reinstall scikit-image"):
        demo.demo_images()
