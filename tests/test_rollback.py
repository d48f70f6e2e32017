"""A user's instance comes back: exactly as it was where a call fails, else in its own settings."""

import itertools

import pytest
import torch
from families import FAMILIES, LIBRARIES
from sinking import faint, plant
from torch import nn

import phreg
from phreg import api, rollback
from phreg.api import active_run, distillation, loading, training_free
from phreg.backbones.resolve import adapt
from phreg.backbones.timm import TimmBackbone
from phreg.config import UnlockConfig
from phreg.errors import PhregError, TrainingError
from phreg.formats import run
from phreg.report import folder
from phreg.sinks import starting, test_time
from phreg.training import loop as trainer
from phreg.training import task as tasks
from phreg.training.task import RetrofitTask
from phreg.training.trainable import unlock

QUICK = {
    "steps": 2,
    "batch_size": 2,
    "registers": 2,
    "views": {"count": 2, "max_shift": 0.25},
    "measure": {"images": 0},
    "device": "cpu",
    "data": {"workers": 0},
    "force": True,  # tiny random models have no artifacts
}


def used(model, dtype=torch.float32):
    """A model as its user left it: in train mode but for its first block, partly frozen, with gradients."""
    model.to(dtype).train()
    blocks = adapt(model).blocks
    blocks[0].eval().requires_grad_(False)
    for parameter in blocks[1].parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return model


def portrait(model):
    """All that a user could tell two states of one model apart by."""
    plain = (bool, int, float, str, tuple, type(None))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {
            name: (id(one), one.dtype, one.shape, one.device, one.requires_grad) for name, one in tensors
        },
        "values": {name: one.detach().clone() for name, one in tensors},
        "gradients": {name: one.grad.clone() for name, one in tensors if one.grad is not None},
        "modules": {name: (id(one), type(one), one.training) for name, one in model.named_modules()},
        "attributes": {
            (name, key): value if isinstance(value, plain) else id(value)
            for name, one in model.named_modules()
            for key, value in vars(one).items()
        },
        "hooks": {
            (name, key): [(number, id(hook)) for number, hook in hooks.items()]
            for name, one in model.named_modules()
            for key, hooks in vars(one).items()
            if key.endswith("_hooks") and key != "phreg_hooks"  # handles of those
        },
        "config": model.config.to_dict() if hasattr(model, "config") else None,
    }


def assert_same(after, before):
    assert after.keys() == before.keys()
    for part in before:
        if part in ("values", "gradients"):
            assert after[part].keys() == before[part].keys()
            for name, value in before[part].items():
                assert torch.equal(after[part][name], value), name
        else:
            assert after[part] == before[part]


def then_raise(monkeypatch, owner, name, error):
    """Has a function do its work, and then fail."""
    real = getattr(owner, name)

    def failing(*arguments, **options):
        real(*arguments, **options)
        raise error

    monkeypatch.setattr(owner, name, failing)


STAGES = {
    "the search for sinks": (distillation, "outliers"),
    "adding registers": (starting, "add_starting_registers"),
    "a change of read-out": (RetrofitTask, "running"),
    "unlocking": (trainer, "unlock"),
    "the optimizer": (trainer, "optimizer"),
    "a step": (tasks, "total_loss"),
    "a checkpoint": (trainer, "save_state"),
    "merging": (trainer, "merge_lora"),
    "the comparison": (distillation, "compare"),
    "the references": (active_run, "make_references"),
    "the report": (folder, "of_survey"),
    "the adapter": (run, "save_adapter"),
    "the very end": (distillation, "Distilled"),
}

ERRORS = dict(zip(STAGES, itertools.cycle([RuntimeError, KeyboardInterrupt, PhregError]), strict=False))

INSTANCES = {
    "timm": (lambda: LIBRARIES["timm"]["vit"](), torch.float16, {"unlock": {"lora": {"rank": 2}}}),
    "transformers": (lambda: LIBRARIES["transformers"]["clip"](), torch.bfloat16, {"method": "paper"}),
    "open_clip": (lambda: LIBRARIES["open_clip"]["clip"](), torch.float32, {"method": "paper"}),
}
"""Models with the settings that change most about them: LoRA, read-outs, another input size."""


@pytest.mark.parametrize("library", INSTANCES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_distillation_that_fails_at_any_stage_leaves_the_instance_as_it_was(
    stage, library, photos, tmp_path, monkeypatch
):
    build, dtype, settings = INSTANCES[library]
    model = used(build(), dtype)
    backbone = adapt(model)
    if settings.get("method") == "paper":
        settings = settings | {"size": backbone.spec.input_size[0] + 2 * backbone.spec.patch_size[0]}
    if STAGES[stage][0] not in (trainer, tasks):
        settings = settings | {"measure": {"images": 2, "views": 2, "keep_best": False}}
    if stage != "the report":  # which takes seconds
        monkeypatch.setattr(distillation, "write_comparison", lambda *_: None)
    before = portrait(model)
    then_raise(monkeypatch, *STAGES[stage], ERRORS[stage])
    with pytest.raises(ERRORS[stage]):
        api.distill(model, photos, tmp_path / "run", **QUICK | settings)
    assert_same(portrait(model), before)


@pytest.mark.parametrize(
    ("owners", "name"),
    [((training_free, distillation), "find_sinks"), ((test_time,), "add_test_time_registers")],
    ids=("finding sinks", "adding registers"),
)
def test_test_time_registers_that_fail_leave_the_instance_as_it_was(
    owners, name, photos, tmp_path, monkeypatch
):
    backbone = adapt(LIBRARIES["timm"]["vit"]())
    images = faint(backbone)
    plant(backbone, 1, 5, images)
    model = used(backbone.model)
    before = portrait(model)
    for owner in owners:
        then_raise(monkeypatch, owner, name, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        phreg.add_test_time_registers(model, images)
    assert_same(portrait(model), before)
    asked = {key: value for key, value in QUICK.items() if key != "steps"}
    with pytest.raises((KeyboardInterrupt, PhregError)):
        api.distill(model, photos, tmp_path / "run", method="test-time", **asked)
    assert_same(portrait(model), before)


@pytest.mark.parametrize("library", INSTANCES)
def test_adding_registers_is_undone_where_it_is_cut_short(library, monkeypatch):
    model = used(INSTANCES[library][0]())
    before = portrait(model)
    then_raise(monkeypatch, type(adapt(model)), "insert_registers", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        phreg.add_registers(model, 2)
    assert_same(portrait(model), before)


@pytest.mark.parametrize(
    "failing", [(TimmBackbone, "load_disk_state"), (loading, "warn_failed_checks")], ids=str
)
def test_an_adapter_half_applied_is_undone_whatever_the_reason(failing, tiny, photos, tmp_path, monkeypatch):
    api.distill(tiny(), photos, tmp_path / "run", **QUICK)
    model = used(tiny())
    before = portrait(model)
    then_raise(monkeypatch, *failing, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        phreg.load(tmp_path / "run", into=model)
    assert_same(portrait(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_an_instance_is_trained_in_fp32_and_comes_back_rounded_to_its_own_precision(
    dtype, tiny, photos, tmp_path
):
    own = tiny().to(dtype)
    full = tiny().to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32)
    training = QUICK | {"steps": 6, "precision": "fp32"}
    api.distill(full, photos, tmp_path / "full", **training)
    api.distill(own, photos, tmp_path / "own", **training)
    expected = {name: tensor.to(dtype) for name, tensor in full.state_dict().items()}
    assert own.state_dict().keys() == expected.keys()
    for name, tensor in own.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    loaded = phreg.load(tmp_path / "own", into=tiny().to(dtype))
    pixels = torch.randn(1, 3, 32, 32, dtype=dtype)
    assert torch.equal(loaded(pixels), own(pixels))


def test_in_bf16_too_every_unlocked_weight_moves_that_would_in_fp32(tiny, photos, tmp_path):
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().bfloat16().to(dtype)
        api.distill(model, photos, tmp_path / str(dtype), **QUICK | {"steps": 12, "optim": {"lr": 1e-3}})
        start = phreg.add_registers(tiny().bfloat16(), 2).state_dict()
        results[dtype] = {
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor.bfloat16(), start[name])
        }
    assert results[torch.bfloat16] == results[torch.float32]


@pytest.mark.parametrize("method", ["relocate", "paper"])
def test_modes_and_frozen_parameters_come_back_as_they_were(method, tiny, photos, tmp_path):
    model = used(tiny())
    modes = {name: module.training for name, module in model.named_modules()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    api.distill(model, photos, tmp_path / "run", method=method, **QUICK)
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert after.pop("reg_token") is True
    assert after == trains
    frozen = tiny().requires_grad_(False)
    api.distill(frozen, photos, tmp_path / "frozen", method=method, **QUICK)
    assert frozen.num_prefix_tokens == 3
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_verdict_leaves_the_instance_exactly_as_it_was(tiny, photos, tmp_path):
    model = used(tiny(), torch.float16)
    before = portrait(model)
    assert (
        api.distill(model, photos, tmp_path / "run", **QUICK | {"force": False, "method": "relocate"}).outcome
        is None
    )
    assert_same(portrait(model), before)


def test_looking_and_measuring_leave_an_instance_as_it_was(tiny, photos):
    model = used(tiny())
    before = portrait(model)
    phreg.inspect(model, photos, count=2, device="cpu")
    assert_same(portrait(model), before)
    phreg.evaluate(model, baseline=used(tiny()), task="consistency", data=photos, device="cpu", views=2)
    assert_same(portrait(model), before)


def test_an_export_leaves_an_instance_in_its_own_mode(tmp_path):
    model = phreg.add_registers(LIBRARIES["transformers"]["dinov2"](), 2).train()
    before = portrait(model)
    phreg.export(model, tmp_path / "out", format="onnx")
    assert_same(portrait(model), before)


def test_test_time_registers_of_units_that_do_not_exist_leave_no_registers(tiny):
    model = tiny()
    before = portrait(model)
    with pytest.raises(PhregError, match="which has 0 there"):
        test_time.install(adapt(model), {7: [(1, 1)]})
    assert_same(portrait(model), before)


def test_measuring_an_fp16_instance_in_bf16_is_refused_in_words(tiny, photos):
    with pytest.raises(PhregError, match=r"weights are float16.*leave precision out"):
        phreg.evaluate(
            tiny().half(), task="consistency", data=photos, device="cpu", precision="bf16", views=2
        )


def test_a_run_goes_on_from_a_failure_with_the_same_instance(tiny, photos, tmp_path, monkeypatch):
    model, other = tiny(), tiny()
    with monkeypatch.context() as patch:
        then_raise(patch, distillation, "save_run", KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            api.distill(model, photos, tmp_path / "run", **QUICK)
    api.distill(model, photos, tmp_path / "run", resume=True, **QUICK)
    api.distill(other, photos, tmp_path / "other", **QUICK)
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_frozen_twin_takes_no_memory_and_what_trains_does_not_reach_it(tiny):
    model = tiny()
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with rollback.rollback_on_error(adapt(model)) as state:
        twin = state.frozen_twin().model
        assert {name: parameter.data_ptr() for name, parameter in twin.named_parameters()} == own
        trained = unlock(state.model, UnlockConfig(roles=("block.1", "vectors")))
        with torch.no_grad():
            for parameter in trained.values():
                parameter.zero_()
    assert {name: parameter.data_ptr() for name, parameter in twin.named_parameters()} == own
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in tiny().state_dict().items())
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    apart = {name for name, parameter in model.named_parameters() if parameter.data_ptr() != own[name]}
    assert apart == {name.removeprefix("model.") for name in trained}
    assert not any(parameter.any() for parameter in trained.values())


@pytest.mark.parametrize(
    ("family", "unlocked"),
    [
        ("timm/vit", {"roles": ("vectors",), "lora": {"rank": 2, "blocks": "all"}}),
        ("transformers/dinov2", {"roles": ("vectors",), "lora": {"rank": 2, "blocks": "all"}}),
        # Without LoRA: PEFT makes the weights of fused attention anew at every forward.
        ("open_clip/clip", {"roles": ("vectors", "block.-1")}),
    ],
)
def test_a_run_holds_one_copy_of_the_weights_that_do_not_train(
    family, unlocked, photos, tmp_path, monkeypatch
):
    def held(*modules):
        storages = [parameter.untyped_storage() for module in modules for parameter in module.parameters()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def watched(task, *arguments):
        tasks.append(task)
        return real(task, *arguments)

    def looked(*_):
        student, teacher = tasks[0].student, tasks[0].teacher.backbone
        trained = sum(one.nbytes for one in student.parameters() if one.requires_grad)
        sizes.add(held(student, teacher) - trained)

    twin = FAMILIES[family]()
    own = {parameter.data_ptr() for parameter in twin.parameters()}
    phreg.add_registers(twin, 2)
    reshaped = sum(  # timm keeps the registers' positions apart from those of patches
        parameter.nbytes
        for name, parameter in twin.named_parameters()
        if parameter.data_ptr() not in own and "reg" not in name
    )
    tasks, sizes, real = [], set(), distillation.train
    monkeypatch.setattr(distillation, "train", watched)
    model = FAMILIES[family]()
    before = held(model)
    api.distill(model, photos, tmp_path / "run", observe=looked, unlock=unlocked, method="relocate", **QUICK)
    assert sizes == {before + reshaped}


def test_a_shallow_twin_takes_no_memory_and_its_structure_is_its_own(tiny):
    model = tiny()
    model.head = model.blocks[0].mlp.fc1  # tied
    before = portrait(model)
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    twin = rollback.shallow_twin(model)
    assert {name: parameter.data_ptr() for name, parameter in twin.named_parameters()} == own
    assert twin.head is twin.blocks[0].mlp.fc1
    phreg.add_registers(twin, 2)
    twin.blocks[0].register_forward_hook(lambda *_: None)
    twin.pos_embed = nn.Parameter(torch.zeros(1))
    assert_same(portrait(model), before)


def test_an_adapter_takes_memory_for_what_it_changes_alone(tiny, photos, tmp_path):
    unlocked = {"roles": ("block.1",), "lora": {"rank": 0}}
    api.distill(tiny(), photos, tmp_path / "run", unlock=unlocked, method="relocate", **QUICK)
    model = tiny()
    own = {name: parameter.data_ptr() for name, parameter in model.blocks.named_parameters()}
    phreg.load(tmp_path / "run", into=model)
    apart = {name for name, parameter in model.blocks.named_parameters() if parameter.data_ptr() != own[name]}
    assert apart == {name for name in own if name.startswith("1.")}


def test_a_model_that_was_moved_and_cast_comes_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = portrait(model)
    with rollback.unchanged(model):
        model.to("meta").half().eval()  # which stands for a device that is not here
        assert not model.training
    assert_same(portrait(model), before)


def test_trained_weights_that_do_not_fit_the_models_precision_are_an_error():
    model = nn.Linear(2, 2).half()
    state = rollback.ModelState(model)
    rollback.to_fp32(model)
    with torch.no_grad():
        model.weight.fill_(1e6)
    with pytest.raises(TrainingError, match=r"weight, up to 1e\+06, do not fit.*float16"):
        state.restore_precision()


def test_what_is_no_half_precision_stays_as_it_is():
    model = nn.BatchNorm1d(2).double()
    assert {tensor.dtype for tensor in rollback.to_fp32(model).state_dict().values()} == {
        torch.float64,
        torch.int64,
    }
