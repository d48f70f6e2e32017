"""Shapes are checked as types: jaxtyping annotations of phreg are enforced by beartype in all tests."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings
from jaxtyping import install_import_hook
from safetensors.torch import save_file

# Before any import of phreg; the hook stays for the whole session.
install_import_hook("phreg", "beartype.beartype")

# No deadline: machines are shared. No chance: a red run must be red again.
settings.register_profile("phreg", deadline=None, derandomize=True)
settings.load_profile("phreg")

pytest_plugins = ["pictures", "hub_server"]

DATA = Path(__file__).parents[2] / "shared" / "data"
REAL_MODEL = DATA / "models" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="session")
def real_data():
    """The folder of real weights and images, where it is at hand."""
    if not REAL_MODEL.is_dir():
        pytest.skip(f"needs real weights and images in {DATA}")
    return DATA


@pytest.fixture(scope="session")
def real_model(real_data):
    """A real pretrained ViT-Ti with real artifacts, as a timm folder."""
    return REAL_MODEL


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """One thread a test process: several of them share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test():
    """Accelerate keeps a process's first precision and device; no test finds those of the one before it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def photos(tmp_path):
    """A folder of twelve small pictures, each different."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        coarse = torch.randint(0, 256, (6, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize((64, 48)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def tiny():
    """Builds a tiny random timm ViT of 32x32 pixels and 4x4 patches, always the same."""
    import timm

    def build(**changes):
        torch.manual_seed(0)
        settings = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "num_classes": 5,
        }
        return timm.models.VisionTransformer(**(settings | changes)).eval()

    return build


@pytest.fixture
def saved(tiny, tmp_path):
    """The tiny model as a timm folder, as another process finds it."""
    folder = tmp_path / "vit"
    folder.mkdir()
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": arguments}
    config["pretrained_cfg"] = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "num_classes": 5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny().state_dict(), folder / "model.safetensors")
    return folder
