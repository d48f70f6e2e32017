"""PEFT's common tests, for vision transformers: its own test files name language models alone.

The runner puts this file among PEFT's tests, as test_phreg_vision.py. What is tested, with which methods of
PEFT and their settings, is PEFT's; the tiny models are phreg's own test families.
"""

import atexit
import shutil
import tempfile
from pathlib import Path

import families_transformers
import pytest
import torch
from peft import LoraConfig, PromptLearningConfig
from transformers import AutoModel

from suites.construction import untouched

from .test_feature_extraction_models import ALL_CONFIGS
from .testing_common import PeftCommonTester
from .testing_utils import set_init_weights_false

FAMILIES = {
    "vit": "vit",
    "dinov2": "dinov2",
    "dinov2-registers": "dinov2-registers",
    "dinov3": "dinov3",
    "deit": "deit",
    "msn": "vit-msn",
    "ijepa": "ijepa",
    "clip": "clip-vision",
    "metaclip2": "metaclip2-vision",
    "siglip": "siglip-vision",
}
"""Families: by the name in a test, and in `families_transformers`. Their images are of one size and form."""

CHECKS = {
    "model_attr": False,
    "adapter_name": False,
    "prepare_for_training": False,
    "load_model_low_cpu_mem_usage": False,
    "save_pretrained": True,
    "save_pretrained_selected_adapters": True,
    "from_pretrained_config_construction": False,
    "load_multiple_adapters": True,
    "merge_layers": True,
    "merge_layers_nan": True,
    "merge_layers_multi": True,
    "merge_layers_is_idempotent": True,
    "safe_merge": True,
    "training": False,
    "training_gradient_checkpointing": False,
    "inference_safetensors": False,
    "peft_model_device_map": False,
    "delete_adapter": False,
    "delete_inactive_adapter": False,
    "delete_unknown_adapter_raises": False,
    "unload_adapter": True,
    "weighted_combination_of_adapters": True,
    "get_base_model_state_dict": False,
}
"""PEFT's common tests that ask for no text and find a vision model's layers.

Some need adapters that change the output at once: those are marked.
"""


def saved_families() -> dict[str, str]:
    """Saves each family's stock model to a folder, from which PEFT's tests load it."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for name, family in FAMILIES.items():
        with untouched():
            families_transformers.FAMILIES[family]().save_pretrained(root / name)
    return {f"{name}-tiny": str(root / name) for name in FAMILIES}


def for_vision(config_class: type, settings: dict) -> tuple[type, dict]:
    """Turns settings for a language model into those for a vision transformer."""
    settings = {key: value for key, value in settings.items() if key != "task_type"}
    settings["target_modules"] = ["q_proj", "v_proj", "query", "value"]
    if "feedforward_modules" in settings:
        settings["feedforward_modules"] = []
    return config_class, settings


MODELS = saved_families()
CONFIGS = {
    config_class.__name__: for_vision(config_class, settings)
    for config_class, settings in ALL_CONFIGS
    if not issubclass(config_class, PromptLearningConfig) and "trainable_token_indices" not in settings
}
"""PEFT's own settings of each method, but for those that learn a prompt or tokens of a text."""


class Images(dict):
    """Inputs by name; one of PEFT's tests asks for `input_ids`, to give them to the input embedding."""

    def __missing__(self, name: str) -> torch.Tensor:
        return self["pixel_values"]


class TestPeftVision(PeftCommonTester):
    transformers_class = AutoModel

    def prepare_inputs_for_testing(self) -> Images:
        generator = torch.Generator().manual_seed(0)
        return Images(pixel_values=torch.randn(2, 3, 32, 32, generator=generator).to(self.torch_device))

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("method", CONFIGS)
    @pytest.mark.parametrize("check", CHECKS)
    def test_common(self, check, method, model):
        config_class, settings = CONFIGS[method]
        if CHECKS[check]:
            settings = set_init_weights_false(config_class, settings)
        getattr(self, f"_test_{check}")(MODELS[model], config_class, settings)

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_lora_in_half_precision(self, dtype, model):
        settings = CONFIGS["LoraConfig"][1]
        self._test_add_adapter_no_autocast_adapter_dtype(MODELS[model], LoraConfig, settings, dtype)
