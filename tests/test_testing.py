"""The conformance suite: every family passes it, and each of its checks catches the fault it is there for."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from families import FAMILIES, LIBRARIES
from open_clip.model import CLIP
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from phreg.backbones.base import Mlp
from phreg.backbones.open_clip import NativeTower, RegisterVisionTransformer
from phreg.backbones.resolve import adapt
from phreg.backbones.timm import TimmBackbone
from phreg.registers import add_registers
from phreg.testing import check_backbone, laws, native_outputs, registers_masked
from phreg.testing.instruments import move_registers
from phreg.tokens import TokenLayout


def library_dense(model: nn.Module, images: Tensor) -> Tensor:
    """Reads dense features the way timm and open_clip offer them, after the final norm."""
    if hasattr(model, "visual"):
        found = model.forward_intermediates(images, normalize_intermediates=True, intermediates_only=True)
        return found["image_intermediates"][-1].permute(0, 2, 3, 1)
    found = model.forward_intermediates(images, norm=True, intermediates_only=True)
    return found[-1].permute(0, 2, 3, 1)


def final_states(model: nn.Module, images: Tensor) -> Tensor:
    """Reads dense features the way transformers offers them where the last hidden state is normed."""
    tokens = model(pixel_values=images).last_hidden_state
    rows, cols = (side // model.config.patch_size for side in images.shape[-2:])
    return tokens[:, tokens.shape[1] - rows * cols :].unflatten(1, (rows, cols))


DENSE = {
    f"timm/{name}": library_dense for name in ("vit", "deit3", "clip", "siglip", "dinov2", "eva02", "dinov3")
}
DENSE |= {f"open_clip/{name}": library_dense for name in ("clip", "no-pre-norm", "average", "timm", "siglip")}
DENSE |= {
    f"transformers/{name}": final_states
    for name in ("dinov2", "dinov2-registers", "dinov3", "siglip-vision", "vit", "deit", "vit-msn", "ijepa")
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_laws(family):
    check_backbone(FAMILIES[family](), dense=DENSE.get(family))


COMPILE_ALL = """
import sys
import torch
from families import LIBRARIES
from phreg.backbones.resolve import adapt
from phreg.testing import Subject
from phreg.testing.laws import check_compile

for name, build in LIBRARIES[sys.argv[1]].items():
    images = torch.ones(2, 3, *adapt(build()).spec.input_size)
    try:
        check_compile(Subject(build(), images, num_registers=4))
    except (AssertionError, RuntimeError) as error:
        print(name, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_family_compiles_and_exports(library):
    # In a process of its own: here phreg's shapes are checked as it runs, which no compiler can trace.
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", COMPILE_ALL, library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_model_under_test_is_left_as_it_was():
    model = FAMILIES["open_clip/clip"]().train()
    before = copy.deepcopy(model.state_dict())

    check_backbone(model)

    assert model.training
    assert type(model.visual) is VisionTransformer
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_size_can_be_asked_for():
    check_backbone(FAMILIES["open_clip/clip"](), size=(16, 24), num_registers=1)


# -- every check can fail ------------------------------------------------------------------------------------


@pytest.fixture
def broken():
    """Checks an open_clip model, whose adapter a test has broken, and returns what the suite says."""

    def check(**arguments) -> str:
        with pytest.raises(AssertionError) as caught:
            check_backbone(FAMILIES["open_clip/clip"](), **arguments)
        return str(caught.value)

    return check


def change_roles(monkeypatch, change):
    roles = NativeTower.roles
    monkeypatch.setattr(NativeTower, "roles", lambda self: change(self, roles(self)))


def change_embeds(monkeypatch, change):
    """Breaks the patched tower's sequence: `change` gets the tower, prefix, registers and patches."""
    embeds = RegisterVisionTransformer._embeds

    def broken(self, images):
        tokens = embeds(self, images)
        first = 1 + self.registers.shape[1]
        return change(self, tokens[:, :1], tokens[:, 1:first], tokens[:, first:])

    monkeypatch.setattr(RegisterVisionTransformer, "_embeds", broken)


def test_a_role_that_names_no_parameter_is_caught(monkeypatch, broken):
    change_roles(monkeypatch, lambda _, roles: roles | {"head": ["visual.nothing"]})
    assert "these are no parameters: ['visual.nothing']" in broken()


def test_a_parameter_of_two_roles_is_caught(monkeypatch, broken):
    change_roles(monkeypatch, lambda _, roles: roles | {"cls": roles["head"]})
    assert "these parameters have two roles: ['visual.proj']" in broken()


def test_an_incomplete_block_is_caught(monkeypatch, broken):
    change_roles(monkeypatch, lambda _, roles: roles | {"block.1": roles["block.1"][1:]})
    assert "role block.1 names" in broken()


def test_registers_without_their_role_are_caught(monkeypatch, broken):
    change_roles(monkeypatch, lambda _, roles: roles | {"registers": []})
    assert "role registers names []" in broken()


def test_a_change_by_zero_registers_is_caught(monkeypatch, broken):
    def adds_always(backbone, count):
        backbone.insert_registers(torch.zeros(count, backbone.spec.width))
        return backbone

    monkeypatch.setattr(laws, "add_registers", adds_always)
    assert "law 1 (0 registers change nothing) is broken: the class of visual became" in broken()


def test_registers_that_no_parameter_holds_are_caught():
    with pytest.raises(AssertionError, match="law 2 is broken: a patched model names no parameter"):
        move_registers(adapt(FAMILIES["open_clip/clip"]()))


def test_a_removal_that_leaves_registers_is_caught(monkeypatch, broken):
    monkeypatch.setattr(NativeTower, "remove_registers", lambda self: None)
    assert "law 1 (removal) is broken: 4 registers remain" in broken()


def test_a_removal_that_changes_one_bit_is_caught(monkeypatch, broken):
    remove = NativeTower.remove_registers

    def inexact(self):
        remove(self)
        self.tower.ln_post.bias.data[0] = torch.nextafter(self.tower.ln_post.bias.data[0], torch.tensor(9.0))

    monkeypatch.setattr(NativeTower, "remove_registers", inexact)
    assert "tensor visual.ln_post.bias changed" in broken()


def test_a_removal_that_freezes_a_parameter_is_caught(monkeypatch, broken):
    remove = NativeTower.remove_registers

    def freezing(self):
        remove(self)
        self.tower.proj.requires_grad_(False)

    monkeypatch.setattr(NativeTower, "remove_registers", freezing)
    assert "requires_grad of visual.proj changed" in broken()


def test_a_removal_that_leaves_a_hook_behind_is_caught(monkeypatch, broken):
    insert = NativeTower.insert_registers

    def hooking(self, tokens):
        insert(self, tokens)
        self.blocks[0].register_forward_hook(lambda module, args, output: output + 1e-3)

    monkeypatch.setattr(NativeTower, "insert_registers", hooking)
    assert "no longer bit-identical: ['run'" in broken()


def test_registers_in_the_wrong_place_are_caught(monkeypatch, broken):
    change_embeds(
        monkeypatch, lambda _, prefix, registers, patches: torch.cat([registers, prefix, patches], 1)
    )
    assert "law 2 (order) is broken: registers sit at positions [0, 1, 2, 3]" in broken()


def test_a_sequence_of_another_length_is_caught(monkeypatch, broken):
    change_embeds(
        monkeypatch, lambda _, prefix, registers, patches: torch.cat([prefix, registers, patches] * 2, 1)
    )
    assert "law 2 (order) is broken: the first block receives 42 tokens, the layout says 21" in broken()


def test_a_patched_model_that_is_not_recognised_is_caught(monkeypatch, broken):
    insert, remove = NativeTower.insert_registers, NativeTower.remove_registers

    def count(self, tokens):
        insert(self, tokens)
        self.count = len(tokens)

    def forget(self):
        remove(self)
        self.count = 0

    monkeypatch.setattr(NativeTower, "insert_registers", count)
    monkeypatch.setattr(NativeTower, "remove_registers", forget)
    monkeypatch.setattr(NativeTower, "num_registers", property(lambda self: getattr(self, "count", 0)))
    assert "law 2 is broken: 0 registers found in a model with 4" in broken()


def test_registers_in_the_output_are_caught(monkeypatch, broken):
    monkeypatch.delattr(RegisterVisionTransformer, "forward_intermediates")
    assert "intermediates.image_intermediates[0] has shape (2, 40, 4, 4), was (2, 32, 4, 4)" in broken()


def test_a_leak_of_registers_into_the_output_is_caught(monkeypatch, broken):
    pool = RegisterVisionTransformer._pool
    leak = lambda self, tokens: pool(self, tokens + 0.01 * tokens[:, 1:2])  # noqa: E731
    monkeypatch.setattr(RegisterVisionTransformer, "_pool", leak)
    assert "law 3 (masked registers have no influence) is broken: run differs by up to" in broken()


def test_attention_that_cannot_be_watched_is_caught():
    backbone = add_registers(adapt(FAMILIES["open_clip/clip"]()), 2)
    unwatched = pytest.raises(AssertionError, match="no attention over all tokens")
    with unwatched, registers_masked(backbone, torch.ones(1, 3, 32, 32)):
        pass


def test_tensors_that_are_not_read_back_are_caught(monkeypatch, broken):
    monkeypatch.setattr(NativeTower, "load_disk_state", lambda self, tensors: None)
    assert "load_disk_state(disk_state()) does not bring back ['positional_embedding'" in broken()


def test_registers_out_of_reach_of_the_gradient_are_caught(monkeypatch, broken):
    def constant(self, images):
        tokens = VisionTransformer._embeds(self, images)
        registers = self.ln_pre(self.registers.data.to(tokens.dtype)).expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1)

    monkeypatch.setattr(RegisterVisionTransformer, "_embeds", constant)
    assert "law 8 (gradients) is broken: the registers receive no gradient" in broken()


def test_a_single_register_without_gradient_is_caught(monkeypatch, broken):
    change_embeds(
        monkeypatch,
        lambda _, prefix, registers, patches: torch.cat(
            [prefix, registers[:, :1].detach(), registers[:, 1:], patches], 1
        ),
    )
    assert "the gradient of these registers is zero: [0]" in broken()


def test_a_copy_that_shares_the_registers_is_caught(monkeypatch, broken):
    owners = []

    def remember(self, tokens):
        insert(self, tokens)
        owners.append(self.tower)

    def from_the_first(self, prefix, registers, patches):
        registers = owners[-1].ln_pre(owners[-1].registers).expand(len(patches), -1, -1)
        return torch.cat([prefix, registers.to(patches.dtype), patches], 1)

    insert = NativeTower.insert_registers
    monkeypatch.setattr(NativeTower, "insert_registers", remember)
    change_embeds(monkeypatch, from_the_first)
    assert "law 8 (deepcopy) is broken: a copy does not use its own registers" in broken()


def test_a_copy_that_differs_is_caught(monkeypatch, broken):
    monkeypatch.setattr(NativeTower, "__deepcopy__", lambda self, memo: self, raising=False)
    monkeypatch.setattr(
        RegisterVisionTransformer, "__deepcopy__", lambda self, memo: perturbed(self), raising=False
    )

    def perturbed(tower):
        twin = tower.__class__.__new__(tower.__class__)
        twin.__dict__ = {name: copy.deepcopy(value) for name, value in tower.__dict__.items()}
        twin.proj.data += 1
        return twin

    assert "law 8 (deepcopy) is broken: a copy's output differs" in broken()


def test_a_model_that_changes_under_bf16_is_caught(monkeypatch, broken):
    change_embeds(
        monkeypatch,
        lambda _, prefix, registers, patches: torch.cat(
            [prefix, registers, patches if patches.dtype == torch.float32 else -patches], 1
        ),
    )
    assert "law 8 (bf16 autocast) is broken: patches lie" in broken()


def test_a_model_that_fails_under_bf16_is_caught(monkeypatch, broken):
    change_embeds(
        monkeypatch, lambda _, prefix, registers, patches: torch.cat([prefix, registers.float(), patches], 1)
    )
    assert "check_bf16 fails on CLIP (open_clip, VisionTransformer)" in broken()


def test_other_gradients_under_checkpointing_are_caught(monkeypatch, broken):
    monkeypatch.setattr(CLIP, "set_grad_checkpointing", lambda self: setattr(self.visual, "pool_type", "avg"))
    assert "law 8 (gradient checkpointing) is broken: the registers' gradient differs" in broken()


def test_a_block_that_cannot_be_run_twice_is_caught(monkeypatch, broken):
    enable = CLIP.set_grad_checkpointing

    class OtherEachTime:
        def __init__(self, block):
            self.block, self.calls = block, 0

        def __call__(self, tokens, *masks):
            self.calls += 1
            return self.block(tokens if self.calls % 2 else tokens.sigmoid(), *masks)

    def once(self):
        enable(self)
        block = self.visual.transformer.resblocks[0]
        block.ln_1.forward = OtherEachTime(copy.deepcopy(block.ln_1))

    monkeypatch.setattr(CLIP, "set_grad_checkpointing", once)
    assert "check_checkpointing fails on CLIP" in broken()


def test_features_that_change_at_another_size_are_caught(monkeypatch, broken):
    table = NativeTower._position_table

    def shifted(self, grid):
        found = table(self, grid)
        return found if self.registers is None or grid == (4, 4) else found.roll(1, 0)

    monkeypatch.setattr(NativeTower, "_position_table", shifted)
    assert "laws 3 and 8 (other sizes) is broken: patches differs" in broken()


def test_a_transposed_grid_is_caught(monkeypatch, broken):
    layout = NativeTower.layout

    def transposed(self, images):
        found = layout(self, images)
        return TokenLayout(found.num_prefix, found.num_registers, found.grid[::-1])

    monkeypatch.setattr(NativeTower, "layout", transposed)
    assert "law 8 (other sizes) is broken: 2x3 patches in, a grid of (3, 2) out" in broken()


def test_dense_features_other_than_the_library_s_are_caught(broken):
    raw = lambda model, images: 1.01 * library_dense(model, images)  # noqa: E731
    assert "dense features is broken: patches differs" in broken(dense=raw)


def change_mlp(monkeypatch, backbone_class, change):
    mlp = backbone_class.mlp
    monkeypatch.setattr(backbone_class, "mlp", lambda self, index: change(self, mlp(self, index)))


class WrongRows(Mlp):
    """An MLP that names other rows than its units'; `change` gets the right ones."""

    change = staticmethod(lambda rows: rows)

    def rows(self, units):
        return self.change(super().rows(units))


def with_rows(monkeypatch, backbone_class, change):
    monkeypatch.setattr(WrongRows, "change", staticmethod(change))
    change_mlp(monkeypatch, backbone_class, lambda _, mlp: WrongRows(mlp.down, mlp.up, mlp.norm))


def test_a_forgotten_bias_of_a_hidden_unit_is_caught(monkeypatch, broken):
    # Zero weights leave the bias, a constant too; a copy without it is no copy.
    with_rows(monkeypatch, NativeTower, lambda rows: rows[:1])
    assert "mlp (block 0) is broken: a unit with another's rows differs" in broken()


def test_rows_of_another_hidden_unit_are_caught(monkeypatch, broken):
    with_rows(monkeypatch, NativeTower, lambda rows: [(weight, (at + 1) % 128) for weight, at in rows])
    assert "still follows its input, with all its rows zero" in broken()


def test_rows_of_more_than_the_hidden_unit_are_caught(monkeypatch, broken):
    more = lambda at: torch.cat([at, (at + 1) % 128])  # noqa: E731
    with_rows(monkeypatch, NativeTower, lambda rows: [(weight, more(at)) for weight, at in rows])
    assert "what other units do, one unit's rows zero, differs" in broken()


@pytest.mark.parametrize("family", ["eva02", "eva02-inner-norm"])
@pytest.mark.parametrize("half", [slice(0, 1), slice(1, 2)])
def test_half_of_a_gated_hidden_unit_is_caught(monkeypatch, family, half):
    def halve(rows):
        split = family == "eva02-inner-norm"  # a layer for each half, with a bias each
        return rows[::2][half] + rows[1::2][half] if split else [(weight, at[half]) for weight, at in rows]

    with_rows(monkeypatch, TimmBackbone, halve)
    with pytest.raises(AssertionError, match="a unit with another's rows differs"):
        check_backbone(FAMILIES[f"timm/{family}"]())


def test_an_inner_norm_that_goes_unmentioned_is_caught(monkeypatch):
    change_mlp(monkeypatch, TimmBackbone, lambda _, mlp: Mlp(mlp.down, mlp.up))
    with pytest.raises(AssertionError, match="still follows its input"):
        check_backbone(FAMILIES["timm/eva02-inner-norm"]())


def test_a_layer_that_the_model_does_not_run_is_caught(monkeypatch, broken):
    change_mlp(monkeypatch, NativeTower, lambda _, mlp: Mlp(copy.deepcopy(mlp.down), mlp.up))
    assert "mlp (block 0) is broken: its layers took part 0 times in one run" in broken()


def test_an_mlp_of_another_block_is_caught(monkeypatch, broken):
    mlp = NativeTower.mlp
    monkeypatch.setattr(NativeTower, "mlp", lambda self, index: mlp(self, index + 1))
    assert "mlp (block 0) is broken: column" in broken()


def test_a_norm_that_is_not_the_inner_one_is_caught(monkeypatch, broken):
    change_mlp(monkeypatch, NativeTower, lambda self, mlp: Mlp(mlp.down, mlp.up, self.blocks[0].ln_2))
    assert "hidden units have shape (2, 21, 32), expected (2, 21, 128)" in broken()


class Traced(nn.Module):
    """Stands in for a backbone and its subject: shapes that tests check cannot be traced."""

    def __init__(self, traceable: bool):
        super().__init__()
        self.traceable, self.images = traceable, torch.ones(2, 3)

    def patched(self):
        return self

    def run(self, images):
        if not self.traceable:
            torch._dynamo.graph_break()
        return images.mean(1)


def test_a_model_that_cannot_be_traced_is_caught(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    laws.check_compile(Traced(True))
    with pytest.raises(RuntimeError, match="graph_break"):
        laws.check_compile(Traced(False))


# -- instruments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "transformers/dinov2",
            {"run", "object.hidden_states[3]", "tuple[2][0]", "object.last_hidden_state"},
        ),
        ("transformers/clip", {"run", "object.hidden_states[3]", "tuple[2][0]", "object.pooler_output"}),
        ("timm/vit", {"run", "intermediates[2]"}),
        ("open_clip/clip", {"run", "intermediates.image_intermediates[2]"}),
    ],
)
def test_native_outputs_are_all_that_the_library_shows(family, names):
    backbone = adapt(FAMILIES[family]())
    found = native_outputs(backbone, torch.ones(1, 3, *backbone.spec.input_size))
    assert names <= set(found)


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_masking_hides_the_register_columns_and_keeps_other_masks(mask):
    backbone = add_registers(adapt(FAMILIES["open_clip/clip"]()), 4)
    queries, keys, values = torch.randn(3, 1, 1, 21, 8).unbind()
    seen = torch.ones(21, 21, dtype=torch.bool)
    seen[:, 7] = False
    given = {None: None, "boolean": seen, "additive": torch.zeros(21, 21).masked_fill(~seen, float("-inf"))}[
        mask
    ]
    kept = [index for index in range(21) if index not in range(1, 5) and (mask is None or index != 7)]
    expected = nn.functional.scaled_dot_product_attention(queries, keys[:, :, kept], values[:, :, kept])

    with registers_masked(backbone, torch.ones(1, 3, 32, 32)):
        found = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=given)

    torch.testing.assert_close(found, expected)
    assert nn.functional.scaled_dot_product_attention(queries, keys, values).ne(found).any()
