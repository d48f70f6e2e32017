"""What a run writes: state to resume from, and the adapter that comes out.

    runs/<name>/  recipe.toml   the resolved configuration
                  log.jsonl     one object a step
                  state/        step-000500/{state.safetensors, state.json}, the last two
                  model/        the adapter: {adapter.safetensors, phreg.json, README.md}
                  report/       report.html and its pictures

The adapter holds the tensors that differ from the base checkpoint, whole, under the names that the base's own
library uses on disk, and the sha256 of the base they belong to. Everything is safetensors and JSON; nothing
is ever unpickled. Every write goes to a temporary name first, is flushed to the disk and then renamed, so a
crash leaves the old file or the new one.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phreg import __version__
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base, weights_sha256
from phreg.config import DistillConfig, flatten, to_toml, validate
from phreg.config import read_toml as read_settings
from phreg.errors import CheckpointError, LoadError, PhregError

FORMAT = "phreg-adapter"
SAVED_FORMAT = "phreg-model"
"""What the `merged` export and a patched transformers model's own `save_pretrained` write: all weights."""
FORMAT_VERSION = 1
LIBRARIES = ("torch", "timm", "transformers", "open_clip_torch")
"""Packages whose versions an adapter records."""
KEPT_STATES = 2
"""Checkpoints kept per run."""

FREE_ON_RESUME = frozenset(
    {
        "output",
        "device",
        "checkpoint_every",
        "keep_freed_memory",
        "trackers",
        "data.workers",
        "measure.views",
    }
)
"""Settings that may differ between a run and its resumption: they do not decide the weights."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and the names in it."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved configuration."""
        return self.path / "recipe.toml"

    @property
    def log(self) -> Path:
        """One JSON object a step."""
        return self.path / "log.jsonl"

    @property
    def model(self) -> Path:
        """The adapter."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The before/after page."""
        return self.path / "report"

    @property
    def states(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = (self.path / "state").glob("step-*")
        return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))


def start_run(path: Path, config: DistillConfig, *, resume: bool) -> RunFolder:
    """Opens a run folder for writing and records its configuration.

    Raises:
        CheckpointError: The folder holds another run and `resume` is off, or `resume` is on and its settings
            differ.
    """
    run = RunFolder(path)
    if run.recipe.exists():
        if not resume:
            raise CheckpointError(
                f"output {path} holds a run already; go on with it by --resume, or choose another --output"
            )
        _check_same(run, config)
    elif path.exists() and any(path.iterdir()):
        raise CheckpointError(f"output {path} is not empty and holds no phreg run; choose another --output")
    path.mkdir(parents=True, exist_ok=True)
    write_text(run.recipe, to_toml(config))
    return run


def save_state(
    run: RunFolder, step: int, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, facts: Any
) -> Path:
    """Writes a checkpoint after `step` optimizer steps, and drops all but the last two.

    Args:
        run: The run.
        step: Optimizer steps done.
        tensors: Weights that train, and averages of them.
        optimizer: Its state is kept too.
        facts: What must be the same on resumption, as JSON.
    """
    state = optimizer.state_dict()["state"]
    moments = {f"optimizer.{i}.{key}": value for i, values in state.items() for key, value in values.items()}
    folder = run.path / "state" / f"step-{step:06d}"
    contents = {name: value.detach().cpu().contiguous() for name, value in {**tensors, **moments}.items()}
    with _replacing(folder) as temporary:
        save_file(contents, temporary / "state.safetensors")
        _flush(temporary / "state.safetensors")
        write_text(temporary / "state.json", json.dumps({"step": step, "facts": facts}))
    for old in run.states[:-KEPT_STATES]:
        shutil.rmtree(old)
    return folder


def load_state(
    run: RunFolder, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, facts: Any
) -> int:
    """Restores the newest readable checkpoint in place.

    Returns:
        The optimizer steps done; 0 where there is no checkpoint yet.

    Raises:
        CheckpointError: The checkpoint belongs to a run whose facts differ, or does not fit the model.
    """
    for folder in reversed(run.states):
        with suppress(OSError, SafetensorError, json.JSONDecodeError):
            saved = load_file(folder / "state.safetensors")
            meta = json.loads((folder / "state.json").read_text())
            break
    else:
        return 0
    differing = [name for name in facts if meta["facts"].get(name) != facts[name]]
    if differing:
        changes = "; ".join(f"{name} was {meta['facts'].get(name)}, is {facts[name]}" for name in differing)
        raise CheckpointError(
            f"cannot resume {run.path} from {folder.name}: {changes}; run it as it was started"
        )
    moments: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in saved if name.startswith("optimizer.")]:
        _, index, key = name.split(".", 2)
        moments.setdefault(int(index), {})[key] = saved.pop(name)
    if saved.keys() != tensors.keys():
        odd = sorted(saved.keys() ^ tensors.keys())
        raise CheckpointError(f"cannot resume {run.path}: its checkpoint and the model differ in {odd[:3]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"])


def save_adapter(
    folder: Path,
    backbone: Backbone,
    base: Base,
    base_state: Mapping[str, Tensor],
    record: Mapping[str, Any],
    card: str,
) -> None:
    """Writes the patched model as an adapter.

    Args:
        folder: Folder to write; an earlier adapter there is replaced.
        backbone: The patched model.
        base: What it was made from.
        base_state: The base's tensors under their on-disk names.
        record: Recipe, figures and whatever else should be told of the run, as JSON.
        card: Text of the model card.
    """
    state = backbone.disk_state()
    changed = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in state.items()
        if name not in base_state or not torch.equal(tensor.cpu(), base_state[name].cpu())
    }
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": asdict(base),
        "class": type(backbone.model).__name__,
        "family": backbone.spec.family,
        "registers": backbone.num_registers,
        "insertion": "after position embedding, before any norm",
        "input_size": list(backbone.spec.input_size),
        "versions": {"phreg": __version__} | {name: version(name) for name in LIBRARIES},
        **record,
    }
    with _replacing(folder) as temporary:
        save_file(changed, temporary / "adapter.safetensors", metadata={"format": "pt"})
        _flush(temporary / "adapter.safetensors")
        write_text(temporary / "phreg.json", json.dumps(description, indent=2))
        write_text(temporary / "README.md", card)


def read_adapter(folder: Path) -> dict[str, Any]:
    """Reads the description of an adapter, or of a patched model saved whole.

    Raises:
        LoadError: It is no adapter, or one of a newer format.
    """
    try:
        description = json.loads((folder / "phreg.json").read_text(encoding="utf-8"))
        kind, number = description["format"], description["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"asked for the adapter in {folder}, whose phreg.json cannot be read ({error})"
        ) from error
    if kind not in (FORMAT, SAVED_FORMAT) or number > FORMAT_VERSION:
        raise LoadError(
            f"asked for the adapter in {folder}, found format {kind!r} version {number}; this phreg reads "
            f"{FORMAT!r} up to version {FORMAT_VERSION}: upgrade phreg, or load the folder with what wrote it"
        )
    return description


def apply_adapter(folder: Path, backbone: Backbone) -> None:
    """Turns an unpatched base model into the adapter's patched one, in place.

    Raises:
        LoadError: The base's weights are not those the adapter was made from, or the adapter's tensors are
            unreadable.
    """
    description = read_adapter(folder)
    source, revision, wanted = (description["base"][key] for key in ("source", "revision", "sha256"))
    found = weights_sha256(backbone.disk_state())
    if found != wanted:
        raise LoadError(
            f"the adapter in {folder} was made for {source} with weights sha256 {wanted[:12]}…, but "
            f"{backbone.describe()} has {found[:12]}…; load it onto that base"
            + (f" (revision {revision})" if revision else "")
        )
    try:
        tensors = load_file(folder / "adapter.safetensors")
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"cannot read {folder / 'adapter.safetensors'} ({error}); fetch the adapter again"
        ) from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise LoadError(
            f"the adapter in {folder} holds NaN or infinite values in {broken[:3]}; fetch or train it again"
        )
    size, before = backbone.spec.input_size, None
    try:
        if tuple(description["input_size"]) != size:
            before = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
            backbone.set_input_size((description["input_size"][0], description["input_size"][1]))
        if description["registers"]:
            backbone.insert_registers(torch.zeros(description["registers"], backbone.spec.width))
        backbone.load_disk_state(tensors)
        backbone.adapter = folder
    except PhregError as error:
        # The base is the user's: a refused adapter leaves it as it was.
        if backbone.num_registers:
            backbone.remove_registers()
        if before is not None:
            backbone.set_input_size(size)
            backbone.load_disk_state(before)
        raise LoadError(f"the adapter in {folder} does not fit: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    Raises:
        CheckpointError: It cannot be written; an old file of that name is still whole.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _writing(path):
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)


def truncate_log(log: Path, steps: int) -> None:
    """Drops what a killed run logged beyond its last checkpoint, and a half-written last line."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= steps:
                kept.append(line + "\n")
    write_text(log, "".join(kept))


def _check_same(run: RunFolder, config: DistillConfig) -> None:
    before = flatten(
        validate(flatten(read_settings(run.recipe)), source=str(run.recipe)).model_dump(mode="json")
    )
    now = flatten(config.model_dump(mode="json"))
    changed = [key for key in now if key not in FREE_ON_RESUME and before.get(key) != now[key]]
    if changed:
        lines = "\n".join(f"  {key}: was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        raise CheckpointError(
            f"cannot resume {run.path}: its settings differ from those it was started with\n{lines}\n"
            "use the same settings, or start anew in another --output"
        )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which then takes the place of `folder` at once."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    with _writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path} ({error}); free space or choose another --output, then go on with --resume"
        ) from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
