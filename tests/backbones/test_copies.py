"""A copy of a patched model is a model of its own: nothing that it runs belongs to the original, nor back."""

import copy
import gc
import io
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

import phreg
from phreg.backbones.base import Backbone
from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import adapt
from phreg.sinks import test_time

UNITS = {0: [(3, 1)], 1: [(5, 1), (9, -1)]}


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "torch.save": through_torch_save}

NOT_PICKLED = [name for name in FAMILIES if name.startswith("transformers/") and name.endswith("-backbone")]
"""Families of which transformers itself pickles no model: it hooks closures into them."""

CLIP = ["transformers/clip", "transformers/metaclip2-vision-projection", "transformers/aimv2"]
CLIP += ["timm/clip", "open_clip/clip", "open_clip/timm", "open_clip/tower"]
"""Some families with a projection to a space shared with text, and so with other read-outs."""

every_family = pytest.mark.parametrize("name", FAMILIES)
every_way = pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for way in WAYS for name in FAMILIES if way == "deepcopy" or name not in NOT_PICKLED],
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def with_registers(name: str) -> Backbone:
    return adapt(phreg.add_registers(FAMILIES[name](), 3))


def with_test_time_registers(name: str) -> Backbone:
    backbone = adapt(FAMILIES[name]())
    if any(backbone.mlp(block) is None for block in UNITS):
        pytest.skip("its MLP cannot be taken apart")
    test_time.install(backbone, UNITS, 2)
    return backbone


PATCHES = {"registers": with_registers, "test-time registers": with_test_time_registers}
every_patch = pytest.mark.parametrize("patch", PATCHES)


def pictures(backbone: Backbone) -> Tensor:
    return torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))


def reachable(model: nn.Module) -> Iterator[Any]:
    """Walks to all that a model holds: hooks, notes on it, what phreg's functions among them close over."""
    kept = (type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float)
    seen: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, kept):
            continue
        seen[id(found)] = found
        if isinstance(found, types.FunctionType):  # which every copy shares
            if found.__module__.startswith("phreg"):
                cells = (cell.cell_contents for cell in found.__closure__ or ())
                waiting += [*cells, *(found.__defaults__ or ())]
            continue
        yield found
        waiting += gc.get_referents(found) if not isinstance(found, Tensor) else []


def memory(model: nn.Module) -> set[int]:
    """Tells where all tensors lie that a model holds, inside hooks too."""
    tensors = (found for found in reachable(model) if isinstance(found, Tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def modules(model: nn.Module) -> set[int]:
    """Tells all modules apart that a model holds, inside hooks too."""
    return {id(found) for found in reachable(model) if isinstance(found, nn.Module)}


def change_registers(backbone: Backbone) -> None:
    registers = backbone.require_registers()
    random = torch.Generator().manual_seed(1)  # the same change of both, so that they stay alike
    registers.add_(1 + torch.rand(registers.shape, generator=random))


def assert_apart(original: Backbone, twin: Backbone, change: Callable[[Backbone], None]) -> None:
    """Both give the same, and a change of one changes its own output and not the other's."""
    images = pictures(original)
    assert torch.equal(twin(images).patches, original(images).patches)
    for changed, other in ((twin, original), (original, twin)):
        own, others = changed(images).patches, other(images).patches
        change(changed)
        assert not torch.equal(changed(images).patches, own)
        assert torch.equal(other(images).patches, others)


def assert_nothing_shared(original: nn.Module, twin: nn.Module) -> None:
    assert not modules(original) & modules(twin)
    assert not memory(original) & memory(twin)


@every_way
def test_a_copy_and_its_original_each_use_registers_of_their_own(name, way):
    original = with_registers(name)
    assert_apart(original, adapt(WAYS[way](original.model)), change_registers)


@every_way
@every_patch
def test_a_copy_holds_no_tensor_and_no_module_of_its_original(name, way, patch):
    original = PATCHES[patch](name)
    original(pictures(original))  # which may leave notes on the model
    twin = WAYS[way](original.model)
    assert len(modules(original.model)) == len(modules(twin))
    assert len(memory(original.model)) == len(memory(twin)), "what shares memory in one does in the other"
    assert_nothing_shared(original.model, twin)


@pytest.mark.parametrize("name", NOT_PICKLED)
def test_of_backbones_of_transformers_not_even_stock_ones_are_pickled(name):
    with pytest.raises(AttributeError, match="output_capuring_hook"):
        pickle.dumps(FAMILIES[name]())


@every_family
def test_the_gradient_of_a_copy_reaches_the_copys_registers_alone(name):
    original = with_registers(name)
    twin = adapt(copy.deepcopy(original.model))
    with torch.enable_grad():
        twin(pictures(twin)).patches.square().sum().backward()
    assert twin.require_registers().grad.abs().sum() > 0
    assert original.require_registers().grad is None


def movers(backbone: Backbone) -> list[test_time.MoveUnits]:
    """Finds the hooks that move units, on the modules of a model."""
    hooks = (hook for module in backbone.model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, test_time.MoveUnits)]


def change_units(backbone: Backbone) -> None:
    for hook in movers(backbone):
        hook.units[:] = [unit + 11 for unit in hook.units]


@every_way
def test_a_copy_and_its_original_each_move_hidden_units_of_their_own(name, way):
    original = with_test_time_registers(name)
    twin = adapt(WAYS[way](original.model))
    assert_apart(original, twin, change_units)
    assert_apart(original, twin, change_registers)


@every_way
def test_a_copys_test_time_registers_go_without_those_of_its_original(name, way):
    original, stock = with_test_time_registers(name), adapt(FAMILIES[name]())
    images = pictures(original)
    twin, before = adapt(WAYS[way](original.model)), original(images).patches
    phreg.remove_registers(twin)
    assert torch.equal(twin(images).patches, stock(images).patches)
    assert movers(twin) == []
    assert test_time.installed(twin) is None
    assert len(movers(original)) == len(UNITS)
    assert torch.equal(original(images).patches, before)


def test_a_copy_warns_of_another_size_by_itself(caplog):
    original = adapt(FAMILIES["timm/vit"]())
    test_time.install(original, UNITS, 2, (32, 32))
    twin = adapt(copy.deepcopy(original.model))
    for backbone in (original, twin, original, twin):
        backbone(torch.randn(1, 3, 48, 48))
    assert caplog.text.count("test-time registers found on images of 32x32 pixels") == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CLIP)
@pytest.mark.parametrize("readout", ["naclip", "sclip", "value-only"])
def test_a_read_out_of_a_copy_is_made_of_its_own_modules(name, way, readout):
    original = with_registers(name)
    set_readout(original, readout)
    twin = WAYS[way](original.model)
    assert_nothing_shared(original.model, twin)
    images = pictures(original)
    assert torch.equal(adapt(twin)(images).patches, original(images).patches)
