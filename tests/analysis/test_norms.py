import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import CORNERS, DEPTH, Planted, pictures

from phreg.analysis.gap import bimodality, outlier_mask, outlier_threshold, wider_of
from phreg.analysis.norms import NormReport, Norms, norm_report, outliers
from phreg.errors import DataError, PhregError

REAL = Path(__file__).parents[3] / "shared" / "data"

UNIMODAL = {
    "normal": lambda rng, n: rng.normal(10, 1, n),
    "narrow log-normal": lambda rng, n: rng.lognormal(3, 0.1, n),
    "wide log-normal": lambda rng, n: rng.lognormal(3, 1, n),
    "gamma": lambda rng, n: rng.gamma(5, 1, n),
    "exponential": lambda rng, n: rng.gamma(1, 1, n),
    "chi of a wide random net": lambda rng, n: np.sqrt(rng.chisquare(192, n)),
    "uniform": lambda rng, n: rng.uniform(1, 2, n),
    "heavy-tailed (log-Laplace)": lambda rng, n: np.exp(rng.laplace(3, 0.2, n)),
    "heavier-tailed (Pareto)": lambda rng, n: 10 * (1 + rng.pareto(3, n)),
}


def bulk(count: int, seed: int = 0, std: float = 0.12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).lognormal(3, std, count)).float()


@pytest.mark.parametrize("count", [64, 1000, 20_000])
@pytest.mark.parametrize("name", UNIMODAL)
def test_norms_of_one_kind_show_no_gap(name: str, count: int):
    # The heaviest tail here, Pareto's, has a false gap about once in 10 000 samples.
    found = [
        outlier_threshold(torch.from_numpy(UNIMODAL[name](np.random.default_rng(seed), count)))
        for seed in range(20)
    ]
    assert found == [None] * 20


@given(
    count=st.integers(100, 2000),
    share=st.floats(0.02, 0.15),
    times=st.one_of(st.floats(5, 1000), st.floats(0.001, 0.2)),
    seed=st.integers(0, 1000),
)
def test_planted_outliers_are_marked_exactly(count: int, share: float, times: float, seed: int):
    norms = bulk(count, seed)
    planted = torch.arange(count) < max(10, math.ceil(share * count))
    norms = torch.where(planted, norms * times, norms)

    gap = outlier_threshold(norms)

    assert gap is not None
    assert gap.side == ("high" if times > 1 else "low")
    # Up to a tenth of the outliers may lie inside the stretch; its middle still separates all of them.
    assert torch.equal(outlier_mask(norms, gap), planted)


def test_one_token_counts_as_an_outlier_only_when_it_stands_out_much_further_than_many():
    ordinary, width = bulk(1000), 8 * 0.12
    many = torch.full((50,), float(ordinary.max()) * math.exp(width))
    assert outlier_threshold(torch.cat([ordinary, many])) is not None
    assert outlier_threshold(torch.cat([ordinary, many[:1]])) is None
    assert outlier_threshold(torch.cat([ordinary, many[:1] * 10])) is not None


def test_a_few_tokens_inside_the_gap_do_not_close_it():
    # As with 900 photographs: no two neighbouring norms are far apart, and yet there are two kinds.
    strays = torch.logspace(math.log10(35), math.log10(250), 40)
    norms = torch.cat([bulk(20_000), 500 * bulk(400) / 20, strays])
    gap = outlier_threshold(norms)
    assert gap is not None
    assert 60 < gap.threshold < 200
    assert float(outlier_mask(norms, gap).float().mean()) == pytest.approx(0.02, abs=0.002)


def test_a_second_mode_that_overlaps_the_first_is_no_gap():
    # Artifacts in the making, as in the block before they emerge: bulk at 20, a hump at 45, plenty between.
    assert outlier_threshold(torch.cat([bulk(20_000), 45 / 20 * bulk(400, std=0.25)])) is None


def test_two_kinds_of_tokens_of_equal_number_are_not_artifacts():
    assert outlier_threshold(torch.cat([bulk(500), 50 * bulk(500)])) is None


@given(factor=st.floats(1e-4, 1e4))
def test_the_gap_scales_with_the_norms(factor: float):
    norms = torch.cat([bulk(500), 20 * bulk(20)])
    gap, scaled = outlier_threshold(norms), outlier_threshold(norms * factor)
    assert gap is not None
    assert scaled is not None
    # fp32 norms: seven digits.
    assert scaled.threshold == pytest.approx(gap.threshold * factor, rel=1e-4)


@pytest.mark.parametrize("count", [1, 4, 100])
def test_equal_norms_show_no_gap_however_many(count: int):
    assert outlier_threshold(torch.full((count,), 7.0)) is None


def test_norms_equal_up_to_rounding_show_no_gap():
    assert outlier_threshold(torch.tensor([8.0] * 90 + [8.0 * (1 + 1e-6)] * 10)) is None


def test_dead_tokens_are_low_outliers():
    norms = torch.cat([bulk(500), torch.zeros(10)])
    gap = outlier_threshold(norms)
    assert gap is not None
    assert torch.equal(outlier_mask(norms, gap), norms == 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norms_that_are_not_finite_are_refused(value: float):
    with pytest.raises(PhregError, match="2 of which are not finite"):
        outlier_threshold(torch.tensor([1.0, value, 2.0, value]))


def half_repaired() -> tuple[torch.Tensor, torch.Tensor]:
    """Makes norms of 1000 tokens before a repair and after it.

    Of 50 artifacts 7 are left, spread from the longest ordinary norm to 124.
    """
    ordinary = bulk(950)
    before = torch.cat([ordinary, torch.full((50,), 124.0)])
    left = torch.logspace(math.log10(float(ordinary.max())), math.log10(124), 8)[1:]
    return before, torch.cat([ordinary, bulk(43, seed=1), left])


def test_artifacts_that_a_repair_left_are_counted_by_the_gap_of_the_original():
    before, after = half_repaired()
    original, own = outlier_threshold(before), outlier_threshold(after)
    assert original is not None
    beyond = int((after > original.threshold).sum())
    assert 0 < beyond < 7, "some are left on either side of the original's threshold"
    assert int(outlier_mask(after, own).sum()) < beyond, "by themselves they are no kind of their own"

    assert wider_of(after, own, original) is original
    assert wider_of(before, original, own) is original, "a model's own gap counts where it finds more"
    assert wider_of(after, own, None) is own


def test_norms_that_have_moved_as_a_whole_are_not_judged_by_the_gap_of_the_original():
    before, _ = half_repaired()
    original = outlier_threshold(before)
    assert original is not None
    assert wider_of(10 * bulk(1000), None, original) is None


def test_a_report_of_a_changed_model_counts_what_lies_beyond_the_gaps_of_the_original_in_each_block():
    before, after = half_repaired()
    backbone = Planted({})
    clean, specials = bulk(1000, seed=2), torch.ones(2, 2, 10, len(backbone.special_tokens))

    def report(inner: torch.Tensor, last: torch.Tensor, original: NormReport | None = None) -> NormReport:
        blocks = torch.stack([inner, last]).reshape(1, 2, 10, 10, 10).expand(2, -1, -1, -1, -1)
        return norm_report(backbone, Norms(blocks, specials), [0, 1], 2, original)

    original = report(before, clean)
    found = report(after, clean, original)

    gap = original.blocks[0].gap
    assert gap is not None
    beyond = after > gap.threshold
    for blocks in (found.blocks, found.normed):
        assert [block.outlier_rate for block in blocks] == pytest.approx([float(beyond.sum()) / 1000, 0])
        assert blocks[0].gap == gap
    assert blocks[0].outlier_norm == float(after[beyond].median())
    assert torch.equal(found.positions[0], beyond.reshape(10, 10, 10).float().mean(dim=0))
    assert report(after, clean).blocks[0].outlier_rate < found.blocks[0].outlier_rate


def test_a_changed_model_is_measured_against_its_original():
    original = outliers(Planted({1: (CORNERS, 300.0)}), [pictures()])
    gap = original.blocks[-1].gap
    assert gap is not None
    weak = Planted({1: (CORNERS[:1], 1.2 * gap.threshold)})
    alone, compared = outliers(weak, [pictures(1)]), outliers(weak, [pictures(1)], original=original)
    assert alone.outlier_rate == 0, "one token does not stand out far enough for a gap of its own"
    assert compared.outlier_rate == 1 / 64


def test_no_gap_marks_no_token():
    assert not outlier_mask(torch.ones(2, 3), None).any()


def test_a_model_with_artifacts_is_reported_with_their_share_block_and_positions():
    report = outliers(Planted({2: (CORNERS, 100.0)}), pictures().split(5), show=3)

    assert report.outlier_rate == pytest.approx(4 / 64)
    assert report.emergence_block == 2
    assert [block.gap is not None for block in report.blocks] == [False, False, True, True]
    expected = torch.zeros(8, 8)
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 1
    assert torch.equal(report.position_histogram, expected)
    assert report.images == 12
    assert report.maps.shape == (3, DEPTH, 8, 8)
    assert report.blocks[-1].outlier_norm == pytest.approx(100, abs=3)


def test_a_model_without_artifacts_is_reported_clean():
    report = outliers(Planted(), [pictures()])
    assert report.outlier_rate == 0
    assert report.emergence_block is None
    assert not report.position_histogram.any()


def test_the_final_norm_turns_the_longest_tokens_into_the_shortest():
    report = outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])
    before, after = report.blocks[-1], report.normed[-1]
    assert before.gap is not None
    assert after.gap is not None
    assert (before.gap.side, after.gap.side) == ("high", "low")
    assert after.outlier_rate == before.outlier_rate


def test_artifacts_hidden_in_inner_blocks_are_found():
    report = outliers(Planted({1: (CORNERS, 100.0), 3: (CORNERS, -100.0)}), [pictures()])
    assert report.outlier_rate == 0
    assert report.emergence_block == 1
    assert report.position_histogram[0, 0] == 1


def test_a_gap_that_closes_again_is_not_where_later_artifacts_emerge():
    pushes = {0: ((5,), 100.0), 1: ((5,), -100.0), 2: (CORNERS, 100.0)}
    assert outliers(Planted(pushes), [pictures()]).emergence_block == 2


def test_registers_and_cls_are_not_counted():
    bare, with_registers = (
        outliers(Planted({2: (CORNERS, 100.0)}, registers=n), [pictures()]) for n in (0, 3)
    )
    found, expected = with_registers.to_json(), bare.to_json()
    assert len(found.pop("tokens")) == 4
    assert len(expected.pop("tokens")) == 1
    assert found == expected


def test_cls_and_registers_are_measured_apart_from_patches_and_by_name():
    report = outliers(Planted(registers=2), [pictures()], layers=[0, 3])
    assert [token.name for token in report.tokens] == ["CLS", "register 1", "register 2"]
    for token in report.tokens:
        # The length of 16 values of 1e4, the same in every image, which the final norm's LayerNorm makes 0.
        assert token.quantiles == ((4e4,) * 9,) * 2
        assert token.normed == ((0.0,) * 9,) * 2
    assert max(report.blocks[-1].quantiles) < 100


def test_what_one_token_does_in_one_block_is_said_of_that_token_and_block():
    backbone = Planted({2: ((), 0.0)}, registers=1)
    backbone.blocks[2].at, backbone.blocks[2].strength = [1], 3e4  # in front of the patches: the register
    cls, register = outliers(backbone, [pictures()]).tokens
    assert {row[0] for row in cls.quantiles} == {4e4}
    grown = math.sqrt(15 + 16) * 1e4  # one value of sixteen went from 1e4 to 4e4
    assert [row[0] for row in register.quantiles] == pytest.approx([4e4, 4e4, grown, grown])


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_histogram_counts_every_token_once_where_its_norm_lies(scale: str):
    report = outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])
    histogram = getattr(report.blocks[-1], scale)
    edges = np.array(histogram.edges)
    assert len(edges) == len(histogram.counts) + 1
    assert sum(histogram.counts) == 12 * 64
    # The first and last norm, but for fp64 rounding in the logarithm.
    assert edges[[0, -1]] == pytest.approx(np.array(report.blocks[-1].quantiles)[[0, -1]])
    steps = np.diff(np.log(edges) if scale == "log" else edges)
    np.testing.assert_allclose(steps, steps[0])
    beyond = edges[:-1] > report.blocks[-1].gap.threshold
    assert sum(np.array(histogram.counts)[beyond]) == 12 * 4


def test_dead_tokens_fall_into_the_first_bin_of_a_histogram_that_still_shows_the_others():
    backbone = Planted()
    with torch.no_grad():
        backbone.model.embed.weight.mul_(1e-30)
        backbone.model.embed.bias.zero_()
        for block in backbone.blocks:
            block.at, block.strength = list(range(1, 61)), 2.0
    histogram = outliers(backbone, [pictures()]).blocks[-1].log
    assert histogram.low == pytest.approx(8e-6)
    assert (histogram.counts[0], histogram.counts[-1]) == (4 * 12, 60 * 12)


# Sample estimates from 20 000 norms; their own standard deviation over seeds is below a hundredth.
@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda rng: rng.normal(0, 0.3, 20_000), 1 / 3),
        (lambda rng: rng.uniform(0, 1, 20_000), 5 / 9),
        (lambda rng: rng.choice([0.0, 3.0], 20_000, p=[0.98, 0.02]), 1),
    ],
    ids=["normal", "uniform", "two points"],
)
def test_bimodality_is_what_it_is_known_to_be_of_log_norms(draw, expected: float):
    norms = torch.from_numpy(np.exp(draw(np.random.default_rng(0))))
    assert bimodality(norms) == pytest.approx(expected, abs=0.01)
    # Log norms only move when norms are scaled; fp64.
    assert bimodality(100 * norms) == pytest.approx(bimodality(norms))


def test_bimodality_of_a_small_sample_is_that_of_its_bias_corrected_moments():
    # Worked out by hand from logs 0, 0, 0, 1: g = 2, k = 4, 3 (n - 1)^2 / ((n - 2)(n - 3)) = 13.5.
    assert bimodality(torch.tensor([0.0, 0.0, 0.0, 1.0]).exp()) == pytest.approx(5 / 17.5)


@pytest.mark.parametrize("norms", [torch.full((100,), 7.0), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(9)])
def test_norms_of_one_size_and_too_few_are_not_bimodal(norms: torch.Tensor):
    assert bimodality(norms) == 0


def test_artifacts_make_a_block_more_bimodal():
    report = outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])
    before, after = report.blocks[1].bimodality, report.blocks[2].bimodality
    assert before < 5 / 9 < after


def test_how_images_are_batched_does_not_matter():
    backbone = Planted({2: (CORNERS, 100.0)})
    at_once, one_by_one = outliers(backbone, [pictures()]), outliers(backbone, pictures().split(1))
    assert at_once.outlier_rate == one_by_one.outlier_rate
    # Convolutions of one image and of twelve round differently.
    torch.testing.assert_close(at_once.maps, one_by_one.maps)


def test_only_the_blocks_asked_for_are_measured_in_order():
    report = outliers(Planted({2: (CORNERS, 100.0)}), [pictures()], layers=[-1, 1, 3])
    assert [block.block for block in report.blocks] == [1, 3]
    assert report.emergence_block == 3


def test_the_report_is_plain_json():
    report = outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])
    read = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert read["outlier_rate"] == pytest.approx(4 / 64)
    assert read["emergence_block"] == 2
    assert read["blocks"][2]["gap"]["side"] == "high"
    assert len(read["position_histogram"]) == 8


def test_no_images_are_refused():
    with pytest.raises(DataError, match="found no images"):
        outliers(Planted(), [])


def test_images_of_two_sizes_are_refused():
    with pytest.raises(DataError, match="8x8 and 4x4"):
        outliers(Planted(), [pictures(), pictures(size=16)])


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(PhregError, match="block 4 asked of"):
        outliers(Planted(), [pictures()], layers=[4])


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="the real weights and images are not beside this repository")
def test_the_known_artifacts_of_a_real_model_are_found():
    timm = pytest.importorskip("timm")
    from phreg.backbones.resolve import adapt
    from phreg.data.crops import Crops, normalise
    from phreg.data.sources import open_images

    folder = REAL / "models" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    backbone = adapt(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    source = open_images(str(REAL / "imagenet_samples"))
    crops = Crops(source, 224, crop="centre")
    keys = [(0, index) for index in range(0, len(source), 18)]
    batches = [
        normalise(crops.batch(keys[start : start + 10]).images, (0.5,) * 3, (0.5,) * 3)
        for start in range(0, 50, 10)
    ]

    report = outliers(backbone, batches)

    # Measured on another sample of the same images: 1.98 %, in a gap around 100. Four corners are 2.04 %.
    assert report.outlier_rate == pytest.approx(0.0198, abs=0.0006)
    assert report.emergence_block == 7
    gap, normed = report.blocks[-1].gap, report.normed[-1].gap
    assert gap is not None
    assert normed is not None
    assert 85 < gap.threshold < 120
    assert (gap.side, normed.side) == ("high", "low")
    assert float(report.position_histogram[[0, 0, -1, -1], [0, -1, 0, -1]].min()) > 0.9
