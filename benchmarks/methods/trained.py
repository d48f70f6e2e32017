"""Runs of the methods, kept, so that each is trained once and measured by several benchmarks.

model, settings, seed ──phreg.distill──► FOLDER/method-seed-hash/ ──► facts.json, and what to open
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import result_file

import phreg
from phreg.errors import PhregError
from phreg.methods import resolve
from phreg.training.checkpoint import write_text

FOLDER = Path(__file__).parent / "results" / ".models"
"""Where runs are kept. Delete it when phreg changes: it is named by settings, not by code."""


def distilled(
    model: Any,
    settings: dict[str, Any],
    training: Sequence[Path],
    run: Path,
    limit: int = measuring.TRAINING,
) -> result_file.Row:
    """Distils a model on images drawn with the seed of its settings.

    Args:
        model: Anything that `phreg.distill` takes; an instance is patched in place.
        settings: Settings of `phreg.distill`, by dotted key, with seed.
        training: All images that may be trained on.
        run: Run folder to write.
        limit: How many of them are drawn.

    Returns:
        What it cost, the sinks that were found, and the verdict where the model was left as it was; or why it
        was refused.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    images = measuring.training_list(training, settings["seed"], run.parent / f"{run.name}-images.txt", limit)
    if not resolve(overrides=settings).measure.keep_best:
        settings = {"measure.images": 0} | settings  # nothing but the run's own table would look at them
    with measuring.metering() as cost:
        try:
            result = phreg.distill(model, images, run, resume=(run / "recipe.toml").is_file(), **settings)
        except PhregError as error:
            return {"refused": str(error)}
    cost["steps"] = result.outcome.steps if result.outcome else 0
    row: result_file.Row = {"cost": cost}
    if result.sinks is not None:
        row["sinks"] = {
            "block": result.sinks.block,
            "units": len(result.sinks.units),
            "explained": result.sinks.explained,
        }
    return row | {"verdict": "left as it was"} if result.unchanged else row


def trained(
    name: str,
    source: str,
    settings: dict[str, Any],
    training: Sequence[Path],
    folder: Path = FOLDER,
    limit: int = measuring.TRAINING,
) -> tuple[str, result_file.Row]:
    """Finds the run of a method, or distils it where it is not there yet.

    Args:
        name: The method's name.
        source: The model: a name or a folder.
        settings: As `distilled` takes them, with the size of the images.
        training: As there.
        folder: Where runs are kept.
        limit: As there.

    Returns:
        What to open: the run, or the model where that was left as it was. And what `distilled` returns.
    """
    asked = json.dumps([str(source), settings, [path.name for path in training], limit], sort_keys=True)
    run = folder / f"{name}-{settings['seed']}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    facts = run / "facts.json"
    if not facts.is_file():
        found = distilled(source, settings, training, run, limit)
        if "refused" in found:
            return source, found
        write_text(facts, json.dumps(found))
    row = json.loads(facts.read_text())
    return (source if "verdict" in row else str(run)), row
