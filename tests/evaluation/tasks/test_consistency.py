from pathlib import Path

import pytest
import torch
from families import FAMILIES

import phreg
from phreg.backbones.resolve import adapt
from phreg.data.sources import Subset
from phreg.errors import PhregError
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.tasks import consistency
from phreg.evaluation.tasks.consistency import Settings

FEW = Settings(count=4, shift=1, views=3)


@pytest.fixture
def reader(tiny, tmp_path):
    def make(model=None, reference=None):
        backbone = adapt(tiny() if model is None else model)
        return FeatureReader(backbone, "tiny", FeatureCache(tmp_path), batch_size=3, reference=reference)

    return make


def without_places(model):
    """A model that knows nothing of position, and whose patches see only themselves."""
    with torch.no_grad():
        model.pos_embed.zero_()
        for block in model.blocks:
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
    return model


def test_a_model_that_reads_each_patch_alone_is_steady_under_shift_and_views(reader, tiny, photos):
    found = consistency.run(reader(without_places(tiny())), str(photos), FEW, seed=0)
    # A mirrored patch is another patch, so only the shift is exact; features agree to fp32 rounding.
    assert found.figures["shift_agreement"] == pytest.approx(1, abs=1e-5)
    assert found.figures["flip_agreement"] < 1
    assert found.notes["images"] == 4
    # 4x4 patches an image, of which windows a patch apart share 3x3.
    assert found.counts["shift_agreement"] == {"patches": 4 * 9, "images": 4}
    assert found.counts["outlier_rate"] == found.counts["flip_agreement"] == {"patches": 4 * 16, "images": 4}
    assert set(found.counts) == set(found.figures)


def test_a_model_with_places_is_less_steady(reader, photos):
    found = consistency.run(reader(), str(photos), FEW, seed=0)
    assert found.figures["shift_agreement"] < 0.999
    assert found.figures["outlier_rate"] == 0
    assert found.detail["worst_percent"]["shift"] <= found.figures["shift_agreement"]


def test_the_reference_is_the_baselines(reader, tiny, photos):
    own = consistency.run(reader(), str(photos), FEW, seed=0)
    other = tiny()
    torch.nn.init.normal_(other.blocks[2].mlp.fc2.weight)
    against = consistency.run(reader(reference=adapt(other).eval()), str(photos), FEW, seed=0)
    assert against.figures["reference_agreement"] < own.figures["reference_agreement"]
    assert against.figures["shift_agreement"] == own.figures["shift_agreement"]


def test_artifacts_that_a_repair_left_are_counted_by_the_gap_of_the_baseline(reader, tiny, photos):
    def pushed(all_images, strength=16.0):
        model = tiny()

        def push(_mlp, _inputs, tokens):
            tokens = tokens.clone()
            tokens[slice(None) if all_images else 0, model.num_prefix_tokens] += strength
            return tokens

        model.blocks[-1].mlp.register_forward_hook(push)
        return model

    student, original = pushed(all_images=False), adapt(pushed(all_images=True)).eval()
    few = FEW.model_copy(update={"count": 3})  # one batch
    compared = consistency.run(reader(student, original), str(photos), few, seed=0).figures
    assert compared["outlier_rate"] == pytest.approx(1 / (3 * 16))
    assert consistency.run(reader(student), str(photos), few, seed=0).figures["outlier_rate"] == 0


def test_pictures_are_taken_from_the_whole_folder(reader, photos, monkeypatch):
    asked = []
    read = Subset.read
    monkeypatch.setattr(
        Subset, "read", lambda self, index: asked.append(self.name(index)) or read(self, index)
    )
    consistency.run(reader(), str(photos), Settings(count=8, shift=1, views=1), seed=0)
    assert [Path(name).stem for name in asked] == ["00", "01", "03", "04", "06", "07", "09", "10"]


def test_pictures_have_the_models_own_shape(reader, tiny, photos, monkeypatch):
    seen = set()
    shared = consistency.FeatureReader.__call__

    def read(self, images, reading):
        seen.add(tuple(images.shape[-2:]))
        return shared(self, images, reading)

    monkeypatch.setattr(FeatureReader, "__call__", read)
    found = consistency.run(reader(without_places(tiny(img_size=(16, 64)))), str(photos), FEW, seed=0)
    assert seen == {(16, 64)}
    assert found.figures["shift_agreement"] == pytest.approx(1, abs=1e-5)


def test_a_shift_out_of_the_picture_is_refused(reader, photos):
    with pytest.raises(PhregError, match="shift of 9"):
        consistency.run(reader(), str(photos), Settings(shift=9), seed=0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"patch_size": 16}, "patches of"),
        ({"embed_dim": 64}, "channels"),
        ({}, "neither of which was trained from the other"),
    ],
)
def test_a_baseline_that_is_another_network_is_no_reference(reader, tiny, photos, caplog, changes, why):
    other = tiny(**changes)
    if not changes:
        torch.nn.init.normal_(other.patch_embed.proj.weight)
    own = consistency.run(reader(), str(photos), FEW, seed=0)
    with caplog.at_level("WARNING", "phreg"):
        found = consistency.run(reader(reference=adapt(other).eval()), str(photos), FEW, seed=0)
    left_out = {"reference_agreement", "reference_worst_percent"}
    assert found.figures == {name: value for name, value in own.figures.items() if name not in left_out}
    assert why in found.notes["reference"]
    assert why in caplog.text


def test_a_student_and_its_original_are_one_network(reader, tiny, photos):
    student = phreg.add_registers(tiny(), 2)
    with torch.no_grad():  # an embedding that training moved, by far more than it does
        weight = student.patch_embed.proj.weight
        weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = consistency.run(reader(student, adapt(tiny()).eval()), str(photos), FEW, seed=0)
    assert "reference_agreement" in found.figures
    assert "reference" not in found.notes


def test_a_student_and_the_baselines_views_are_read_alike(reader, photos):
    student, original = adapt(FAMILIES["open_clip/clip"]()).eval(), adapt(FAMILIES["open_clip/clip"]()).eval()
    student.trained_readout = "value-only"
    trained = consistency.run(reader(student, original), str(photos), FEW, seed=0)
    asked = FEW.model_copy(update={"readout": "value-only"})
    assert trained.notes["readout"] == "value-only"
    assert trained.figures == consistency.run(reader(original), str(photos), asked, seed=0).figures
    plain = consistency.run(reader(original), str(photos), FEW, seed=0)
    assert plain.figures != trained.figures
    assert original.readout == "plain"
