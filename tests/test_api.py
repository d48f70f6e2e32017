import json

import jaxtyping
import pytest
import timm
import torch
from families import LIBRARIES
from torch import nn

import phreg
from phreg import api
from phreg.analysis.inspection import Inspection
from phreg.api.arguments import named_models, short_names
from phreg.backbones.readout import use_readout
from phreg.backbones.resolve import adapt
from phreg.errors import DataError, LoadError, PhregError
from phreg.formats.load import open_model
from phreg.report.verdict import nothing_to_repair
from phreg.training.task import RetrofitTask

QUICK = {
    "batch_size": 2,
    "views": {"count": 3, "max_shift": 0.25},
    "measure": {"images": 2, "views": 3, "keep_best": False},
    "device": "cpu",
    "data": {"workers": 0},
    "force": True,  # tiny random models have no artifacts
}


def images(count=3, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_add_and_remove_registers_work_in_place_and_return_the_model(tiny):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert phreg.add_registers(model, 4) is model
    assert model.num_prefix_tokens == 5
    assert phreg.remove_registers(model) is model
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_registers_are_refused_where_there_are_some_and_where_the_count_makes_no_sense(tiny):
    model = phreg.add_registers(tiny(), 2)
    with pytest.raises(PhregError, match="remove_registers"):
        phreg.add_registers(model, 2)
    with pytest.raises(PhregError, match="0 or more"):
        phreg.add_registers(tiny(), -1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_a_model_is_opened(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(PhregError, match="'cuda', which cannot be used here"):
        phreg.distill("no/such-model", tmp_path / "photos", tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()
    with pytest.raises(PhregError, match="'cuda', which cannot be used here"):
        phreg.inspect("no/such-model", tmp_path / "photos", device="cuda")


def test_a_convolutional_network_is_refused_with_the_reason():
    with pytest.raises(PhregError, match="cannot add registers to"):
        phreg.add_registers(torch.nn.Conv2d(3, 8, 3), 4)


@pytest.mark.parametrize(("init", "std"), [("randn", 1 / 32**0.5), ("trunc-normal", 0.02), ("zeros", 0.0)])
def test_registers_start_as_asked(tiny, init, std):
    model = phreg.add_registers(tiny(), 200, init=init)
    # 6400 draws: the standard deviation is known to about 1 %.
    assert model.reg_token.std().item() == pytest.approx(std, rel=0.05, abs=1e-9)


def test_denoise_is_the_teacher_alone_and_leaves_the_model_as_it_is(tiny):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grids = phreg.denoise(model, images(), count=4, max_shift=0.25)
    assert grids.shape == (3, 4, 4, 32)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    same = phreg.denoise(model, images(), count=4, max_shift=0.25)
    other = phreg.denoise(model, images(), seed=1, count=4, max_shift=0.25)
    assert torch.equal(grids, same)
    assert not torch.equal(grids, other)


def test_denoise_reads_a_model_as_phreg_trained_it():
    backbone = adapt(LIBRARIES["open_clip"]["clip"]())
    backbone.trained_readout = "value-only"
    grids = phreg.denoise(backbone.model, images(), count=1)
    with torch.no_grad(), use_readout(backbone):
        torch.testing.assert_close(grids, backbone(images()).patches, atol=1e-5, rtol=1e-5)  # fp32 sums
    assert backbone.readout == "plain"


def test_denoise_with_one_view_is_the_models_own_normed_patch_tokens(tiny):
    model = tiny()
    with torch.no_grad():
        own = model.forward_features(images())[:, 1:].unflatten(1, (4, 4))
    # The same tokens through the same norm, only batched otherwise.
    torch.testing.assert_close(phreg.denoise(model, images(), count=1), own, atol=1e-5, rtol=1e-5)


def test_an_unknown_view_setting_is_named_with_the_nearest(tiny):
    with pytest.raises(PhregError, match=r"views.cuont: unknown key; did you mean views.count"):
        phreg.denoise(tiny(), images(), cuont=3)


def test_inspect_takes_a_batch_and_a_folder_and_writes_what_it_found(tiny, photos, tmp_path):
    model = tiny().train()
    assert isinstance(phreg.inspect(model, images(3)), Inspection)
    found = phreg.inspect(model, photos, output=tmp_path / "out", count=5)
    written = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert written["images"] == 5
    assert written["outlier_rate"] == found.outlier_rate
    assert written["emergence_block"] == found.emergence_block
    assert len(written["blocks"]) == 3
    assert written["interpolation"]["grid"] == [6, 6], "looked at larger too"
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".png", ".html"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "phreg inspect" in page
    assert photos.name in page


def test_inspect_sets_models_side_by_side_each_at_its_own_size(tiny, saved, photos):
    from families import FAMILIES

    other = FAMILIES["transformers/dinov2"]()
    found = phreg.inspect(saved, photos, baseline=[tiny(img_size=48, embed_dim=64), other], count=2)
    assert [model.name for model in found.models] == ["vit", "instance 2", "instance 3"]
    assert [model.size for model in found.models] == [(32, 32), (48, 48), (32, 32)]
    assert {model.norms.images for model in found.models} == {2}
    assert len(found.to_json()["against"]) == 2


def test_a_single_baseline_of_inspect_needs_no_list(tmp_path):
    for one in (tmp_path / "other", str(tmp_path / "other")):
        with pytest.raises(PhregError, match="other"):
            phreg.inspect("demo", tmp_path, baseline=one)


def test_local_folders_are_called_by_their_last_part_as_far_as_that_tells_them_apart(tmp_path, monkeypatch):
    for path in ("a/vit", "b/vit", "c"):
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "c")

    def called(*models):
        return list(short_names(named_models(models)))

    assert called(tmp_path / "a" / "vit", "facebook/dinov2-base") == ["vit", "facebook/dinov2-base"]
    assert called(f"{tmp_path}/a/vit/", ".") == ["vit", "c"]
    both = [str(tmp_path / "a" / "vit"), str(tmp_path / "b" / "vit")]
    assert called(*both) == ["a/vit", "b/vit"]


def test_labelled_images_tell_what_single_tokens_know_of_a_class(tiny, photos, tmp_path):
    for name, numbers in (("x", (0, 1, 2)), ("y", (3, 4, 5))):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in numbers:
            (photos / f"{number:02}.png").rename(tmp_path / "classes" / name / f"{number}.png")
    found = phreg.inspect(tiny(), photos, labels=tmp_path / "classes")
    assert (found.classes.images, found.classes.classes, found.classes.chance) == (6, 2, 0.5)
    assert [entry.token for entry in found.classes.tokens] == ["ordinary patch", "CLS"]
    with pytest.raises(DataError):
        phreg.inspect(tiny(), photos, labels=tmp_path / "nowhere")


def test_a_tensor_of_another_size_tells_what_resampling_does_and_one_of_the_own_size_nothing(tiny):
    assert phreg.inspect(tiny(), images(2)).interpolation is None
    assert phreg.inspect(tiny(dynamic_img_size=True), images(2, side=48)).interpolation.grid == (6, 6)


def test_what_save_pretrained_writes_of_a_patched_model_loads_here_and_nowhere_unpatched(tmp_path):
    import transformers
    from families_transformers import FAMILIES

    model = phreg.add_registers(FAMILIES["dinov2"](), 3)
    model.save_pretrained(tmp_path / "saved")
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    loaded = phreg.load(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)
    for stock in (transformers.AutoModel, type(model)):
        with pytest.raises((OSError, ValueError)):
            stock.from_pretrained(tmp_path / "saved", local_files_only=True)


def test_loading_what_is_no_adapter_says_what_it_is(tiny, tmp_path):
    with pytest.raises(LoadError, match="nothing is there"):
        phreg.load(tmp_path / "nowhere")


def test_a_hub_model_is_distilled_and_its_adapter_comes_back_from_the_hub(hub, saved, photos, tmp_path):
    commit = hub.commit("me/vit", saved)
    result = api.distill("me/vit", photos, tmp_path / "run", steps=1, **QUICK)
    base = json.loads((tmp_path / "run" / "model" / "phreg.json").read_text())["base"]
    assert base["source"] == "me/vit"
    assert base["revision"] == commit
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "base_model: me/vit" in card
    hub.commit("me/vit-reg", tmp_path / "run" / "model")
    loaded = phreg.load("me/vit-reg")
    assert torch.equal(loaded(images()), result.model(images()))


@pytest.mark.parametrize("resampled", [{}, {"scale": 0.1}], ids=str)
def test_views_that_show_context_are_trained_on_and_measured_with(tiny, photos, tmp_path, resampled):
    views = {"count": 3, "max_shift": 0.25, "fill": "context"} | resampled
    result = phreg.distill(tiny(), photos, tmp_path / "run", steps=1, **QUICK | {"views": views})
    assert result.outcome.steps == 1
    assert 0 < result.comparison.agreement[1].mean <= 1
    with pytest.raises(PhregError, match="context"):
        phreg.denoise(result.model, images(), count=3, max_shift=0.25, fill="context")


def test_the_public_door_opens_onto_everything_it_names():
    for name in phreg.__all__:
        assert getattr(phreg, name) is not None
    assert set(phreg.__all__) <= set(dir(phreg))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = phreg.nothing


def test_importing_phreg_imports_no_model_library():
    import subprocess
    import sys

    code = (
        "import phreg, phreg.cli, sys\n"
        "print([m for m in ('timm', 'transformers', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_run_of_the_demonstration_model_is_exported_and_loads_in_plain_timm(photos, tmp_path):
    import timm

    result = api.distill("demo", photos, tmp_path / "run", steps=1, **QUICK)
    sizes = phreg.export(tmp_path / "run", tmp_path / "out", format="timm")
    assert sizes[0].claimed
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(stock(images(side=224)), result.model(images(side=224)))
    with pytest.raises(PhregError, match="timm"):
        phreg.export(tmp_path / "run", tmp_path / "other", format="transformers")


def test_a_run_with_a_read_out_of_its_own_is_not_exported_as_if_it_had_none(photos, tmp_path):
    api.distill(LIBRARIES["timm"]["clip"](), photos, tmp_path / "run", method="paper", steps=1, **QUICK)
    with pytest.raises(PhregError, match=r"value-only|made from a model instance"):
        phreg.export(tmp_path / "run", tmp_path / "out", format="timm")


def test_the_global_drift_is_measured_even_where_the_loss_has_no_global_term(tiny, photos, tmp_path):
    result = api.distill(tiny(), photos, tmp_path / "run", method="paper", steps=2, **QUICK)
    assert result.comparison.drift.mean < 1
    rows = {row.name: row.after for row in result.comparison.rows()}
    assert rows["pooled output, cosine to the original's, mean"] == result.comparison.drift.mean


@pytest.mark.parametrize("wrong", ["photos", [1], torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32).byte()])
def test_what_is_no_batch_of_images_is_refused_with_what_it_should_be(tiny, wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    with pytest.raises(PhregError, match=r"normalised float tensor"):
        phreg.denoise(tiny(), wrong)
    with pytest.raises(PhregError, match="multiple"):
        phreg.denoise(tiny(), torch.zeros(1, 3, 30, 32))


def test_unreadable_images_are_left_out_of_an_inspection_not_replaced(tiny, photos, caplog):
    for number in range(30):
        (photos / f"more-{number}.png").write_bytes((photos / "00.png").read_bytes())
    (photos / "broken.png").write_text("not an image")
    assert phreg.inspect(tiny(), photos, count=100).norms.images == 42
    assert "broken.png" in caplog.text
    for number in range(5):
        (photos / f"broken-{number}.png").write_text("not an image")
    with pytest.raises(PhregError, match="too many unreadable images"):
        phreg.inspect(tiny(), photos, count=100)


DINO = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def vit():
    """A ViT of transformers that does not say how its images are normalised."""
    from families import FAMILIES

    return FAMILIES["transformers/vit"]()


def test_a_model_distilled_with_a_normalisation_keeps_it_wherever_it_goes(photos, tmp_path, caplog):
    from transformers import AutoImageProcessor

    run = tmp_path / "run"
    done = api.distill(vit(), photos, run, steps=1, **QUICK, **DINO)
    done.model.save_pretrained(tmp_path / "saved")
    loaded = phreg.load(run, into=vit())
    for number, model in enumerate((done.model, loaded)):
        phreg.export(model, tmp_path / f"remote {number}", "remote-code")
        processor = AutoImageProcessor.from_pretrained(tmp_path / f"remote {number}")
        assert (tuple(processor.image_mean), tuple(processor.image_std)) == tuple(DINO.values())
    phreg.export(loaded, tmp_path / "merged", "merged")
    for path in (tmp_path / "remote 0", tmp_path / "merged", tmp_path / "saved"):
        spec = open_model(path)[0].spec
        assert (spec.mean, spec.std) == tuple(DINO.values())
    assert "assumed" not in caplog.text
    record = json.loads((run / "model" / "phreg.json").read_text())
    assert (record["mean"], record["std"]) == (list(DINO["mean"]), list(DINO["std"]))


def test_every_verb_says_what_it_assumes_and_takes_the_normalisation(photos, tmp_path, caplog):
    for number, picture in enumerate(sorted(photos.iterdir())):
        folder = tmp_path / "classes" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    pixels, given = {}, {"timm-like": DINO, "assumed": {}}
    for name, settings in given.items():
        caplog.clear()
        model = vit()
        found = phreg.inspect(model, photos, count=2, **settings)
        pixels[name] = found.survey.shown[0].image
        asked = {"task": "classification", "data": tmp_path / "classes", "methods": ["knn"], "neighbours": 2}
        phreg.evaluate(vit(), **asked, **settings)
        phreg.denoise(vit(), images(), count=2, **settings)
        phreg.export(phreg.add_registers(vit(), 2), tmp_path / name, "remote-code", **settings)
        assert caplog.text.count("which are usual for vit") == (0 if settings else 4)
    mean, std = (torch.tensor(DINO[part]).view(3, 1, 1) for part in ("mean", "std"))
    levels = pixels["assumed"] * 0.5 + 0.5
    torch.testing.assert_close(pixels["timm-like"], (levels - mean) / std, rtol=1e-5, atol=1e-5)


def test_views_are_filled_with_white_by_the_normalisation_that_is_given(tiny):
    model = tiny()
    seen = []
    handle = model.patch_embed.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    phreg.denoise(model, images(), count=8, max_shift=0.25, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.4))
    handle.remove()
    white = torch.tensor([8.0, 3.0, 1.0])
    corners = torch.cat([shown[:, :, row, col] for shown in seen for row in (0, -1) for col in (0, -1)])
    assert any(torch.allclose(corner, white) for corner in corners)


@pytest.mark.parametrize(
    "wrong",
    [{"mean": (0.5, 0.5)}, {"std": (0.5, 0.5, 0.0)}, {"mean": (0.5, 0.5, float("inf"))}],
    ids=str,
)
def test_a_normalisation_is_three_numbers(wrong, tiny):
    with pytest.raises(PhregError, match="give three numbers, for red, green and blue"):
        phreg.inspect(tiny(), images(), **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "mps", torch.device("cuda:3"), "nonsense"], ids=str)
def test_a_device_that_is_not_there_is_said_by_every_verb_before_anything_is_opened(device, tmp_path):
    (tmp_path / "photos").mkdir()
    verbs = [
        lambda: phreg.load(tmp_path / "nothing", device=device),
        lambda: phreg.inspect("no/model", tmp_path / "photos", device=str(device)),
        lambda: phreg.distill("no/model", tmp_path / "photos", tmp_path / "run", device=str(device)),
        lambda: phreg.evaluate(
            "no/model", task="classification", data=tmp_path / "photos", device=str(device)
        ),
    ]
    for verb in verbs:
        with pytest.raises(PhregError, match=f"asked to run on device '{device}', which cannot be used here"):
            verb()


def oblong_vit():
    """A ViT of transformers for images of 16x64 pixels, as many patches as a square of 4x4."""
    from families_transformers import WIDE, build
    from transformers import ViTConfig, ViTModel

    return build(ViTModel, ViTConfig(**WIDE | {"image_size": (16, 64)}))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_model_that_is_not_square_is_shown_images_of_its_own_shape(library, tiny, photos, tmp_path):
    model = tiny(img_size=(16, 64)) if library == "timm" else oblong_vit()
    assert phreg.inspect(model, photos, count=2).size == (16, 64)

    done = api.distill(model, photos, tmp_path / "run", steps=1, registers=2, **QUICK)

    pixels = images()[..., :16, :].repeat(1, 1, 1, 2)
    assert adapt(done.model)(pixels).patches.shape == (3, 2, 8, 32)
    assert phreg.denoise(done.model, pixels, count=2).shape == (3, 2, 8, 32)
    record = json.loads((tmp_path / "run" / "model" / "phreg.json").read_text())
    assert (record["input_size"], record["size"]) == ([16, 64], [16, 64])
    assert "at 16x64 pixels" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_an_adapter_of_a_model_that_is_not_square_goes_onto_its_base_again(photos, tmp_path):
    run = tmp_path / "run"
    done = api.distill(oblong_vit(), photos, run, steps=1, registers=2, **QUICK)
    loaded = phreg.load(run, into=oblong_vit())
    pixels = images()[..., :16, :].repeat(1, 1, 1, 2)
    with torch.no_grad():
        found, expected = (model(pixels).last_hidden_state for model in (loaded, done.model))
    assert torch.equal(found, expected)


def test_size_takes_height_and_width(saved, photos, tmp_path):
    found = phreg.inspect(saved, photos, size=(16, 48), count=2)
    assert found.size == (16, 48)
    asked = QUICK | {"size": (16, 48), "target": {"native_size": True}}
    done = api.distill(saved, photos, tmp_path / "run", steps=1, **asked)
    assert done.model.patch_embed.img_size == (16, 48)
    api.distill(output=tmp_path / "run", resume=True)
    assert phreg.load(tmp_path / "run").patch_embed.img_size == (16, 48)
    with pytest.raises(PhregError, match="size 20 asked of"):
        phreg.inspect(saved, photos, size=(16, 20), count=2)


def test_resume_needs_nothing_but_the_run_and_an_unfinished_run_says_how_to_finish(saved, photos, tmp_path):
    run = tmp_path / "run"
    api.distill(saved, photos, run, steps=1, **QUICK)
    before = (run / "model" / "adapter.safetensors").read_bytes()
    api.distill(output=run, resume=True)
    assert (run / "model" / "adapter.safetensors").read_bytes() == before
    with pytest.raises(PhregError, match="registers: was 4, is 5"):
        api.distill(output=run, resume=True, registers=5)
    for path in (run / "model").iterdir():
        path.unlink()
    with pytest.raises(LoadError, match="--resume"):
        phreg.load(run)


@pytest.mark.parametrize("method", ["relocate", "paper"])
def test_a_clean_model_is_returned_untouched_with_the_verdict_unless_forced(method, tiny, photos, tmp_path):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unforced = QUICK | {"force": False}
    result = api.distill(model, photos, tmp_path / "run", method=method, steps=1, **unforced)
    assert result.model is model
    assert (result.sinks, result.outcome, result.comparison, result.failures) == (None, None, None, [])
    assert result.norms.emergence_block is None
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "run" / "model").exists()
    assert "No sinks found" in (tmp_path / "run" / "report" / "report.html").read_text()
    forced = api.distill(tiny(), photos, tmp_path / "forced", method=method, registers=4, steps=1, **QUICK)
    assert forced.outcome.steps == 1
    assert forced.model.num_prefix_tokens == 5


def test_a_model_without_sinks_is_denoised_where_its_moved_views_agree_better(tiny, photos, tmp_path):
    model = tiny()
    torch.manual_seed(0)
    nn.init.normal_(model.pos_embed, std=2.0)  # what a patch's features show is mostly where it lies
    asked = QUICK | {"force": False, "steps": 1, "views": {"max_shift": 0.5}}
    result = api.distill(model, photos, tmp_path / "run", **asked)
    assert result.outcome.steps == 1
    assert (result.sinks, result.norms, result.consistency) == (None, None, None)


@pytest.mark.parametrize("method", ["auto", "denoise"])
def test_a_model_that_agrees_with_its_moved_views_is_returned_with_the_figures(
    method, tiny, photos, tmp_path
):
    model = tiny()
    nn.init.zeros_(model.pos_embed)
    for block in model.blocks:  # nothing but the patch itself decides a patch's features
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
    asked = QUICK | {"force": False, "steps": 1, "method": method}
    result = api.distill(model, photos, tmp_path / "run", views={"flip": 0.0, "fill": "context"}, **{
        name: value for name, value in asked.items() if name != "views"
    })  # fmt: skip
    assert result.unchanged
    assert result.outcome is None
    assert result.consistency.mean == pytest.approx(1, abs=1e-5)
    assert result.consistency.headroom == pytest.approx(0, abs=1e-5)
    assert model.num_prefix_tokens == 1
    assert "agree to 1.000" in nothing_to_repair(result.norms, result.consistency)


@pytest.mark.parametrize("resume", [False, True])
def test_force_goes_on_in_the_folder_of_the_verdict(resume, saved, photos, tmp_path):
    run, asked = tmp_path / "run", QUICK | {"method": "relocate", "steps": 1, "force": False}
    assert api.distill(saved, photos, run, **asked).outcome is None
    looks = {path.name for path in (run / "report").iterdir()}
    with pytest.raises(DataError):
        api.distill(saved, photos, run, **asked | {"force": True, "batch_size": 99})
    assert {path.name for path in (run / "report").iterdir()} == looks, "a failure leaves the verdict"
    assert api.distill(saved, photos, run, resume=resume, **asked | {"force": True}).outcome.steps == 1
    assert {path.name for path in (run / "report").iterdir()} == {"report.html", "figures.json"}
    phreg.load(run)


WRONG = {
    "batch": {"batch_size": 99},
    "role": {"unlock": {"roles": ["blocks", "cheek"]}},
    "nothing to train": {"registers": 0, "unlock": {"roles": []}},
    "no units": {"method": "test-time"},
}
"""What cannot be done with the tiny model and twelve images, and is found out at different times."""


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_done_leaves_the_output_as_it_was(wrong, saved, photos, tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        length = {} if wrong == "no units" else {"steps": 1}
        with pytest.raises(PhregError) as error:
            api.distill(saved, photos, run, **QUICK | length | WRONG[wrong])
        assert "holds a run already" not in str(error.value)
        assert not run.exists()
    run.mkdir()
    with pytest.raises(PhregError):
        api.distill(saved, photos, run, **QUICK | length | WRONG[wrong])
    assert list(run.iterdir()) == []
    assert api.distill(saved, photos, run, steps=1, **QUICK).outcome.steps == 1


# The loss is computed once to measure the learning rates, then at each step.
@pytest.mark.parametrize("failing", [1, 4])
def test_a_run_that_fails_leaves_nothing_before_its_first_step_and_goes_on_after_it(
    failing, saved, photos, tmp_path, monkeypatch
):
    calls = iter(range(1, 99))
    real = RetrofitTask.loss

    def loss(*arguments):
        if next(calls) == failing:
            raise RuntimeError("the lights went out")
        return real(*arguments)

    monkeypatch.setattr(RetrofitTask, "loss", loss)
    asked = QUICK | {"steps": 4, "checkpoint_every": 2}
    with pytest.raises(RuntimeError):
        api.distill(saved, photos, tmp_path / "run", **asked)
    assert (tmp_path / "run").exists() == (failing > 1)
    for file in (tmp_path / "run").glob("state/*/state.json"):
        told = json.loads(file.read_text())
        assert 0 < told["sessions"]["seconds"] < 1000
        file.write_text(json.dumps(told | {"sessions": {"seconds": 1000, "skipped": ["gone.jpg"]}}))
    result = api.distill(saved, photos, tmp_path / "run", resume=failing > 1, **asked)
    assert result.outcome.images == 8, "over both sessions"
    assert (result.outcome.seconds > 1000) == (failing > 1)
    assert result.outcome.skipped == (["gone.jpg"] if failing > 1 else [])


@pytest.mark.parametrize("method", ["relocate", "paper"])
def test_a_model_in_half_precision_is_inspected_distilled_and_loaded_in_its_own(
    method, tiny, photos, tmp_path
):
    model = tiny().bfloat16()
    assert phreg.inspect(model, photos, count=2).norms.images == 2
    result = api.distill(model, photos, tmp_path / "run", method=method, steps=2, **QUICK)
    assert result.model is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    loaded = phreg.load(tmp_path / "run", into=tiny().bfloat16())
    assert torch.equal(loaded(images().bfloat16()), model(images().bfloat16()))
    assert phreg.denoise(loaded, images(), count=2).dtype == torch.float32


def test_inspect_writes_over_an_earlier_look_and_over_nothing_else(tiny, photos, tmp_path):
    look = tmp_path / "look"
    for _ in range(2):
        phreg.inspect(tiny(), photos, output=look, count=1)
    before = {path.name for path in photos.iterdir()}
    for among in (photos, photos / "look"):
        with pytest.raises(PhregError, match="among the images"):
            phreg.inspect(tiny(), photos, output=among, count=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("do not lose me")
    for other in (tmp_path / "thesis", tmp_path / "thesis" / "thesis.tex"):
        with pytest.raises(PhregError, match="not empty"):
            phreg.inspect(tiny(), images(2), output=other)
    assert {path.name for path in photos.iterdir()} == before
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_no_images_asked_for_or_given_is_one_clear_error(tiny, photos):
    with pytest.raises(PhregError, match=r"0 images.*--count"):
        phreg.inspect(tiny(), photos, count=0)
    with pytest.raises(DataError, match="no images"):
        phreg.add_test_time_registers(tiny(), images(0))


def test_the_demonstrations_sinks_are_named_in_the_run_and_their_relocation_is_logged(photos, tmp_path):
    settings = QUICK | {"force": False, "sinks": {"images": 8}}
    result = api.distill("demo", photos, tmp_path / "run", steps=1, **settings)
    assert {(unit.block, unit.index) for unit in result.sinks.units} == {(3, 57), (3, 148)}
    written = json.loads((tmp_path / "run" / "model" / "phreg.json").read_text())
    assert written["sinks"] == result.sinks.to_json()
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["terms"]["relocation"] > 0


def test_a_run_that_fails_a_check_says_so_in_words_in_its_record_and_on_its_card(tiny, photos, tmp_path):
    tight = {"drift": 1.0, "agreement": 0.0, "outlier_rate": 0.0}
    training = {"optim": {"lr": 0.1, "schedule": "constant"}, "checks": tight}
    result = api.distill(tiny(), photos, tmp_path / "run", steps=3, **QUICK, **training)
    assert any("checks.drift = 1" in failure for failure in result.failures)
    written = json.loads((tmp_path / "run" / "model" / "phreg.json").read_text())
    assert written["gates"] == {"passed": False, "failures": result.failures}
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "**Failed its checks:** " in card
    assert all(failure in card for failure in result.failures)
    assert phreg.info(result.run).failures == tuple(result.failures)
    headline = (result.run / "report" / "report.html").read_text().partition("</header>")[0]
    assert headline.count("Check failed: ") == len(result.failures)


def test_a_failed_check_is_logged_by_the_run_and_by_whatever_loads_its_model(saved, photos, tmp_path, caplog):
    training = {"optim": {"lr": 0.1, "schedule": "constant"}, "checks": {"drift": 1.0}}
    run = tmp_path / "run"
    result = api.distill(saved, photos, run, steps=3, **QUICK, **training)
    failures = "; ".join(result.failures)
    assert f"checks failed, and the adapter is marked so: {failures}" in caplog.text
    base = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    for load in (
        lambda: phreg.load(run),
        lambda: phreg.load(run, into=base),
        lambda: phreg.export(run, tmp_path / "out", format="adapter"),
        lambda: phreg.load(tmp_path / "out"),
        lambda: phreg.push(run, "me/vit", dry_run=tmp_path / "dry"),
    ):
        caplog.clear()
        load()
        (warned,) = [record.getMessage() for record in caplog.records if "checks" in record.getMessage()]
        assert failures in warned


def test_a_model_within_its_gates_loads_without_a_word(saved, photos, tmp_path, caplog):
    loose = {"checks": {"drift": 0.0, "agreement": 1.0, "outlier_rate": 1.0}}
    api.distill(saved, photos, tmp_path / "run", steps=1, **QUICK, **loose)
    phreg.load(tmp_path / "run")
    assert "checks" not in caplog.text


def test_a_finished_run_is_judged_anew_by_other_gates(saved, photos, tmp_path):
    run = tmp_path / "run"
    trained = QUICK | {"steps": 2, "checks": {"drift": 0.0, "agreement": 1.0, "outlier_rate": 1.0}}
    assert api.distill(saved, photos, run, **trained).failures == []
    weights = (run / "model" / "adapter.safetensors").read_bytes()
    judged = api.distill(output=run, resume=True, checks={"drift": 1.0})
    assert any("checks.drift = 1" in failure for failure in judged.failures)
    assert not json.loads((run / "model" / "phreg.json").read_text())["gates"]["passed"]
    assert (run / "model" / "adapter.safetensors").read_bytes() == weights


def test_a_run_within_its_gates_is_marked_so_and_one_not_measured_neither_way(tiny, photos, tmp_path, caplog):
    loose = QUICK | {"checks": {"drift": 0.0, "agreement": 1.0, "outlier_rate": 1.0}}
    for name, images, passed in (("measured", 2, True), ("not", 0, None)):
        settings = loose | {"measure": {"images": images, "views": 3}}
        result = api.distill(tiny(), photos, tmp_path / name, steps=1, **settings)
        assert result.failures == []
        written = json.loads((tmp_path / name / "model" / "phreg.json").read_text())
        assert written["gates"] == {"passed": passed, "failures": []}
        assert ("not measured" in caplog.text) == (passed is None)
        assert "Failed its checks" not in (tmp_path / name / "model" / "README.md").read_text()
