"""Pushing: what goes to the hub, what stays here, the card that fills itself, and what can go wrong."""

import dataclasses
import errno
import hashlib
import json
import os
import re

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import phreg
from phreg import api
from phreg.backbones.resolve import Base, Located
from phreg.errors import LoadError, PhregError, PushError
from phreg.formats.card import License
from phreg.formats.publish import assemble, base_license
from phreg.report.html import ImageCard, Page, Picture, write_report

# The client's own way of sending a large file over LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

QUICK = {
    "force": True,  # the tiny models have no artifacts
    "steps": 1,
    "batch_size": 2,
    "views": {"count": 3, "max_shift": 0.25},
    "measure": {"images": 2, "views": 3, "keep_best": False},
    "device": "cpu",
    "data": {"workers": 0},
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(hub, saved, photos, tmp_path):
    """A run whose base is on the hub, with a licence in its card."""
    (saved / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    hub.commit("maker/vit", saved)
    return api.distill("maker/vit", photos, tmp_path / "run", **QUICK)


@pytest.fixture
def token(hub, monkeypatch):
    """Logs in."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub.token


def card_of(folder):
    path = folder / "README.md"
    return huggingface_hub.metadata_load(path), path.read_text()


def at(hub, repository, branch="main"):
    repo = hub.repositories[repository]
    return repo.commits[repo.branches[branch]]


# -- there and back ----------------------------------------------------------------------------------------


def test_a_run_is_pushed_as_its_adapter_in_one_commit_and_comes_back(run, hub, token):
    pushed = phreg.push(run.run, "me/vit-reg")
    assert pushed.commit.startswith(f"{hub.url}/me/vit-reg/commit/")
    assert {"README.md", "adapter.safetensors", "phreg.json", "report/01.png"} <= set(pushed.files)
    assert len(hub.repositories["me/vit-reg"].commits) == 2  # the hub's own first one, and ours
    assert torch.equal(phreg.load("me/vit-reg")(IMAGES), run.model(IMAGES))


def test_an_export_is_pushed_from_its_folder_or_made_on_the_way_and_comes_back(run, hub, token, tmp_path):
    phreg.export(run.run, tmp_path / "out", format="timm")
    phreg.push(tmp_path / "out", "me/from-folder")
    phreg.push(run.run, "me/from-run", format="timm")
    for name in ("me/from-folder", "me/from-run"):
        assert torch.equal(phreg.load(name)(IMAGES), run.model(IMAGES))
        stock = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
        assert torch.equal(stock(IMAGES), run.model(IMAGES))
        settings, text = card_of(at(hub, name))
        assert (settings["library_name"], settings["base_model_relation"]) == ("timm", "finetune")
        assert f'timm.create_model("hf-hub:{name}", pretrained=True)' in text
        assert "| pixels | largest relative difference | equal |" in text
        assert "| outlier rate (share of patch tokens) |" in text


def test_a_config_that_names_its_own_folder_names_the_repository_once_pushed(run, tmp_path):
    phreg.export(run.run, tmp_path / "out", format="timm")
    trunk = {"timm_model_name": f"local-dir:{tmp_path / 'out'}"}
    (tmp_path / "out" / "other_config.json").write_text(json.dumps(trunk))
    phreg.push(tmp_path / "out", "me/x", dry_run=tmp_path / "dry")
    pushed = json.loads((tmp_path / "dry" / "other_config.json").read_text())
    assert pushed == {"timm_model_name": "hf-hub:me/x"}


def test_a_branch_and_a_private_repository_are_made_as_asked(run, hub, token):
    phreg.push(run.run, "me/vit-reg", private=True, revision="try")
    repo = hub.repositories["me/vit-reg"]
    assert repo.private
    assert not (repo.commits[repo.branches["main"]] / "phreg.json").exists()
    assert torch.equal(phreg.load("me/vit-reg", revision="try")(IMAGES), run.model(IMAGES))


def test_a_second_push_replaces_what_another_format_left_and_keeps_the_rest(run, hub, token):
    phreg.push(run.run, "me/vit-reg", format="timm")
    (at(hub, "me/vit-reg") / "NOTES.md").write_text("mine")
    phreg.push(run.run, "me/vit-reg")
    names = {path.name for path in at(hub, "me/vit-reg").iterdir()}
    assert names == {".gitattributes", "NOTES.md", "README.md", "adapter.safetensors", "phreg.json", "report"}


def test_a_dry_run_writes_the_folder_and_speaks_to_no_repository(run, hub, tmp_path):
    hub.requests.clear()
    pushed = phreg.push(run.run, "me/vit-reg", dry_run=tmp_path / "dry")
    assert pushed.commit is None
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "phreg.json",
        "report",
    ]
    assert not any("me/vit-reg" in request for request in hub.requests)
    assert torch.equal(phreg.load(tmp_path / "dry")(IMAGES), run.model(IMAGES))


# -- the card ----------------------------------------------------------------------------------------------


def test_the_card_fills_itself_with_front_matter_that_the_hub_reads(run, tmp_path):
    phreg.push(run.run, "me/vit-reg", dry_run=tmp_path / "dry")
    settings, text = card_of(tmp_path / "dry")
    assert settings == {
        "base_model": "maker/vit",
        "base_model_relation": "adapter",
        "library_name": "phreg",
        "pipeline_tag": "image-feature-extraction",
        "license": "cc-by-nc-4.0",
        "tags": ["phreg", "registers", "vision-transformer"],
    }
    for part in (
        'phreg.load("me/vit-reg")',
        "The licence of the base model, `cc-by-nc-4.0`, is kept.",
        "method `auto`: 1 steps of 2 images",
        "| optim.lr | 0.01 |",
        "| outlier rate (share of patch tokens) |",
        "![Chart of norms from block to block](report/",
        "timm ",
        "eprint        = {2505.21501}",
        "eprint        = {2309.16588}",
    ):
        assert part in text, part


def test_nothing_of_this_disk_and_no_photograph_is_pushed(run, tmp_path, photos):
    phreg.push(run.run, "me/vit-reg", dry_run=tmp_path / "dry")
    texts = [path.read_text() for path in (tmp_path / "dry").iterdir() if path.suffix in (".json", ".md")]
    assert str(tmp_path) not in "".join(texts)
    assert json.loads((tmp_path / "dry" / "phreg.json").read_text())["recipe"]["images"] == photos.name
    pictures = sorted((tmp_path / "dry" / "report").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    shown = re.findall(r"!\[(.*?)\]\(report/\d\d\.png\)", (tmp_path / "dry" / "README.md").read_text())
    assert len(shown) == len(pictures)
    maps = [alt.partition(":")[0] for alt in shown if " of image " in alt]
    assert maps == [
        f"{layer} of image {number}, {side}"
        for number in (1, 2)
        for layer in ("norms", "features")
        for side in ("before", "after")
    ]
    assert len(shown) > len(maps) + 5, "charts"


def test_of_many_images_and_layers_the_maps_of_a_few_are_pushed_and_none_that_shows_a_photograph(
    run, tmp_path
):
    plain = Picture(np.zeros((8, 8, 3), dtype=np.uint8))
    layers = ("norms", "features", "attention of CLS", "text: norms of image 1, cats")
    card = ImageCard(plain.pixels, {name: [plain, plain] for name in layers})
    photographic = dataclasses.replace(plain, photographic=True)
    card = dataclasses.replace(card, maps=card.maps | {layers[-1]: [photographic, None]})
    page = Page("t", "v", models=("before", "after"), layers=dict.fromkeys(layers, ""), images=[card] * 12)
    write_report(run.run / "report" / "report.html", page)
    phreg.push(run.run, "me/vit-reg", dry_run=tmp_path / "dry")
    text = (tmp_path / "dry" / "README.md").read_text()
    assert re.findall(r"!\[(.*?)\]", text) == [
        f"{layer} of image {number}, {side}"
        for number in (1, 2, 3, 4)
        for layer in ("norms", "features")
        for side in ("before", "after")
    ]


def test_an_adapter_of_a_local_base_names_it_without_its_path_and_goes_into_a_model_at_hand(
    saved, photos, tmp_path, caplog
):
    result = api.distill(saved, photos, tmp_path / "run", **QUICK)
    phreg.push(tmp_path / "run", "me/vit-reg", dry_run=tmp_path / "dry")
    assert f"the base is a folder here, {saved.name}: others find it where" in caplog.text
    settings, text = card_of(tmp_path / "dry")
    assert "base_model" not in settings
    assert f"Made from `{saved.name}`" in text
    with pytest.raises(LoadError, match="into=model"):
        phreg.load(tmp_path / "dry")
    base = timm.create_model(f"local-dir:{saved}", pretrained=True)
    assert torch.equal(phreg.load(tmp_path / "dry", into=base)(IMAGES), result.model(IMAGES))


@pytest.mark.parametrize(
    ("card", "config", "found"),
    [
        ("---\nlicense: mit\n---\n", {}, License("mit")),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            {},
            License("other", "mine", "LICENSE"),
        ),
        (None, {"pretrained_cfg": {"license": "apache-2.0"}}, License("apache-2.0")),
        ("# no front matter", {"license": "bsd"}, License("bsd")),
        ("# no front matter", {}, License()),
        ("---\nlicense: [\n---\n", {}, License()),
        (None, None, License()),
    ],
)
def test_a_licence_is_read_where_the_base_tells_it_and_else_unknown(card, config, found, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert base_license(Base(str(tmp_path), "timm", None, "")) == found


def test_a_base_that_cannot_be_asked_for_its_licence_is_told_and_said_to_be_unknown(
    run, hub, tmp_path, caplog
):
    hub.repositories.pop("maker/vit")
    hub.commit("maker/other", tmp_path / "photos")
    commit = json.loads((run.run / "model" / "phreg.json").read_text())["base"]["revision"]
    assert base_license(Base("maker/gone", "timm", commit, "")) == License()
    assert "the licence of maker/gone is not known" in caplog.text


def test_an_unknown_licence_is_said_to_be_unknown_in_the_card(hub, saved, photos, tmp_path):
    hub.commit("maker/vit", saved)
    api.distill("maker/vit", photos, tmp_path / "run", **QUICK)
    phreg.push(tmp_path / "run", "me/vit-reg", dry_run=tmp_path / "dry")
    settings, text = card_of(tmp_path / "dry")
    assert settings["license"] == "unknown"
    assert "is **unknown** here" in text


# -- what can go wrong -------------------------------------------------------------------------------------


def never_leaks(caught, secret, *texts):
    """Checks an error, and all that it came of, for a secret."""
    chain, error = list(texts), caught.value
    while error is not None:
        chain.append(f"{error} {error!r}")
        error = error.__cause__ or error.__context__
    return secret not in "".join(chain)


@pytest.fixture
def adapter(tmp_path):
    """The least that is an adapter."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    record = {
        "format": "phreg-adapter",
        "format_version": 1,
        "base": {"source": "instance", "library": "timm", "revision": None, "sha256": "0"},
        "class": "VisionTransformer",
        "registers": 1,
        "input_size": [32, 32],
        "versions": {"phreg": "0.1.0"},
    }
    (folder / "phreg.json").write_text(json.dumps(record))
    save_file({"reg_token": torch.zeros(1, 1, 8)}, folder / "adapter.safetensors")
    return folder


def test_without_a_token_the_hub_is_not_even_asked(adapter, hub):
    with pytest.raises(PushError, match=r"'me/x' of http.*there is no token; log in with `hf auth login`"):
        phreg.push(adapter, "me/x")
    assert hub.requests == []


def test_a_wrong_token_is_named_as_the_reason_but_never_printed(adapter, hub, monkeypatch, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    with (
        caplog.at_level("DEBUG"),
        pytest.raises(PushError, match=r"token was refused \(HTTP 401\)") as caught,
    ):
        phreg.push(adapter, "me/x")
    assert never_leaks(caught, "secret", caplog.text, *capfd.readouterr())
    assert "me/x" not in hub.repositories


def test_the_right_token_is_never_logged_or_written_either(adapter, hub, token, caplog, capfd):
    with caplog.at_level("DEBUG"):
        phreg.push(adapter, "me/x")
    assert token not in "".join([caplog.text, *capfd.readouterr()])
    files = [path for path in at(hub, "me/x").rglob("*") if path.is_file()]
    assert not any(token.encode() in path.read_bytes() for path in files)


def test_a_namespace_of_another_is_refused(adapter, hub, token):
    with pytest.raises(
        PushError, match=r"may not write there \(HTTP 403\); push to a repository of your own"
    ):
        phreg.push(adapter, "them/x")
    assert "them/x" not in hub.repositories


def test_a_repository_of_another_that_may_be_read_is_refused_without_a_commit(adapter, hub, token, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("theirs")
    hub.commit("them/x", tmp_path / "theirs")
    with pytest.raises(PushError, match=r"may not write there \(HTTP 403\).*nothing was committed"):
        phreg.push(adapter, "them/x")
    assert len(hub.repositories["them/x"].commits) == 1


def test_a_repository_that_holds_a_model_of_other_making_is_left_alone(adapter, hub, token, saved):
    hub.commit("me/base", saved)
    with pytest.raises(PushError, match=r"holds a model that phreg did not write \(model\.safetensors\)"):
        phreg.push(adapter, "me/base")
    assert len(hub.repositories["me/base"].commits) == 1


def test_a_public_repository_is_not_taken_for_a_private_one(adapter, hub, token):
    phreg.push(adapter, "me/x")
    with pytest.raises(PushError, match="exists and is public; make it private at"):
        phreg.push(adapter, "me/x", private=True)


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (409, "somebody else changed it at the same time"),
        (413, "the hub refused.*HTTP 413"),
        (401, "refused"),
    ],
)
def test_a_commit_that_the_hub_refuses_is_one_clear_error(status, found, adapter, hub, token):
    hub.refusing["/api/models/me/x/commit/main"] = status
    with pytest.raises(PushError, match=f"{found}.*nothing was committed"):
        phreg.push(adapter, "me/x")
    assert len(hub.repositories["me/x"].commits) == 1


def test_a_large_file_that_does_not_arrive_is_one_clear_error(adapter, hub, token):
    content = (adapter / "adapter.safetensors").read_bytes()
    hub.refusing[f"/lfs/{hashlib.sha256(content).hexdigest()}"] = 403
    with pytest.raises(PushError, match="nothing was committed"):
        phreg.push(adapter, "me/x")
    assert len(hub.repositories["me/x"].commits) == 1


def test_a_hub_that_is_down_and_a_lost_network_are_one_clear_error_each(adapter, hub, token, monkeypatch):
    hub.failing = True
    with pytest.raises(PushError, match=r"the hub refused \(HTTP 500"):
        phreg.push(adapter, "me/x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(PushError, match=r"the upload broke off \(ConnectError.*check the network"):
        phreg.push(adapter, "me/x")


def test_offline_says_so(adapter, hub, token, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set; unset it"):
        phreg.push(adapter, "me/x")


@pytest.mark.parametrize("name", ["x", "a/b/c", "me/a b", "me/", "me/--"])
def test_what_cannot_be_a_repository_is_refused(name, adapter, hub, token):
    with pytest.raises(PushError, match="give owner/name"):
        phreg.push(adapter, name)
    assert hub.repositories == {}


def test_a_folder_that_holds_something_is_never_overwritten(adapter, tmp_path):
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(PushError, match="is not empty; give a new or an empty folder"):
        phreg.push(adapter, "me/x", dry_run=tmp_path / "dry")
    assert [path.name for path in (tmp_path / "dry").iterdir()] == ["thesis.tex"]


def test_a_full_disk_leaves_nothing_half_written(adapter, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("phreg.formats.publish.shutil.copyfile", full)
    with pytest.raises(PushError, match=r"dry .*No space left on device"):
        phreg.push(adapter, "me/x", dry_run=tmp_path / "dry")
    assert not [path for path in tmp_path.iterdir() if "dry" in path.name]


def test_what_phreg_did_not_write_is_not_pushed(saved, tmp_path):
    with pytest.raises(PushError, match="which phreg did not write"):
        phreg.push(saved, "me/x", dry_run=tmp_path / "dry")
    with pytest.raises(PushError, match="which phreg did not write"):
        assemble(Located(saved, str(saved), "timm"), tmp_path / "dry", "me/x")


def test_a_link_to_a_file_elsewhere_is_not_pushed(adapter, hub, token, tmp_path):
    (tmp_path / "secret").write_text("key")
    (adapter / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(PhregError, match="is a link"):
        phreg.push(adapter, "me/x")
    assert hub.repositories == {}
