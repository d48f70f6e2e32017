"""One look has to find what each analysis finds alone, and to leave the model alone."""

import json

import pytest
import torch
from families import FAMILIES
from looking import BLOCK, CLASSES, UNIT, from_all_sides, larger, looked_at, noise, sinking_model
from sinking import photographs

import phreg
from phreg import demo
from phreg.analysis.class_probe import global_probe
from phreg.analysis.complexity import complexity
from phreg.analysis.consistency import consistency
from phreg.analysis.inspection import MOVED, MOVED_IMAGES, MOVED_VIEWS, PROBED, LabelledImages, look
from phreg.analysis.interpolation import interpolation_effect, stripes
from phreg.analysis.norms import outliers
from phreg.analysis.probes import position_probe, reconstruction_probe, sample_tokens
from phreg.analysis.survey import survey
from phreg.backbones.readout import use_readout
from phreg.backbones.resolve import adapt
from phreg.data.crops import centre_crops
from phreg.data.sampling import subsample
from phreg.data.sources import open_images
from phreg.errors import PhregError
from phreg.formats.load import open_model
from phreg.progress import told_to
from phreg.registers import add_registers
from phreg.sinks import test_time
from phreg.sinks.locate import find_sinks

KINDS = [
    "timm/vit-gap",  # no CLS
    "timm/dinov2-reg4",  # registers of its own
    "timm/eva02",  # rotary positions
    "transformers/siglip2-vision",  # no CLS, and no run without values
    "transformers/deit",  # a second prefix token
    "open_clip/clip",
]


@pytest.fixture(scope="module")
def sides():
    return from_all_sides()


@pytest.fixture(scope="module")
def written(sides):
    return json.loads(json.dumps(sides[2].to_json(), allow_nan=False))


def units(sinks):
    return {(unit.block, unit.index) for unit in sinks.units}


# -- what is found ------------------------------------------------------------------------------------------


def test_the_planted_sink_is_found_with_its_cause_and_its_place(sides):
    _, _, found = sides
    assert found.outlier_rate == 1 / 16
    assert found.emergence_block == BLOCK
    assert units(found.sinks) == {(BLOCK, UNIT)}
    assert found.norms.position_histogram.flatten().tolist() == [1.0] + 15 * [0.0]
    assert not found.stripes.found


def test_figures_are_those_of_each_analysis_alone(sides, written):
    backbone, images, _ = sides
    batches = images.split(5)
    norms = outliers(backbone, batches)
    sample = sample_tokens(backbone, batches, norms)
    alone = {
        **survey(backbone, batches).to_json(),
        "sinks": find_sinks(backbone, batches).to_json(),
        "stripes": stripes(norms.position_histogram).to_json(),
        "position_probe": position_probe(sample).to_json(),
        "reconstruction_probe": reconstruction_probe(sample).to_json(),
        "class_probe": global_probe(backbone, batches, CLASSES, norms).to_json(),
        "interpolation": interpolation_effect(backbone, [larger(images)]).to_json(),
        "consistency": consistency(backbone, images.split(4), MOVED, (32, 32), count=MOVED_VIEWS).to_json(),
        "cost": [cost.to_json() for cost in complexity(backbone)],
    }
    for name, figures in alone.items():
        assert written[name] == json.loads(json.dumps(figures)), name
    assert written.keys() - alone.keys() == {"model", "size", "latency", "against", "recommended_method"}
    assert (written["model"], written["size"], written["against"]) == ("sinking", [32, 32], [])
    assert [time["registers"] for time in written["latency"]] == [0, 1, 2, 4, 8, 16]


def test_the_first_images_are_kept_to_be_shown_as_they_look(sides):
    backbone, images, found = sides
    assert len(found.photos) == len(found.survey.shown) == 3
    for index, photo in enumerate(found.photos):
        assert torch.equal(found.survey.shown[index].image, images[index])
        std = torch.tensor(backbone.spec.std)[:, None, None]
        mean = torch.tensor(backbone.spec.mean)[:, None, None]
        pixels = (255 * (images[index] * std + mean)).clamp(0, 255)
        # Half a step of 8 bits.
        assert (torch.from_numpy(photo).movedim(-1, 0) - pixels).abs().max() < 0.51


def test_maps_are_kept_of_the_images_shown_alone(sides):
    _, images, found = sides
    kept = [found.survey.norms.maps]
    for shown in found.survey.shown:
        kept += [shown.image, shown.norms, shown.features, shown.attention]
    for tensor in kept:
        # A view of something larger would keep that in memory.
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert len(found.survey.norms.maps) == 3
    assert found.survey.outliers.shape == (len(images), 4, 4)
    assert found.survey.outliers.dtype == torch.bool


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_model_is_looked_at_and_told_in_json_without_nan(family, registers):
    backbone = add_registers(adapt(FAMILIES[family]()), registers)
    found = looked_at(backbone, images=noise(backbone, PROBED))
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["images"] == PROBED
    names = backbone.special_tokens
    assert found.survey.attention.queries == (names if "CLS" in names else ("patches", *names))
    # What registers cost is set against none, however many there are.
    assert found.costs[0].registers == 0
    assert found.costs[0].parameters_added == 0


def test_sinks_are_to_be_relocated_and_a_clean_model_is_judged_by_its_views(sides, written):
    assert written["recommended_method"] == "relocate"
    _, images, found = sides
    assert written["consistency"]["images"] == 12
    assert len(found.consistency.denoised) == len(found.survey.shown)
    clean = looked_at("timm/vit", images=images)  # the same weights, before the unit was planted
    assert clean.sinks is None
    assert clean.to_json()["recommended_method"] == ("denoise" if clean.consistency.worthwhile else None)


def test_views_of_the_images_shown_are_measured_first_and_of_the_others_evenly_spaced_ones():
    backbone = adapt(FAMILIES["timm/vit"]())
    images = noise(backbone, 40)
    found = looked_at(backbone, images=images, show=4).consistency
    chosen = torch.cat([images[:4], images[4::3]])
    assert len(chosen) == len(found.maps) == MOVED_IMAGES
    alone = consistency(backbone, chosen.split(4), MOVED, (32, 32), count=MOVED_VIEWS, show=4)
    assert torch.equal(found.maps, alone.maps)
    assert torch.equal(found.denoised, alone.denoised)
    many = looked_at(backbone, images=images, show=20).consistency
    assert len(many.maps) == len(many.denoised) == 20, "every image shown has its map"


@pytest.mark.real
@pytest.mark.slow
def test_a_real_dinov2_without_sinks_has_headroom_that_denoising_could_gain(real_data):
    backbone = open_model(real_data / "models" / "dinov2-small")[0].eval()
    photographs = subsample(open_images(real_data / "imagenet_samples"), 6)
    found = look(backbone, "dinov2-small", list(centre_crops(backbone, photographs, 224)))
    assert found.sinks is None
    # Measured on 16 photographs: .966, .988 and .022 ± .005; six of them differ by no more than this.
    assert found.consistency.mean == pytest.approx(0.966, abs=0.012)
    assert found.consistency.floor == pytest.approx(0.988, abs=0.006)
    assert 0.005 < found.consistency.headroom < 0.04
    assert found.to_json()["recommended_method"] == "denoise"


@pytest.mark.real
def test_the_sinks_of_a_real_vit_are_to_be_relocated(real_data, real_model):
    found = phreg.inspect(str(real_model), real_data / "imagenet_samples", count=8, device="cpu")
    assert found.to_json()["recommended_method"] == "relocate"
    # Its sinks lie at the corners, where it agrees least with its moved views.
    agreement = found.consistency.by_position
    assert agreement[[0, 0, -1, -1], [0, -1, 0, -1]].mean() < agreement[4:-4, 4:-4].mean() - 0.3


# -- what is left out ---------------------------------------------------------------------------------------


def test_of_few_images_no_probe_is_trained(sides):
    backbone, images, _ = sides
    few = looked_at(backbone, images=images[: PROBED - 1])
    assert (few.position, few.reconstruction, few.classes) == (None, None, None)
    enough = looked_at(backbone, images=images[:PROBED])
    assert enough.position.ordinary.tokens == 2 * 15
    json.dumps(few.to_json(), allow_nan=False)


def test_where_nothing_is_found_there_are_no_sinks_and_nothing_else_is_missing():
    found = looked_at("timm/vit")
    assert found.sinks is None
    assert (found.outlier_rate, found.emergence_block) == (0.0, None)
    assert found.to_json()["sinks"] is None
    assert found.survey.attention is not None
    assert len(found.costs) == len(found.latency) == 6


def test_a_model_whose_attention_cannot_be_captured_is_looked_at_without_it():
    backbone, images = sinking_model()
    for block in backbone.blocks:
        block.attn.fused_attn = False
    found = looked_at(backbone, images=images)
    assert found.survey.attention is None
    assert found.sinks.attention is None
    assert units(found.sinks) == {(BLOCK, UNIT)}
    assert found.to_json()["attention"] is None


def test_a_model_with_rotary_positions_has_no_effect_of_resampling():
    backbone = adapt(FAMILIES["timm/dinov3"]())
    found = looked_at(backbone, resampled=[larger(noise(backbone, 2))])
    assert found.interpolation is None


def test_a_model_whose_images_are_too_small_to_be_moved_says_so(tiny):
    found = looked_at(tiny(img_size=24), images=torch.randn(2, 3, 24, 24))
    assert found.consistency is None
    assert found.not_moved.startswith("a grid of 3x3 patches is too small for two different views")
    assert found.to_json()["consistency"] is None
    measured = looked_at(tiny(), images=torch.randn(2, 3, 32, 32))
    assert measured.not_moved == ""


def test_agreement_is_that_of_features_as_the_model_was_trained():
    backbone = adapt(FAMILIES["open_clip/clip"]())
    images = noise(backbone, 2)
    plain = looked_at(backbone, images=images).consistency
    backbone.trained_readout = "value-only"
    found = looked_at(backbone, images=images).consistency
    size = backbone.spec.input_size
    with use_readout(backbone):
        expected = consistency(backbone, [images], MOVED, size, count=MOVED_VIEWS)
    assert torch.equal(found.maps, expected.maps)
    assert not torch.allclose(found.maps, plain.maps)
    assert backbone.readout == "plain"


def test_texts_asked_of_a_model_without_a_text_tower_are_refused():
    with (
        pytest.raises(PhregError, match="text"),
        told_to(lambda what, *_: pytest.fail(f"{what} comes first")),
    ):
        looked_at("timm/vit", queries=["a cat"])


# -- with registers -----------------------------------------------------------------------------------------


def test_registers_do_not_hide_a_sink_from_the_search():
    backbone, images = sinking_model()
    bare = find_sinks(backbone, images.split(5))
    add_registers(backbone, 2, "zeros")
    found = looked_at(backbone, images=images)
    assert units(found.sinks) == units(bare) == {(BLOCK, UNIT)}
    # What enters the blocks at patches does not depend on registers.
    torch.testing.assert_close(found.sinks.triggers[0], bare.triggers[0])
    assert [token.name for token in found.norms.tokens] == ["CLS", "register 1", "register 2"]


def test_test_time_registers_take_the_artifacts_and_show_it():
    backbone, images = adapt(demo.demo_model()), photographs(15)
    moved = {demo.SINK_BLOCK: [(demo.CORNER_NEURON, 1), (demo.BACKGROUND_NEURON, 1)]}
    test_time.install(backbone, moved)
    found = look(backbone, "demo", images.split(4), show=1)
    assert found.outlier_rate == 0
    assert found.sinks is None
    register = found.norms.tokens[-1]
    assert register.name == "register 1"
    assert register.quantiles[-1][4] > 5 * found.norms.blocks[-1].median
    assert test_time.installed(backbone).units == moved


# -- the model stays as it is -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["timm/vit", "transformers/dinov2", "open_clip/clip"])
@pytest.mark.parametrize("registers", [0, 2])
def test_a_look_leaves_the_model_as_it_is(family, registers):
    backbone = add_registers(adapt(FAMILIES[family]()), registers)
    images = noise(backbone, PROBED)
    next(backbone.model.parameters()).requires_grad_(False)

    def state():
        return (
            {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()},
            {name: buffer.clone() for name, buffer in backbone.model.named_buffers()},
            [parameter.requires_grad for parameter in backbone.model.parameters()],
            [module.training for module in backbone.modules()],
            [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in backbone.modules()],
            backbone.readout,
            backbone.num_registers,
            backbone(images).patches,
        )

    before = state()
    looked_at(backbone, images=images, labelled=LabelledImages([images], torch.arange(PROBED) % 2))
    for was, now in zip(before, state(), strict=True):
        if isinstance(was, dict):
            assert was.keys() == now.keys()
            assert all(torch.equal(tensor, now[name]) for name, tensor in was.items())
        elif isinstance(was, torch.Tensor):
            assert torch.equal(was, now)
        else:
            assert was == now


# -- while it lasts ----------------------------------------------------------------------


def test_every_stage_that_begins_is_told_to_end():
    progress = {}

    def observe(what, done, total):
        progress.setdefault(what, []).append((done, total))

    with told_to(observe):
        looked_at("timm/vit", "vit")
    assert list(progress) == [
        f"vit: {stage}"
        for stage in (
            "norms, attention, neighbours",
            "sinks",
            "probes",
            "agreement with moved views (3 images, 17 forward passes each)",
            "resampled positions",
            "cost",
        )
    ]
    assert all(done == total for done, total in (steps[-1] for steps in progress.values()))


@torch.no_grad()
def test_features_shown_of_a_trained_model_are_those_it_was_trained_for():
    backbone = adapt(FAMILIES["open_clip/clip"]())
    images = noise(backbone, 2)
    plain = looked_at(backbone, images=images).survey.shown
    backbone.trained_readout = "value-only"
    found = looked_at(backbone, images=images).survey.shown
    with use_readout(backbone):
        expected = backbone(images).patches
    for before, after, features in zip(plain, found, expected, strict=True):
        torch.testing.assert_close(after.features, features)
        assert torch.equal(after.norms[-1], before.norms[-1]), "all else is read plainly"
