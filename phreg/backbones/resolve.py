"""What a user types, turned into a backbone: the one door for hub ids, names, folders and instances.

Each library has its adapter, a module of this package with two functions: `adapt(model)` wraps an instance,
`load(folder)` builds the model in a local folder of that library's layout. This module decides which adapter
is asked, and first sees to it that the folder is there, complete, and holds plain tensors. No model library
is imported before it is needed.

    owner/name, timm name, open_clip:ARCH/TAG ──hub──┐
    local folder ────────────────────────────────────┴► Located ──check, load──► Backbone + Base ◄── instance

It finds phreg's own adapters, runs and exports, but does not read what they say: see `phreg.formats.load`.
"""

import importlib
import logging
import math
import os
import pickle
import struct
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from phreg.backbones.base import Backbone, Library, Triple
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.parsing import parse_json
from phreg.record import Base, RecordError, read_format, weights_sha256
from phreg.storage import ADAPTER_FILE, EXPORT_FILE, resume_command

logger = logging.getLogger(__name__)

EXPORTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What is fetched of an export: its weights, configs and tokenizer; never code or pickles."""

FORMS = "owner/name of the hub, a timm name, open_clip:ARCH/TAG, or a folder of a saved model"
"""The forms a model can be given in, for messages."""


@dataclass(frozen=True)
class LibraryLayout:
    """How a library lays a model out in a folder.

    Attributes:
        config: File that describes the model.
        key: Key in it by which this library's models are written_by from the others'.
        weights: Files that may hold the weights, best first; an index names the shards.
    """

    config: str
    key: str
    weights: tuple[str, ...]


LAYOUTS: dict[Library, LibraryLayout] = {
    "transformers": LibraryLayout(
        "config.json",
        "model_type",
        (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ),
    ),
    "timm": LibraryLayout("config.json", "architecture", ("model.safetensors", "pytorch_model.bin")),
    "open_clip": LibraryLayout(
        "open_clip_config.json",
        "model_cfg",
        (
            "open_clip_model.safetensors",
            "open_clip_pytorch_model.bin",
            "model.safetensors",
            "pytorch_model.bin",
        ),
    ),
}
"""The libraries, in the order in which they are tried on an instance, a folder or a repository."""

# A broken pickle fails in whatever way its bytes happen to spell.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

HF_HUB_ORDER: tuple[Library, ...] = ("open_clip", "timm", "transformers")
"""The order for `hf-hub:owner/name`, which is how open_clip and timm write a hub id."""

WRAPPERS = {
    "torch._dynamo": "torch.compile may have traced it; pass `model._orig_mod`, compile afterwards",
    "torch.nn.parallel": "its parameters are listed already; pass `model.module`, wrap afterwards",
    "torch.distributed": "its parameters are sharded; pass the whole model, shard afterwards",
    "peft": "PEFT has rebuilt it; call `merge_and_unload()` first, let PEFT wrap afterwards",
}
"""Packages whose wrappers would not see a change to the model inside, and why."""


@runtime_checkable
class LibraryAdapter(Protocol):
    """What the module of a library offers."""

    def adapt(self, model: nn.Module) -> Backbone:
        """Wraps an instance."""
        ...

    def load(self, folder: Path) -> Backbone:
        """Builds the model in a local folder."""
        ...

    def build(self, name: str, config: dict[str, Any], tensors: Collection[str]) -> Backbone:
        """Builds a model of random weights, of a class, the library's own config and its tensors' names."""
        ...


@dataclass(frozen=True)
class Located:
    """A model's files, on this disk.

    Attributes:
        folder: Where they are.
        source: What to give to `locate` to find them again.
        library: The library whose layout they have; None for phreg's own formats, and for a graph.
        revision: The hub commit; None for a local folder.
        arch: The architecture, where the source names it (`open_clip:ARCH/TAG`).
    """

    folder: Path
    source: str
    library: Library | None
    revision: str | None = None
    arch: str | None = None


# -- instances -------------------------------------------------------------------------------------------


def display_name(source: str) -> str:
    """Names a model in a report: a local folder by its last part, since reports are shown to others."""
    return Path(source).absolute().name if Path(source).exists() else source


def adapt(model: nn.Module) -> Backbone:
    """Wraps a model of transformers, timm or open_clip, or of a subclass of theirs, without copying it.

    A model inside torch.compile, DistributedDataParallel, FSDP or PEFT is refused rather than unwrapped: the
    wrapper would go on without the registers, and nobody would notice.

    Args:
        model: The model; a backbone is returned as it is.

    Raises:
        UnsupportedModelError: The model is not one that phreg can patch.
    """
    if isinstance(model, Backbone):
        return model
    reason = _wrapper(model)
    if reason:
        raise UnsupportedModelError(f"cannot add registers to {type(model).__name__}: {reason}")
    modules = [base.__module__ for base in type(model).__mro__]
    packages = {module.partition(".")[0] for module in modules}
    for library in LAYOUTS:
        if library in packages:
            return _adapter(library).adapt(model)
    raise UnsupportedModelError(
        f"cannot add registers to {type(model).__name__}: its class is of {type(model).__module__}; "
        "supported are vision transformers of transformers, timm and open_clip: see phreg/backbones/README.md"
    )


def adapt_inside(model: nn.Module) -> list[Backbone]:
    """Finds every vision transformer that phreg can patch in a model built around them, or the model itself.

    Raises:
        UnsupportedModelError: There is none, or a wrapper would not see the change; see `adapt`.
    """
    try:
        return [adapt(model)]
    except UnsupportedModelError:
        if _wrapper(model):
            raise
        found: list[Backbone] = []
        seen: set[nn.Module] = set()
        for module in model.modules():
            if module is model or module in seen:
                continue
            if _wrapper(module):
                seen.update(module.modules())
                continue
            with suppress(UnsupportedModelError):
                found.append(adapt(module))
                seen.update(module.modules())
        if not found:
            raise
        return found


def _wrapper(model: nn.Module) -> str | None:
    """Says why a change to the model inside would go unseen; None where the model is no wrapper."""
    modules = [f"{base.__module__}." for base in type(model).__mro__]
    packages = (package for package in WRAPPERS if any(name.startswith(f"{package}.") for name in modules))
    return next((WRAPPERS[package] for package in packages), None)


def _adapter(library: Library) -> LibraryAdapter:
    """Imports the adapter of a library, and the library with it."""
    return cast(LibraryAdapter, importlib.import_module(f"phreg.backbones.{library}"))


def build(library: str, name: str, config: dict[str, Any], tensors: Collection[str]) -> Backbone:
    """Builds a model of random weights, of a class, its library's own config and the names of its tensors.

    Raises:
        LoadError: There is no such library, or it cannot make a model of them.
    """
    if library not in LAYOUTS:
        raise LoadError(f"library {library!r} is none of {', '.join(LAYOUTS)}")
    return _adapter(library).build(name, config, tensors)


# -- sources ---------------------------------------------------------------------------------------------


def load(
    source: str | os.PathLike[str] | nn.Module | Located, revision: str | None = None
) -> tuple[Backbone, Base]:
    """Builds the model that a user named, and says which one it is.

    Args:
        source: A model in one of the forms listed in phreg/backbones/README.md, or an instance, or what
            `locate` found.
        revision: Commit, branch or tag of a hub repository; None means the main branch.

    Raises:
        LoadError: The model cannot be found, fetched or trusted.
        UnsupportedModelError: It is not one that phreg can patch.
    """
    if isinstance(source, nn.Module):
        _refuse_revision(revision, "a model instance")
        backbone = adapt(source)
        return backbone, _base(backbone, "instance", None)
    found = source if isinstance(source, Located) else locate(source, revision)
    if found.library is None:
        raise LoadError(f"base model '{found.source}' was written by phreg; open it with phreg.load")
    _check_weights(found, found.library)
    try:
        if found.arch is None:
            backbone = _adapter(found.library).load(found.folder)
        else:
            from phreg.backbones import open_clip

            backbone = open_clip.load(found.folder, found.arch, found.source.rpartition("/")[2])
    except (LoadError, UnsupportedModelError) as error:  # adapters know the folder alone
        raise type(error)(f"model '{found.source}': {error}") from error
    return backbone, _base(backbone, found.source, found.revision)


def settle_normalisation(
    backbone: Backbone, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> None:
    """Sees to it that images are normalised for a model as it is used to, or warns of what is assumed.

    Args:
        backbone: The model.
        mean: Mean of red, green and blue, on a scale of 0 to 1; None means what the model says, or else its
            image processor where it came from, or else what is usual.
        std: Their standard deviation, likewise.

    Raises:
        PhregError: What is given is not three numbers, or a deviation is not above 0.
    """
    for name, given, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if given is not None and not _is_triple(given, least):
            raise PhregError(
                f"{name} {given!r} asked for to normalise images with; give three numbers, for red, green "
                f"and blue on a scale of 0 to 1{', each above 0' if name == 'std' else ''}"
            )
    if mean is None or std is None:
        if backbone.assumed:
            backbone.find_normalisation()
        if backbone.assumed and backbone.model not in _WARNED:
            _WARNED.add(backbone.model)
            logger.warning(
                "neither %s nor its files say how its images are normalised; assumed are mean %s and std %s, "
                "%s: if it was trained with others, give mean and std (--mean, --std)",
                backbone.describe(), backbone.spec.mean, backbone.spec.std, backbone.assumed,
            )  # fmt: skip
    if mean is not None or std is not None:
        backbone.set_normalisation(
            cast(Triple, tuple(map(float, mean or backbone.spec.mean))),
            cast(Triple, tuple(map(float, std or backbone.spec.std))),
        )


_WARNED: WeakSet[nn.Module] = WeakSet()
"""Models whose normalisation was said to be assumed; once is enough, however often one is read."""


def _is_triple(values: Any, least: float) -> bool:
    try:
        return len(values) == 3 and all(least < float(value) < math.inf for value in values)
    except (TypeError, ValueError):
        return False


def _base(backbone: Backbone, source: str, revision: str | None) -> Base:
    return Base(source, backbone.spec.library, revision, weights_sha256(backbone.disk_state()))


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Located:
    """Finds a model's files, and fetches them where they are on the hub.

    A folder of that name wins over the hub. phreg's adapters and runs are found too.

    Args:
        source: A model in one of the forms listed in phreg/backbones/README.md.
        revision: Commit, branch or tag of a hub repository; None means the main branch.

    Raises:
        LoadError: The model cannot be found or fetched.
    """
    text = os.fspath(source)
    path = os.path.expanduser(text)  # noqa: PTH111  # unlike Path, it takes strings that are no paths
    if text and os.path.exists(path):  # noqa: PTH110
        _refuse_revision(revision, f"local '{text}'")
        return _locate_folder(Path(path).resolve())
    if isinstance(source, os.PathLike) or _looks_like_path(text):
        raise LoadError(f"model '{text}' looks like a path, and nothing is there; give {FORMS}")
    scheme, _, name = text.partition(":")
    if scheme == "open_clip":
        from phreg.backbones import open_clip

        arch, repository = open_clip.hub_file(name)
        return _locate_on_hub(repository, revision, ("open_clip",), text, arch)
    if scheme == "hf-hub":
        return _locate_on_hub(name, revision, HF_HUB_ORDER, text)
    repository = _timm_repository(text) or text
    if "/" not in repository:
        raise LoadError(f"model '{text}' is no folder here, nor a name that timm knows; give {FORMS}")
    try:
        return _locate_on_hub(repository, revision, tuple(LAYOUTS), repository)
    except LoadError as error:
        raise LoadError(f"{error}; nor is there a local folder '{text}'") from error


def refuse_meta_device(source: str | os.PathLike[str]) -> None:
    """Refuses to load a model where torch makes all tensors without values.

    Raises:
        LoadError: The default device is `meta`, by `torch.device` as context or by `set_default_device`.
    """
    if torch.empty(0).is_meta:
        raise LoadError(
            f"asked to load '{os.fspath(source)}' under torch.device('meta'), where tensors have no values "
            "to load into; load it outside of that context, or, for a model without values, build one of its "
            "class inside and call phreg.add_registers on it"
        )


def find_adapter(folder: Path) -> Path | None:
    """Finds the phreg adapter in a folder: itself, or the `model` folder of a run; None without one."""
    return next((path for path in (folder, folder / "model") if (path / ADAPTER_FILE).is_file()), None)


def _looks_like_path(text: str) -> bool:
    endings = ("/", ".safetensors", ".bin", ".pt", ".pth", ".json")
    return text.startswith(("/", ".", "~")) or text.endswith(endings) or text.count("/") > 1 or "\\" in text


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise LoadError(f"revision {revision} asked of {what}; only the hub has revisions, leave it out")


def _timm_repository(text: str) -> str | None:
    """Finds the repository of a timm name; None where it is no such name, or is a repository's id already."""
    name = text.removeprefix("timm/")
    if "/" in name or (name != text and "." in name):
        return None
    from phreg.backbones import timm

    return timm.hub_id(name) if timm.is_name(name) else None


def _locate_folder(folder: Path) -> Located:
    if not folder.is_dir():
        raise LoadError(f"model '{folder}' is a file; give the folder that holds it and its config")
    adapter = find_adapter(folder)
    if adapter is not None:
        _refuse_links(adapter)
        return Located(adapter, str(folder), None)
    if (folder / EXPORT_FILE).is_file():
        _refuse_links(folder)
    if (folder / "recipe.toml").is_file():
        if (folder / "report" / "inspect.json").is_file() and not (folder / "log.jsonl").exists():
            raise LoadError(
                f"run '{folder}' holds no model, since it found nothing to repair or to gain; use its base, "
                f"which {folder / 'recipe.toml'} names, or distil it all the same: "
                f"{resume_command(folder)} --force"
            )
        raise LoadError(
            f"run '{folder}' holds no model yet, since it was not finished; "
            f"finish it: {resume_command(folder)}"
        )
    return Located(folder, str(folder), _library(folder, tuple(LAYOUTS), str(folder)))


def _locate_on_hub(
    repository: str, revision: str | None, order: Sequence[Library], source: str, arch: str | None = None
) -> Located:
    """Fetches the configs, finds the library by them, then fetches the weights in the one best format."""
    from phreg.backbones import hub  # takes 0.1 s to import, which only users of the hub should pay

    folder = hub.snapshot(repository, revision, ["*config.json", "*.index.json", ADAPTER_FILE, EXPORT_FILE])
    commit = folder.name
    if find_adapter(folder):
        hub.snapshot(repository, commit, [ADAPTER_FILE, "*.safetensors"])
        _refuse_links(folder)
        return Located(folder, source, None, commit)
    library = "open_clip" if arch else _library(folder, order, source)
    if library is None or (folder / EXPORT_FILE).is_file():
        hub.snapshot(repository, commit, EXPORTED_FILES)
        _refuse_links(folder)
        return Located(folder, source, library, commit)
    for name in LAYOUTS[library].weights:
        files = _files(folder, name)
        # The config is named along with them because the client warns about patterns that match nothing.
        hub.snapshot(repository, commit, [LAYOUTS[library].config, *(file.name for file in files)])
        if any(file.is_file() for file in files):
            break
    return Located(folder, source, library, commit, arch)


def _refuse_links(folder: Path) -> None:
    """Refuses a folder of phreg's that links to files elsewhere; the hub's cache links within itself."""
    home = (folder.parents[1] if folder.parent.name == "snapshots" else folder).resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise LoadError(
                f"asked to read {folder}, in which {path.name} is a link to {path.resolve()}, outside of it; "
                "phreg does not follow it: copy the file there if it is yours, else fetch the folder again"
            )


def _library(folder: Path, order: Sequence[Library], source: str) -> Library | None:
    """Finds the library that a folder was exported for, else the first whose config it has.

    Returns:
        The library; None for an export that none of them builds.
    """
    exported = folder / EXPORT_FILE
    try:
        written_by = read_format(exported) if exported.is_file() else None
    except RecordError as error:
        raise LoadError(f"asked for {source}, whose {error}") from error
    for library in sorted(order, key=lambda library: library != written_by):  # stable
        config = folder / LAYOUTS[library].config
        if config.is_file() and LAYOUTS[library].key in _read_json(config):
            return library
    if written_by:
        return None
    wanted = ", ".join(
        f"{layout.config} with {layout.key} ({library})" for library, layout in LAYOUTS.items()
    )
    raise LoadError(f"model '{source}' has no config that says what it is, such as {wanted}; give {FORMS}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} is not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise LoadError(f"{file} should hold a JSON object, found something else; copy or download it again")
    return content


# -- weights ---------------------------------------------------------------------------------------------


def _files(folder: Path, name: str) -> list[Path]:
    """Lists the files behind one of a layout's names: the file itself, or the shards an index names."""
    index = folder / name
    if not name.endswith(".index.json"):
        return [index]
    if not index.is_file():
        return []
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise LoadError(f"{index} should map tensors to files as weight_map; copy or download it again")
    odd = [shard for shard in shards.values() if not _is_file_name(shard)]
    if odd:
        raise LoadError(
            f"{index} names {odd[0]!r} as a file of weights, which is no file beside it; "
            "do not trust this folder, fetch the model from where it was published"
        )
    return [folder / shard for shard in sorted(set(shards.values()))]


def _is_file_name(name: Any) -> bool:
    """Tells a file's name from a path that may lead elsewhere."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _check_weights(found: Located, library: Library) -> None:
    """Checks, without reading the tensors, that the weights are all there, whole, and plain tensors.

    Raises:
        LoadError: A file is missing, broken, or holds pickled objects.
    """
    names = LAYOUTS[library].weights
    ways = (_files(found.folder, name) for name in names)
    files = next((files for files in ways if any(file.is_file() for file in files)), [])
    if not files:
        readable = ", ".join(name for name in names if not name.endswith(".json"))
        raise LoadError(f"model '{found.source}' has no weights; {library} models keep them in {readable}")
    for file in files:
        problem = _problem(file)
        if problem:
            again = f"delete {file.resolve()} and run the same again" if found.revision else "copy it again"
            raise LoadError(f"model '{found.source}': {file.name} {problem}; {again}")


def _problem(file: Path) -> str | None:
    """Says what is wrong with a file of weights."""
    if not file.is_file():
        return "is missing, though its index names it"
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return None
        torch.load(file, map_location="meta", weights_only=True)
    except SafetensorError as error:
        return f"is cut short or broken ({error})"
    except UNPICKLING_ERRORS:
        return "is broken, or holds pickled objects, which phreg never loads"
    return None
