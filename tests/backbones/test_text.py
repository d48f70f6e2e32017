"""Text towers, and tokens on their way to the space shared with them, against the libraries' own."""

import families_open_clip
import families_transformers
import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP
from torch.nn.functional import linear

from phreg.backbones.resolve import adapt
from phreg.backbones.text import imagenet_names, imagenet_templates, text_encoder
from phreg.errors import LoadError, PhregError
from phreg.registers import add_registers

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order, through one layer


def letters(texts):
    """A tokenizer of a text's first 5 characters."""
    return torch.tensor([[ord(letter) % 64 for letter in text[:5].ljust(5)] for text in texts])


@torch.no_grad()
def test_open_clips_own_tokenizer_serves_an_instance():
    torch.manual_seed(0)
    text = families_open_clip.TEXT | {"vocab_size": 49408, "context_length": 77}
    model = CLIP(embed_dim=16, vision_cfg=families_open_clip.VISION, text_cfg=text).eval()
    texts = ["a photo of a cat.", "a dog"]
    expected = model.encode_text(open_clip.tokenize(texts))
    torch.testing.assert_close(text_encoder(adapt(model))(texts), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_tokenizer_can_be_given_to_a_model_of_transformers(family):
    model = families_transformers.FAMILIES[family]()
    encode = text_encoder(adapt(model), lambda texts: {"input_ids": letters(texts)})
    texts = [chr(97 + number % 26) * 4 for number in range(300)]  # more than go at a time
    expected = model.get_text_features(input_ids=letters(texts)).pooler_output
    torch.testing.assert_close(encode(texts), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_tokenizer_of_a_folder_pads_as_the_model_learned(family, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[PAD]": 2, "[UNK]": 3, "cat": 5, "Cat": 6, "a": 7}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path
    )
    model = families_transformers.FAMILIES[family]()
    model.config.name_or_path = str(tmp_path)
    length = model.config.text_config.max_position_embeddings
    if family == "clip":
        ids = torch.tensor([[7, 6] + [2] * (length - 2)])
        mask = torch.tensor([[1, 1] + [0] * (length - 2)])
        expected = model.get_text_features(input_ids=ids, attention_mask=mask)
    else:
        expected = model.get_text_features(input_ids=torch.tensor([[7, 5] + [2] * (length - 2)]))
    torch.testing.assert_close(text_encoder(adapt(model))(["a Cat"]), expected.pooler_output, **CLOSE)


def test_a_model_without_a_text_tower_is_refused(tiny):
    for model in (
        tiny(),
        families_open_clip.FAMILIES["tower"](),
        families_transformers.FAMILIES["clip-vision-projection"](),
    ):
        with pytest.raises(PhregError, match="no text tower"):
            text_encoder(adapt(model))


@pytest.mark.parametrize("library", [families_open_clip, families_transformers])
def test_an_instance_whose_tokenizer_is_unknown_is_refused(library):
    with pytest.raises(LoadError, match="does not say"):
        text_encoder(adapt(library.FAMILIES["clip"]()))


def test_prompts_and_names_are_open_clips():
    assert len(imagenet_templates()) == 80
    assert len(set(imagenet_names())) >= 998  # two kinds of maillot and of crane share a name in some lists
    assert all("cat" in template("cat") for template in imagenet_templates())


# -- the joint space


@torch.no_grad()
def test_a_clips_tokens_are_projected():
    backbone = adapt(families_transformers.FAMILIES["clip"]())
    tokens = torch.randn(2, 3, 32)
    expected = backbone.model.visual_projection(tokens)
    torch.testing.assert_close(backbone.to_joint(tokens), expected, **CLOSE)


@torch.no_grad()
def test_a_siglips_tokens_go_through_the_values_of_its_pooling():
    backbone = adapt(families_transformers.FAMILIES["siglip"]())
    head, tokens = backbone.tower.head, torch.randn(2, 3, 32)
    value, bias = head.attention.in_proj_weight[64:], head.attention.in_proj_bias[64:]
    attended = head.attention.out_proj(linear(tokens, value, bias))
    expected = attended + head.mlp(head.layernorm(attended))
    torch.testing.assert_close(backbone.to_joint(tokens), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("num_registers", [0, 2])
def test_so_do_those_of_open_clips_siglip_with_registers_too(num_registers):
    backbone = add_registers(adapt(families_open_clip.FAMILIES["siglip"]()), num_registers)
    pool, tokens = backbone.tower.trunk.attn_pool, torch.randn(2, 3, 64)
    assert isinstance(pool, timm.layers.AttentionPoolLatent)
    value, bias = pool.kv.weight[64:], pool.kv.bias[64:]
    attended = pool.proj(linear(tokens, value, bias))
    expected = backbone.tower.head(attended + pool.mlp(pool.norm(attended)))
    torch.testing.assert_close(backbone.to_joint(tokens), expected, **CLOSE)


def test_a_model_without_a_joint_space_is_refused(tiny):
    with pytest.raises(PhregError, match="no projection"):
        adapt(tiny()).to_joint(torch.zeros(1, 1, 32))
