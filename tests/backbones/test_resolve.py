"""From what a user types to a backbone: forms, the hub and its failures, broken files, the hash."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import families_open_clip
import families_transformers
import huggingface_hub
import open_clip
import open_clip.factory
import open_clip.pretrained
import peft
import pytest
import timm
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from open_clip.push_to_hf_hub import save_for_hf as save_open_clip
from safetensors.torch import save_file
from timm.models import save_for_hf as save_timm
from torch import nn

from phreg.backbones.resolve import Base, adapt, find_adapter, load, locate, weights_sha256
from phreg.errors import LoadError, UnsupportedModelError

pytest_plugins = ["hub_server"]

IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TIMM_ID = "timm/test_vit.r160_in1k"


@dataclass(frozen=True)
class Saved:
    """A model, and the folder its own library wrote it to."""

    model: nn.Module
    folder: Path


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Saved:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"), seed=0)


@pytest.fixture(scope="module")
def timm_vit(tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("timm")
    model = timm.create_model("test_vit").eval()
    save_timm(model, str(folder), safe_serialization=True)
    return Saved(model, folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("open_clip")
    model = families_open_clip.clip()
    config = {"embed_dim": 16, "vision_cfg": families_open_clip.VISION, "text_cfg": families_open_clip.TEXT}
    no_tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    model.visual.image_mean, model.visual.image_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    save_open_clip(model, no_tokenizer, config, str(folder), safe_serialization=True)
    return Saved(model, folder)


def save_dinov2(folder: Path, *, seed: int, **options) -> Saved:
    model = families_transformers.FAMILIES["dinov2"]()
    with torch.no_grad():
        model.layernorm.bias.fill_(seed)
    model.save_pretrained(folder, **options)
    return Saved(model, folder)


def plain(folder: Path, *, config: str = '{"model_type": "any"}', weights: str = "model.safetensors") -> Path:
    """Writes the least that is found as a model, for tests that end before a library reads it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    if weights.endswith(".safetensors"):
        save_file({"weight": torch.zeros(1000)}, folder / weights)
    elif weights:
        torch.save({"weight": torch.zeros(1000)}, folder / weights)
    return folder


def copied(saved: Saved, folder: Path) -> Path:
    return Path(shutil.copytree(saved.folder, folder))


# -- instances ---------------------------------------------------------------------------------------------


def test_importing_phreg_backbones_imports_no_model_library():
    code = (
        "import sys, phreg.backbones.resolve; print({'transformers', 'timm', 'open_clip'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
def test_an_instance_is_wrapped_by_its_library_s_adapter(library, dinov2, timm_vit, clip):
    model = {"transformers": dinov2, "timm": timm_vit, "open_clip": clip}[library].model
    backbone = adapt(model)
    assert backbone.model is model
    assert backbone.spec.library == library


def test_a_subclass_is_known_by_what_it_derives_from():
    class Mine(timm.models.VisionTransformer):
        pass

    assert adapt(Mine(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)).spec.library == "timm"


def test_a_backbone_is_returned_as_it_is(timm_vit):
    backbone = adapt(timm_vit.model)
    assert adapt(backbone) is backbone


def test_a_model_of_no_known_library_is_refused_by_name():
    with pytest.raises(
        UnsupportedModelError, match=r"Linear: its class is of torch.nn.*supported are.*README"
    ):
        adapt(nn.Linear(2, 2))


def test_a_compiled_model_is_refused_with_the_way_out(timm_vit):
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule: .*_orig_mod"):
        adapt(torch.compile(timm_vit.model))


def test_a_data_parallel_model_is_refused_with_the_way_out(timm_vit):
    with pytest.raises(UnsupportedModelError, match=r"DataParallel: .*model\.module"):
        adapt(nn.DataParallel(timm_vit.model))


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks for it
def test_a_peft_model_is_refused_with_the_way_out():
    model = families_transformers.FAMILIES["dinov2"]()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UnsupportedModelError, match=r"PeftModel: .*merge_and_unload"):
        adapt(wrapped)


def test_loading_an_instance_says_what_it_is(timm_vit):
    backbone, base = load(timm_vit.model)
    assert backbone.model is timm_vit.model
    assert base == Base("instance", "timm", None, weights_sha256(timm_vit.model.state_dict()))


def test_an_instance_has_no_revisions(timm_vit):
    with pytest.raises(LoadError, match=r"revision v1 asked of a model instance.*leave it out"):
        load(timm_vit.model, revision="v1")


# -- local folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
@pytest.mark.parametrize("form", [str, Path, os.path.relpath])
def test_a_local_folder_of_each_library_loads_as_it_was_saved(library, form, dinov2, timm_vit, clip):
    saved = {"transformers": dinov2, "timm": timm_vit, "open_clip": clip}[library]
    backbone, base = load(form(saved.folder))
    assert type(backbone.model) is type(saved.model)
    assert (base.source, base.library, base.revision) == (str(saved.folder), library, None)
    assert base.sha256 == weights_sha256(adapt(saved.model).disk_state())


def test_resolving_the_source_of_a_base_again_finds_the_same(dinov2):
    _, base = load(os.path.relpath(dinov2.folder))
    assert load(base.source)[1] == base


def test_a_home_folder_is_expanded(dinov2, monkeypatch):
    monkeypatch.setenv("HOME", str(dinov2.folder.parent))
    assert locate(f"~/{dinov2.folder.name}").folder == dinov2.folder


@pytest.mark.parametrize(
    "path",
    [
        "/no/such",
        "./nosuch",
        "../nosuch",
        "~/nosuch",
        "~nobody/x",
        "a/b/c",
        "a\\b",
        "model.safetensors",
        "no/",
    ],
)
def test_what_looks_like_a_path_and_is_not_there_is_never_asked_of_the_hub(path, hub):
    with pytest.raises(LoadError, match="looks like a path, and nothing is there"):
        load(path)
    assert hub.requests == []


def test_a_path_object_is_never_asked_of_the_hub(hub):
    with pytest.raises(LoadError, match="looks like a path, and nothing is there"):
        load(Path("facebook/dinov2-base"))
    assert hub.requests == []


def test_a_file_is_refused_in_favour_of_its_folder(dinov2):
    with pytest.raises(LoadError, match="is a file; give the folder"):
        load(dinov2.folder / "model.safetensors")


def test_a_local_folder_has_no_revisions(dinov2):
    with pytest.raises(LoadError, match=r"revision main asked of local .*leave it out"):
        load(dinov2.folder, revision="main")


@pytest.mark.parametrize("config", [None, "{}", '{"hidden_size": 8}'])
def test_a_folder_without_a_telling_config_is_refused_with_what_was_looked_for(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(
        LoadError, match=r"no config that says what it is.*model_type.*architecture.*model_cfg"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "found"), [("{not json", "is not JSON"), ("[1]", "should hold a JSON object")]
)
def test_a_broken_config_is_named(config, found, tmp_path):
    with pytest.raises(LoadError, match=rf"config\.json {found}"):
        load(plain(tmp_path / "model", config=config))


@pytest.mark.parametrize("name", ["phreg.json", "model/phreg.json"])
def test_adapters_and_runs_are_told_from_base_models(name, tmp_path):
    assert not find_adapter(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert find_adapter(tmp_path)
    assert locate(tmp_path).library is None
    with pytest.raises(LoadError, match=r"phreg\.load"):
        load(tmp_path)


# -- weights on disk ---------------------------------------------------------------------------------------


def test_the_same_weights_as_bin_and_as_safetensors_have_the_same_hash(dinov2, tmp_path):
    folder = copied(dinov2, tmp_path / "bin")
    _, base = load(dinov2.folder)
    (folder / "model.safetensors").unlink()
    torch.save(adapt(dinov2.model).disk_state(), folder / "pytorch_model.bin")
    assert load(folder)[1].sha256 == base.sha256


def test_sharded_weights_load_like_whole_ones(dinov2, tmp_path):
    saved = save_dinov2(tmp_path, seed=0, max_shard_size="20KB")
    assert len(list(saved.folder.glob("model-*.safetensors"))) > 1
    assert load(saved.folder)[1].sha256 == load(dinov2.folder)[1].sha256


def test_a_missing_shard_is_named(tmp_path):
    folder = save_dinov2(tmp_path, seed=0, max_shard_size="20KB").folder
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        LoadError, match=rf"{shard.name} is missing, though its index names it; copy it again"
    ):
        load(folder)


def test_an_index_without_a_map_is_named(tmp_path):
    folder = plain(tmp_path / "model", weights="")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(LoadError, match=r"index\.json should map tensors to files as weight_map"):
        load(folder)


def test_a_folder_without_weights_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(
        LoadError, match=r"has no weights; transformers models keep them in model\.safetensors"
    ):
        load(plain(tmp_path / "model", weights=""))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_weights_are_named(weights, kept, tmp_path):
    folder = plain(tmp_path / "model", weights=weights)
    content = (folder / weights).read_bytes()
    (folder / weights).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(LoadError, match=rf"{weights} is (cut short or )?broken.*; copy it again"):
        load(folder)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.filterwarnings(
    "ignore:Detected pickle protocol:UserWarning"
)  # torch, of bytes that happen to say so
@given(content=st.binary(max_size=200))
def test_weights_of_random_bytes_end_in_one_clear_error(weights, content, tmp_path_factory):
    folder = plain(tmp_path_factory.mktemp("random") / "model", weights=weights)
    (folder / weights).write_bytes(content)
    with pytest.raises(LoadError, match="broken"):
        load(folder)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_and_never_run(zipped, tmp_path):
    folder, trace = plain(tmp_path / "model", weights=""), tmp_path / "trace"
    torch.save({"weight": Bomb(trace)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(LoadError, match="holds pickled objects, which phreg never loads"):
        load(folder)
    assert not trace.exists()


# -- the hub: forms ----------------------------------------------------------------------------------------


def test_a_transformers_id_loads_with_its_commit(hub, dinov2):
    commit = hub.commit("facebook/dinov2-tiny", dinov2.folder)
    backbone, base = load("facebook/dinov2-tiny")
    assert torch.equal(backbone.run(IMAGES), adapt(dinov2.model).run(IMAGES))
    assert base == Base("facebook/dinov2-tiny", "transformers", commit, load(dinov2.folder)[1].sha256)


@pytest.mark.parametrize(
    "name", [TIMM_ID, "test_vit.r160_in1k", "test_vit", "timm/test_vit", f"hf-hub:{TIMM_ID}"]
)
def test_a_timm_model_loads_by_id_and_by_name(name, hub, timm_vit):
    commit = hub.commit(TIMM_ID, timm_vit.folder)
    _, base = load(name)
    source = name if name.startswith("hf-hub:") else TIMM_ID
    assert base == Base(source, "timm", commit, weights_sha256(timm_vit.model.state_dict()))


@pytest.mark.parametrize("name", ["laion/tiny", "hf-hub:laion/tiny"])
def test_an_open_clip_model_loads_by_id_with_and_without_prefix(name, hub, clip):
    commit = hub.commit("laion/tiny", clip.folder)
    _, base = load(name)
    assert base == Base(name, "open_clip", commit, weights_sha256(clip.model.state_dict()))


def test_an_open_clip_name_loads_the_repository_open_clip_knows(hub, clip, tmp_path, monkeypatch):
    config = json.loads((clip.folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-8", config)
    known = open_clip.pretrained._pcfg(hf_hub="laion/tiny/")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", {"some": known})
    commit = hub.commit("laion/tiny", clip.folder)
    _, base = load("open_clip:Tiny-8/some")
    assert base == Base("open_clip:Tiny-8/some", "open_clip", commit, weights_sha256(clip.model.state_dict()))


@pytest.mark.parametrize(
    ("name", "library"), [("laion/both", "transformers"), ("hf-hub:laion/both", "open_clip")]
)
def test_a_repository_of_two_libraries_is_read_as_its_prefix_says(name, library, hub, clip, tmp_path):
    folder = copied(clip, tmp_path / "both")
    plain(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", folder, dirs_exist_ok=True)
    hub.commit("laion/both", folder)
    assert locate(name).library == library
    weights = {"transformers": "model.safetensors", "open_clip": "open_clip_model.safetensors"}[library]
    assert weights in hub.fetched()
    assert len([name for name in hub.fetched() if name.endswith(".safetensors")]) == 1


def test_a_folder_wins_over_the_hub(hub, tmp_path, monkeypatch):
    plain(tmp_path / "facebook" / "dinov2-tiny")
    monkeypatch.chdir(tmp_path)
    assert locate("facebook/dinov2-tiny").folder == tmp_path / "facebook" / "dinov2-tiny"
    assert hub.requests == []


@pytest.mark.parametrize("name", ["no-such-model", "dinov2-base", "", "x" * 999])
def test_a_bare_name_that_nobody_knows_is_refused_with_the_forms(name, hub):
    with pytest.raises(LoadError, match=r"no folder here, nor a name that timm knows; give owner/name"):
        load(name)
    assert hub.requests == []


def test_only_the_files_that_are_needed_are_fetched(hub, dinov2, tmp_path):
    folder = copied(dinov2, tmp_path / "full")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "tf_model.h5").write_bytes(b"x")
    (folder / "README.md").write_text("x")
    hub.commit("a/b", folder)
    load("a/b")
    assert hub.fetched() == {"config.json", "model.safetensors"}


def test_pickle_is_fetched_only_where_there_is_nothing_else(hub, tmp_path, caplog):
    hub.commit("a/b", plain(tmp_path / "model", weights="pytorch_model.bin"))
    locate("a/b")
    assert hub.fetched() == {"config.json", "pytorch_model.bin"}
    assert caplog.records == []  # the client has nothing to warn about


def test_the_shards_of_an_index_are_fetched_and_nothing_beside_them(hub, tmp_path):
    folder = save_dinov2(tmp_path / "model", seed=0, max_shard_size="20KB").folder
    save_file({"x": torch.zeros(1)}, folder / "model-other.safetensors")
    hub.commit("a/b", folder)
    _, base = load("a/b")
    assert base.sha256 == load(folder)[1].sha256
    assert "model-other.safetensors" not in hub.fetched()


def test_a_repository_that_lacks_a_shard_says_so(hub, tmp_path):
    folder = save_dinov2(tmp_path / "model", seed=0, max_shard_size="20KB").folder
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.unlink()
    hub.commit("a/b", folder)
    with pytest.raises(LoadError, match=rf"model 'a/b': {shard.name} is missing"):
        load("a/b")


def test_an_adapter_on_the_hub_is_fetched_whole_for_others_to_read(hub, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "phreg.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, folder / "phreg.safetensors")
    (folder / "README.md").write_text("x")
    commit = hub.commit("me/adapter", folder)
    found = locate("me/adapter")
    assert (found.library, found.revision) == (None, commit)
    assert find_adapter(found.folder)
    assert hub.fetched() == {"phreg.json", "phreg.safetensors"}


def test_a_pinned_revision_loads_the_older_weights(hub, tmp_path):
    saved = [save_dinov2(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    old = hub.commit("a/b", saved[0].folder, tag="v1")
    new = hub.commit("a/b", saved[1].folder)
    for revision, commit, seed in [("v1", old, 1), (old, old, 1), (None, new, 2), ("main", new, 2)]:
        backbone, base = load("a/b", revision)
        assert base.revision == commit
        assert backbone.model.layernorm.bias[0] == seed


def test_the_environment_of_the_client_is_honoured(hub, tmp_path):
    hub.commit("a/private", plain(tmp_path / "model"))
    hub.repositories["a/private"].private = True
    code = "from phreg.backbones.resolve import locate; print(locate('a/private').folder)"
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": hub.token,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")


# -- the hub: failures -------------------------------------------------------------------------------------


def test_a_missing_repository_is_named_with_what_to_do(hub):
    with pytest.raises(
        LoadError, match=r"model 'no/such' asked of http.*no such repository.*no local folder.*spelling"
    ):
        load("no/such")


def test_a_missing_revision_is_named(hub, tmp_path):
    hub.commit("a/b", plain(tmp_path / "model"))
    with pytest.raises(LoadError, match=r"model 'a/b' at revision v9 asked of .*no such revision"):
        load("a/b", revision="v9")


def test_what_cannot_be_a_repository_is_refused(hub):
    with pytest.raises(LoadError, match=r"model 'a/b c' asked of .*not how a repository is named"):
        load("a/b c")


def test_a_gated_repository_says_how_to_get_in_and_opens_with_the_token(hub, tmp_path, monkeypatch):
    hub.commit("a/gated", plain(tmp_path / "model"))
    hub.repositories["a/gated"].gated = True
    with pytest.raises(LoadError, match=rf"it is gated.*ask for it at {hub.url}/a/gated.*HF_TOKEN"):
        load("a/gated")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert locate("a/gated").library == "transformers"


def test_a_private_repository_opens_with_the_token(hub, tmp_path, monkeypatch):
    hub.commit("a/private", plain(tmp_path / "model"))
    hub.repositories["a/private"].private = True
    with pytest.raises(LoadError, match=r"or it is private.*hf auth login.*HF_TOKEN"):
        load("a/private")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert locate("a/private").library == "transformers"


def test_a_wrong_token_is_named_as_the_reason_but_never_printed(hub, tmp_path, monkeypatch, caplog, capfd):
    hub.commit("a/b", plain(tmp_path / "model"))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    with pytest.raises(LoadError, match=r"access was refused \(HTTP 401\).*HF_TOKEN") as caught:
        load("a/b")
    chain, error = [], caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ or error.__context__
    assert "secret" not in "".join([*chain, caplog.text, *capfd.readouterr()])


def test_a_hub_that_is_down_is_told_from_a_missing_model(hub, tmp_path):
    hub.commit("a/b", plain(tmp_path / "model"))
    hub.failing = True
    with pytest.raises(
        LoadError, match=r"model 'a/b'.*no usable answer \(HfHubHTTPError: .*500.*run the same again"
    ):
        load("a/b")


def test_a_hub_that_is_down_does_not_matter_once_the_model_is_cached(hub, tmp_path):
    commit = hub.commit("a/b", plain(tmp_path / "model"))
    locate("a/b")
    hub.failing = True
    assert locate("a/b").revision == commit


def test_no_network_ends_in_a_clear_error(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens there
    with pytest.raises(
        LoadError, match=r"no usable answer \(ConnectError.*check the network and HF_ENDPOINT"
    ):
        load("a/b")


def test_offline_with_a_cold_cache_says_how_to_fill_it(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"HF_HUB_OFFLINE is set.*`hf download a/b`"):
        load("a/b")
    assert hub.requests == []


def test_offline_with_half_a_cache_says_how_to_fill_it(hub, tmp_path, monkeypatch):
    hub.commit("a/b", plain(tmp_path / "model"))
    huggingface_hub.snapshot_download("a/b", allow_patterns=["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"HF_HUB_OFFLINE is set, and its files are not all in the cache"):
        load("a/b")


@pytest.mark.parametrize("pinned", [True, False])
def test_offline_with_a_warm_cache_loads(pinned, hub, dinov2, monkeypatch):
    commit = hub.commit("a/b", dinov2.folder)
    online = load("a/b")[1]
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("a/b", commit if pinned else None)[1] == online
    assert hub.requests == []


def test_a_download_cut_once_is_resumed(hub, dinov2):
    hub.commit("a/b", dinov2.folder)
    hub.cut_after, hub.cuts_left = 500, 2
    assert load("a/b")[1].sha256 == load(dinov2.folder)[1].sha256
    assert hub.cuts_left == 0


def test_a_download_that_keeps_breaking_ends_in_one_error_and_the_next_try_succeeds(hub, dinov2):
    hub.commit("a/b", dinov2.folder)
    hub.cut_after = 0
    with pytest.raises(LoadError, match=r"model 'a/b'.*the download broke off.*run the same again"):
        load("a/b")
    hub.cut_after = None
    assert load("a/b")[1].sha256 == load(dinov2.folder)[1].sha256


def test_a_full_disk_is_named(hub, tmp_path, monkeypatch):
    hub.commit("a/b", plain(tmp_path / "model"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(
        LoadError, match=rf"the cache {tmp_path}/cache cannot be written \(No space left.*HF_HOME"
    ):
        load("a/b")


def test_a_repository_without_weights_is_refused(hub, tmp_path):
    hub.commit("a/b", plain(tmp_path / "model", weights="flax_model.msgpack"))
    with pytest.raises(LoadError, match=r"model 'a/b' has no weights; transformers models keep them in"):
        load("a/b")


def test_a_repository_without_a_telling_config_is_refused(hub, tmp_path):
    hub.commit("a/b", plain(tmp_path / "model", config="{}"))
    with pytest.raises(LoadError, match=r"model 'a/b' has no config that says what it is"):
        load("a/b")


def test_broken_weights_in_the_cache_are_named_and_following_the_advice_helps(hub, dinov2):
    hub.commit("a/b", dinov2.folder)
    weights = (locate("a/b").folder / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(LoadError, match=rf"'a/b': model\.safetensors is cut short.*delete {weights} and run"):
        load("a/b")
    weights.unlink()
    assert load("a/b")[1].sha256 == load(dinov2.folder)[1].sha256


def test_an_unsupported_model_is_refused_by_its_id(hub, tmp_path):
    save_timm(timm.create_model("test_convnext"), str(tmp_path / "model"), safe_serialization=True)
    hub.commit("timm/test_convnext.x", tmp_path / "model")
    with pytest.raises(
        UnsupportedModelError, match=r"'timm/test_convnext\.x': cannot add registers to .*ConvNeXt"
    ):
        load("timm/test_convnext.x")


# -- the hash of weights -----------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def named_tensors(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True))
    return {name: draw(tensor()) for name in names}


@st.composite
def tensor(draw):
    shape = draw(st.lists(st.integers(1, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))).to(
        dtype
    )


def test_the_recipe_of_the_hash_is_what_its_docstring_says():
    # printf '["a", "float32", [2, 1]]\n\0\0\200\77\0\0\0\300["b", "uint8", []]\n\7' | sha256sum
    tensors = {"b": torch.tensor(7, dtype=torch.uint8), "a": torch.tensor([[1.0], [-2.0]])}
    assert weights_sha256(tensors) == "d675bdccaf7bbc51c1f462417aa32a89b3abe7f8448822f96fc3338a3dbb1687"


@given(tensors=named_tensors())
def test_the_hash_depends_on_neither_order_nor_memory_layout(tensors):
    strided = {name: tensors[name].T.contiguous().T for name in reversed(tensors) if tensors[name].dim() == 2}
    same = {
        name: strided.get(name, nn.Parameter(tensors[name], requires_grad=False))
        for name in reversed(tensors)
    }
    assert weights_sha256(same) == weights_sha256(tensors)


@given(tensors=named_tensors(), data=st.data())
def test_the_hash_changes_with_any_bit(tensors, data):
    name = data.draw(st.sampled_from(sorted(tensors)))
    raw = tensors[name].clone().reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = raw.view(tensors[name].dtype).reshape(tensors[name].shape)
    assert weights_sha256(tensors | {name: changed}) != weights_sha256(tensors)


@given(tensors=named_tensors(), data=st.data())
def test_the_hash_changes_with_any_name_dtype_or_shape(tensors, data):
    name = data.draw(st.sampled_from(sorted(tensors)))
    others = {other: tensors[other] for other in tensors if other != name}
    new_name = data.draw(st.text(max_size=6).filter(lambda text: text not in tensors))
    changed = data.draw(
        st.sampled_from(
            [
                others,
                others | {new_name: tensors[name]},
                others | {name: tensors[name][None]},
                others | {name: tensors[name].reshape(-1).view(torch.uint8)[:, None, None, None]},
                others | {name: tensors[name], new_name: torch.zeros(0)},
            ]
        )
    )
    assert weights_sha256(changed) != weights_sha256(tensors)


def test_tensors_that_run_into_each_other_hash_differently():
    halves = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert weights_sha256(halves) != weights_sha256({"a": torch.zeros(3), "b": torch.zeros(1)})
    assert weights_sha256({"a": torch.zeros(0)}) != weights_sha256({})


@pytest.mark.parametrize("name", ["run", "my run", "a[/x]b", "it's", "$HOME"])
def test_a_run_that_was_not_finished_says_the_command_that_finishes_it(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    with pytest.raises(LoadError, match="was not finished") as caught:
        locate(folder)
    command = str(caught.value).partition("finish it: ")[2]
    assert shlex.split(command) == ["phreg", "distill", "--output", str(folder), "--resume"]
