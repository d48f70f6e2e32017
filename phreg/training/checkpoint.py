"""The folder of a run, and the state in it to resume from.

    runs/<name>/  recipe.toml   the resolved configuration
                  log.jsonl     one object a step
                  state/        step-000500/{state.safetensors, state.json}, the last two
                  model/        the adapter: {adapter.safetensors, phreg.json, README.md}
                  report/       report.html and its pictures

The adapter is written by `phreg.formats.adapter`. Everything is safetensors and JSON; nothing is ever
unpickled. Every write goes to a temporary name first, is flushed to the disk and then renamed, so a
crash leaves the old file or the new one.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phreg.config import ChecksConfig, DistillConfig
from phreg.errors import CheckpointError
from phreg.parsing import parse_json
from phreg.record import weights_sha256
from phreg.settings import flatten, read_settings, to_toml, validate
from phreg.storage import flush, replacing, resume_command, write_text, writing
from phreg.training.sharding import fill, like, whole
from phreg.training.trust_region import RoleRate

logger = logging.getLogger(__name__)

KEPT_STATES = 2
"""Checkpoints kept per run."""

FREE_ON_RESUME = frozenset(
    {
        "output",
        "force",
        "device",
        "checkpoint_every",
        "checkpoint_activations",
        "keep_freed_memory",
        "trackers",
        "data.workers",
        "measure.views",
        *(f"checks.{name}" for name in ChecksConfig.model_fields),
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
    def rates(self) -> Path:
        """The learning rate of each role, where a trust region bounds them."""
        return self.path / "rates.json"

    @property
    def report(self) -> Path:
        """The before/after page."""
        return self.path / "report"

    @property
    def states(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = (self.path / "state").glob("step-*")
        complete = (path for path in found if re.fullmatch(r"step-\d+", path.name))
        return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))

    @property
    def begun(self) -> bool:
        """Whether there is something to go on with, or to load: a logged step, a checkpoint, an adapter."""
        logged = self.log.is_file() and self.log.stat().st_size > 0
        return logged or bool(self.states) or self.model.exists()

    @property
    def is_verdict(self) -> bool:
        """Whether the run found nothing to repair or to gain: all it left is what it saw."""
        return (self.report / "inspect.json").is_file() and not self.begun


def start_run(path: Path, config: DistillConfig, *, resume: bool) -> RunFolder:
    """Opens a run folder for writing and records its configuration.

    Raises:
        CheckpointError: The folder holds another run and `resume` is off, or `resume` is on and its settings
            differ.
    """
    run = RunFolder(path)
    check_free(path, resume=resume)
    if resume and run.recipe.exists():
        _check_same(run, config)
    elif resume:
        logger.info("there is no run in %s to go on with: starting one", path)
    with writing(run.path, "free space, or choose another --output", CheckpointError):
        path.mkdir(parents=True, exist_ok=True)
        write_text(run.recipe, to_toml(config))
    return run


def close_without_model(run: RunFolder) -> None:
    """Ends a run of which the original is the result: its log goes into the report, its state goes."""
    with writing_run(run):
        run.log.replace(run.report / run.log.name)
    shutil.rmtree(run.path / "state", ignore_errors=True)
    run.rates.unlink(missing_ok=True)


def write_rates(run: RunFolder, rates: Mapping[str, RoleRate]) -> None:
    """Writes the learning rate of each role."""
    with writing_run(run):
        write_text(run.rates, json.dumps({role: asdict(rate) for role, rate in rates.items()}, indent=2))


def read_rates(run: RunFolder) -> dict[str, RoleRate]:
    """Reads the learning rate of each role.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        found = TypeAdapter(dict[str, RoleRate]).validate_json(run.rates.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"cannot go on with {run.path}: {run.rates.name} is damaged ({error}); start the run anew"
        ) from error
    return found


def writing_run(run: RunFolder) -> AbstractContextManager[None]:
    """Turns the failure of a write to a run that has begun into an error that says how to go on.

    It gives the whole command, since not everything that distils has the flag.
    """
    advice = f"free space, then go on with the run: {resume_command(run.path)}"
    return writing(run.path, advice, CheckpointError)


@contextmanager
def rollback_folder_on_error(path: Path) -> Iterator[None]:
    """Undoes what is written to a run folder inside, where it fails before the run's first step.

    So what was wrong can be mended and asked for again. A run that has begun is left as it is, to go on with.
    """
    run = RunFolder(path)
    there = set(path.iterdir()) if path.is_dir() else None
    recipe = run.recipe.read_bytes() if run.recipe.is_file() else None
    try:
        yield
    except BaseException:
        if path.is_dir() and not run.begun:
            for new in set(path.iterdir()) - (there or set()):
                shutil.rmtree(new) if new.is_dir() else new.unlink()
            if there is None:
                path.rmdir()
            if recipe is not None:
                run.recipe.write_bytes(recipe)
        raise


@contextmanager
def starting_run(run: RunFolder, config: DistillConfig, accelerator: Any, *, resume: bool) -> Iterator[None]:
    """Starts a run on its main process; what fails before its first step leaves the folder as it was.

    Args:
        run: Its folder.
        config: Its settings.
        accelerator: Its processes, of accelerate.
        resume: As `start_run` takes it.

    Raises:
        CheckpointError: See `start_run`.
    """
    with rollback_folder_on_error(run.path) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            start_run(run.path, config, resume=resume)
        accelerator.wait_for_everyone()
        yield


def check_free(path: Path, *, resume: bool) -> None:
    """Checks, before anything is loaded, that a run may be written to a folder.

    A run that found nothing to repair or to gain gives way to another: nothing was made that could be lost.

    Raises:
        CheckpointError: The folder holds another run and `resume` is off, or it holds something else.
    """
    run = RunFolder(path)
    if run.recipe.exists():
        if not resume and not run.is_verdict:
            raise CheckpointError(
                f"output {path} holds a run already; go on with it: {resume_command(path)}, "
                "or choose another --output"
            )
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"output {path} is not empty and holds no phreg run; choose another --output")


class Sessions(BaseModel):
    """What the sessions of a run add up to, as far as its checkpoint.

    Attributes:
        seconds: Seconds of training.
        skipped: Files that could not be read.
    """

    seconds: float = 0.0
    skipped: frozenset[str] = frozenset()


NONE_YET = Sessions()
"""What a run took before its first session."""


def save_state(
    run: RunFolder,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    facts: Any,
    sessions: Sessions = NONE_YET,
    *,
    write: bool = True,
) -> Path:
    """Writes a checkpoint after `step` optimizer steps, and drops all but the last two.

    Where tensors are sharded, all processes call this together, and one of them writes.

    Args:
        run: The run.
        step: Optimizer steps done.
        tensors: Weights that train, and averages of them.
        optimizer: Its state is kept too.
        facts: What must be the same on resumption, as JSON.
        sessions: What it took so far.
        write: Whether this process writes.
    """
    state = optimizer.state_dict()["state"]
    moments = {f"optimizer.{i}.{key}": value for i, values in state.items() for key, value in values.items()}
    folder = run.path / "state" / f"step-{step:06d}"
    contents: dict[str, Tensor] = {}
    for name, value in {**tensors, **moments}.items():  # one by one: a device need not hold all of them whole
        together = whole(value.detach())
        if write:
            contents[name] = together.cpu().contiguous()
    if not write:
        return folder
    with writing_run(run), replacing(folder) as temporary:
        save_file(contents, temporary / "state.safetensors")
        flush(temporary / "state.safetensors")
        told = {"step": step, "facts": facts, "sha256": weights_sha256(contents)}
        told["sessions"] = sessions.model_dump(mode="json")
        write_text(temporary / "state.json", json.dumps(told))
    for old in run.states[:-KEPT_STATES]:
        shutil.rmtree(old)
    return folder


class StateRecord(BaseModel):
    """What state.json says of a checkpoint."""

    model_config = ConfigDict(strict=True)

    step: NonNegativeInt
    facts: dict[str, Any]
    sha256: str | None = None
    sessions: Sessions = NONE_YET


def past_sessions(run: RunFolder, step: int) -> Sessions:
    """Reads what a run took up to the checkpoint of a step; nothing at step 0, or where 0.1 wrote it."""
    if not step:
        return NONE_YET
    written = run.path / "state" / f"step-{step:06d}" / "state.json"
    return StateRecord.model_validate_json(written.read_bytes()).sessions


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
        with suppress(OSError, SafetensorError, ValueError):
            saved = load_file(folder / "state.safetensors")
            meta = StateRecord.model_validate_json((folder / "state.json").read_bytes())
            if meta.sha256 in (None, weights_sha256(saved)):  # earlier versions wrote none
                break
        logger.warning("checkpoint %s is damaged, so the one before it is taken", folder)
    else:
        return 0
    differing = [name for name in facts if meta.facts.get(name) != facts[name]]
    if differing:
        changes = "; ".join(f"{name} was {meta.facts.get(name)}, is {facts[name]}" for name in differing)
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
            fill(tensor, saved[name])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in moments.items():
        moments[index] = {key: like(value, parameters[index]) for key, value in values.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta.step


def truncate_log(log: Path, steps: int) -> None:
    """Drops what a killed run logged beyond its last checkpoint, and a half-written last line."""
    if not log.exists():
        return
    kept = []
    for line in log.read_bytes().splitlines():
        with suppress(ValueError, LookupError, TypeError):
            if parse_json(line)["step"] <= steps:
                kept.append(line.decode() + "\n")
    with writing_run(RunFolder(log.parent)):
        write_text(log, "".join(kept))


def _check_same(run: RunFolder, config: DistillConfig) -> None:
    source, settings = read_settings(run.recipe, written_by_phreg=True)
    before = flatten(validate(settings, source=source).model_dump(mode="json"))
    now = flatten(config.model_dump(mode="json"))
    changed = [key for key in now if key not in FREE_ON_RESUME and before.get(key) != now[key]]
    if changed:
        lines = "\n".join(f"  {key}: was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        raise CheckpointError(
            f"cannot resume {run.path}: its settings differ from those it was started with\n{lines}\n"
            "use the same settings, or start anew in another --output"
        )
