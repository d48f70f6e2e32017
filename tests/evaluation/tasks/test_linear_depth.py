import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.data import stereo_motorcycle

from phreg.backbones.resolve import adapt
from phreg.errors import DataError, PhregError
from phreg.evaluation.datasets.augmentation import CropConfig
from phreg.evaluation.datasets.depth import open_depths
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.tasks import linear_depth
from phreg.evaluation.tasks.depth_head import DepthHead, gradient_loss, scale_loss
from phreg.evaluation.tasks.linear_depth import PROTOCOLS, Settings
from phreg.evaluation.tasks.table import resolve_settings

FOCAL, BASELINE, OFFSET = 994.978, 0.193001, 31.086
"""Pixels, metres and pixels, of the motorcycle's cameras, as scikit-image documents them."""


@pytest.fixture
def motorcycle(tmp_path):
    """A photograph and its measured depths, 2 to 5 m, to learn from and to be tested on."""
    from PIL import Image

    picture, _, disparity = (values[::2, ::2] for values in stereo_motorcycle())
    depth = FOCAL * BASELINE / (disparity + OFFSET)
    depth[~np.isfinite(disparity)] = np.nan
    for split in ("train", "val"):
        for kind in ("images", "depths"):
            (tmp_path / "set" / kind / split).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "set" / "images" / split / "motorcycle.png")
        np.save(tmp_path / "set" / "depths" / split / "motorcycle.npy", depth)
    return tmp_path / "set"


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=4)


SMALL = {
    "reading": FeatureConfig(size=64),
    "max_depth": 6,
    "steps": 80,
    "lr": 0.1,
    "warmup": 5,
    "scale_only": 20,
    "train_batch_size": 1,
}


def test_a_linear_head_learns_the_depths_of_a_photograph(reader, motorcycle):
    found = linear_depth.run(reader, str(motorcycle), Settings(**SMALL), seed=0)
    depth = np.load(motorcycle / "depths" / "val" / "motorcycle.npy")
    mean = math.sqrt(np.nanvar(depth))  # the error of a head that knows nothing but the mean depth
    assert next(iter(found.figures)) == "rmse"
    assert found.figures["rmse"] < 0.95 * mean  # the model's weights are random, and most it sees is colour
    assert set(found.figures) == {"rmse", "abs_rel", "log10", "delta1", "delta2", "delta3"}
    assert found.notes["images"] == 1
    # What the stereo rig did not see is NaN, and counts no more than what is beyond the range.
    known = int((depth < SMALL["max_depth"]).sum())
    assert found.counts == {key: {"pixels": known, "images": 1} for key in found.figures}


def test_crops_teach_too_and_the_error_falls_with_training(reader, motorcycle):
    crop = CropConfig(size=48, scale=(1.0, 1.3), colour=0, max_class_share=1.0)
    cropped = SMALL | {"augment": True, "crop": crop, "max_depth": 10, "scale_only": 10}  # 5 m at first
    as_it_starts = {"steps": 1, "lr": 1e-6}
    rmse = [
        linear_depth.run(reader, str(motorcycle), Settings(**cropped | changes), 0).figures["rmse"]
        for changes in (as_it_starts, {"steps": 40})
    ]
    assert rmse[1] < 0.7 * rmse[0]


def test_pixels_at_the_baselines_artifacts_are_measured_on_their_own(reader, motorcycle, monkeypatch):
    places = torch.zeros(8, 12, dtype=torch.bool)
    places[4:] = True
    monkeypatch.setattr("phreg.evaluation.tasks.linear_depth.artifact_places", lambda *_: [places])
    found = linear_depth.run(reader, str(motorcycle), Settings(**SMALL | {"steps": 2}), 0)
    assert found.figures["artifact_rmse"] > 0
    # Half of the picture, less what the stereo rig did not see.
    assert 0.4 < found.notes["pixels_at_artifacts"] / (250 * 371) <= 0.5
    assert found.counts["artifact_rmse"] == {"pixels": found.notes["pixels_at_artifacts"], "images": 1}
    places[:] = True
    found = linear_depth.run(reader, str(motorcycle), Settings(**SMALL | {"steps": 2}), 0)
    assert found.figures["artifact_rmse"] == pytest.approx(found.figures["rmse"], rel=1e-9)
    places[:] = False
    found = linear_depth.run(reader, str(motorcycle), Settings(**SMALL | {"steps": 2}), 0)
    assert "artifact_rmse" not in found.figures
    assert "no depth that counts" in found.notes["left_out"]["artifact_rmse"]


def test_the_mirror_image_has_its_say(reader, motorcycle):
    rmse = {
        flip: linear_depth.run(
            reader, str(motorcycle), Settings(**SMALL | {"steps": 30}, flip=flip), 0
        ).figures["rmse"]
        for flip in (True, False)
    }
    assert rmse[True] != rmse[False]
    # Mirrored back to front, it would spoil the mean instead of smoothing it.
    assert rmse[True] < 1.1 * rmse[False]


def test_depths_in_another_unit_are_an_error_that_says_so(reader, motorcycle):
    with pytest.raises(DataError, match="correct unit"):
        linear_depth.run(reader, str(motorcycle), Settings(**SMALL | {"steps": 1}, unit=1000), 0)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"min_depth": 5, "max_depth": 2}, "min_depth should be less than max_depth, found 5 and 2"),
     ({"bins": 1}, "bins: should be greater than or equal to 2")],
)  # fmt: skip
def test_depths_that_leave_nothing_to_learn_are_refused(wrong, named):
    with pytest.raises(PhregError, match=named):
        resolve_settings("linear-depth", wrong)


def test_training_depths_of_which_none_counts_are_refused_before_any_training(reader, motorcycle):
    path = motorcycle / "depths" / "train" / "motorcycle.npy"
    np.save(path, np.zeros_like(np.load(path)))
    with pytest.raises(DataError, match="none of the 1 training pictures"):
        linear_depth.run(reader, str(motorcycle), Settings(**SMALL), 0)


def test_depths_are_the_mean_of_bins_by_their_shares():
    bins = torch.tensor([1.0, 2.0, 4.0])
    head = DepthHead(2, bins, seed=0)
    with torch.no_grad():
        head.score.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1]]).view(3, 2, 1, 1))
    features = torch.tensor([0.4, 0.9]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    expected = (0.5 * 1 + 1.0 * 2 + 0.1 * 4) / (0.5 + 1.0 + 0.1)  # scores, floored at 0, plus 0.1
    torch.testing.assert_close(head(features), torch.full((1, 1, 12, 12), expected))


@given(seed=st.integers(0, 1000), factor=st.floats(0.5, 2))
def test_a_wrong_scale_costs_only_its_share(seed, factor):
    errors = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    counted = errors.abs() < 1.5
    valid = errors[counted].double()
    expected = (valid.var() + 0.15 * valid.mean() ** 2).sqrt()
    torch.testing.assert_close(scale_loss(errors, counted).double(), expected, rtol=1e-5, atol=0)  # fp32
    flat = torch.full((1, 1, 9, 9), math.log(factor))
    everywhere = torch.ones_like(flat, dtype=torch.bool)
    # atol: the root is floored at 1e-6, and fp32 leaves a variance of about 1e-14.
    expected = torch.tensor(math.sqrt(0.15) * abs(math.log(factor)))
    torch.testing.assert_close(scale_loss(flat, everywhere), expected, rtol=1e-4, atol=2e-6)
    assert gradient_loss(flat, everywhere) == 0


def test_gradients_are_compared_between_pixels_that_both_count():
    errors = torch.zeros(1, 1, 16, 16)
    errors[..., 8:] = 1
    everywhere = torch.ones_like(errors, dtype=torch.bool)
    # One edge across 16, 8, 4 and 2 rows, over 256, 64, 16 and 4 pixels.
    torch.testing.assert_close(
        gradient_loss(errors, everywhere), torch.tensor(16 / 256 + 8 / 64 + 4 / 16 + 2 / 4)
    )
    unknown = everywhere.clone()
    unknown[..., 8:] = False
    assert gradient_loss(errors, unknown) == 0


def test_pictures_of_unknown_depth_teach_nothing():
    errors = torch.randn(1, 1, 9, 9, requires_grad=True)
    nothing = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    loss = scale_loss(errors, nothing) + gradient_loss(errors, nothing)
    loss.backward()
    assert loss == 0
    assert (errors.grad == 0).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_are_whole_settings(protocol):
    settings = resolve_settings("linear-depth", {"steps": 7}, protocol)
    assert settings.augment
    assert settings.steps == 7
    assert (settings.reading.size, settings.reading.fit) == (None, "centred")


def test_the_head_of_least_abs_rel_is_kept_and_the_last_is_told_too(reader, motorcycle):
    # The rate grows until the head is spoilt, so that the best comes before the last.
    settings = Settings(**SMALL | {"steps": 24, "lr": 3.0, "warmup": 24}, keep_best=4)
    kept = linear_depth.run(reader, str(motorcycle), settings, seed=0)
    last = linear_depth.run(reader, str(motorcycle), settings.model_copy(update={"keep_best": None}), 0)
    told = kept.notes["kept"]
    assert told["last"] == last.figures
    assert told["by"] == "least abs_rel on the test pictures, of every 4 steps"
    assert told["step"] in range(4, 25, 4)
    assert kept.figures["abs_rel"] <= last.figures["abs_rel"]
    assert "kept" not in last.notes
    assert (kept.figures == last.figures) == (told["step"] == 24)


def test_a_test_of_a_head_on_its_way_does_not_change_its_training(reader, motorcycle):
    settings = Settings(**SMALL | {"steps": 6}, batch_norm=True)
    often = linear_depth.run(reader, str(motorcycle), settings.model_copy(update={"keep_best": 2}), 0)
    assert often.notes["kept"]["last"] == linear_depth.run(reader, str(motorcycle), settings, 0).figures


def test_without_the_cls_a_head_has_half_the_channels(reader, motorcycle):
    settings = Settings(**SMALL | {"steps": 1})
    channels = {}
    for alone in (False, True):
        batches = linear_depth._cached(
            reader,
            open_depths(motorcycle, "train"),
            settings.model_copy(update={"class_token": not alone}),
            seed=0,
        )
        channels[alone] = next(batches)[0].shape[1]
    assert channels == {False: 64, True: 32}


def test_a_remark_of_the_data_is_in_every_result(reader, motorcycle, monkeypatch):
    def remarked(*args, **kwargs):
        return replace(open_depths(*args, **kwargs), remark="few pictures")

    monkeypatch.setattr(linear_depth, "open_depths", remarked)
    found = linear_depth.run(reader, str(motorcycle), Settings(**SMALL | {"steps": 1}), seed=0)
    assert found.notes["limits"] == ["few pictures"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_runs_on_sizes_that_are_no_whole_patches(reader, motorcycle, protocol):
    few = {"steps": 3, "warmup": 1, "scale_only": 1, "train_batch_size": 2, "reading.size": 60}
    settings = resolve_settings("linear-depth", few | {"crop.size": (44, 53)}, protocol)
    found = linear_depth.run(reader, str(motorcycle), settings, seed=0)
    assert math.isfinite(found.figures["rmse"])
    assert found.counts["rmse"]["images"] == 1
    depths = linear_depth._crops(reader, open_depths(motorcycle, "train"), settings, seed=0)
    features, truth = next(depths)
    assert truth.shape == (2, 1, 44, 53), "to the pixel"
    assert features.shape[-2:] == (6, 7), "of the padded crop"


def test_what_each_picture_adds_makes_up_the_figures(reader, motorcycle, whole_sample):
    for kind, suffix in (("images", "png"), ("depths", "npy")):
        folder = motorcycle / kind / "val"
        (folder / f"again.{suffix}").write_bytes((folder / f"motorcycle.{suffix}").read_bytes())
    depths = motorcycle / "depths" / "val" / "again.npy"
    np.save(depths, np.load(depths) + 0.5)
    found = linear_depth.run(reader, str(motorcycle), Settings(**SMALL | {"steps": 1}), seed=0)
    whole_sample(found, "rmse", "abs_rel", "delta1")
