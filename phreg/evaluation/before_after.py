"""The before/after table: what a retrofit changed, on images it was not trained on.

Before is the original model, after the patched one. The reference that agreement is measured against is the
original averaged over many views or, for the demonstration model, the known truth.

    original ──survey──► outlier rate, where the outliers are, pooled output ──┐
        └──many views──► reference ──► agreement of both                       ├──► drift
    patched ──survey──► outlier rate, pooled output ───────────────────────────┘
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from phreg import demo
from phreg.analysis.norms import BlockNorms, NormReport
from phreg.analysis.survey import Survey, survey
from phreg.backbones.base import Backbone
from phreg.backbones.readout import set_readout, use_readout
from phreg.backbones.resolve import Base
from phreg.config import ChecksConfig, DistillConfig, TargetConfig
from phreg.data.crops import center_crop
from phreg.evaluation.metrics.agreement import Agreement, AgreementMeter, Drift, drift
from phreg.processes import in_shares
from phreg.progress import track
from phreg.seeding import keyed_generator
from phreg.short_table import ShortTable, shown_as_table
from phreg.teacher import Teacher
from phreg.view_sampling import count_different

# Nothing is bound by these shapes: the last batch may be smaller than the others.
Images = Float[Tensor, "_ 3 _ _"]
Grids = Float[Tensor, "_ _ _ _"]


class Row(NamedTuple):
    """One line of the before/after table; None where a figure does not exist."""

    name: str
    before: float | None
    after: float | None
    lower_is_better: bool
    unit: Literal["share", "cosine"] = "cosine"

    @property
    def texts(self) -> tuple[str, str]:
        """Both sides for a table: shares in per cent, a figure that does not exist as a dash."""
        before, after = (_text(value, self.unit) for value in (self.before, self.after))
        return before, after


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.3f} %" if unit == "share" else f"{value:.4f}"


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images that a run is measured on, a batch each, and what their patch features are measured against.

    Attributes:
        images: Normalised images.
        references: Reference of their patch features.
        described: What the reference is, in a few words.
    """

    images: Sequence[Images]
    references: Sequence[Grids]
    described: str


@shown_as_table
@dataclass(frozen=True, eq=False)
class Comparison:
    """A model before and after.

    Attributes:
        images: Images measured on.
        held_out: Whether none of them was trained on.
        reference: What agreement is measured against, in words.
        surveys: What one look at either model tells, before and after, plainly read.
        agreement: Cosine to the reference, before and after; masked: where the original had outliers.
        drift: Cosine of the patched model's pooled output to the original's.
        shown: Dense features of the first few images, before and after, read as they were distilled.
    """

    images: int
    held_out: bool
    reference: str
    surveys: tuple[Survey, Survey]
    agreement: tuple[Agreement, Agreement]
    drift: Drift
    shown: tuple[Grids, Grids]

    @property
    def norms(self) -> tuple[NormReport, NormReport]:
        """Norms of patch tokens, before and after."""
        before, after = self.surveys
        return before.norms, after.norms

    @property
    def most_outliers(self) -> tuple[BlockNorms, BlockNorms]:
        """The block with the largest outlier rate, before and after."""
        before, after = (max(side.blocks, key=lambda block: block.outlier_rate) for side in self.norms)
        return before, after

    def rows(self) -> list[Row]:
        """The table."""
        return table(self.to_json())

    def short_table(self) -> ShortTable:
        """What `print` and a notebook show: the table."""
        apart = "not trained on" if self.held_out else "that were trained on too"
        rows = [(row.name, *row.texts) for row in self.rows()]
        return ShortTable(f"on {self.images} images {apart}", rows, ("figure", "before", "after"))

    def to_json(self) -> dict[str, Any]:
        """The figures, without maps."""
        return {
            "images": self.images,
            "held_out": self.held_out,
            "reference": self.reference,
            "outlier_rate": [report.outlier_rate for report in self.norms],
            "outlier_rate_by_block": [[block.outlier_rate for block in side.blocks] for side in self.norms],
            "emergence_block": [report.emergence_block for report in self.norms],
            "agreement": [asdict(side) for side in self.agreement],
            "drift": asdict(self.drift),
        }


def table(figures: Mapping[str, Any]) -> list[Row]:
    """Lays out the figures that `Comparison.to_json` gave, before and after.

    Those of earlier versions know no block but the last.
    """
    rates, (before, after), drift = (figures[name] for name in ("outlier_rate", "agreement", "drift"))
    masked = "the same, where the original had outliers"
    by_block = figures.get("outlier_rate_by_block")
    most = "the same, in the block with most"
    return [
        Row("outlier rate (share of patch tokens)", *rates, lower_is_better=True, unit="share"),
        *([Row(most, *map(max, by_block), lower_is_better=True, unit="share")] if by_block else []),
        Row(f"cosine to {figures['reference']}, mean", before["mean"], after["mean"], lower_is_better=False),
        Row(
            "the same, worst 1 % of patches",
            before["worst_percent"],
            after["worst_percent"],
            lower_is_better=False,
        ),
        Row(masked, before["masked"], after["masked"], lower_is_better=False),
        Row("pooled output, cosine to the original's, mean", 1.0, drift["mean"], lower_is_better=False),
        Row("the same, worst image", 1.0, drift["min"], lower_is_better=False),
    ]


@torch.no_grad()
def compare(
    original: Backbone,
    patched: Backbone,
    measured: HeldOut,
    target: TargetConfig,
    *,
    held_out: bool,
    show: int = 8,
) -> Comparison:
    """Measures a patched model against its original.

    Both models are left plainly read.

    Args:
        original: The model as it was.
        patched: The model with registers.
        measured: Images on the models' device, and their references.
        target: Which block and read-outs were distilled; agreement is measured on those.
        held_out: Whether none of the images was trained on.
        show: Images whose features and maps are kept.
    """
    sides, batches = (original, patched), measured.images
    for side in sides:
        set_readout(side, "plain")
    before = survey(original, track("surveying the original", batches), show=show)
    student = track("surveying the student", batches)
    surveys = before, survey(patched, student, show=show, original=before.norms)
    were_outliers = before.outliers.split([len(images) for images in batches])

    set_readout(original, target.teacher_readout)
    set_readout(patched, target.student_readout)
    meters = AgreementMeter(), AgreementMeter()
    shown: tuple[list[Tensor], list[Tensor]] = ([], [])
    compared = track("comparing both", batches)
    for images, truth, mask in zip(compared, measured.references, were_outliers, strict=True):
        features = [side(images, target.layer, target.norm).patches.float() for side in sides]
        for meter, grids, grid in zip(meters, shown, features, strict=True):
            meter.update(grid, truth, mask.to(grid.device))
            grids.append(grid.cpu() if sum(map(len, grids)) < show else grid[:0].cpu())
    for side in sides:
        set_readout(side, "plain")
    return Comparison(
        images=sum(map(len, batches)),
        held_out=held_out,
        reference=measured.described,
        surveys=surveys,
        agreement=(meters[0].compute(), meters[1].compute()),
        drift=drift(surveys[1].pooled, surveys[0].pooled),
        shown=(torch.cat(shown[0])[:show], torch.cat(shown[1])[:show]),
    )


def make_references(
    original: Backbone,
    batches: Sequence[Images],
    margin: tuple[int, int],
    config: DistillConfig,
    base: Base,
) -> HeldOut:
    """Makes what a run is measured against: the original averaged over many views of each image.

    Each process makes a share of the references, and all get all of them.
    Of the demonstration model the truth is known, and takes the place of that average.

    Args:
        original: The model as it was, on its device.
        batches: Normalised images with the context that views show.
        margin: Rows and columns of that context, in pixels on each side.
        config: The run's settings.
        base: What the model is.
    """
    images = [center_crop(whole, margin) for whole in batches]
    if base.source == "demo":
        return HeldOut(images, [demo.truth(batch) for batch in images], "the known truth")
    grid = original.layout(images[0]).grid
    count = min(config.measure.views, count_different(config.views, grid) or config.measure.views)
    many = config.views.model_copy(update={"count": count, "sampler": "uniform"})
    teacher = Teacher(original, many, config.target)

    def average(number: int) -> Tensor:
        return teacher(batches[number], keyed_generator("reference", config.seed, number), margin).patches

    with use_readout(original, config.target.teacher_readout):
        references = in_shares(len(batches), average, "averaging over views")
    return HeldOut(images, references, f"the original averaged over {count} views")


def failed_checks(comparison: Comparison, checks: ChecksConfig) -> list[str]:
    """Says in words what became worse than the checks allow; a figure that is NaN is worse than any.

    Outliers are judged in the last block, and in the block with most: they can rise inside the model alone.
    """
    rates = [report.outlier_rate for report in comparison.norms]
    most = comparison.most_outliers
    before, after = comparison.agreement
    risen = f"by more than checks.outlier_rate = {checks.outlier_rate:g}"
    last_holds = rates[1] <= rates[0] + checks.outlier_rate
    judged = [
        (not last_holds, f"the outlier rate rose from {rates[0]:.4f} to {rates[1]:.4f}, {risen}"),
        (
            last_holds and not most[1].outlier_rate <= most[0].outlier_rate + checks.outlier_rate,
            f"the outlier rate inside the model rose from {most[0].outlier_rate:.4f} at most (block "
            f"{most[0].block}) to {most[1].outlier_rate:.4f} (block {most[1].block}), {risen}",
        ),
        (
            not after.mean >= before.mean - checks.agreement,
            f"agreement with {comparison.reference} fell from {before.mean:.4f} to {after.mean:.4f}, by more "
            f"than checks.agreement = {checks.agreement:g}",
        ),
        (
            not comparison.drift.mean >= checks.drift,
            f"the pooled output drifted to a cosine of {comparison.drift.mean:.4f} to the original's, below "
            f"checks.drift = {checks.drift:g}: what reads it (a classifier, zero-shot text) will suffer",
        ),
    ]
    return [message for failed, message in judged if failed]
