"""Stock folders in a process that has no phreg: the library's automatic classes alone load them."""

import os
import subprocess
import sys

import pytest
import torch
from families_open_clip import FAMILIES as OPEN_CLIP
from families_transformers import FAMILIES as TRANSFORMERS
from PIL import Image

from phreg.backbones import resolve
from phreg.formats.export import export
from phreg.registers import add_registers

STRANGER = """
import sys
sys.modules["phreg"] = None  # importing it fails
import open_clip, timm, torch
import transformers as hf
from PIL import Image

torch.set_num_threads(1)
images = torch.load("images.pt")
clip = open_clip.create_model_and_transforms("local-dir:open_clip")[0].eval()
with torch.no_grad():
    pixels = hf.AutoImageProcessor.from_pretrained("model")(Image.open("photo.png"), return_tensors="pt")
    found = {
        "model": hf.AutoModel.from_pretrained("model")(images).pooler_output,
        "classifier": hf.AutoModelForImageClassification.from_pretrained("classifier")(images).logits,
        # transformers asks the hub about whatever AutoBackbone is given, folders too.
        "backbone": torch.cat(hf.AutoBackbone.from_pretrained("owner/backbone")(images).feature_maps, dim=1),
        "timm": timm.create_model("local-dir:timm", pretrained=True).eval()(images),
        "open_clip": clip.encode_image(images),
    }
assert pixels["pixel_values"].shape == (1, 3, 32, 32)
torch.save(found, "found.pt")
"""

FOLDERS = {
    "model": ("transformers", TRANSFORMERS["dinov2-swiglu"]),
    "classifier": ("transformers", TRANSFORMERS["dinov2-classifier"]),
    "backbone": ("transformers", TRANSFORMERS["dinov2-backbone"]),
    "timm": ("timm", TRANSFORMERS["siglip-vision"]),
    "open_clip": ("open_clip", OPEN_CLIP["clip"]),
}


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_stock_format_loads_where_there_is_no_phreg(tmp_path, hub, images):
    expected = {}
    for name, (format, build) in FOLDERS.items():
        backbone, base = resolve.load(build())
        add_registers(backbone, 3)
        export(backbone, tmp_path / name, format, base=base)
        expected[name] = answer(backbone, name, images)
    hub.commit("owner/backbone", tmp_path / "backbone")
    torch.save(images, tmp_path / "images.pt")
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")

    environment = {**os.environ, "PYTHONPATH": "", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    finished = subprocess.run(
        [sys.executable, "-c", STRANGER], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    assert finished.returncode == 0, finished.stderr
    found = torch.load(tmp_path / "found.pt")
    for name in FOLDERS:
        # Rounding of fp32: outputs are of order 1.
        assert torch.allclose(found[name], expected[name], atol=1e-5), name


def answer(backbone, name, images):
    if name == "classifier":
        return backbone.model(images).logits
    if name == "backbone":
        return torch.cat(backbone.model(images).feature_maps, dim=1)
    return backbone.run(images)
