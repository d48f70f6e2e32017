"""Test-time registers edit each image by itself, move nothing else, and go as they came."""

import copy
import io
import pickle

import jaxtyping
import known_sinks
import pytest
import torch
from families import FAMILIES
from sinking import faint, photographs, plant

import phreg
from phreg import api, demo, methods
from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.methods.base import num_registers
from phreg.sinks import test_time
from phreg.sinks.test_time import MoveUnits

UNITS = {1: [(5, 1), (9, -1)]}


def hidden_units():
    """Two images, a CLS token, two registers, four patches, twelve units."""
    return torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))


def test_registers_get_the_largest_of_the_patches_and_all_else_is_silent():
    hidden = hidden_units()
    (edited,) = MoveUnits([5, 9], [1, -1], start=1, stop=3)(torch.nn.Identity(), (hidden,))
    for register in (1, 2):
        assert torch.equal(edited[:, register, 5], hidden[:, 3:, 5].amax(1))
        assert torch.equal(edited[:, register, 9], hidden[:, 3:, 9].amin(1)), "its sinks are negative"
    assert not edited[:, 0, [5, 9]].any(), "CLS is silent"
    assert not edited[:, 3:, [5, 9]].any(), "patches are silent"
    others = [unit for unit in range(12) if unit not in (5, 9)]
    assert torch.equal(edited[..., others], hidden[..., others])


def test_the_input_is_not_edited_in_place():
    hidden = hidden_units()
    before = hidden.clone()
    MoveUnits([5], [1], 1, 3)(torch.nn.Identity(), (hidden,))
    assert torch.equal(hidden, before)


def test_every_image_of_a_batch_is_edited_as_it_is_alone():
    move = MoveUnits([5, 9], [1, -1], 1, 3)
    (together,) = move(torch.nn.Identity(), (hidden_units(),))
    for number in range(2):
        (alone,) = move(torch.nn.Identity(), (hidden_units()[number : number + 1],))
        assert torch.equal(together[number : number + 1], alone)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_takes_them_can_be_copied_and_is_itself_again_without(family):
    backbone = adapt(FAMILIES[family]())
    if backbone.mlp(1) is None:
        pytest.skip("its MLP cannot be taken apart")
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    before = backbone(images)
    test_time.install(backbone, UNITS, 2)
    with_hook = backbone(images)
    assert not torch.equal(with_hook.patches, before.patches)
    assert test_time.installed(backbone).units == UNITS
    twin = adapt(copy.deepcopy(backbone.model))
    assert test_time.installed(twin).units == UNITS
    assert torch.equal(twin(images).patches, with_hook.patches)
    phreg.remove_registers(backbone)
    after = backbone(images)
    assert test_time.installed(backbone) is None
    assert torch.equal(after.patches, before.patches)
    assert torch.equal(after.pooled, before.pooled)
    assert torch.equal(twin(images).patches, with_hook.patches), "a copy is a model of its own"


@pytest.mark.parametrize("family", ["timm/vit", "transformers/dinov2", "open_clip/clip"])
def test_a_pickled_model_keeps_its_hooks(family):
    backbone = adapt(FAMILIES[family]())
    images = torch.randn(2, 3, *backbone.spec.input_size)
    test_time.install(backbone, UNITS)
    twin = adapt(pickle.load(io.BytesIO(pickle.dumps(backbone.model))))
    assert test_time.installed(twin).units == UNITS
    assert torch.equal(twin(images).patches, backbone(images).patches)


@pytest.mark.parametrize("family", ["transformers/dinov2", "open_clip/clip", "timm/naflexvit"])
def test_other_sizes_work(family):
    backbone = adapt(FAMILIES[family]())
    rows, cols = backbone.spec.patch_size
    test_time.install(backbone, UNITS)
    assert backbone(torch.randn(1, 3, 6 * rows, 5 * cols)).patches.shape[1:3] == (6, 5)


@pytest.mark.parametrize("filling", ["zeros", "noise"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_is_no_patch(filling, implementation):
    model = FAMILIES["transformers/siglip2-vision"]()
    model.set_attn_implementation(implementation)
    test_time.install(adapt(model), {1: [(unit, 1) for unit in range(16)]}, 2)
    rows, cols = 3, 4
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, rows * cols, model.embeddings.patch_embedding.in_features, generator=generator)
    shapes = torch.tensor([[rows, cols]])
    alone = model(pixels, torch.ones(1, rows * cols).long(), shapes).last_hidden_state
    more = {"zeros": torch.zeros_like, "noise": lambda part: 9 * torch.randn_like(part)}[filling](
        pixels[:, :5]
    )
    mask = (torch.arange(rows * cols + 5) < rows * cols).long()[None]
    padded = model(torch.cat([pixels, more], 1), mask, shapes).last_hidden_state
    # A masked kernel sums in another order: fp32 rounding. Where padding counts, it is off by 1e-2 and more.
    torch.testing.assert_close(padded[:, : rows * cols], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_padded_image_leaves_nothing_on_the_model_and_removal_no_trace():
    model = FAMILIES["transformers/siglip2-vision"]()
    before = traces(model)
    test_time.install(adapt(model), UNITS, 2)
    during = traces(model)
    pixels = torch.randn(1, 12, model.embeddings.patch_embedding.in_features)
    model(pixels, (torch.arange(12) < 6).long()[None], torch.tensor([[2, 3]]))
    assert traces(model) == during
    assert during != before
    phreg.remove_registers(model)
    assert traces(model) == before


def traces(model):
    """Names each module's attributes, and numbers the hooks before its forward."""
    return {
        name: (
            sorted(vars(module)),
            len(module._forward_pre_hooks),
            len(module._forward_pre_hooks_with_kwargs),
        )
        for name, module in model.named_modules()
    }


@torch.no_grad()
def test_a_model_with_them_that_takes_padding_is_exported_as_it_is(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    model = FAMILIES["transformers/siglip2-vision"]()
    test_time.install(adapt(model), UNITS, 2)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 12, model.embeddings.patch_embedding.in_features, generator=generator)
    asked = (pixels, (torch.arange(12) < 6).long()[None], torch.tensor([[2, 3]]))
    exported = torch.export.export(model, asked).module()
    assert torch.equal(exported(*asked).last_hidden_state, model(*asked).last_hidden_state)


def test_another_size_than_they_were_found_at_is_warned_of_once(caplog):
    backbone = adapt(FAMILIES["transformers/dinov2"]())
    rows, cols = backbone.spec.patch_size
    test_time.install(backbone, UNITS, size=(4 * rows, 4 * cols))
    assert test_time.installed(backbone).size == (4 * rows, 4 * cols)
    backbone(torch.randn(1, 3, 4 * rows, 4 * cols))
    assert not caplog.records
    for _ in range(2):
        backbone(torch.randn(1, 3, 4 * rows, 5 * cols))
    (record,) = caplog.records
    assert f"images of {4 * rows}x{4 * cols} pixels" in record.getMessage()


@pytest.mark.slow
def test_a_model_with_them_compiles_into_one_graph(tiny, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    backbone = adapt(tiny())
    test_time.install(backbone, UNITS)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(backbone.model, fullgraph=True)
    with torch.no_grad():
        # Fused kernels sum in another order: fp32 rounding over three blocks.
        torch.testing.assert_close(compiled(images), backbone.model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("units", "found"), [({1: [(4000, 1)]}, "has 128 there"), ({7: [(1, 1)]}, "has 0 there")]
)
def test_units_that_do_not_exist_are_named_and_nothing_is_hooked(tiny, units, found):
    backbone = adapt(tiny())
    with pytest.raises(PhregError, match=found):
        test_time.install(backbone, UNITS | units)
    assert test_time.installed(backbone) is None


def test_removing_registers_removes_the_hooks_too(tiny):
    model = tiny()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    test_time.install(adapt(model), UNITS)
    phreg.remove_registers(model)
    assert torch.equal(model(images), before)


def test_the_demonstrations_artifacts_are_moved_by_one_call_and_come_back_by_another():
    model, images = demo.demo_model(), photographs(every=8)
    before = model(images[:2])
    likeness = torch.cosine_similarity(adapt(model)(images).patches, demo.truth(images), dim=-1)
    artifacts = float((likeness < 0.5).sum() / len(images))
    assert phreg.add_test_time_registers(model, images) is model
    (moved,) = test_time.installed(adapt(model)).units.items()
    assert moved[0] == demo.SINK_BLOCK
    assert set(moved[1]) == {(demo.BACKGROUND_NEURON, 1), (demo.CORNER_NEURON, 1)}
    assert abs(adapt(model).num_registers - artifacts) <= 1, "one for each that an image has, of two kinds"
    assert phreg.inspect(model, images).outlier_rate == 0
    phreg.remove_registers(model)
    assert torch.equal(model(images[:2]), before)


def test_one_call_is_refused_where_there_is_nothing_to_move_or_nowhere_to_move_it(tiny):
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PhregError, match="no artifacts in any block; there is nothing to repair"):
        phreg.add_test_time_registers(tiny(), images)
    unexplained = tiny()
    with torch.no_grad():
        unexplained.pos_embed[0, 1] *= 1e5
    with pytest.raises(PhregError, match=r"no hidden unit was found.*--method relocate"):
        phreg.add_test_time_registers(unexplained, images)
    with pytest.raises(PhregError, match="remove_registers"):
        phreg.add_test_time_registers(phreg.add_registers(tiny(), 1), images)
    backbone = adapt(tiny())
    plant(backbone, 1, 5, faint(backbone))
    with pytest.raises(PhregError, match="use 1 or more"):
        phreg.add_test_time_registers(backbone.model, faint(backbone), num_registers=0)


@pytest.mark.parametrize(
    ("found", "registers"), [(known_sinks.sinks((0, 1, 9.0), (0, 2, 9.0, 1)), 5), (None, 1)]
)
def test_automatic_registers_are_as_many_as_an_image_has_sinks(found, registers):
    config = methods.resolve(None, {"method": "test-time"})
    assert num_registers(found, config) == registers  # two of the first cluster, three of the second
    assert num_registers(found, config.model_copy(update={"registers": 2})) == 2


QUICK = {
    "device": "cpu",
    "data": {"workers": 0},
    "views": {"count": 3},
    "measure": {"images": 2, "views": 3},
    "sinks": {"images": 8},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A test-time run of the demonstration model."""
    folder = tmp_path_factory.mktemp("test-time")
    demo.write_demo_images(folder / "photos", held_out=True)
    return api.distill("demo", folder / "photos", folder / "run", method="test-time", **QUICK)


def test_a_test_time_run_trains_nothing_and_loads_back_with_its_hooks(run):
    assert run.outcome.steps == 0
    assert run.comparison.norms[0].outlier_rate > 0.01
    assert run.comparison.norms[1].outlier_rate == 0
    loaded = phreg.load(run.run)
    images = torch.randn(2, 3, 224, 224)
    assert torch.equal(loaded(images), run.model(images))
    moved = test_time.installed(adapt(loaded))
    assert moved.units == test_time.installed(adapt(run.model)).units
    assert moved.size == (224, 224)
    assert not (run.run / "log.jsonl").exists()
    assert all(parameter.requires_grad for parameter in run.model.parameters())


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_no_stock_format_takes_them_and_the_refusal_says_what_does(run, format, tmp_path):
    for model in (run.run, run.model):
        with pytest.raises(PhregError, match=r"test-time registers work by hooks.*merged"):
            phreg.export(model, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["model", "vision_model"])
def test_save_pretrained_does_not_lose_them_in_silence(part, tmp_path):
    model = FAMILIES["transformers/clip"]()
    test_time.install(adapt(model), UNITS)
    saving = model if part == "model" else model.vision_model
    with pytest.raises(PhregError, match="would be lost"):
        saving.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    phreg.remove_registers(model)
    model.save_pretrained(tmp_path / "saved")
