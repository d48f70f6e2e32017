"""Registers change no type: whatever a model computes in, every module gets and gives what it did before."""

import contextlib
import copy
from collections.abc import Callable

import open_clip
import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

import phreg
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import adapt
from phreg.sinks import test_time

NORMS = (nn.LayerNorm, nn.RMSNorm)

every_family = pytest.mark.parametrize("name", FAMILIES)


def norms_kept(model: nn.Module) -> None:
    """All in bf16, and every norm in fp32."""
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, NORMS) or type(module).__name__.endswith("RMSNorm"):
            module.float()


def low_precision_of_open_clip(model: nn.Module) -> None:
    """What open_clip does for `precision="pure_bf16"`: linear layers alone, tokens and positions stay."""
    open_clip.convert_weights_to_lp(model, torch.bfloat16)


TYPES: dict[str, Callable[[nn.Module], object]] = {
    "fp32": lambda model: model.float(),
    "bf16": lambda model: model.bfloat16(),
    "fp16": lambda model: model.half(),
    "fp64": lambda model: model.double(),
    "bf16, norms fp32": norms_kept,
    "open_clip's": low_precision_of_open_clip,
}
"""What a model may be turned to."""

CONTEXTS = {
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
}


def add_trained(model: nn.Module) -> None:
    phreg.add_registers(model, 3)


def add_test_time(model: nn.Module) -> None:
    backbone = adapt(model)
    if backbone.mlp(1) is None:
        pytest.skip("its MLP cannot be taken apart")
    test_time.install(backbone, {1: [(5, 1), (9, -1)]}, 2)


PATCHES = {"registers": add_trained, "test-time registers": add_test_time}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def types_in(value: object) -> list[torch.dtype]:
    """Lists the types of tensors of numbers, however nested."""
    if isinstance(value, Tensor):
        return [value.dtype] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [dtype for item in value for dtype in types_in(item)] if isinstance(value, tuple | list) else []


def types_inside(model: nn.Module, names: set[str]) -> dict[str, set[tuple[torch.dtype, ...]]]:
    """Runs a model, and notes what types its modules get and give, all calls alike.

    open_clip's tower norms registers apart from other tokens, and so calls its first norm twice.

    Raises:
        RuntimeError: It does not run so.
    """
    backbone, found = adapt(model), {}

    def note(name: str):
        def hook(_module, args, kwargs, output):
            given = [value for value in kwargs.values() if not isinstance(value, nn.Module)]
            found.setdefault(name, set()).add(tuple(types_in([*args, *given, output])))

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in names
    ]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=generator).to(backbone.dtype)
    try:
        features = backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return found | {"features": {tuple(types_in(tuple(features)))}}


def stock_types(model: nn.Module, context) -> tuple[set[str], dict[str, set[tuple[torch.dtype, ...]]]]:
    """Runs a model without registers; skips what its own library does not run in these types."""
    names = {name for name, _ in model.named_modules()}
    try:
        with context():
            return names, types_inside(model, names)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"its library does not run it so: {str(error)[:60]}")


def combinations():
    """Every family and way that there is in its library; test-time registers in two of them."""
    for name in FAMILIES:
        for types in TYPES:
            if types == "open_clip's" and not name.startswith("open_clip/"):
                continue
            yield name, types, "registers"
            if types in ("bf16", "bf16, norms fp32"):
                yield name, types, "test-time registers"


@pytest.mark.parametrize(("name", "types", "patch"), list(combinations()))
def test_every_module_gets_and_gives_the_types_that_it_did_without_registers(name, types, patch):
    stock, first, last = (FAMILIES[name]() for _ in range(3))
    TYPES[types](stock)
    names, expected = stock_types(stock, contextlib.nullcontext)
    for step in (TYPES[types], PATCHES[patch]):
        step(first)
    for step in (PATCHES[patch], TYPES[types]):
        step(last)
    assert types_inside(first, names) == expected
    assert types_inside(last, names) == expected, "cast after it was patched"


PROMOTED = {"timm/naflexvit"}
"""Without CLS, autocast keeps its tokens in half precision; timm's own registers, in fp32, promote them."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PROMOTED])
@pytest.mark.parametrize(
    ("types", "context"), [("fp32", "autocast bf16"), ("fp32", "autocast fp16"), ("bf16", "autocast bf16")]
)
def test_autocast_casts_what_it_did_without_registers(name, types, context):
    stock = FAMILIES[name]()
    TYPES[types](stock)
    patched = phreg.add_registers(copy.deepcopy(stock), 3)
    names, expected = stock_types(stock, CONTEXTS[context])
    with CONTEXTS[context]():
        assert types_inside(patched, names) == expected


def tokens_of(backbone: Backbone) -> torch.dtype:
    """Tells the type in which a model without registers hands tokens to its blocks."""
    found: list[Tensor] = []
    handle = backbone.first_block_input.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    images = torch.randn(2, 3, *backbone.spec.input_size).to(backbone.dtype)
    try:
        backbone.run(images)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"its library does not run it so: {str(error)[:60]}")
    finally:
        handle.remove()
    return found[0].dtype


@every_family
@pytest.mark.parametrize("types", [types for types in TYPES if types != "open_clip's"])
def test_registers_are_made_in_the_type_of_the_tokens_that_they_join(name, types):
    model = FAMILIES[name]()
    TYPES[types](model)
    expected = tokens_of(adapt(model))
    assert adapt(phreg.add_registers(model, 3)).require_registers().dtype == expected


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_nothing_behind_and_removal_gives_the_cast_model_back(name, dtype):
    model, stock = phreg.add_registers(FAMILIES[name](), 3), FAMILIES[name]().to(dtype)
    model.to(dtype)
    numbers = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in numbers} == {dtype}
    phreg.remove_registers(model)
    assert model.state_dict().keys() == stock.state_dict().keys()
    for key, tensor in stock.state_dict().items():
        assert model.state_dict()[key].dtype == tensor.dtype, key
        assert torch.equal(model.state_dict()[key], tensor), key


CAST_AS_THEY_GO_IN = [
    name
    for name in FAMILIES
    if not name.startswith("timm/")
    and name not in ("open_clip/timm", "open_clip/timm-head", "open_clip/siglip")
]
"""Families whose registers are not timm's own."""


@pytest.mark.parametrize("name", CAST_AS_THEY_GO_IN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_registers_kept_in_fp32_cast_no_hidden_state_and_count_as_rounded(name, dtype):
    names, expected = stock_types(FAMILIES[name]().to(dtype), contextlib.nullcontext)
    rounded = adapt(phreg.add_registers(FAMILIES[name](), 3).to(dtype))
    kept = adapt(copy.deepcopy(rounded.model))
    kept.require_registers().data = kept.require_registers().data.float()
    assert types_inside(kept.model, names) == expected
    images = torch.randn(2, 3, *rounded.spec.input_size).to(dtype)
    assert torch.equal(kept(images).patches, rounded(images).patches)


@pytest.mark.parametrize("name", ["timm/vit", "timm/eva02", "timm/naflexvit"])
def test_registers_of_timms_own_kept_in_fp32_are_refused_by_timm_and_not_cast_silently(name):
    backbone = adapt(phreg.add_registers(FAMILIES[name](), 3).bfloat16())
    backbone.require_registers().data = backbone.require_registers().data.float()
    with pytest.raises(RuntimeError, match="dtype"):
        backbone(torch.randn(2, 3, *backbone.spec.input_size).bfloat16())
