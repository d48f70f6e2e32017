"""Registers start as asked, go in once, and come out again without a trace."""

import ast
from pathlib import Path

import accelerate
import pytest
import torch
from families import FAMILIES as EVERY
from families_timm import FAMILIES

import phreg
from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.registers import add_registers, initial_registers, remove_registers
from phreg.sinks import test_time

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("init", "std"), [("randn", 1 / 16), ("trunc-normal", 0.02)])
def test_registers_are_drawn_around_zero_with_the_standard_deviation_of_their_kind(init, std):
    tokens = initial_registers(100, 256, init)
    # Of 25 600 draws, the mean varies by std / 160 and their own std by std / 226; the bound is 5 times that.
    assert tokens.mean().item() == pytest.approx(0, abs=5 * std / 160)
    assert tokens.std().item() == pytest.approx(std, abs=5 * std / 226)


def test_registers_can_start_at_zero():
    assert torch.equal(initial_registers(3, 8, "zeros"), torch.zeros(3, 8))


@pytest.mark.parametrize("init", ["randn", "trunc-normal"])
def test_the_draw_is_the_seeds_alone_and_touches_no_global_state(init):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = initial_registers(3, 8, init, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(initial_registers(3, 8, init, seed=5), first)
    assert not torch.equal(initial_registers(3, 8, init, seed=6), first)


def test_randn_of_seed_0_is_what_is_drawn_where_nothing_is_said():
    expected = initial_registers(3, 32, "randn", 0)
    assert torch.equal(initial_registers(3, 32), expected)
    assert torch.equal(adapt(phreg.add_registers(FAMILIES["vit"](), 3)).registers.detach()[0], expected)


def test_registers_start_as_asked_in_the_model():
    backbone = adapt(add_registers(FAMILIES["vit"](), 2, "zeros"))
    assert backbone.num_registers == 2
    assert not backbone.registers.any()
    other = adapt(add_registers(FAMILIES["vit"](), 2, "randn", 7))
    assert torch.equal(other.registers.detach()[0], initial_registers(2, 32, "randn", 7))


@pytest.mark.parametrize("init", ["randn", "trunc-normal", "zeros"])
@pytest.mark.parametrize("name", EVERY)
def test_registers_lie_where_the_model_does_whatever_the_default_device(name, init):
    model = EVERY[name]()
    torch.set_default_device("meta")
    try:
        tokens = adapt(add_registers(model, 3, init)).registers
    finally:
        torch.set_default_device(None)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    expected = initial_registers(3, tokens.shape[-1], init)
    assert torch.allclose(tokens.float()[0, -3:], expected)


UNITS = {1: [(5, 1), (9, -1)]}


def with_test_time_registers(model):
    """Adds test-time registers, where the MLP of block 1 can be taken apart; else others."""
    backbone = adapt(model)
    if backbone.mlp(1) is None:
        add_registers(backbone, 3, "zeros")
    else:
        test_time.install(backbone, UNITS, 3)
    return backbone


@pytest.mark.parametrize("name", EVERY)
def test_test_time_registers_lie_where_the_model_does_whatever_the_default_device(name):
    model, expected = EVERY[name](), with_test_time_registers(EVERY[name]())
    torch.set_default_device("meta")
    try:
        backbone = with_test_time_registers(model)
    finally:
        torch.set_default_device(None)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(backbone(images).patches, expected(images).patches)
    assert {
        tensor.device.type for tensor in with_test_time_registers(EVERY[name]().to("meta")).parameters()
    } == {"meta"}


def answer(backbone):
    """Calls a model as its library does, which is where accelerate's hooks are."""
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    if backbone.spec.library == "transformers":
        return backbone.run(images)
    return getattr(backbone.model, "visual", backbone.model)(images)


@pytest.mark.parametrize(
    "name", [name for name in EVERY if name != "open_clip/coca"]
)  # it answers by a tuple
@torch.no_grad()
def test_a_patched_model_that_accelerate_offloads_keeps_its_registers(name):
    backbone, stock = adapt(add_registers(EVERY[name](), 3)), EVERY[name]()
    expected, stock_expected = answer(backbone), answer(adapt(stock))
    for model in (stock, backbone.model):
        accelerate.cpu_offload(model, execution_device="cpu")
    try:
        right = torch.equal(answer(adapt(stock)), stock_expected)
    except RuntimeError as error:
        pytest.skip(f"its library does not run it offloaded: {error}")
    if not right:
        pytest.skip("its library gives other answers where it is offloaded, registers or not")
    assert {parameter.device.type for parameter in backbone.model.parameters()} == {"meta"}
    assert torch.equal(answer(backbone), expected)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_model_that_accelerate_spreads_module_by_module_takes_registers(name):
    model = EVERY[name]()
    children = {child: "cpu" for child, _ in model.named_children()}
    own = {parameter: "cpu" for parameter, _ in model.named_parameters(recurse=False)}
    spread = accelerate.dispatch_model(model, children | own, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in spread.modules())
    backbone, expected = adapt(add_registers(spread, 3)), adapt(add_registers(EVERY[name](), 3))
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone(images).patches, expected(images).patches)


ALLOWED = {
    "registers.py",  # `insert`, which all that adds registers to a user's model goes through
    "backbones/open_clip.py",  # a tower hands them on to timm's trunk
    "backbones/transformers.py",  # a model that phreg builds itself, of a remote-code export
    "backbones/transformers_classes.py",  # and one of another class
}


def test_registers_get_into_a_users_model_in_one_place():
    root = Path(phreg.__file__).parent
    callers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "insert_registers"
    }
    assert callers == ALLOWED


@pytest.mark.parametrize("name", EVERY)
def test_a_model_on_the_meta_device_takes_registers_there(name):
    model = EVERY[name]().to("meta")
    add_registers(model, 3)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert adapt(model).num_registers == 3


@pytest.mark.parametrize("name", ["transformers/vit", "timm/vit", "open_clip/clip"])
def test_a_model_that_accelerate_has_offloaded_is_refused_before_registers_are_lost(name):
    model = EVERY[name]()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(PhregError, match=r"accelerate has offloaded, such as .*; add registers first"):
        add_registers(model, 2)
    assert adapt(model).num_registers == 0
    whole = accelerate.dispatch_model(EVERY[name](), {"": "cpu"})
    assert adapt(add_registers(whole, 2)).num_registers == 2


def test_0_registers_change_nothing():
    model = FAMILIES["vit"]()
    before = model(IMAGES)
    assert add_registers(model, 0) is model
    assert adapt(model).num_registers == 0
    assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("count", [-1, -4])
def test_a_negative_count_is_refused(count):
    with pytest.raises(PhregError, match=f"asked for {count} registers; use 0 or more"):
        add_registers(FAMILIES["vit"](), count)


def test_registers_go_in_once():
    model = add_registers(FAMILIES["vit"](), 2)
    with pytest.raises(PhregError, match=r"which has 2 from phreg; call phreg\.remove_registers"):
        add_registers(model, 1)
    assert adapt(model).num_registers == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_removing_registers_undoes_adding_them_to_the_bit(wrapped):
    model = FAMILIES["vit"]()
    before, state = model(IMAGES), {name: value.clone() for name, value in model.state_dict().items()}
    given = adapt(model) if wrapped else model
    assert add_registers(given, 3) is given
    assert not torch.equal(model(IMAGES), before)
    assert remove_registers(given) is given
    assert torch.equal(model(IMAGES), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_removing_registers_from_a_model_without_leaves_it_as_it_is():
    model = FAMILIES["vit"]()
    before = model(IMAGES)
    assert remove_registers(model) is model
    assert torch.equal(model(IMAGES), before)


def test_test_time_registers_go_with_all_their_hooks():
    model = FAMILIES["vit"]()
    before, hooks = model(IMAGES), hooks_of(model)
    test_time.install(adapt(model), {1: [(5, 1)]}, 2, (32, 32))
    assert not torch.equal(model(IMAGES), before)
    remove_registers(model)
    assert torch.equal(model(IMAGES), before)
    assert hooks_of(model) == hooks


def hooks_of(model):
    """The number of each module's hooks before its forward."""
    return [
        (len(module._forward_pre_hooks), len(module._forward_pre_hooks_with_kwargs))
        for module in model.modules()
    ]
