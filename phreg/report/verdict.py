"""Puts a report into one sentence."""

from collections.abc import Iterator

from phreg.analysis.advice import recommend
from phreg.analysis.consistency import CERTAIN, WORTHWHILE, ConsistencyReport
from phreg.analysis.inspection import Inspection
from phreg.analysis.norms import BlockNorms, NormReport
from phreg.analysis.positions import describe_positions
from phreg.evaluation.before_after import Comparison
from phreg.sinks.locate import Population, Sinks


def verdict(report: NormReport) -> str:
    """Says in a sentence whether a model has artifacts: how many, how strong, since which block, where."""
    found, last = report.blocks[report.focus], report.blocks[-1]
    if found.outlier_norm is None:
        return _after_norm_only(report.normed[-1])
    strength = _strength(found.outlier_norm, found.median)
    traits = (
        f"{strength}, from block {report.emergence_block} on (of 0 to {last.block}), "
        f"mostly {describe_positions(report.position_histogram)}"
    )
    if found is last:
        return f"{percent(found.outlier_rate)} of patch tokens are artifacts: {traits}."
    share = f"in block {found.block}, {percent(found.outlier_rate)} of patch tokens are"
    return f"No artifacts in the last block, but inside the model: {share}, {traits}."


def headline(report: NormReport, sinks: Sinks | None) -> str:
    """Says in one sentence whether a model has artifacts, and what causes them."""
    if sinks is None:
        return verdict(report)
    count = len(sinks.units)
    units = "1 hidden unit causes" if count == 1 else f"{count} hidden units cause"
    cause = f"{units} {percent(sinks.explained)} of them" if count else "no hidden unit explains them"
    return f"{verdict(report).removesuffix('.')}; {cause}."


def advice(found: Inspection) -> str:
    """Says which method a model needs, or that none has anything to gain, with the figures.

    Nothing is said of a model without sinks whose agreement with moved views nobody measured.
    """
    method = recommend(found.norms, found.sinks, found.consistency)
    said = []
    if method == "relocate":
        said.append("Sinks can be moved into registers: --method relocate.")
    if found.not_moved:
        said.append(f"Agreement with moved views was not measured: {found.not_moved}.")
    if found.consistency is not None:
        by = " by --method denoise" if method == "denoise" else ""
        said.append(f"{_agreement(found.consistency)}: {_gain(found.consistency)}{by}.")
    return " ".join(said)


def disagreement(found: ConsistencyReport) -> str:
    """Says in a sentence or two how far disagreement with moved views is fixed to the frame, and how sure."""
    images = len(found.maps)
    measured = f"Measured on {images} image{'s' * (images > 1)}, in {found.views} moved views of each."
    if images == 1:
        return f"{measured} Spread, and what is fixed to the frame, take several images to tell."
    fixed, by_chance = percent(found.frame_fixed), percent(found.frame_fixed_by_chance)
    return (
        f"{measured} {fixed} of the disagreement is the same in all images, and so fixed to the frame; of "
        f"images that have nothing in common it would be {by_chance}."
    )


def nothing_to_repair(report: NormReport, moved: ConsistencyReport | None = None) -> str:
    """Says why a model was returned unchanged, and how to train it anyway.

    Args:
        report: Its norms.
        moved: How it agrees with its moved views, if that was asked.
    """
    hidden = report.normed[-1].gap is not None
    asked, forced = ("relocate", " without relocation") if hidden else ("repair", "")
    agreement = f" {_agreement(moved)}: {_gain(moved)}." if moved else ""
    return (
        f"Nothing to {asked}. {verdict(report)}{agreement} The model is returned unchanged; --force distils "
        f"it{forced}."
    )


def nothing_gained(steps: int) -> str:
    """Says why a model was returned unchanged after training."""
    return (
        f"Nothing gained. In {steps} steps no state agreed better with the held-out images' references than "
        "the original does. The model is returned unchanged."
    )


def outcome(comparison: Comparison) -> str:
    """Says in a sentence what a retrofit changed: artifacts, agreement with the reference, global output."""
    rates = [percent(most.outlier_rate) for most in comparison.most_outliers]
    before, after = comparison.agreement
    return (
        f"Artifacts went from {rates[0]} to {rates[1]} of patch tokens, in the block with most; "
        f"agreement with {comparison.reference} from {before.mean:.3f} to {after.mean:.3f}; "
        f"the global output keeps a cosine of {comparison.drift.mean:.3f} to the original's."
    )


def causes(sinks: Sinks) -> str:
    """Says where a model's sinks emerge, what causes them, and what becomes of them, in a few sentences."""
    said = [_units(sinks)]
    if sinks.attention is not None:
        who = "CLS" if any(token.name == "CLS" for token in sinks.norms.tokens) else "the patches"
        said.append(f"They attract up to {percent(max(sinks.attention))} of the attention of {who}.")
    if sinks.populations:
        largest, *others = sorted(sinks.populations, key=lambda each: -each.rate)
        said += [*_kind(largest)]
        said += [
            f"Other sinks, {percent(each.rate)} of patches, emerge in block {each.block}." for each in others
        ]
    return " ".join(said)


def _units(sinks: Sinks) -> str:
    where = f"Sinks emerge in block {sinks.block}, triggered by {'position' if sinks.fixed else 'content'}"
    if not sinks.units:
        return f"{where}; no hidden unit explains them."
    named = ", ".join(f"{unit.block}:{unit.index}" for unit in sinks.units[:4])
    more = f" and {len(sinks.units) - 4} more" if len(sinks.units) > 4 else ""
    noun = "hidden unit causes" if len(sinks.units) == 1 else "hidden units cause"
    clusters = f", {len(sinks.triggers)} clusters of sinks" if len(sinks.triggers) > 1 else ""
    return (
        f"{where}; {len(sinks.units)} {noun} {percent(sinks.explained)} of them "
        f"(block:unit {named}{more}{clusters})."
    )


def _kind(population: Population) -> Iterator[str]:
    """Says what writes a population, and what attention does with it."""
    kind = population.kind
    if kind.mlp is not None and kind.attention is not None and kind.input is not None:
        yield (
            f"Of what they hold after block {population.block}, its MLP wrote {_whole(kind.mlp)}, its "
            f"attention {_whole(kind.attention)}, and earlier blocks {_whole(kind.input)}."
        )
    if kind.role in ("parked", "read") and kind.looked_at is not None:
        parked = "next to nothing there: attention is parked"
        reads = parked if kind.role == "parked" else "what they hold"
        looks = f"One head of a later block looks there with {percent(kind.looked_at)} of its attention"
        yield f"{looks}, and reads {reads}."


def _whole(share: float) -> str:
    """Writes a share of what adds up to 1, parts of which may be negative, as whole per cent."""
    return f"{round(100 * share) + 0} %"


def percent(share: float) -> str:
    """Writes a share as per cent, small ones with the digits they need."""
    return f"{100 * share:.1f} %" if share >= 0.01 or not share else f"{100 * share:.2g} %"


def _agreement(found: ConsistencyReport) -> str:
    return (
        f"Patch features agree to {found.mean:.3f} with the model's own moved views; averages over views "
        f"agree to {found.floor:.3f}"
    )


def _gain(found: ConsistencyReport) -> str:
    """Says how much there is to gain; both ends of the comparison that decides it are among the figures."""
    error = found.headroom_error
    figure = f"{found.headroom:.3f}" + ("" if error is None else f" ± {error:.3f}")
    if found.worthwhile:
        return f"up to {figure} to gain"
    if found.headroom < WORTHWHILE:
        return f"nothing to gain ({figure}, below {WORTHWHILE:g})"
    return f"nothing sure to gain ({figure}, less than {CERTAIN:g} standard errors)"


def _after_norm_only(block: BlockNorms) -> str:
    if block.outlier_norm is None:
        return "No sinks found: the norms of patch tokens show no gap in any block."
    return (
        f"{percent(block.outlier_rate)} of patch tokens stand apart, but only after the final norm: "
        f"{_strength(block.outlier_norm, block.median)}; before it, norms show no gap in any block."
    )


def _strength(outlier_norm: float, median: float) -> str:
    """Compares the norm of outliers with that of all tokens; outliers are too few to move its median."""
    times = outlier_norm / max(median, 1e-12)
    return (
        f"their norm is {times:.0f}x the median"
        if times >= 9.95
        else f"their norm is {times:.1f}x the median"
    )
