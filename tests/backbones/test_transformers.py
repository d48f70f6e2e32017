import copy
import dataclasses
import inspect
import json
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import accelerate
import peft
import pytest
import torch
import transformers as hf
from families_transformers import FAMILIES, NAFLEX, TEXT, TINY, VISION, WIDE, build, joint
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from transformers import PreTrainedModel
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

import phreg
from phreg.backbones import resolve
from phreg.backbones import transformers as adapter
from phreg.backbones.resolve import settle_normalisation
from phreg.backbones.transformers import adapt, load
from phreg.backbones.transformers_registers import PadMask, RegisterSpan
from phreg.data.crops import as_input
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.formats.export import export
from phreg.formats.load import open_model
from phreg.registers import add_registers, remove_registers

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums in another order differ by 1e-7 a block; values are of order 1, and mistakes change 1e-2."""

every_family = pytest.mark.parametrize("name", FAMILIES)

PREFIX = {
    "dinov2-registers": 3,
    "dinov2-registers-classifier": 3,
    "dinov2-registers-backbone": 3,
    "dinov3": 3,
    "dinov3-gated": 3,
    "dinov3-backbone": 3,
    "deit": 2,
    "deit-classifier": 2,
    "ijepa": 0,
}
"""Prefix tokens, where they are not a CLS alone; SigLIP and AIMv2 have none."""


def images(size: int = 32, width: int | None = None, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, size, width or size, generator=torch.Generator().manual_seed(seed))


def patched(name: str, count: int = 4) -> adapter.TransformersBackbone:
    return add_registers(adapt(FAMILIES[name]()), count)


# -- what is found out about a model


@every_family
def test_the_spec_counts_the_tokens_the_model_came_with(name: str) -> None:
    expected = PREFIX.get(name, 0 if name.startswith(("siglip", "aimv2")) else 1)

    backbone = adapt(FAMILIES[name]())

    assert backbone.spec.num_prefix == expected
    assert (backbone.spec.width, backbone.spec.num_heads, len(backbone.blocks)) == (32, 4, 3)
    assert (backbone.spec.patch_size, backbone.spec.input_size) == ((8, 8), (32, 32))


@every_family
def test_every_parameter_of_the_tower_has_a_role_but_mask_tokens(name: str) -> None:
    backbone = patched(name)

    named = {parameter for names in backbone.roles().values() for parameter in names}

    prefix = f"{backbone.tower_name}." if backbone.tower_name else ""
    tower = {prefix + parameter for parameter, _ in backbone.tower.named_parameters()}
    assert {parameter for parameter in tower - named if not parameter.endswith("mask_token")} == set()


def test_a_text_tower_has_no_role() -> None:
    roles = adapt(FAMILIES["clip"]()).roles()

    assert roles["head"] == ["visual_projection.weight"]
    assert not [name for names in roles.values() for name in names if name.startswith(("text_", "logit_"))]


def test_a_pre_norm_is_part_of_the_norms() -> None:
    roles = adapt(FAMILIES["clip-vision"]()).roles()

    assert roles["norm"] == [
        f"{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32)),
            "window",
        ),
        (lambda: hf.HieraModel(hf.HieraConfig()), "window"),
        (lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)), "convolution"),
        (lambda: hf.BeitModel(hf.BeitConfig(**WIDE, use_relative_position_bias=True)), "bias"),
        (lambda: hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**WIDE)), "bias"),
        (lambda: hf.BertModel(hf.BertConfig(**TEXT)), "bert"),
        (lambda: nn.Linear(2, 2), "no model of transformers"),
    ],
    ids=["swin", "hiera", "convnext", "beit", "data2vec", "text", "no-transformers"],
)
def test_other_models_are_refused_with_the_reason(model, reason: str) -> None:
    with torch.device("meta"):
        instance = model()

    with pytest.raises(UnsupportedModelError, match=reason):
        adapt(instance)


def llava(model_class: type[nn.Module]) -> nn.Module:
    text = hf.LlamaConfig(**{key: TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size")})
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 1, 4, 4
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION), text_config=text, image_token_id=3)
    return build(model_class, config)


def test_of_several_vision_towers_none_is_taken() -> None:
    model = llava(hf.LlavaForConditionalGeneration)
    model.another = torch.nn.Sequential(hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)))
    with pytest.raises(
        UnsupportedModelError, match=r"several vision models; give one: .*, model\.another\.0"
    ):
        adapt(model)


@pytest.mark.parametrize(
    ("model_class", "tower"),
    [(hf.LlavaModel, "vision_tower"), (hf.LlavaForConditionalGeneration, "model.vision_tower")],
)
def test_a_language_model_is_patched_in_its_vision_tower_however_deep(
    model_class: type[nn.Module], tower: str
) -> None:
    model = llava(model_class)
    before = model.get_image_features(images()).pooler_output

    add_registers(model, 4)
    after = model.get_image_features(images()).pooler_output

    assert model.get_submodule(tower).registers.tokens.shape == (1, 4, 32)
    assert [state.shape for state in after] == [state.shape for state in before]
    assert not torch.equal(after[0], before[0])


@torch.no_grad()
def test_a_patched_language_model_saves_itself_whole(tmp_path: Path) -> None:
    model = add_registers(llava(hf.LlavaForConditionalGeneration), 4)

    model.save_pretrained(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["phreg.json", "phreg.safetensors"]
    again = open_model(tmp_path)[0].model
    assert type(again) is hf.LlavaForConditionalGeneration
    tokens = torch.tensor([[0, *[3] * 16, 5]])
    assert torch.equal(again(tokens, images()[:1]).logits, model(tokens, images()[:1]).logits)


# -- running


def native_pooled(model: PreTrainedModel, name: str, pixels: torch.Tensor) -> torch.Tensor:
    """Runs a model as its documentation says, and takes its global output."""
    if name in ("clip", "metaclip2", "aimv2", "siglip"):
        return model.get_image_features(pixels).pooler_output
    if name.startswith("siglip2"):
        rows = torch.stack([convert_image_to_patches(image, 8) for image in pixels])
        arguments = {
            "pixel_values": rows,
            "pixel_attention_mask": torch.ones(rows.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * len(pixels)),
        }
        if name == "siglip2":
            return model.get_image_features(**arguments).pooler_output
        return getattr(model, "vision_model", model)(**arguments).pooler_output
    if name == "vit-mae":
        return model(pixels, noise=torch.arange(16).expand(len(pixels), -1)).last_hidden_state[:, 0]
    if name.endswith("-backbone"):
        model.config.reshape_hidden_states, model.config.return_class_token = False, True
        output = model(pixels)
        return output.cls_tokens[-1] if name == "dinov3-backbone" else output.feature_maps[-1][:, 0]
    if name.endswith("-projection"):
        return model(pixels).image_embeds
    if name.endswith("-classifier"):
        model = next(child for child in model.children() if isinstance(child, PreTrainedModel))
    output = model(pixels)
    if output.get("pooler_output") is not None:
        return output.pooler_output
    tokens = output.last_hidden_state
    return tokens.mean(1) if name in ("ijepa", "aimv2-native") else tokens[:, 0]


@every_family
@torch.no_grad()
def test_run_gives_the_global_output_of_the_library(name: str) -> None:
    model = FAMILIES[name]()
    pooled = adapt(model).run(images())

    torch.testing.assert_close(pooled, native_pooled(model, name, images()), **ROUNDING)


@torch.no_grad()
def test_a_masked_autoencoder_shows_every_patch_in_order_and_keeps_its_mask_ratio() -> None:
    model = build(hf.ViTMAEModel, hf.ViTMAEConfig(**WIDE, mask_ratio=0.75))
    backbone, changed = adapt(model), images()
    changed[:, :, 8:16, 16:24] += 10  # the patch in row 1, column 2

    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = backbone.tower.embeddings.patch_embeddings(images())
        before = backbone.block_tokens(images(), [0])[0]
        torch.manual_seed(2)
        again, after = backbone.block_tokens(images(), [0])[0], backbone.block_tokens(changed, [0])[0]

    assert first.shape[1] == 16
    assert before.shape == (2, 17, 32)
    assert torch.equal(before, again)
    assert int((after - before).abs().sum(-1)[0].argmax()) == 1 + 1 * 4 + 2
    assert model.config.mask_ratio == 0.75


@torch.no_grad()
def test_a_masked_autoencoder_still_drops_patches_when_its_users_call_it() -> None:
    model = build(hf.ViTMAEModel, hf.ViTMAEConfig(**WIDE, mask_ratio=0.75))

    add_registers(model, 4)

    assert model(images()).last_hidden_state.shape == (2, 1 + 4, 32)


@torch.no_grad()
def test_registers_go_in_before_the_pre_norm() -> None:
    backbone, found = patched("clip-vision"), []
    backbone.blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))

    backbone.run(images())

    norm = backbone.tower.pre_layrnorm
    expected = nn.functional.layer_norm(backbone.registers[0], (32,), norm.weight, norm.bias)
    torch.testing.assert_close(found[0][0, 1:5], expected, **ROUNDING)


@torch.no_grad()
def test_registers_kept_in_fp32_serve_a_model_in_bf16() -> None:
    backbone = patched("vit")
    backbone.model.bfloat16()
    backbone.registers.data = backbone.registers.data.float()

    assert backbone.run(images().bfloat16()).dtype == torch.bfloat16


def test_the_projection_is_the_models_own_and_passes_gradients_on() -> None:
    model = FAMILIES["clip"]()

    projection = adapt(model).projection
    projection.sum().backward()

    assert projection.shape == (32, 16)
    assert model.visual_projection.weight.grad is not None


@torch.no_grad()
def test_single_hidden_states_can_be_asked_for() -> None:
    backbone = patched("vit")

    states = backbone.model(images(), output_hidden_states=[1, 3]).hidden_states

    assert [None if state is None else state.shape[1] for state in states] == [None, 17, None, 17]


ASKED = {"output_hidden_states": True}


def loss_and_states(backbone: adapter.TransformersBackbone, **asked):
    """Runs a tower in double precision; the loss weighs each value of its main output differently."""
    output = backbone.tower(**backbone._inputs(images().double()) | asked)
    maps = output.get("feature_maps")
    found = maps[-1] if maps else output.last_hidden_state
    return (found * torch.arange(found.numel()).reshape(found.shape).sin()).sum(), output.get("hidden_states")


@every_family
def test_gradients_reach_the_hidden_states_that_are_handed_out(name: str) -> None:
    backbone = patched(name)
    backbone.model.double()
    loss, states = loss_and_states(backbone, **ASKED)
    for state in states:
        state.retain_grad()
    loss.backward()

    for number, state in enumerate(states):
        moved = torch.randn(state.shape, generator=torch.Generator().manual_seed(number)).double()
        losses = []
        for step in (1e-3, -1e-3):
            with moved_state(backbone, number, step * moved), torch.no_grad():
                losses.append(loss_and_states(backbone)[0])
        slope = (losses[0] - losses[1]) / 2e-3
        # Central differences are off by the square of the step, and AIMv2 norms in fp32 whatever its type.
        torch.testing.assert_close((state.grad * moved).sum(), slope, rtol=1e-3, atol=1e-4)


@contextmanager
def moved_state(backbone: adapter.TransformersBackbone, number: int, by: torch.Tensor):
    """Adds to a hidden state, in its place in the stack: after a block, or before the first."""
    start, count = backbone.spec.num_prefix, backbone.num_registers

    def add(tokens):
        room = by.new_zeros(len(by), count, by.shape[2])
        return tokens + torch.cat([by[:, :start], room, by[:, start:]], 1)

    block = backbone.blocks[max(number - 1, 0)]
    handle = (
        block.register_forward_hook(lambda _, args, output: add(output), prepend=True)
        if number
        else block.register_forward_pre_hook(lambda _, args: (add(args[0]), *args[1:]))
    )
    yield
    handle.remove()


@every_family
def test_what_is_handed_out_for_gradients_is_the_same_to_the_bit(name: str) -> None:
    backbone = patched(name)
    with torch.no_grad():
        expected = backbone.tower(**backbone._inputs(images()) | ASKED)
        alone = backbone.tower(**backbone._inputs(images())).get("last_hidden_state")

    found = backbone.tower(**backbone._inputs(images()) | ASKED)

    assert all(state.grad_fn is not None for state in found.hidden_states)
    for state, without in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(state, without)
    if alone is not None:
        assert torch.equal(found.last_hidden_state, alone)


@pytest.mark.parametrize("asked_by", ["argument", "config"])
def test_gradients_reach_hidden_states_however_they_were_asked_for(asked_by: str) -> None:
    backbone = patched("dinov2-classifier")
    keywords = ASKED
    if asked_by == "config":
        backbone.collector.config.output_hidden_states, keywords = True, {}

    output = backbone.model(images(), **keywords)
    found = torch.autograd.grad(output.logits.sum(), output.hidden_states)

    assert all(gradient.any() for gradient in found)


def shapes(output):
    """The shapes in an output, nested as it is."""
    if isinstance(output, tuple | list):
        return [shapes(item) for item in output]
    return tuple(output.shape) if isinstance(output, torch.Tensor) else output


@every_family
@pytest.mark.parametrize("states", [False, True], ids=["attentions", "both"])
@torch.no_grad()
def test_a_tuple_of_outputs_is_as_the_library_gives_it_where_fused_attention_has_no_maps(name, states):
    stock, with_registers = adapt(FAMILIES[name]()), patched(name)
    asked = {"output_attentions": True, "output_hidden_states": states, "return_dict": False}

    given = [backbone.tower(**backbone._inputs(images()) | asked) for backbone in (stock, with_registers)]

    assert shapes(given[1]) == shapes(given[0])


# -- attention


@every_family
@torch.no_grad()
def test_the_parts_of_attention_make_the_librarys_own_attention(name: str) -> None:
    backbone = patched(name)
    last = len(backbone.blocks) - 1
    inputs, maps, outputs = [], [], []
    block = backbone.blocks[last]
    module = block.get_submodule(backbone.family.attention)
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    module.register_forward_hook(lambda _, args, output: outputs.append(output[0]) or maps.append(output[1]))
    backbone.model.set_attn_implementation("eager")

    backbone.run(images())

    attention = backbone.attention(last)
    normed = attention.norm(inputs[0])
    scores = attention.queries(normed) @ attention.keys(normed).transpose(-1, -2) * attention.scale
    found = scores.softmax(-1)
    torch.testing.assert_close(found, maps[0], **ROUNDING)
    heads = (found @ attention.values(normed)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.out(heads), outputs[0], **ROUNDING)


def test_rotated_queries_need_an_image_first() -> None:
    backbone = adapt(FAMILIES["dinov3"]())

    with pytest.raises(PhregError, match="run the backbone first"):
        backbone.attention(0).queries(torch.zeros(1, 19, 32))


# -- mlp


@every_family
def test_every_block_has_an_mlp_of_its_own(name: str) -> None:
    backbone = patched(name)
    for index, block in enumerate(backbone.blocks):
        mlp = backbone.mlp(index)
        layers = [
            part for part in block.get_submodule(backbone.family.mlp).modules() if type(part) is nn.Linear
        ]
        assert {*mlp.up, mlp.down} == set(layers)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("vit", 2), ("dinov2", 2), ("dinov2-swiglu", 4), ("dinov3", 2), ("dinov3-gated", 4), ("aimv2", 2)],
)
def test_only_its_rows_move_a_hidden_unit(name: str, num_parameters: int) -> None:
    backbone, hidden, units = patched(name), [], torch.tensor([5, 2])
    mlp, module = backbone.mlp(1), backbone.blocks[1].get_submodule(backbone.family.mlp)
    mlp.down.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))

    module(torch.randn(2, 7, 32))
    hidden[0][..., units].sum().backward()

    fed = mlp.rows(units)
    assert len(fed) == num_parameters  # weights, and biases but for AIMv2's, of each layer
    assert all(rows.tolist() == [5, 2] for _, rows in fed)
    for parameter, rows in fed:
        moved = parameter.grad.reshape(mlp.num_units, -1).any(1)
        assert sorted(moved.nonzero().flatten().tolist()) == sorted(rows.tolist())
    others = set(module.parameters()) - {parameter for parameter, _ in fed}
    assert all(parameter.grad is None for parameter in others)


def test_an_mlp_with_layers_of_its_own_is_not_taken_apart() -> None:
    backbone = adapt(FAMILIES["dinov2"]())
    backbone.blocks[0].mlp.inner_norm = nn.LayerNorm(64)
    wrapped = backbone.blocks[1].mlp
    wrapped.fc1 = nn.Sequential(wrapped.fc1)

    assert [backbone.mlp(index) is None for index in range(3)] == [True, True, False]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_stays_unseen_with_registers(implementation: str) -> None:
    backbone = patched("siglip2-vision")
    backbone.model.set_attn_implementation(implementation)
    rows = torch.randn(2, 16, 192, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    shapes, outputs = torch.tensor([[4, 4], [3, 4]]), []

    for padding in (0.0, 5.0):
        rows[1, 12:] = padding
        outputs.append(backbone.model(rows, mask, shapes))

    assert torch.equal(outputs[0].pooler_output, outputs[1].pooler_output)
    assert torch.equal(outputs[0].last_hidden_state[1, :12], outputs[1].last_hidden_state[1, :12])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([[True, False]]), [[True, True, True, False]]),
        (torch.tensor([[1, 0]]), [[1, 1, 1, 0]]),
        (
            torch.tensor([[[[0.0, -1.0], [0.0, 0.0]]]]),
            [[[[0, 0, 0, -1.0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]],
        ),
        (torch.tensor([[[[True, False]]]]), [[[[True, True, True, False]]]]),
    ],
    ids=["flags", "numbers", "scores", "one-row"],
)
def test_a_mask_makes_room_where_the_registers_are(mask: torch.Tensor, expected: list) -> None:
    pad = PadMask(RegisterSpan(start=1, count=2))

    args, _ = pad(nn.Identity(), (torch.zeros(1, 2, 4), mask), {})

    assert args[1].tolist() == expected


@pytest.mark.parametrize("padded", [False, True], ids=["no-mask", "padded"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "deit", "ijepa"])
@torch.no_grad()
def test_flex_attention_gives_what_fused_attention_gives(name: str, padded: bool, monkeypatch) -> None:
    # Compiled, as transformers does it, each shape takes seconds.
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.WrappedFlexAttention.__call__", lambda _: uncompiled_flex
    )
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", uncompiled_mask)
    backbone, outputs = patched(name), []
    mask = torch.ones(2, 16 + backbone.spec.num_prefix, dtype=torch.long)
    mask[1, 9:] = 0
    for implementation in ("sdpa", "flex_attention"):
        backbone.model.set_attn_implementation(implementation)
        keywords = {"attention_mask": mask} if padded else {}
        outputs.append(backbone.model(images(), **keywords).last_hidden_state)

    torch.testing.assert_close(outputs[1], outputs[0], **ROUNDING)


def uncompiled_mask(**kwargs):
    return create_block_mask(**kwargs | {"_compile": False})


def uncompiled_flex(*args, **kwargs):
    with warnings.catch_warnings():  # that this is the slow way
        warnings.simplefilter("ignore")
        return flex_attention(*args, **kwargs)


def test_a_block_mask_makes_room_where_the_registers_are() -> None:
    pad, causal = PadMask(RegisterSpan(start=1, count=2)), lambda image, head, query, key: query >= key
    mask = create_block_mask(causal, None, None, 3, 3, device="cpu")

    args, _ = pad(nn.Identity(), (torch.zeros(1, 3, 4), mask), {})
    again, _ = pad(nn.Identity(), (torch.zeros(1, 3, 4), mask), {})

    found = create_mask(args[1].mask_mod, 2, 2, 5, 5, device="cpu")  # for two images and heads alike
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert found.tolist() == [[[[bool(seen) for seen in row] for row in expected]] * 2] * 2
    assert args[1].seq_lengths == (5, 5)
    assert again[1] is args[1]


def test_a_mask_that_cannot_grow_is_refused_with_a_way_out() -> None:
    pad = PadMask(RegisterSpan(start=1, count=2))

    with pytest.raises(PhregError, match="set_attn_implementation"):
        pad(nn.Identity(), (torch.zeros(1, 2, 4),), {"attention_mask": object()})


# -- adding and removing


def traces(model: nn.Module) -> dict[str, tuple]:
    """Notes everything a patch might leave behind."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs")
    return {
        name: (
            sorted(vars(module)),
            sorted(dict(module.named_children())),
            [len(vars(module)[kind]) for kind in hooks],
        )
        for name, module in model.named_modules()
    }


@every_family
def test_removal_leaves_no_trace(name: str) -> None:
    model = FAMILIES[name]()
    before = traces(model)

    add_registers(model, 4)
    during = traces(model)
    remove_registers(model)

    assert during != before
    assert traces(model) == before


def test_a_copys_registers_are_removed_without_touching_the_original() -> None:
    original = FAMILIES["dinov2"]()
    add_registers(original, 4)
    before = traces(original)

    twin = remove_registers(copy.deepcopy(original))

    assert traces(original) == before
    assert traces(twin) == traces(FAMILIES["dinov2"]())


def test_registers_are_not_inserted_twice() -> None:
    backbone = patched("vit")

    with pytest.raises(PhregError, match="which has 4"):
        backbone.insert_registers(torch.zeros(2, 32))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT uses it
def test_peft_trains_its_copy_of_the_registers_and_merges_it() -> None:
    model = patched("dinov2").model
    frozen = adapt(model).registers
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["registers"], init_lora_weights=False
    )

    wrapped = peft.get_peft_model(model, config)
    trained = wrapped.base_model.model.registers.tokens
    wrapped(pixel_values=images()).pooler_output.sum().backward()

    assert frozen.grad is None
    assert trained is not frozen
    assert trained.grad.abs().sum() > 0
    with torch.no_grad():
        trained.add_(1)
        before = wrapped(pixel_values=images()).pooler_output
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(images()).pooler_output, before, **ROUNDING)


# -- native size

STRETCHABLE = [
    name for name in FAMILIES if not name.startswith(("siglip2", "dinov3")) and name not in ("aimv2-native",)
]


@pytest.mark.parametrize("name", STRETCHABLE)
@torch.no_grad()
def test_a_new_native_size_is_what_the_library_resamples_to(name: str) -> None:
    backbone = patched(name)
    table = backbone.roles()["pos_embed"]
    parameter = backbone.model.get_parameter(table[0])
    expected = backbone.run(images(48)) if backbone.spec.any_size else None

    backbone.set_input_size(48)

    assert backbone.model.get_parameter(table[0]) is parameter
    assert backbone.spec.input_size == (48, 48)
    assert adapt(backbone.model).spec.input_size == (48, 48)
    found = backbone.run(images(48))
    if expected is not None:
        torch.testing.assert_close(found, expected, **ROUNDING)
        backbone.family = dataclasses.replace(
            backbone.family, sizes="always"
        )  # the library now needs no telling
        torch.testing.assert_close(backbone.run(images(48)), expected, **ROUNDING)


@torch.no_grad()
def test_a_new_native_size_is_saved_and_loaded(tmp_path: Path) -> None:
    backbone = adapt(FAMILIES["clip"]())
    backbone.set_input_size(48)
    backbone.model.save_pretrained(tmp_path)

    again = load(tmp_path)

    assert again.spec.input_size == (48, 48)
    assert torch.equal(again.run(images(48)), backbone.run(images(48)))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dinov2", (32, 48)),
        ("vit", (32, 44)),
        ("vit", 33),
        ("vit", 0),
        ("siglip2", 48),
        ("dinov3", 48),
        ("aimv2-native", 48),
    ],
)
def test_a_native_size_that_cannot_be_is_refused_and_changes_nothing(
    name: str, size: int | tuple[int, int]
) -> None:
    backbone = adapt(FAMILIES[name]())
    before = copy.deepcopy(backbone.model.state_dict())

    with pytest.raises(PhregError, match="native size"):
        backbone.set_input_size(size)

    assert backbone.spec.input_size == (32, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())


# -- names on disk


@every_family
def test_disk_names_are_those_of_the_librarys_own_file(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()

    model.save_pretrained(tmp_path)

    stored, found = load_file(tmp_path / "model.safetensors"), adapt(model).disk_state()
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in stored.items())


@every_family
def test_single_tensors_come_back_in_place_and_leave_the_others(name: str) -> None:
    backbone = patched(name)
    parameters = dict(backbone.model.named_parameters())
    before = {key: tensor.clone() for key, tensor in backbone.disk_state().items()}
    wanted = {key: tensor + 1 for index, (key, tensor) in enumerate(before.items()) if index % 5 == 0}

    backbone.load_disk_state(wanted)

    after = backbone.disk_state()
    assert all(torch.equal(after[key], (before | wanted)[key]) for key in before)
    assert all(parameters[key] is parameter for key, parameter in backbone.model.named_parameters())


@pytest.mark.parametrize("name", ["dinov2-swiglu", "vit", "clip"])
def test_registers_have_one_name_on_disk(name: str) -> None:
    backbone = patched(name)

    added = backbone.disk_state().keys() - adapt(FAMILIES[name]()).disk_state().keys()

    assert added == {f"{backbone.tower_name}.registers.tokens".lstrip(".")}


@pytest.mark.parametrize(
    "tensors",
    [
        {"encoder.layer.9.norm1.weight": torch.zeros(32)},
        {"layernorm.weight": torch.zeros(16)},
        {"layernorm.weight": torch.zeros(32, 2)},
        {"encoder.layer.0.mlp.weights_in.weight": torch.zeros(8, 32)},
    ],
    ids=["unknown", "short", "deep", "joined"],
)
def test_a_tensor_of_another_model_is_refused_and_nothing_changes(tensors: dict[str, torch.Tensor]) -> None:
    backbone = adapt(FAMILIES["dinov2-swiglu"]())
    before = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}

    with pytest.raises(PhregError, match="another model"):
        backbone.load_disk_state({"layernorm.bias": torch.ones(32)} | tensors)

    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.disk_state().items())


# -- saving

CONSTRUCTED = [
    (hf.ViTModel, {"add_pooling_layer": False, "use_mask_token": False}),
    (hf.ViTModel, {"add_pooling_layer": True, "use_mask_token": True}),
    (hf.ViTModel, {"add_pooling_layer": False, "use_mask_token": True}),
    (hf.DeiTModel, {"add_pooling_layer": False, "use_mask_token": False}),
    (hf.DeiTModel, {"add_pooling_layer": True, "use_mask_token": True}),
    (hf.DeiTModel, {"add_pooling_layer": False, "use_mask_token": True}),
    (hf.IJepaModel, {"add_pooling_layer": True, "use_mask_token": False}),
    (hf.IJepaModel, {"add_pooling_layer": False, "use_mask_token": True}),
    (hf.IJepaModel, {"add_pooling_layer": True, "use_mask_token": True}),
    (hf.ViTMSNModel, {"use_mask_token": True}),
]


@pytest.mark.parametrize("way", ["save_pretrained", "merged"])
@pytest.mark.parametrize(("model_class", "arguments"), CONSTRUCTED)
@torch.no_grad()
def test_what_the_constructor_was_told_beside_its_config_is_saved_and_loaded(
    model_class, arguments, way, tmp_path
):
    model = build(partial(model_class, **arguments), model_class.config_class(**WIDE))
    add_registers(model, 3)

    if way == "merged":
        export(adapt(model), tmp_path / "out", "merged", base=resolve.load(model)[1])
    else:
        model.save_pretrained(tmp_path / "out")
    loaded = phreg.load(tmp_path / "out")

    assert type(loaded) is model_class
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    for own, other in zip(model(images()).to_tuple(), loaded(images()).to_tuple(), strict=True):
        assert torch.equal(own, other)


@every_family
def test_no_constructor_takes_more_beside_its_config_than_saved_tensors_tell(name):
    taken = inspect.signature(type(FAMILIES[name]()).__init__).parameters.keys()
    assert taken - {"self", "config", "kwargs", "args"} <= adapter.CONSTRUCTED.keys()


@every_family
def test_a_patched_model_saves_what_no_stock_loader_takes(name: str, tmp_path: Path) -> None:
    backbone = patched(name)

    backbone.model.save_pretrained(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["phreg.json", "phreg.safetensors"]
    description = json.loads((tmp_path / "phreg.json").read_text())
    assert description["class"] == type(backbone.model).__name__
    assert description["registers"] == 4
    assert description["config"]["model_type"] == backbone.model.config.model_type
    stored, expected = load_file(tmp_path / "phreg.safetensors"), backbone.disk_state()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in expected.items())
    for loader in (hf.AutoModel, type(backbone.model)):
        with pytest.raises((OSError, ValueError)):
            loader.from_pretrained(tmp_path, local_files_only=True)


def test_pushing_to_the_hub_saves_in_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    model, uploaded = patched("dinov2").model, []
    monkeypatch.setattr("transformers.utils.hub.hf_api", mock.Mock())
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", mock.Mock())
    monkeypatch.setattr(
        type(model),
        "_upload_modified_files",
        lambda self, folder, *args, **kwargs: uploaded.extend(path.name for path in Path(folder).iterdir()),
    )

    model.push_to_hub("me/it")

    assert sorted(uploaded) == ["phreg.json", "phreg.safetensors"]


def test_saving_and_pushing_in_one_call_is_refused_with_the_other_way(tmp_path: Path) -> None:
    with pytest.raises(PhregError, match=r"call push_to_hub"):
        patched("dinov2").model.save_pretrained(tmp_path, push_to_hub=True)


def test_a_patched_model_is_not_saved_over_a_stock_one(tmp_path: Path) -> None:
    FAMILIES["dinov2"]().save_pretrained(tmp_path)

    with pytest.raises(PhregError, match=r"holds config\.json, model\.safetensors"):
        patched("dinov2").model.save_pretrained(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_part_without_the_registers_is_not_saved_alone(tmp_path: Path) -> None:
    with pytest.raises(PhregError, match="save the whole model"):
        patched("dinov2").model.encoder.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["clip", "siglip", "aimv2", "dinov2-classifier", "clip-vision-projection"])
@torch.no_grad()
def test_a_model_patched_in_its_tower_alone_is_saved_by_export_or_refused(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    tower = adapt(model).tower
    add_registers(tower, 4)

    with pytest.raises(
        PhregError, match=rf"asked to save {type(model).__name__}, whose vision tower.*merged"
    ):
        model.save_pretrained(tmp_path / "whole")
    phreg.export(model, tmp_path / "out", format="merged")
    tower.save_pretrained(tmp_path / "tower")

    assert not (tmp_path / "whole" / "model.safetensors").exists()
    assert torch.equal(adapt(phreg.load(tmp_path / "out")).run(images()), adapt(model).run(images()))
    assert torch.equal(adapt(phreg.load(tmp_path / "tower")).run(images()), adapt(tower).run(images()))
    remove_registers(tower)
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()


@torch.no_grad()
def test_a_model_patched_in_its_tower_alone_still_gives_its_tensors_to_whoever_else_asks(tmp_path) -> None:
    model = FAMILIES["clip"]()
    add_registers(model.vision_model, 4)

    torch.save(model.state_dict(), tmp_path / "state")
    twin = FAMILIES["clip"]()
    add_registers(twin.vision_model, 4, "zeros")
    twin.load_state_dict(torch.load(tmp_path / "state"))

    assert torch.equal(adapt(twin).run(images()), adapt(model).run(images()))


@every_family
@pytest.mark.parametrize("limit", ["10KB", 20_000])
@torch.no_grad()
def test_a_patched_model_is_saved_and_loaded_whatever_the_size_of_shards_asked_for(name, limit, tmp_path):
    model = patched(name).model
    model.save_pretrained(tmp_path, max_shard_size=limit)
    loaded = phreg.load(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["dinov2-swiglu", "clip", "siglip2-vision", "vit-classifier"])
@torch.no_grad()
def test_a_base_in_shards_takes_registers_when_it_is_opened_or_spread_by_accelerate(name, tmp_path):
    FAMILIES[name]().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    stock = type(FAMILIES[name]())
    children = {child: "cpu" for child, _ in FAMILIES[name]().named_children()}
    own = {parameter: "cpu" for parameter, _ in FAMILIES[name]().named_parameters(recurse=False)}
    expected = patched(name).run(images())

    for model in (
        open_model(tmp_path / "base")[0].model,
        stock.from_pretrained(tmp_path / "base", device_map="cpu"),
        stock.from_pretrained(tmp_path / "base", device_map=children | own),
    ):
        add_registers(model, 4)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(adapt(model).run(images()), expected)
        assert torch.equal(adapt(phreg.load(tmp_path / "saved")).run(images()), expected)


def test_registers_go_where_the_sequence_lies_that_they_join() -> None:
    registers = adapter.Registers(torch.zeros(2, 8), num_prefix=1)

    joined = registers(torch.empty(1, 5, 8, device="meta", dtype=torch.bfloat16))

    assert (joined.device.type, joined.dtype, joined.shape) == ("meta", torch.bfloat16, (1, 7, 8))


@pytest.mark.parametrize("way", ["offloaded", "meta"])
@torch.no_grad()
def test_a_model_without_values_is_refused_until_they_are_back(way: str, tmp_path: Path) -> None:
    model = patched("clip").model
    expected = adapt(model).run(images())
    if way == "offloaded":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        model.to("meta")

    with pytest.raises(PhregError, match=r"have no values.*remove_hook_from_module"):
        model.save_pretrained(tmp_path / "refused")

    assert not (tmp_path / "refused").exists()
    if way == "offloaded":
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(adapt(phreg.load(tmp_path / "saved")).run(images()), expected)


def test_a_state_that_lacks_some_of_the_model_is_refused_before_it_is_written(tmp_path: Path) -> None:
    model = patched("clip").model
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "logit_scale"}

    with pytest.raises(
        PhregError, match=r"lacks 1 of its tensors, such as logit_scale.*leave state_dict out"
    ):
        model.save_pretrained(tmp_path / "out", state_dict=state)

    assert not (tmp_path / "out").exists()


NESTED = {
    "the whole": lambda model: model,
    "its inner model": lambda model: model.model,
    "its vision tower": lambda model: model.model.vision_tower,
}


@pytest.mark.parametrize("part", NESTED)
@torch.no_grad()
def test_every_model_around_a_patched_encoder_saves_itself_with_it(part: str, tmp_path: Path) -> None:
    model = add_registers(llava(hf.LlavaForConditionalGeneration), 4)
    saved = NESTED[part](model)

    saved.save_pretrained(tmp_path)
    loaded = phreg.load(tmp_path)

    assert type(loaded) is type(saved)
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in saved.state_dict().items())


def test_the_text_tower_of_a_patched_model_saves_as_ever(tmp_path: Path) -> None:
    model = patched("clip").model

    model.text_model.save_pretrained(tmp_path)

    assert (tmp_path / "config.json").is_file()


@pytest.mark.parametrize("from_tower", [False, True], ids=["from-the-model", "from-its-tower"])
def test_once_registers_are_removed_a_model_saves_as_ever(from_tower: bool, tmp_path: Path) -> None:
    model = patched("clip").model

    remove_registers(model.vision_model if from_tower else model)
    model.save_pretrained(tmp_path)

    assert load(tmp_path).num_registers == 0


def test_a_copy_saves_its_own_weights(tmp_path: Path) -> None:
    backbone = patched("dinov2")
    twin = adapt(copy.deepcopy(backbone.model))
    with torch.no_grad():
        twin.registers.fill_(3)

    twin.model.save_pretrained(tmp_path)

    assert torch.equal(
        load_file(tmp_path / "phreg.safetensors")["registers.tokens"], torch.full((1, 4, 32), 3.0)
    )


def test_an_interrupted_save_leaves_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = patched("dinov2")
    backbone.model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("phreg.backbones.transformers_registers.save_file", full_disk)
    with pytest.raises(PhregError, match="no space"):
        backbone.model.save_pretrained(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- loading


@every_family
@torch.no_grad()
def test_a_folder_loads_as_the_class_that_wrote_it(name: str, tmp_path: Path) -> None:
    original = adapt(FAMILIES[name]())
    original.model.save_pretrained(tmp_path)

    loaded = load(tmp_path)

    # A classifier of image-text models is loaded as such too: its head is the reason why it was kept.
    assert type(loaded.model) is type(original.model)
    assert loaded.spec == original.spec
    assert not any(module.training for module in loaded.model.modules())
    assert torch.equal(loaded.run(images()), original.run(images()))
    assert loaded.disk_state().keys() == original.disk_state().keys()


@torch.no_grad()
def test_a_vision_model_in_the_file_of_a_whole_one_keeps_that_files_names(tmp_path: Path) -> None:
    whole = adapt(FAMILIES["clip"]())
    whole.model.save_pretrained(tmp_path)

    part = add_registers(adapt(hf.CLIPVisionModel.from_pretrained(tmp_path)), 4)
    part.load_disk_state({"vision_model.registers.tokens": torch.full((1, 4, 32), 2.0)})

    names = part.disk_state().keys() - {"vision_model.registers.tokens"}
    assert names == {name for name in whole.disk_state() if name.startswith("vision_model.")}
    assert torch.equal(part.registers, torch.full((1, 4, 32), 2.0))


def test_half_precision_files_load_in_fp32(tmp_path: Path) -> None:
    FAMILIES["dinov2"]().bfloat16().save_pretrained(tmp_path)

    assert {parameter.dtype for parameter in load(tmp_path).model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        (
            "processor_config.json",
            {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}},
        ),
    ],
)
def test_the_image_processors_normalisation_wins(file: str, content: dict, tmp_path: Path) -> None:
    FAMILIES["dinov2"]().save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))

    spec = load(tmp_path).spec

    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@torch.no_grad()
def test_a_pooler_that_was_never_trained_is_left_out(tmp_path: Path) -> None:
    hf.ViTModel(FAMILIES["vit"]().config, add_pooling_layer=False).save_pretrained(tmp_path)

    loaded = load(tmp_path)

    assert loaded.model.pooler is None
    assert torch.equal(loaded.run(images()), loaded.model(images()).last_hidden_state[:, 0])


@torch.no_grad()
def test_old_files_of_tensors_are_read_and_objects_in_them_are_not(tmp_path: Path) -> None:
    original = adapt(FAMILIES["dinov2"]())
    original.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(original.disk_state(), tmp_path / "pytorch_model.bin")

    assert torch.equal(load(tmp_path).run(images()), original.run(images()))

    torch.save({"layernorm.weight": tmp_path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="cannot load it"):
        load(tmp_path)


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "should hold an object, found list"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text("{"),
            "preprocessor_config.json cannot",
        ),
        (cut_weights, "cannot load it"),
        (drop_weights, "cannot load it"),
        (lambda folder: change_config(folder, hidden_size=64), "cannot load it"),
        (lambda folder: change_config(folder, hidden_size="wide"), "cannot load it"),
        (lambda folder: change_config(folder, num_hidden_layers=2), r"has, unlike the class, .*layers\.2"),
        (lambda folder: change_config(folder, num_hidden_layers=4), r"lacks .*layers\.3"),
        (
            lambda folder: change_weights(folder, lambda tensors: tensors.pop("layernorm.bias")),
            r"lacks 1 .*layernorm\.bias",
        ),
        (
            lambda folder: change_weights(
                folder, lambda tensors: tensors.update({"registers.tokens": torch.zeros(1, 4, 32)})
            ),
            r"has, unlike the class, .*registers\.tokens",
        ),
    ],
    ids=[
        "no-config",
        "broken-config",
        "list-config",
        "broken-processor",
        "cut-weights",
        "no-weights",
        "other-width",
        "no-number",
        "fewer-blocks",
        "more-blocks",
        "lacks-one",
        "patched",
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(damage, message: str, tmp_path: Path) -> None:
    FAMILIES["vit"]().save_pretrained(tmp_path)
    damage(tmp_path)

    with pytest.raises(LoadError, match=message):
        load(tmp_path)


def test_weights_of_a_projection_must_be_there(tmp_path: Path) -> None:
    FAMILIES["clip-vision-projection"]().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop("visual_projection.weight"))

    with pytest.raises(LoadError, match=r"lacks 1 .*visual_projection"):
        load(tmp_path)


def test_a_model_type_unknown_to_transformers_is_refused_without_running_its_code(tmp_path: Path) -> None:
    FAMILIES["dinov2"]().save_pretrained(tmp_path)
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit('ran')")
    change_config(tmp_path, model_type="mine", auto_map={"AutoModel": "modeling_mine.Mine"})

    with pytest.raises(UnsupportedModelError, match="'mine'"):
        load(tmp_path)


def test_a_folder_with_another_architecture_is_refused(tmp_path: Path) -> None:
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModelError, match="BertModel"):
        load(tmp_path)


# -- normalisation

PROCESSORS = {
    "as usual": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255},
    "not normalised": {"do_normalize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "not rescaled": {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    "neither": {"do_rescale": False, "do_normalize": False},
    "to -1 and 1": {"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "one number": {"image_mean": 0.3, "image_std": 0.7},
    "what its class says": {},
}
"""Settings of image processors."""


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("name", ["ViTImageProcessor", "CLIPImageProcessor"])
def test_images_are_normalised_as_the_image_processor_does(kind: str, name: str, tmp_path: Path) -> None:
    FAMILIES["vit"]().save_pretrained(tmp_path)
    settings = PROCESSORS[kind] | {"image_processor_type": name, "do_resize": False, "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    levels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    expected = hf.AutoImageProcessor.from_pretrained(tmp_path)(levels[0], return_tensors="pt")["pixel_values"]

    loaded, instance = load(tmp_path), adapt(hf.ViTModel.from_pretrained(tmp_path))
    settle_normalisation(instance)

    for backbone in (loaded, instance):
        assert backbone.assumed is None
        torch.testing.assert_close(as_input(backbone, levels), expected.float(), rtol=1e-5, atol=1e-5)


def test_a_nested_processor_is_found_ahead_of_one_by_itself(tmp_path: Path) -> None:
    FAMILIES["clip"]().save_pretrained(tmp_path)
    for file, mean in (("preprocessor_config.json", 0.1), ("processor_config.json", 0.2)):
        settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": [mean] * 3}
        nested = {"image_processor": settings} if file == "processor_config.json" else settings
        (tmp_path / file).write_text(json.dumps(nested))

    assert hf.AutoImageProcessor.from_pretrained(tmp_path).image_mean == (0.2, 0.2, 0.2)
    assert load(tmp_path).spec.mean == (0.2, 0.2, 0.2)


def test_an_instance_from_the_hub_is_normalised_as_its_repository_says(hub, tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    FAMILIES["vit"]().save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": 0.5}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    hub.commit("me/vit", folder)

    backbone, _ = open_model(hf.ViTModel.from_pretrained("me/vit"))

    assert (backbone.spec.mean, backbone.spec.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("where", ["nowhere", "folder", "hub", "hub is down"])
def test_what_is_assumed_is_said_once_where_no_image_processor_is_found(where, hub, tmp_path, caplog) -> None:
    model, repository = FAMILIES["vit"](), f"me/{where.replace(' ', '-')}"
    model.save_pretrained(tmp_path / "vit")
    if where == "folder":
        model = hf.ViTModel.from_pretrained(tmp_path / "vit")
    elif where.startswith("hub"):
        hub.commit(repository, tmp_path / "vit")
        model = hf.ViTModel.from_pretrained(repository)
        hub.failing = where == "hub is down"

    for _ in range(2):
        backbone, _ = open_model(model)

    assert backbone.spec.mean == (0.5, 0.5, 0.5)
    (said,) = [record.getMessage() for record in caplog.records if "normalised" in record.getMessage()]
    assert "mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5), which are usual for vit" in said
    assert "--mean, --std" in said


def test_a_processor_for_no_rgb_is_refused_with_its_values(tmp_path: Path) -> None:
    FAMILIES["vit"]().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [1, 2], "image_std": [1, 2]})
    )

    with pytest.raises(LoadError, match=r"three numbers, or one, found \[1, 2\]"):
        load(tmp_path)


# -- models that are not square

KEYWORD = {
    "vit": (hf.ViTModel, hf.ViTConfig),
    "deit": (hf.DeiTModel, hf.DeiTConfig),
    "vit-msn": (hf.ViTMSNModel, hf.ViTMSNConfig),
    "ijepa": (hf.IJepaModel, hf.IJepaConfig),
}
"""Families that take images of any shape as their own, and resample their positions when told to."""


def oblong(name: str, size: tuple[int, int], **changes) -> nn.Module:
    model_class, config_class = KEYWORD[name]
    return build(model_class, config_class(**WIDE | {"image_size": size} | changes))


@pytest.mark.parametrize("name", KEYWORD)
@pytest.mark.parametrize(
    "size", [(16, 64), (24, 40)], ids=["as many patches as a square", "no square number"]
)
def test_at_its_own_size_a_model_that_is_not_square_adds_its_positions_as_they_are(name, size) -> None:
    model = oblong(name, size)
    seen: list[torch.Tensor] = []
    model.embeddings.register_forward_hook(lambda _module, _args, output: seen.append(output))
    pixels = images(*size)

    patches = adapt(model)(pixels).patches

    embedded = model.embeddings.patch_embeddings(pixels)
    count = embedded.shape[1]
    positions = model.embeddings.position_embeddings[:, -count:]
    torch.testing.assert_close(seen[0][:, -count:], embedded + positions, rtol=0, atol=0)
    torch.testing.assert_close(
        patches.flatten(1, 2), model(pixels).last_hidden_state[:, -count:], rtol=0, atol=0
    )


@pytest.mark.parametrize("changes", [{}, {"patch_size": (8, 16)}], ids=["oblong", "oblong patches"])
def test_a_model_whose_positions_transformers_would_take_for_a_square_takes_its_own_size_alone(
    changes,
) -> None:
    backbone = adapt(oblong("vit", (16, 64), **changes))

    assert not backbone.spec.any_size
    with pytest.raises(PhregError, match="takes only its own size; use 16x64"):
        backbone(images(32, 32))


def test_registers_in_a_model_that_is_not_square_come_and_go(tmp_path: Path) -> None:
    model = oblong("vit", (24, 40))
    before = model(images(24, 40)).last_hidden_state

    backbone = add_registers(adapt(model), 4)
    backbone.model.save_pretrained(tmp_path / "patched")
    again, _ = open_model(tmp_path / "patched")
    patched = backbone(images(24, 40)).patches
    remove_registers(backbone)

    assert patched.shape == (2, 3, 5, 32)
    torch.testing.assert_close(again(images(24, 40)).patches, patched, rtol=0, atol=0)
    torch.testing.assert_close(model(images(24, 40)).last_hidden_state, before, rtol=0, atol=0)


def test_a_new_native_size_may_be_any_shape_where_the_model_keeps_both_sides() -> None:
    backbone = adapt(FAMILIES["vit"]())
    table = backbone.model.embeddings.position_embeddings.detach()
    as_image = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(as_image, (2, 8), mode="bicubic", align_corners=False)

    backbone.set_input_size((16, 64))

    found = backbone.model.embeddings.position_embeddings
    torch.testing.assert_close(found[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 16, 32))
    assert (backbone.spec.input_size, backbone.spec.any_size) == ((16, 64), False)
    assert backbone.model(images(16, 64)).last_hidden_state.shape == (2, 17, 32)
    backbone.set_input_size(32)
    assert (backbone.spec.input_size, backbone.spec.any_size) == ((32, 32), True)
    with pytest.raises(PhregError, match="square grid"):
        adapt(FAMILIES["dinov2"]()).set_input_size((16, 64))


def test_positions_that_transformers_cannot_resample_at_all_are_refused() -> None:
    config = hf.Dinov2Config(**{**TINY, "image_size": (24, 40)}, mlp_ratio=2)

    with pytest.raises(UnsupportedModelError, match=r"grid of 3x5.*use a model of square images"):
        adapt(hf.Dinov2Model(config))


@pytest.mark.parametrize(
    "model",
    [
        lambda: hf.ViTModel(hf.ViTConfig(**WIDE, num_channels=1)),
        lambda: hf.Dinov2Model(hf.Dinov2Config(**TINY, mlp_ratio=2, num_channels=4)),
        lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**NAFLEX, num_channels=4)),
        lambda: hf.CLIPModel(joint(hf.CLIPConfig, **VISION, num_channels=1)),
    ],
    ids=["vit", "dinov2", "siglip2", "clip"],
)
def test_models_of_other_than_three_channels_are_refused(model) -> None:
    with pytest.raises(UnsupportedModelError, match=r"images of \d channels, not of 3"):
        adapt(model())
