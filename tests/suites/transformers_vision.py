"""Transformers' common tests of any model, for vision transformers that phreg patches.

The source distribution has the tests that all models share, and no model's own test file. This file names
tiny vision models to them; the runner puts it among them, as test_phreg_vision.py. Models' own test files
come with a checkout: see PHREG_TRANSFORMERS_TESTS in README.md.
"""

import copy
import unittest

import torch
import transformers as hf
from families_transformers import WIDE

from .test_modeling_common import ModelTesterMixin

SMALL = WIDE | {"num_hidden_layers": 2}
STAGES = {"out_features": ["stage1", "stage2"]}
CLASSES = SMALL | {"num_labels": 3}
DINO = {key: value for key, value in CLASSES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}

FAMILIES = {
    "Vit": (hf.ViTConfig(**CLASSES), 1, [hf.ViTModel, hf.ViTForImageClassification]),
    "Deit": (hf.DeiTConfig(**CLASSES), 2, [hf.DeiTModel, hf.DeiTForImageClassification]),
    "Msn": (hf.ViTMSNConfig(**CLASSES), 1, [hf.ViTMSNModel, hf.ViTMSNForImageClassification]),
    "Ijepa": (hf.IJepaConfig(**CLASSES), 0, [hf.IJepaModel, hf.IJepaForImageClassification]),
    "Dinov2": (
        hf.Dinov2Config(**DINO, **STAGES),
        1,
        [hf.Dinov2Model, hf.Dinov2ForImageClassification, hf.Dinov2Backbone],
    ),
    "Dinov2WithRegisters": (
        hf.Dinov2WithRegistersConfig(**DINO, **STAGES, num_register_tokens=2),
        3,
        [
            hf.Dinov2WithRegistersModel,
            hf.Dinov2WithRegistersForImageClassification,
            hf.Dinov2WithRegistersBackbone,
        ],
    ),
    "Dinov3": (
        hf.DINOv3ViTConfig(**CLASSES, **STAGES, num_register_tokens=2),
        3,
        [hf.DINOv3ViTModel, hf.DINOv3ViTBackbone],
    ),
    "Clip": (
        hf.CLIPVisionConfig(**SMALL, projection_dim=16),
        1,
        [hf.CLIPVisionModel, hf.CLIPVisionModelWithProjection],
    ),
    "MetaClip2": (
        hf.MetaClip2VisionConfig(**SMALL, projection_dim=16),
        1,
        [hf.MetaClip2VisionModel, hf.MetaClip2VisionModelWithProjection],
    ),
    "Siglip": (hf.SiglipVisionConfig(**SMALL), 0, [hf.SiglipVisionModel]),
    "Aimv2": (hf.Aimv2VisionConfig(**SMALL), 0, [hf.Aimv2VisionModel]),
}
"""Families: a config, how many tokens are ahead of the patches, and the classes."""


class VisionModelTester:
    """Answers what the common tests ask about a model: its config, its inputs, and its sizes."""

    batch_size = 3
    is_training = True

    def __init__(self, config: hf.PretrainedConfig, num_prefix: int) -> None:
        self.config = config
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
            setattr(self, name, getattr(config, name))
        self.mask_length = (self.image_size // self.patch_size) ** 2
        self.num_masks = self.mask_length // 2
        self.seq_length = self.mask_length + num_prefix

    def get_config(self) -> hf.PretrainedConfig:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[hf.PretrainedConfig, dict[str, torch.Tensor]]:
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": images}


class VisionTests(ModelTesterMixin):
    """The common tests, without those of texts and of embeddings that a vision model has not."""

    family = ""
    test_resize_embeddings = False
    test_model_get_set_embeddings = None

    def setUp(self) -> None:
        config, num_prefix, _ = FAMILIES[self.family]
        self.model_tester = VisionModelTester(config, num_prefix)

    def test_last_hidden_state(self) -> None:
        """Its length is what each model's own test file checks first, and no common test."""
        tester = self.model_tester
        config, inputs = tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0](config).eval()
        with torch.no_grad():
            found = model(**inputs).last_hidden_state
        assert found.shape == (tester.batch_size, tester.seq_length, tester.hidden_size)


for name, (_, _, classes) in FAMILIES.items():
    globals()[f"Test{name}"] = type(
        f"Test{name}",
        (VisionTests, unittest.TestCase),
        {"family": name, "all_model_classes": tuple(classes), "__module__": __name__},
    )
