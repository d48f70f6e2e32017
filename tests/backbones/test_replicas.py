"""Replicas, which torch.nn.DataParallel runs on several GPUs, use weights of their own in all phreg adds."""

import copy

import families
import pytest
import torch
from replicas import replicate, shift_weights

import phreg
from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import adapt
from phreg.sinks import test_time

UNITS = {1: [(5, 1), (9, -1)]}
SHIFT = 0.05
READ = ["transformers/clip", "transformers/clip-vision-projection", "timm/clip", "open_clip/clip"]


def images(backbone):
    return torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))


def outputs(backbone, model):
    """Calls a model or a replica of it as its library does, without phreg, and lists all tensors it gives."""
    if backbone.spec.library == "open_clip":
        found = getattr(model, "encode_image", model)(images(backbone))
    elif backbone.spec.library == "timm":
        found = model(images(backbone))
    else:
        found = model.get_submodule(backbone.tower_name)(
            **backbone._inputs(images(backbone)) | {"output_hidden_states": True, "return_dict": False}
        )
    return list(flat(found))


def flat(found):
    if isinstance(found, torch.Tensor):
        yield found
        return
    for part in found:
        if part is not None:
            yield from flat(part)


def expect_own_weights(backbone):
    """Checks a replica of other weights against a deep copy that was given the same weights."""
    model, twin = backbone.model, copy.deepcopy(backbone.model)
    shift_weights(twin, SHIFT)
    before = outputs(backbone, model)
    replica = replicate(model, SHIFT)
    found, expected = outputs(backbone, replica), outputs(backbone, twin)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0], before[0])
    after = outputs(backbone, model)
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True)), (
        "it moved the original"
    )


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_a_replica_uses_its_own_registers(family):
    backbone = adapt(families.FAMILIES[family]())
    phreg.add_registers(backbone, 3)
    expect_own_weights(backbone)


@torch.no_grad()
@pytest.mark.parametrize("readout", ["naclip", "value-only", "clearclip", "sclip"])
@pytest.mark.parametrize("family", READ)
def test_a_replica_s_dense_read_out_uses_its_own_attention(family, readout):
    backbone = adapt(families.FAMILIES[family]())
    phreg.add_registers(backbone, 3)
    set_readout(backbone, readout)
    expect_own_weights(backbone)


@pytest.mark.parametrize("family", ["transformers/dinov2", "transformers/clip", "timm/vit", "open_clip/clip"])
def test_gradients_of_a_replica_reach_the_registers(family):
    backbone = adapt(families.FAMILIES[family]())
    phreg.add_registers(backbone, 3)
    sum(part.sum() for part in outputs(backbone, backbone.model)).backward()
    expected, backbone.registers.grad = backbone.registers.grad, None
    sum(part.sum() for part in outputs(backbone, replicate(backbone.model))).backward()
    assert expected.abs().sum() > 0
    assert torch.equal(backbone.registers.grad, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["transformers/dinov2", "transformers/clip", "timm/vit", "open_clip/clip"])
def test_a_replica_s_test_time_registers_use_its_own_weights(family):
    backbone = adapt(families.FAMILIES[family]())
    test_time.install(backbone, UNITS, 2)
    expect_own_weights(backbone)


@torch.no_grad()
def test_replicas_that_run_at_the_same_time_have_each_their_own_padding():
    model = families.FAMILIES["transformers/siglip2-vision"]()
    test_time.install(adapt(model), {1: [(unit, 1) for unit in range(16)], 2: [(3, 1)]}, 2)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 12, model.embeddings.patch_embedding.in_features, generator=generator)
    masks, shapes = [torch.arange(12)[None] < count for count in (6, 12)], torch.tensor([[2, 3], [3, 4]])
    alone = [model(pixels[i : i + 1], masks[i].long(), shapes[i : i + 1]).last_hidden_state for i in range(2)]
    replicas, found = [replicate(model) for _ in range(2)], {}

    def run_the_other(*_):
        """Stands for another GPU's thread, which gets ahead in the midst of a block."""
        handle.remove()
        found[1] = replicas[1](pixels[1:], masks[1].long(), shapes[1:]).last_hidden_state

    handle = replicas[0].encoder.layers[1].self_attn.register_forward_hook(run_the_other)
    found[0] = replicas[0](pixels[:1], masks[0].long(), shapes[:1]).last_hidden_state
    assert torch.equal(found[0][:, :6], alone[0][:, :6])
    assert torch.equal(found[1], alone[1])
