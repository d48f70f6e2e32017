"""Writes golden files with the phreg that is installed: three tiny models, each with a run and its exports.

    cd tests/golden && python make.py 0.1

`tests/test_golden.py` loads them from then on. They are written once for each version, and never again.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import phreg
from phreg.backbones.resolve import adapt

EXPORTS = {
    "dinov2": ("transformers", "remote-code", "onnx", "merged", "adapter"),
    "vit": ("timm", "merged", "adapter"),
    "clip": ("open_clip", "merged", "adapter"),
}
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 3}
RUN = {
    "registers": 2,
    "force": True,
    "steps": 2,
    "batch_size": 2,
    "seed": 0,
    "device": "cpu",
    "views": {"count": 2},
    "measure": {"images": 2, "views": 2},
    "sinks": {"images": 4},
}


def shake(model: nn.Module) -> nn.Module:
    """Moves every parameter away from the zeros and ones of an initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def dinov2(folder: Path) -> None:
    """Writes a DINOv2 of transformers."""
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    shake(transformers.Dinov2Model(config)).save_pretrained(folder)


def vit(folder: Path) -> None:
    """Writes a ViT of timm with a classifier."""
    model = shake(timm.create_model("vit_tiny_patch16_224", **TINY))
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3}
    timm.models.save_for_hf(model, folder, model_config=config, model_args=TINY, safe_serialization=True)


def clip(folder: Path) -> None:
    """Writes a CLIP of open_clip, its text tower included."""
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    model = shake(open_clip.model.CLIP(**config))
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": list(mean), "std": list(std)}}, indent=2)
    )


def main(version: str) -> None:
    """Writes the golden files of a version below the folder of this file."""
    root = Path(version)
    (root / "photos").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(10):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40)).save(root / "photos" / f"{number}.png")
    os.chdir(root)
    for name, write in {"dinov2": dinov2, "vit": vit, "clip": clip}.items():
        torch.manual_seed(0)
        write(Path(name, "base"))
        base = Path(name, "base")
        phreg.distill(base, "photos", f"{name}/run", **RUN)
        shutil.rmtree(f"{name}/run/report")
        for format in EXPORTS[name]:
            phreg.export(f"{name}/run", f"{name}/{format}", format=format)
        model = phreg.load(f"{name}/run")
        if name == "dinov2":
            model.save_pretrained(f"{name}/save_pretrained")
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            features = adapt(model)(images)
        expected = {f"state.{key}": value.contiguous().clone() for key, value in model.state_dict().items()}
        expected |= {
            "images": images,
            "patches": features.patches.contiguous(),
            "pooled": features.pooled.contiguous(),
        }
        save_file(expected, f"{name}/expected.safetensors")
    phreg.distill(
        "demo", "photos", "demo/run", method="test-time", registers=1, device="cpu", measure={"images": 0}
    )
    # Where the files were written is nobody's business.
    for file in [*Path().rglob("*.json"), *Path().rglob("README.md")]:
        file.write_text(file.read_text().replace(os.fspath(Path.cwd()), "/golden"))


if __name__ == "__main__":
    main(sys.argv[1])
