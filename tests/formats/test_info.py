"""`phreg info`: what one has, and whether it fits the base at hand."""

import json

import pytest
import timm
import torch
from families_transformers import FAMILIES

import phreg
from phreg import api, cli
from phreg.errors import LoadError

QUICK = {
    "force": True,  # the tiny models have no artifacts
    "steps": 2,
    "batch_size": 2,
    "views": {"count": 3, "max_shift": 0.25},
    "measure": {"images": 2, "views": 3, "keep_best": False},
    "device": "cpu",
    "data": {"workers": 0},
}


@pytest.fixture
def run(saved, photos, tmp_path):
    return api.distill(saved, photos, tmp_path / "run", registers=3, **QUICK)


def bytes_of(folder):
    """Bytes of tensors by what torch has in memory."""
    from safetensors.torch import load_file

    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


def test_a_run_is_told_with_its_base_method_figures_and_size(run, saved):
    shown = phreg.info(run.run)
    assert (shown.format, shown.format_version) == ("phreg-adapter", 2)
    assert (shown.model_class, shown.registers) == ("VisionTransformer", 3)
    assert (shown.method, shown.steps) == ("auto", 2)
    assert shown.base.source == str(saved)
    assert list(shown.figures) == run.comparison.rows()
    assert (shown.tensors, shown.num_bytes) == bytes_of(run.run / "model")
    assert shown.versions["timm"] == timm.__version__
    assert shown.fits == "whole"  # found again: the folder is there


def test_a_base_at_hand_fits_as_a_whole_by_its_tower_or_not(run, saved):
    def base():
        return timm.create_model(f"local-dir:{saved}", pretrained=True)

    other = base()
    torch.nn.init.zeros_(other.blocks[0].mlp.fc1.weight)
    headed = base()
    headed.reset_classifier(2)
    assert [phreg.info(run.run, base=model).fits for model in (base(), headed, other)] == [
        "whole",
        "tower",
        "no",
    ]
    assert phreg.info(run.run, base=saved).fits == "whole"


def test_a_base_that_is_not_on_this_disk_is_not_fetched(hub, saved, photos, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub.commit("maker/vit", saved)
    api.distill("maker/vit", photos, tmp_path / "run", **QUICK)
    assert phreg.info(tmp_path / "run").fits == "whole"  # in the cache since
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    hub.requests.clear()
    assert phreg.info(tmp_path / "run").fits == "unknown"
    assert hub.requests == []


def test_an_export_is_told_with_the_sizes_it_stands_for_and_the_run_it_came_of(run, hub, tmp_path):
    sizes = phreg.export(run.run, tmp_path / "out", format="timm")
    hub.commit("me/out", tmp_path / "out")
    for source in (tmp_path / "out", "me/out"):
        shown = phreg.info(source)
        assert (shown.format, shown.method) == ("timm", "auto")
        assert shown.sizes == tuple((size.size, size.claimed) for size in sizes)
        assert list(shown.figures) == run.comparison.rows()
        assert (shown.tensors, shown.num_bytes) == bytes_of(tmp_path / "out")
        assert shown.fits == "unknown"


def test_a_model_saved_whole_is_told_as_far_as_it_says(tmp_path):
    phreg.add_registers(FAMILIES["dinov2"](), 3).to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    shown = phreg.info(tmp_path / "saved")
    assert (shown.format, shown.registers, shown.base, shown.method) == ("phreg-model", 3, None, None)
    assert (shown.tensors, shown.num_bytes) == bytes_of(tmp_path / "saved")


def test_what_phreg_did_not_write_and_what_is_broken_are_one_clear_error_each(run, saved):
    with pytest.raises(LoadError, match="no such folder; give a run, an adapter or an export"):
        phreg.info("nowhere")
    with pytest.raises(LoadError, match="timm model that phreg did not write"):
        phreg.info(saved)
    (run.run / "model" / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"cannot read .*adapter\.safetensors"):
        phreg.info(run.run)


def test_the_command_prints_lines_and_json(run, capsys):
    cli.main(["info", str(run.run)])
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "phreg-adapter, version 2",
        "auto, 2 steps",
        "this base is the one",
        "none failed",
        "outlier rate",
    ):
        assert part in printed
    cli.main(["info", str(run.run), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["registers"] == 3
    assert shown["figures"][0]["name"].startswith("outlier rate")
    assert shown["base"]["library"] == "timm"


def test_the_push_command_says_what_it_did(run, tmp_path, capsys):
    cli.main(["push", str(run.run), "me/vit-reg", "--dry-run", str(tmp_path / "dry")])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("Nothing was pushed. me/vit-reg would hold")
    assert (tmp_path / "dry" / "README.md").is_file()
