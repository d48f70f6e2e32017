"""The model card of an adapter or an export: what it is, what it was made from, and what was measured.

Everything in it is read from what phreg.json or phreg_export.json says; the front matter is what the Hugging
Face hub reads. A card is written when a run ends, and written anew, knowing more, when it is pushed.

    record ──┬── front matter: base_model, library_name, pipeline_tag, license, tags
             └── use, origin, method, data, before/after, pictures, equality, versions, citation
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from phreg.evaluation.before_after import table
from phreg.formats.export.spec import FormatSpec, find_spec
from phreg.record import Equality, RunRecord
from phreg.run_summary import RunSummary

CITATION = """```bibtex
@inproceedings{chen2025phreg,
  title         = {Vision Transformers with Self-Distilled Registers},
  author        = {Chen, Yinjie and Yan, Zipeng and Zhou, Chong and Dai, Bo and Luo, Andrew F.},
  booktitle     = {Advances in Neural Information Processing Systems},
  year          = {2025},
  eprint        = {2505.21501},
  archivePrefix = {arXiv}
}
@inproceedings{darcet2024registers,
  title         = {Vision Transformers Need Registers},
  author        = {Darcet, Timoth{\\'e}e and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr},
  booktitle     = {International Conference on Learning Representations},
  year          = {2024},
  eprint        = {2309.16588},
  archivePrefix = {arXiv}
}
```"""

SETTINGS = (
    "method",
    "registers",
    "register_init",
    "optim.name",
    "optim.lr",
    "optim.schedule",
    "unlock.roles",
    "views.count",
    "views.max_shift",
    "target.teacher_readout",
    "target.student_readout",
    "loss.pooled",
    "loss.relocation",
    "seed",
)
"""Settings that a card tells, as far as the run has them."""

JOINT = ("CLIPModel", "SiglipModel", "Siglip2Model", "MetaClip2Model", "Aimv2Model", "CLIP", "CustomTextCLIP")
"""Classes of image-text models."""


@dataclass(frozen=True)
class License:
    """A licence as the hub's front matter has it.

    Attributes:
        identifier: Such as `apache-2.0`, or `other`, `unknown`.
        name: Name of an `other` licence.
        link: Where its text is.
    """

    identifier: str = "unknown"
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Illustration:
    """A picture beside the card.

    Attributes:
        path: Its file, relative to the card.
        alt: What there is to see.
    """

    path: Path
    alt: str


def model_card(
    record: RunRecord,
    *,
    repository: str | None = None,
    license: License | None = None,
    pictures: Sequence[Illustration] = (),
) -> str:
    """Writes a model card in Markdown.

    Args:
        record: What phreg.json or phreg_export.json says.
        repository: Hub id that it is pushed to; None where it stays here.
        license: The base's licence; None where nobody looked, and the card then claims nothing.
        pictures: Pictures of the run's report.
    """
    name, spec = _name(record), find_spec(record.format)
    sections = [
        _front_matter(record, spec, license),
        f"# {name} with {record.registers} registers",
        f"`{name}` with {record.registers} register tokens, retrofitted by self-distillation: tokens that "
        "take over the artifacts which a large vision transformer otherwise writes over its patches.",
        *_use(spec, repository or "path/of/this/folder", name),
        *_origin(record, name, license),
        *_method(record.run or RunSummary()),
        *_results(record, pictures),
        *_equality(record.equality),
        "## Versions",
        ", ".join(f"{package} {number}" for package, number in record.versions.items()) + ".",
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(sections) + "\n"


def figure(value: float | None) -> str:
    """Writes a figure with four digits after the point; a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def _front_matter(record: RunRecord, spec: FormatSpec, license: License | None) -> str:
    task = "image-feature-extraction"
    if "ForImageClassification" in record.model_class:
        task = "image-classification"
    elif record.model_class in JOINT:
        task = "zero-shot-image-classification"
    base = record.base if record.base and record.base.revision is not None else None
    images = record.run.setting("images") if record.run else None
    data = ModelCardData(
        base_model=base.source.removeprefix("hf-hub:") if base else None,
        base_model_relation=("adapter" if spec.needs_base else "finetune") if base else None,
        library_name=spec.card.library,
        pipeline_tag=task,
        license=license.identifier if license else None,
        license_name=license.name if license else None,
        license_link=license.link if license else None,
        datasets=images if _is_dataset(images) else None,
        tags=["phreg", "registers", "vision-transformer"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _use(spec: FormatSpec, place: str, name: str) -> Iterator[str]:
    yield "## Use"
    card = spec.card
    if card.code:
        yield f"Without phreg, in {card.library} as it is:"
        yield f"```python\n{card.code.format(repository=place)}\n```"
    if card.note:
        yield card.note
    if spec.open is None:
        return
    if card.code:
        yield "With phreg:"
    yield f'```python\nimport phreg\n\nmodel = phreg.load("{place}")\n```'
    if card.into:
        yield card.into.format(place=place, base=name)


def _origin(record: RunRecord, name: str, license: License | None) -> Iterator[str]:
    yield "## Origin and licence"
    base = record.base
    at = f", revision `{base.revision}`" if base and base.revision else ""
    weights = f", weights sha256 `{base.sha256}`" if base and base.sha256 else ""
    yield f"Made from `{name}` ({record.model_class}{at}{weights})."
    if license is None:
        yield "The licence is that of the base model."
    elif license.identifier == "unknown":
        yield "The licence of the base model is **unknown** here; look it up before use, for it applies."
    else:
        words = license.name or license.identifier
        words = f"[{words}]({license.link})" if license.link else f"`{words}`"
        yield f"The licence of the base model, {words}, is kept."


def _pixels(size: int | Sequence[int]) -> str:
    """Writes an image size: one number for a square, or height and width."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _method(run: RunSummary) -> Iterator[str]:
    yield "## How it was made"
    method, batch_size, images = (run.setting(key) for key in ("method", "batch_size", "images"))
    if run.outcome is None or not run.sizes or None in (method, batch_size, images):
        yield "By [phreg](https://arxiv.org/abs/2505.21501); the record of the run is not at hand."
        return
    yield (
        f"By [phreg](https://arxiv.org/abs/2505.21501), method `{method}`: {run.outcome.steps} "
        f"steps of {batch_size} images per process at {' or '.join(map(_pixels, run.sizes))} pixels; "
        f"{run.outcome.trained:,} weights trained."
    )
    found = {key: run.setting(key) for key in SETTINGS}
    rows = [f"| {key} | {_listed(value)} |" for key, value in found.items() if value is not None]
    yield "\n".join(["| setting | value |", "| --- | --- |", *rows])
    yield "## Data"
    where = f"the dataset `{images}`" if _is_dataset(images) else "images of its maker"
    skipped = len(run.outcome.skipped)
    yield f"No labels. Trained on {where}" + (f"; {skipped} unreadable images skipped." if skipped else ".")


def _results(record: RunRecord, pictures: Sequence[Illustration]) -> Iterator[str]:
    yield "## Before and after"
    figures = record.run.figures if record.run else None
    if figures:
        rows = [
            f"| {row.name} | {figure(row.before)} | {figure(row.after)} |"
            for row in table(figures.model_dump())
        ]
        yield "\n".join(["| figure | before | after |", "| --- | --- | --- |", *rows])
        apart = "not trained on" if figures.held_out else "that were trained on too"
        yield f"On {figures.images} images {apart}."
    else:
        yield "Not measured."
    if record.failures:
        yield f"**Failed its checks:** {'; '.join(record.failures)}."
    run = record.run_or_readout
    if run is not None and run.readout != "plain":
        yield (
            f"Its dense features are meant to be read through the last block's {run.readout} read-out; "
            "the model's ordinary pooled output was not trained, and the table says how far it drifted."
        )
    if pictures:
        yield "\n".join(f"![{picture.alt}]({picture.path.as_posix()})" for picture in pictures)


def _equality(sizes: Sequence[Equality]) -> Iterator[str]:
    if not sizes:
        return
    yield "## Equality to the trained model"
    rows = [
        f"| {_pixels(size.size)} | {size.relative:.1e} | "
        f"{'yes' if size.claimed else 'no: differs at this size'} |"
        for size in sizes
    ]
    yield "\n".join(["| pixels | largest relative difference | equal |", "| --- | --- | --- |", *rows])


def _name(record: RunRecord) -> str:
    """Names a base as others know it: without the path that it has on its maker's disk."""
    if record.base is None:
        return record.model_class
    source = record.base.source.removeprefix("hf-hub:")
    return Path(source).name if Path(source).is_absolute() else source


def _is_dataset(images: str | None) -> bool:
    """Tells a Hugging Face dataset from a folder, a list of paths or shards."""
    if images is None or images.count("/") != 1 or images.startswith(("/", ".", "~")):
        return False
    return not images.endswith((".txt", ".tar", "/")) and not Path(images).exists()


def _listed(value: object) -> str:
    """Writes a setting, the parts of a list one after another."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
