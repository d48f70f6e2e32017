"""An adapter goes onto the weights that it was made for, and onto no others."""

import copy
import json
import re

import families_open_clip
import families_transformers
import pytest
import torch
from families_timm import FAMILIES
from safetensors.torch import load_file, save_file

from phreg import api
from phreg.backbones.resolve import Base, adapt, weights_sha256
from phreg.config import LoraConfig, UnlockConfig
from phreg.errors import LoadError
from phreg.formats import adapter
from phreg.formats.adapter import (
    apply_adapter,
    base_of,
    describe_tower,
    fit,
    read_adapter,
    read_tensors,
    save_adapter,
)
from phreg.record import RunRecord, write_record
from phreg.registers import add_registers
from phreg.sinks import test_time
from phreg.training import trainable
from phreg.training.trainable import merge_lora, unlock

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base():
    return FAMILIES["vit"]()


@pytest.fixture
def made(base, tmp_path):
    """A folder with an adapter of that model, and the patched model it was made from."""
    return make(base, tmp_path / "adapter")


def make(base, folder, revision=None, size=(32, 32), units=None):
    backbone = adapt(copy.deepcopy(base))
    before = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
    source = Base("the base", backbone.spec.library, revision, weights_sha256(before))
    tower = describe_tower(backbone)
    if size != (32, 32):
        backbone.set_input_size(size)
    if units:
        test_time.install(backbone, units, 3, size)
    else:
        add_registers(backbone, 3)
    with torch.no_grad():
        backbone.model.norm.weight.mul_(1.5)
    save_adapter(folder, backbone, source, before, None, lambda _: "# card", tower=tower)
    return folder, backbone


def described(model_class, sha256, tower=None):
    """The record of an adapter, as far as it tells what the adapter fits."""
    base = Base("the base", "timm", None, sha256)
    return RunRecord(format="phreg-adapter", model_class=model_class, base=base, tower=tower, registers=3)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_it_turns_its_base_into_the_model_it_was_made_from(base, made):
    folder, patched = made
    backbone = adapt(base)
    assert fit(read_adapter(folder), backbone) == "whole"
    apply_adapter(folder, backbone)
    assert torch.equal(base(IMAGES), patched.model(IMAGES))
    assert backbone.num_registers == 3
    assert backbone.adapter == folder


@pytest.mark.parametrize(("revision", "said"), [(None, ""), ("abc", " (revision abc)")])
def test_other_weights_are_refused_with_both_hashes_and_what_to_do(base, tmp_path, revision, said):
    folder, _ = make(base, tmp_path / "adapter", revision)
    expected = weights_sha256(adapt(base).disk_state())
    with torch.no_grad():
        base.blocks[0].mlp.fc1.bias[0] += 1
    before, backbone = state_of(base), adapt(base)
    assert fit(read_adapter(folder), backbone) is None
    found = weights_sha256(backbone.disk_state())
    message = (
        f"sha256 {expected[:12]}…, but .* has {found[:12]}…, .*; load it onto that base{re.escape(said)}$"
    )
    with pytest.raises(LoadError, match=message):
        apply_adapter(folder, backbone)
    assert_unchanged(base, before)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_tower_is_known_again_in_each_precision_but_not_with_other_weights(base, precision):
    record = described("Another", "", describe_tower(adapt(base)))
    cast = copy.deepcopy(base).to(getattr(torch, precision))
    assert fit(record, adapt(cast)) == "tower"
    with torch.no_grad():
        cast.blocks[0].mlp.fc1.bias[0] += 1
    assert fit(record, adapt(cast)) is None


def test_the_whole_base_is_known_by_its_hash_whatever_its_tower_says(base):
    sha256 = weights_sha256(adapt(base).disk_state())
    own = type(base).__name__
    assert fit(described(own, sha256), adapt(base)) == "whole"
    assert fit(described("Another", sha256), adapt(base)) == "whole", "without a tower only the hash can tell"
    assert fit(described(own, sha256[::-1]), adapt(base)) is None


def test_the_base_of_a_model_that_was_saved_whole_is_not_known(base):
    assert base_of(described("Another", "abc")).sha256 == "abc"
    with pytest.raises(LoadError, match="base of a phreg-model, whose record names none"):
        base_of(RunRecord(format="phreg-model", model_class="Another", registers=3))


def test_test_time_registers_come_back_with_the_units_that_they_move(base, tmp_path):
    units = {1: [(5, 1), (9, -1)]}
    folder, _ = make(base, tmp_path / "adapter", units=units)
    backbone = adapt(base)
    apply_adapter(folder, backbone)
    moved = test_time.installed(backbone)
    assert (moved.units, moved.size) == (units, (32, 32))


def test_a_position_embedding_of_another_size_comes_with_its_adapter(base, tmp_path):
    folder, patched = make(base, tmp_path / "adapter", size=(48, 48))
    apply_adapter(folder, adapt(base))
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(base(images), patched.model(images))


def test_a_refused_adapter_of_another_size_leaves_the_size_and_the_weights(base, tmp_path):
    folder, _ = make(base, tmp_path / "adapter", size=(48, 48))
    tensors = load_file(folder / "adapter.safetensors")
    save_file(tensors | {"norm.weight": torch.ones(7)}, folder / "adapter.safetensors")
    before, output, backbone = state_of(base), base(IMAGES), adapt(base)
    with pytest.raises(LoadError):
        apply_adapter(folder, backbone)
    assert backbone.spec.input_size == (32, 32)
    assert_unchanged(base, before)
    assert torch.equal(base(IMAGES), output)


@pytest.mark.parametrize("wrong", ["missing", "shape", "type", "unknown"])
def test_tensors_that_do_not_fit_leave_the_base_as_it_was(base, made, wrong):
    folder, _ = made
    file = folder / "adapter.safetensors"
    tensors = load_file(file)
    match wrong:
        case "missing":
            del tensors["reg_token"]
        case "shape":
            tensors["norm.weight"] = torch.ones(7)
        case "type":
            tensors["norm.weight"] = tensors["norm.weight"].double()
        case "unknown":
            tensors["norm.wait"] = torch.ones(32)
    save_file(tensors, file)
    before, output = state_of(base), base(IMAGES)
    backbone = adapt(base)
    with pytest.raises(LoadError):
        apply_adapter(folder, backbone)
    assert backbone.num_registers == 0
    assert_unchanged(base, before)
    assert torch.equal(base(IMAGES), output)


@pytest.mark.parametrize("wrong", ["size", "registers", "units", "tensors"])
def test_whatever_does_not_fit_is_refused_before_the_model_is_touched(base, tmp_path, monkeypatch, wrong):
    folder, _ = make(base, tmp_path / "adapter", units={1: [(5, 1)]})
    record, changes, file = read_adapter(folder), {}, folder / "adapter.safetensors"
    match wrong:
        case "size":
            changes["input_size"] = (30, 32)
        case "registers":
            changes["registers"] = 4
        case "units":
            changes["test_time"] = {1: [(5000, 1)]}
        case "tensors":
            save_file({"norm.weight": torch.ones(32)}, file)
    record = record.model_copy(update=changes).with_sums(load_file(file))
    write_record(folder / "phreg.json", record)
    backbone, before = adapt(base), state_of(base)
    monkeypatch.setattr(adapter, "rollback_on_error", None)  # with which all that changes the model begins
    with pytest.raises(LoadError, match="does not fit"):
        apply_adapter(folder, backbone)
    assert_unchanged(base, before)


def test_a_file_that_is_not_there_says_which_pickles_are_in_its_place(tmp_path):
    with pytest.raises(LoadError, match=r"adapter\.safetensors, which is not there; fetch"):
        read_tensors(tmp_path / "adapter.safetensors")
    for name in ("b.pt", "a.bin", "c.pth", "d.pkl", "e.ckpt", "readme.md"):
        (tmp_path / name).touch()
    with pytest.raises(
        LoadError, match=r"not there, only a\.bin, b\.pt, c\.pth, d\.pkl, e\.ckpt; a pickle may"
    ):
        read_tensors(tmp_path / "adapter.safetensors")


def test_values_that_are_not_finite_are_refused_naming_three_of_the_tensors(tmp_path):
    file = tmp_path / "adapter.safetensors"
    tensors = {name: torch.ones(2) for name in "abcdef"}
    save_file(tensors, file)
    assert read_tensors(file).keys() == tensors.keys()
    for name in "bcde":
        tensors[name] = torch.tensor([1.0, float("inf")])
    save_file(tensors, file)
    with pytest.raises(LoadError, match=r"holds NaN or infinite values in \['b', 'c', 'd'\]; fetch"):
        read_tensors(file)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    file = tmp_path / "adapter.safetensors"
    save_file({"a": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LoadError, match=r"cannot read .*adapter\.safetensors as safetensors"):
        read_tensors(file)


# -- by phreg.load ------------------------------------------------------------------------------------------


# -- low-rank changes ----------------------------------------------------------------------------------------


def low_rank(model, folder, rank=2):
    """A folder with an adapter of a model that changed at low rank, as training leaves it, and the model."""
    backbone = adapt(copy.deepcopy(model))
    before = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
    add_registers(backbone, 3)
    lora = LoraConfig(rank=rank, blocks="all")
    trained = unlock(backbone, UnlockConfig(roles=("vectors",), lora=lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        images = torch.randn(1, 3, *backbone.spec.input_size, generator=generator)
        backbone.run(images.to(backbone.dtype))  # as training does
    backbone.low_rank = merge_lora(backbone, adapt(copy.deepcopy(model)))
    source = Base("the base", backbone.spec.library, None, weights_sha256(before))
    save_adapter(folder, backbone, source, before, None, lambda _: "", tower=describe_tower(adapt(model)))
    return folder, backbone


BUILDS = {
    "timm": lambda: FAMILIES["vit"](),
    "fused": lambda: families_open_clip.FAMILIES["clip"](),
    "transformers": lambda: families_transformers.FAMILIES["dinov2"](),
}


@pytest.mark.parametrize("build", BUILDS)
def test_a_low_rank_change_is_kept_as_factors_and_comes_back_to_the_bit(build, tmp_path):
    model = BUILDS[build]()
    matrices = {
        name for name, tensor in adapt(model).disk_state().items()
        if tensor.ndim == 2
        and name.startswith(("blocks.", "encoder.layer.", "dinov2.", "visual.transformer"))
    }  # fmt: skip
    folder, patched = low_rank(model, tmp_path / "adapter")
    kept = load_file(folder / "adapter.safetensors")
    assert {name.removesuffix(".lora_A") for name in kept if name.endswith(".lora_A")} == matrices
    assert not matrices & kept.keys(), "and not whole as well"
    backbone = adapt(model)
    apply_adapter(folder, backbone)
    assert_unchanged(backbone.model, patched.model.state_dict())


def test_a_low_rank_change_of_a_half_precision_model_comes_back_to_the_bit(tmp_path):
    model = FAMILIES["vit"]()
    folder, patched = low_rank(model.bfloat16(), tmp_path / "adapter")
    assert any(name.endswith(".lora_A") for name in load_file(folder / "adapter.safetensors"))
    backbone = adapt(model)
    apply_adapter(folder, backbone)
    assert_unchanged(backbone.model, patched.model.state_dict())


def test_a_low_rank_change_goes_onto_the_same_tower_in_another_model(tmp_path):
    folder, patched = low_rank(FAMILIES["vit"](), tmp_path / "adapter")
    other = FAMILIES["vit"]()
    other.reset_classifier(7)
    backbone = adapt(other)
    assert fit(read_adapter(folder), backbone) == "tower"
    apply_adapter(folder, backbone)
    assert torch.equal(backbone.model.forward_features(IMAGES), patched.model.forward_features(IMAGES))


def test_a_weight_that_changed_after_it_was_merged_is_kept_whole(tmp_path, monkeypatch):
    def changed_later(backbone, original):
        merged = trainable.merge_lora(backbone, original)
        backbone.model.blocks[0].mlp.fc1.weight.data += 0.5
        return merged

    monkeypatch.setitem(globals(), "merge_lora", changed_later)
    folder, patched = low_rank(FAMILIES["vit"](), tmp_path / "adapter")
    kept = load_file(folder / "adapter.safetensors")
    assert torch.equal(kept["blocks.0.mlp.fc1.weight"], patched.model.blocks[0].mlp.fc1.weight)
    assert "blocks.0.mlp.fc1.weight.lora_A" not in kept


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda kept: kept.pop("blocks.0.mlp.fc1.weight.lora_B"), "one factor of blocks.0.mlp.fc1.weight"),
        (
            lambda kept: kept.update({"blocks.0.mlp.fc1.weight.lora_A": torch.zeros(2, 31)}),
            r"a change of shape \(128, 31\), the model's tensor has \(128, 32\)",
        ),
        (
            lambda kept: kept.update({"blocks.0.mlp.fc1.weight.lora_A": torch.zeros(3, 32)}),
            "a change of shape",
        ),
        (
            lambda kept: kept.update({"odd.lora_A": torch.zeros(2, 8), "odd.lora_B": torch.zeros(8, 2)}),
            "name .'odd'., which the model lacks",
        ),
    ],
)
def test_factors_that_do_not_fit_leave_the_base_as_it_was(tmp_path, wrong, said):
    folder, _ = low_rank(FAMILIES["vit"](), tmp_path / "adapter")
    file = folder / "adapter.safetensors"
    kept = load_file(file)
    wrong(kept)
    save_file(kept, file)
    write_record(folder / "phreg.json", read_adapter(folder).with_sums(kept))
    backbone = adapt(FAMILIES["vit"]())
    before = state_of(backbone.model)
    with pytest.raises(LoadError, match=said):
        apply_adapter(folder, backbone)
    assert_unchanged(backbone.model, before)


@pytest.fixture
def trained(tmp_path, tiny):
    """An adapter of a trained-looking patched model, its folder and the patched model."""
    backbone = adapt(tiny())
    base_state = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
    base = Base("instance", "timm", None, weights_sha256(base_state))
    add_registers(backbone, 3)
    with torch.no_grad():
        backbone.model.blocks[-1].mlp.fc1.weight.mul_(1.5)
        backbone.model.pos_embed.add_(0.1)
    folder = tmp_path / "adapter"
    save_adapter(folder, backbone, base, base_state, None, lambda record: "# card")
    return folder, backbone


def test_an_adapter_holds_only_what_changed_and_gives_the_patched_model_back_exactly(trained, tiny):
    folder, patched = trained
    names = set(load_file(folder / "adapter.safetensors"))
    assert "blocks.2.mlp.fc1.weight" in names
    assert "reg_token" in names
    assert "blocks.0.mlp.fc1.weight" not in names
    loaded = api.load(folder, into=tiny())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), patched.model(images))


def test_whoever_may_read_a_new_file_may_read_an_adapter(trained, tmp_path):
    (tmp_path / "new").touch()
    assert (trained[0] / "adapter.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_an_adapter_on_another_base_is_refused_with_both_hashes(trained, tiny):
    folder, _ = trained
    other = tiny()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[0, 0] += 1e-6
    with pytest.raises(LoadError, match="sha256"):
        api.load(folder, into=other)
    assert other.reg_token is None, "a refused base stays as it was"


def test_an_adapter_made_from_an_instance_says_how_to_load_it(trained):
    with pytest.raises(LoadError, match="into=model"):
        api.load(trained[0])


@pytest.mark.parametrize("damage", ["truncate", "nan", "shape", "extra", "newer", "not-json"])
def test_a_tampered_adapter_is_one_clear_error_and_changes_nothing(trained, tiny, damage):
    folder, _ = trained
    weights, description = folder / "adapter.safetensors", folder / "phreg.json"
    tensors = load_file(weights)
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "nan":
        tensors["reg_token"][0, 0, 0] = float("nan")
        save_file(tensors, weights)
    elif damage == "shape":
        tensors["reg_token"] = tensors["reg_token"][:, :, :5].contiguous()
        save_file(tensors, weights)
    elif damage == "extra":
        save_file(tensors | {"intruder": torch.zeros(1)}, weights)
    elif damage == "newer":
        description.write_text(json.dumps(json.loads(description.read_text()) | {"format_version": 99}))
    else:
        description.write_text("{")
    model = tiny()
    before = model(torch.ones(1, 3, 32, 32))
    with pytest.raises(LoadError):
        api.load(folder, into=model)
    assert torch.equal(model(torch.ones(1, 3, 32, 32)), before)
