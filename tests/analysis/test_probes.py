import dataclasses
import json

import numpy as np
import pytest
import torch
from planted import CORNERS, DEPTH, PATCH, WIDTH, Planted, pictures
from torch import nn

from phreg.analysis.class_probe import ORDINARY, OUTLIER, global_probe
from phreg.analysis.norms import outliers
from phreg.analysis.probes import (
    TokenSample,
    position_probe,
    reconstruction_probe,
    sample_tokens,
)
from phreg.errors import DataError, PhregError


class Gather(nn.Module):
    """A block that makes some patches forget themselves and remember the image: artifacts.

    In images whose patches have a mean below `floor` in the second channel it leaves them alone.
    """

    def __init__(self, at, ahead=1, floor=-float("inf")):
        super().__init__()
        self.at, self.ahead, self.floor = [ahead + patch for patch in at], ahead, floor

    def forward(self, tokens):
        tokens = tokens.clone()
        mean = tokens[:, self.ahead :].mean(1)
        marked = 20 * mean
        marked[:, 0] += 100
        for index in self.at:
            tokens[:, index] = torch.where(mean[:, 1:2] >= self.floor, marked, tokens[:, index])
        return tokens


def gathering(*, registers=0, floor=-float("inf")):
    backbone = Planted(registers=registers)
    backbone.model.blocks[DEPTH - 2] = Gather(CORNERS, 1 + registers, floor)
    return backbone


def two_kinds(count=80):
    """Noise that is brighter in every second image, by so little that one patch hardly shows it."""
    labels = torch.arange(count) % 2
    return pictures(count) + 0.15 * labels[:, None, None, None], labels


def sampled(backbone, images, **settings):
    return sample_tokens(backbone, [images], outliers(backbone, [images]), **settings)


def written(tokens, positions, grid=(2, 4), images=8, pixels=None, outlying=None):
    """A sample made by hand: `images` images with the same number of tokens each."""
    count = len(tokens)
    return TokenSample(
        layer=0,
        grid=grid,
        tokens=tokens,
        images=torch.arange(count) * images // count,
        positions=positions,
        pixels=torch.zeros(count, 1) if pixels is None else pixels,
        outliers=torch.zeros(count, dtype=torch.bool) if outlying is None else outlying,
    )


# -- samples


def test_a_sample_keeps_all_outliers_and_some_of_the_other_tokens():
    sample = sampled(Planted({2: (CORNERS, 100.0)}), pictures(), per_image=10)
    for image in range(12):
        own = sample.images == image
        assert sorted(sample.positions[own & sample.outliers].tolist()) == list(CORNERS)
        rest = sample.positions[own & ~sample.outliers].tolist()
        assert len(set(rest)) == len(rest) == 10


def test_a_sample_holds_the_pixels_of_each_tokens_patch():
    images = pictures()
    sample = sampled(Planted(), images)
    for number in (0, 100, 700):
        row, col = divmod(int(sample.positions[number]), 8)
        patch = images[sample.images[number], :, PATCH * row :, PATCH * col :][:, :PATCH, :PATCH]
        assert torch.equal(sample.pixels[number], patch.flatten())


def test_a_sample_holds_tokens_behind_the_final_norm():
    backbone, images = Planted(), pictures()
    sample = sampled(backbone, images)
    assert sample.layer == DEPTH - 1
    expected = backbone(images).patches.flatten(1, 2)[sample.images, sample.positions]
    assert torch.equal(sample.tokens, expected)


def test_tokens_are_read_where_the_outliers_are():
    hidden = Planted({1: (CORNERS, 100.0), 3: (CORNERS, -100.0)})
    assert sampled(hidden, pictures()).layer in (1, 2)
    assert sampled(hidden, pictures(), layer=-1).layer == 3
    assert sampled(hidden, pictures(), layer=-1).outliers.sum() == 12 * len(CORNERS)


def test_a_sample_is_the_same_however_images_are_batched_and_another_with_another_seed():
    backbone, images = Planted({2: (CORNERS, 100.0)}), pictures()
    report = outliers(backbone, [images])
    whole, parts, other = (
        sample_tokens(backbone, batches, report, per_image=10, seed=seed)
        for batches, seed in (([images], 0), (images.split(5), 0), ([images], 1))
    )
    assert torch.equal(whole.positions, parts.positions)
    # Convolutions of one batch size and another round differently.
    torch.testing.assert_close(whole.tokens, parts.tokens)
    assert not torch.equal(whole.positions, other.positions)


def test_samples_of_no_images_or_of_two_sizes_are_refused():
    backbone, report = Planted(), outliers(Planted(), [pictures()])
    with pytest.raises(DataError, match="found no images"):
        sample_tokens(backbone, [], report)
    with pytest.raises(DataError, match="one size"):
        sample_tokens(backbone, [pictures(), pictures(size=16)], report)


# -- position


def test_position_is_told_where_tokens_show_it_and_only_there():
    ramp = torch.linspace(-3, 3, 32)
    lit = pictures(24) * 0.05
    lit[:, 0] += ramp
    lit[:, 1] += ramp[:, None]
    shown, hidden = (position_probe(sampled(Planted(), images)).ordinary for images in (lit, pictures(24)))
    assert shown.tokens == hidden.tokens == 6 * 64
    assert shown.top1 > 0.5
    assert shown.distance < 0.6
    # One in 64 by chance; noise of 384 tokens stays below one in 16 by eight standard deviations.
    assert hidden.top1 < 1 / 16
    # Two random places of an 8x8 grid are 4.2 patches apart on average.
    assert 3 < hidden.distance < 5


def test_distance_is_in_patches():
    positions = torch.arange(8).repeat(40)
    columns = torch.eye(4)[positions % 4]  # tokens that know their column, and not which of two rows
    found = position_probe(written(columns, positions)).ordinary
    assert 0.3 < found.top1 < 0.7
    assert found.distance == pytest.approx(1 - found.top1)


def test_chance_is_what_the_kind_alone_gives_away():
    found = position_probe(sampled(Planted({2: ((0,), 100.0)}), pictures()))
    assert found.outliers.chance == 1
    assert found.outliers.tokens == 3
    assert found.ordinary.chance < 0.1


def test_without_outliers_there_are_no_figures_of_them():
    sample = sampled(Planted(), pictures())
    assert position_probe(sample).outliers is None
    assert reconstruction_probe(sample).outliers is None


def test_one_image_is_not_enough():
    sample = sampled(Planted(), pictures(1))
    for probe in (position_probe, reconstruction_probe):
        with pytest.raises(DataError, match="1 image"):
            probe(sample)


def test_no_image_is_both_trained_and_tested_on():
    # Tokens that name their image: each image's own value cannot be learned from the others.
    images = torch.arange(8).repeat_interleave(40)
    sample = written(torch.eye(8)[images], torch.arange(8).repeat(40), pixels=100.0 * images[:, None].float())
    found = reconstruction_probe(sample, penalty=1e-6)
    assert found.trained == 6 * 40
    assert found.ordinary.tokens == 2 * 40
    assert found.ordinary.error > 50


# -- pixels


def test_pixels_that_tokens_hold_are_reconstructed_and_others_are_not():
    noise = torch.randn(320, 3, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(8).repeat(40)
    holding = written(noise @ torch.tensor([[1.0, 2, 0], [0, 1, 0], [3, 0, 1]]), positions, pixels=noise)
    found = reconstruction_probe(holding, penalty=0.0).ordinary
    assert found.error < 1e-4  # fp32 of values around 1
    other = written(noise.roll(7, 0), positions, pixels=noise)
    missed = reconstruction_probe(other).ordinary
    assert missed.error == pytest.approx(missed.chance, rel=0.1)


def test_the_error_is_the_length_of_the_difference():
    tokens = torch.zeros(320, 2)
    pixels = torch.tensor([[3.0, 4.0], [-3.0, -4.0]]).repeat(160, 1)
    found = reconstruction_probe(written(tokens, torch.arange(8).repeat(40), pixels=pixels)).ordinary
    assert found.error == found.chance == pytest.approx(5)


def test_artifacts_hold_less_of_their_patch_than_ordinary_tokens():
    found = reconstruction_probe(sampled(gathering(), pictures(40)))
    assert found.ordinary.error < 0.9 * found.ordinary.chance
    assert found.outliers.error > 0.95 * found.outliers.chance


def test_local_probes_are_plain_json_and_repeatable():
    sample = sampled(gathering(), pictures())
    for probe in (position_probe, reconstruction_probe):
        first, again = (json.dumps(probe(sample).to_json(), allow_nan=False) for _ in range(2))
        assert first == again
        assert json.loads(first)["outliers"]["tokens"] == 12


# -- the whole image


@pytest.fixture(scope="module")
def probed():
    backbone, (images, labels) = gathering(registers=2), two_kinds()
    return global_probe(backbone, images.split(16), labels, outliers(backbone, [images]))


def test_artifacts_tell_what_ordinary_tokens_and_idle_ones_do_not(probed):
    found = {token.token: token for token in probed.tokens}
    assert list(found) == [ORDINARY, OUTLIER, "CLS", "register 1", "register 2"]
    assert found[OUTLIER].mean > 0.9
    assert found[ORDINARY].mean < 0.8
    # These are the same for all images; half of them are of each class, in every seed.
    assert found["CLS"].mean == found["register 1"].mean == 0.5
    assert probed.chance == 0.5


def test_figures_come_with_their_standard_deviation_over_seeds(probed):
    ordinary = probed.tokens[0]
    assert len(ordinary.values) == len(probed.seeds) == 5
    assert ordinary.mean == pytest.approx(np.mean(ordinary.values))
    assert ordinary.std == pytest.approx(np.std(ordinary.values, ddof=1))
    assert json.loads(json.dumps(probed.to_json(), allow_nan=False))["tokens"][0]["token"] == ORDINARY


def test_images_without_outliers_are_left_out_of_their_probe_and_counted():
    images, labels = two_kinds(40)
    plain = Planted()
    with torch.no_grad():
        means = plain(images, layer=0, norm=False).patches[..., 1].mean((1, 2))
    backbone = gathering(floor=means.median().item())
    found = global_probe(backbone, [images], labels, outliers(backbone, [images]), seeds=(0,))
    by_token = {token.token: token for token in found.tokens}
    assert 15 <= found.without_outliers <= 25
    assert by_token[OUTLIER].images == 40 - found.without_outliers
    assert by_token[ORDINARY].images == found.images == 40
    assert by_token[OUTLIER].std is None


def test_a_model_without_artifacts_has_no_figure_of_them():
    images, labels = two_kinds(16)
    found = global_probe(Planted(), [images], labels, outliers(Planted(), [images]), seeds=(0,))
    assert [token.token for token in found.tokens] == [ORDINARY, "CLS"]
    assert found.without_outliers == 16


def test_a_model_without_a_cls_token_has_no_figure_of_it():
    backbone = Planted()
    backbone.model.extra = nn.Parameter(torch.empty(1, 0, WIDTH))
    backbone.spec = dataclasses.replace(backbone.spec, num_prefix=0)
    backbone.model.norm.forward = lambda tokens: tokens  # what follows reads place 0 of any sequence
    images, labels = two_kinds(16)
    found = global_probe(backbone, [images], labels, outliers(backbone, [images]), seeds=(0,))
    assert [token.token for token in found.tokens] == [ORDINARY]


def test_labels_may_be_any_numbers(probed):
    backbone, (images, labels) = gathering(registers=2), two_kinds()
    found = global_probe(backbone, [images], 700 - 3 * labels, outliers(backbone, [images]))
    assert found.classes == 2
    assert found.tokens[1].mean > 0.9


def test_labels_that_do_not_fit_are_refused():
    backbone, report = Planted(), outliers(Planted(), [pictures()])
    with pytest.raises(DataError, match="10 labels, found 12 images"):
        global_probe(backbone, [pictures()], torch.arange(10) % 2, report)
    with pytest.raises(DataError, match="a single image"):
        global_probe(backbone, [pictures()], torch.tensor([0] * 11 + [1]), report)
    with pytest.raises(DataError, match="found 0 images"):
        global_probe(backbone, [], torch.zeros(0, dtype=torch.long), report)


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(PhregError, match="block 9"):
        sampled(Planted(), pictures(), layer=9)
