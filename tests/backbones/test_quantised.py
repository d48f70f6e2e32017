"""Models whose linear layers are packed to 4 or 8 bits, as bitsandbytes packs them, take registers too."""

import copy

import families
import pytest
import torch
from torch import nn
from torch.nn import functional

import phreg
from phreg.backbones.base import first_unpacked
from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import Base, adapt, weights_sha256
from phreg.errors import LoadError, PhregError
from phreg.formats.adapter import save_adapter

LIBRARY_READS_PACKED_WEIGHTS = ("timm/eva", "timm/dinov3", "timm/vit-rope")
"""Their attention takes `qkv.weight` itself, so that they do not run quantised without phreg either."""


class Packed(nn.Linear):
    """A linear layer whose parameter is packed: two numbers a byte (4 bits), or one (8 bits)."""

    def __init__(self, layer, bits):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        shape = (layer.weight.numel() // 2, 1) if bits == 4 else layer.weight.shape
        dtype = torch.uint8 if bits == 4 else torch.int8
        self.weight = nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=False)
        self.bias = layer.bias
        self.unpacked = [layer.weight.detach()]  # in a list, so that the model does not list it

    def forward(self, tokens):
        return functional.linear(tokens, self.unpacked[0].to(tokens.dtype), self.bias)


def pack(model, bits, spare=("patch_embedding",)):
    """Packs linear layers; Siglip2 asks its patch embedding, a linear layer, for the type of its input."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear and name not in spare:
                setattr(module, name, Packed(child, bits))
    return model


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "family", [name for name in families.FAMILIES if not name.startswith(LIBRARY_READS_PACKED_WEIGHTS)]
)
def test_registers_have_the_type_that_a_packed_model_computes_in(family, bits):
    model = families.FAMILIES[family]().bfloat16()
    quantised = adapt(pack(copy.deepcopy(model), bits))
    assert quantised.dtype == torch.bfloat16
    backbone = adapt(model)
    for each in (backbone, quantised):
        phreg.add_registers(each, 3)
    assert quantised.registers.dtype == torch.bfloat16
    assert torch.equal(quantised.registers, backbone.registers)
    images = torch.randn(2, 3, *backbone.spec.input_size).bfloat16()
    found, expected = quantised(images), backbone(images)
    assert torch.equal(found.patches, expected.patches)
    assert torch.equal(found.pooled, expected.pooled)
    phreg.remove_registers(quantised)
    assert quantised.num_registers == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["transformers/clip", "timm/clip", "open_clip/timm"])
def test_a_packed_projection_takes_tokens_to_the_joint_space(family):
    backbone = adapt(families.FAMILIES[family]())
    quantised = adapt(pack(copy.deepcopy(backbone.model), 4))
    images = torch.randn(2, 3, *backbone.spec.input_size)
    for each in (backbone, quantised):
        set_readout(each, "value-only")
    # The product with a matrix of ones is exact; the matrix comes out as it went in.
    torch.testing.assert_close(quantised(images).patches, backbone(images).patches)


def test_what_would_write_packed_weights_as_plain_ones_is_refused(tmp_path):
    model = pack(families.FAMILIES["transformers/clip-vision"](), 4)
    phreg.add_registers(model, 3)
    for format in ("merged", "remote-code", "timm", "onnx"):
        with pytest.raises(PhregError, match=r"quantised \(uint8\).*export the model before"):
            phreg.export(model, tmp_path / format, format=format)
        assert not (tmp_path / format).exists()
    with pytest.raises(PhregError, match=r"quantised \(uint8\).*save the model before"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "phreg.json").exists()


def test_an_adapter_says_why_it_does_not_go_onto_a_packed_base(tmp_path):
    model = families.FAMILIES["transformers/clip-vision"]()
    quantised, backbone = pack(copy.deepcopy(model), 8), adapt(model)
    before = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
    base = Base("me/clip", "transformers", None, weights_sha256(before))
    phreg.add_registers(backbone, 3)
    save_adapter(tmp_path / "adapter", backbone, base, before, None, lambda _: "")
    with pytest.raises(LoadError, match=r"me/clip.* are quantised \(int8\).*quantise it then"):
        phreg.load(tmp_path / "adapter", into=quantised)


def test_a_packed_patch_embedding_does_not_say_what_images_come_in():
    model = families.FAMILIES["transformers/siglip2-vision"]().bfloat16()
    assert adapt(pack(model, 4, spare=())).dtype == torch.bfloat16


def test_a_model_of_packed_weights_alone_is_one_clear_error():
    with pytest.raises(PhregError, match=r"found weights of torch.uint8 alone"):
        first_unpacked([nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_not_distilled(bits, photos, tmp_path):
    model = pack(families.FAMILIES["transformers/dinov2"](), bits)
    with pytest.raises(PhregError, match=r"quantised \(u?int8\) and cannot train"):
        phreg.distill(model, photos, tmp_path / "run", steps=1, device="cpu")
    assert not (tmp_path / "run").exists()
