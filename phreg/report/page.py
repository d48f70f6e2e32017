"""Lays out what was found about models as a report page, and as the pictures that go beside it.

    Inspection, and those it is compared with ──inspection_page──┐
                                                                 ├──► Page ──► report.html
    Comparison, and an Inspection of either side ──comparison_page┘

The maps of all models share their scales, and where models are equally wide, the basis of their colours.
Features averaged over moved views are sides of their own beside the models, for the divider; of one model
alone, for the pointer too.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phreg.analysis.feature_maps import SimilarityCodes, attention_limits, joint_limits, similarity_codes
from phreg.analysis.inspection import Inspection
from phreg.analysis.positions import fixed_share
from phreg.evaluation.before_after import Comparison
from phreg.report import agreement, maps
from phreg.report.canvas import png
from phreg.report.figures import AGREEMENT, by_kind, figures, focus_blocks, relative_error
from phreg.report.html import (
    MAX_SHOWN,
    UNKNOWN,
    Chart,
    ImageCard,
    Line,
    Origin,
    Page,
    Patches,
    Picture,
    Report,
    Section,
)
from phreg.report.verdict import advice, causes, headline, outcome


class InspectionReport(Inspection):
    """What `phreg.inspect` returns: an `Inspection` that shows itself, as a page in a notebook."""

    @classmethod
    def of(cls, inspection: Inspection) -> "InspectionReport":
        """Makes an inspection one that shows itself."""
        return cls(**vars(inspection))

    def report(self) -> Report:
        """Makes the report page."""
        return Report.of(inspection_page(self))

    def __repr__(self) -> str:
        return "\n".join(f"{model.name}: {_verdict(model)}" for model in self.models)

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def inspection_page(inspection: Inspection, origin: Origin = UNKNOWN) -> Page:
    """Builds the page about a model, beside those it is compared with.

    Args:
        inspection: What was found.
        origin: How to make the report again.
    """
    models = inspection.models
    return _page(
        models,
        title=" against ".join(model.name for model in models),
        verdict=" ".join(_of(models, model, _verdict(model)) for model in models),
        measured=f"Measured on {inspection.norms.images} images.",
        lines=_lines(models),
        origin=origin,
    )


def comparison_page(
    title: str,
    comparison: Comparison,
    before: Inspection,
    after: Inspection,
    origin: Origin = UNKNOWN,
    *,
    failures: Sequence[str] = (),
) -> Page:
    """Builds the page about a model before and after.

    Args:
        title: What was patched.
        comparison: Its figures.
        before: What was found about the original.
        after: What was found about the patched model.
        origin: How to make the report again.
        failures: What became worse than its checks allow, in words.
    """
    models = (before, after)
    apart = "not trained on" if comparison.held_out else "that were trained on too"
    figures = [Line(row.name, (row.before, row.after), row.lower_is_better) for row in comparison.rows()]
    return _page(
        models,
        title=title,
        verdict=" ".join([outcome(comparison), *(f"Check failed: {failure}." for failure in failures)]),
        measured=f"Measured on {comparison.images} images {apart}.",
        lines=[*figures, *_lines(models)[1:]],  # the first is the outlier rate again
        origin=origin,
    )


def _page(
    models: Sequence[Inspection],
    *,
    title: str,
    verdict: str,
    measured: str,
    lines: Sequence[Line],
    origin: Origin,
) -> Page:
    count = min(MAX_SHOWN, *(len(model.survey.shown) for model in models))
    averaged = agreement.averaged_features(models, count)
    features = [torch.stack([shown.features for shown in model.survey.shown[:count]]) for model in models]
    features += averaged.values()
    pointed_at = features if len(models) == 1 else features[: len(models)]  # a page of more grows too large
    codes = [[similarity_codes(grid) for grid in side] for side in pointed_at]
    error = max(code.error for side in codes for code in side)
    names = tuple(model.name for model in models)
    return Page(
        title=title,
        verdict=verdict,
        note=f"{measured} Similarities on this page are those of shortened features, and true to within "
        f"{error:.2f}.",
        models=names,
        sides=(*names, *averaged),
        lines=lines,
        layers=_layers(models),
        images=_cards(models, features, codes),
        sections=_sections(models),
        origin=origin,
    )


def _verdict(model: Inspection) -> str:
    """Says whether a model has artifacts, what causes them, and which method it needs."""
    return " ".join(filter(None, (headline(model.norms, model.sinks), advice(model))))


def _of(models: Sequence[Inspection], model: Inspection, said: str) -> str:
    """Says which model a sentence is about, where there are several."""
    return f"{model.name}: {said}" if len(models) > 1 else said


# -- the table -----------------------------------------------------------------------------------------------


def _lines(models: Sequence[Inspection]) -> list[Line]:
    return _table([_figures(model) for model in models], BETTER)


def _table(sides: Sequence[Mapping[str, float | None]], lower_is_better: Mapping[str, bool]) -> list[Line]:
    """The table of some models' figures; a figure that no model has is left out."""
    lines = [Line(name, [side[name] for side in sides], lower_is_better.get(name)) for name in sides[0]]
    return [line for line in lines if any(value is not None for value in line.values)]


OUTLIER_RATE = "outlier rate, last block (share of patch tokens)"

BETTER = {
    OUTLIER_RATE: True,
    "bimodality of log norms, last block": True,
    "largest share of attention on outliers, over blocks": True,
    "distance of the predicted position, ordinary tokens, patches": True,
    "pixels predicted from ordinary tokens, error relative to guessing": True,
    "class predicted from CLS, top-1": False,
}
"""Figures of which lower is better (True) or higher (False); of the others neither is."""


def _figures(model: Inspection) -> dict[str, float | None]:
    """The figures of one model, None where one does not exist."""
    norms, attention, neighbours = model.norms, model.survey.attention, model.survey.neighbours
    block = norms.blocks[norms.focus]
    positions, pixels = by_kind(model.position), by_kind(model.reconstruction)
    distances = {kind: figures.distance for kind, figures in positions.items()}
    errors = {kind: relative_error(figures) for kind, figures in pixels.items()}
    classes = {entry.token: entry.mean for entry in model.classes.tokens} if model.classes else {}
    some = bool(model.survey.outliers.any())
    drawn_to = max(attention.share) if attention and some else None
    alike = neighbours.outliers.mean if neighbours.outliers else None
    return {
        OUTLIER_RATE: model.outlier_rate,
        "block where outliers emerge, from 0": model.emergence_block,
        "median norm of patch tokens": block.median,
        "median norm of outliers": block.outlier_norm,
        "bimodality of log norms, last block": norms.blocks[-1].bimodality,
        "share of outliers at fixed positions": fixed_share(norms.position_histogram) if some else None,
        "largest share of attention on outliers, over blocks": drawn_to,
        "cosine of outliers' patch embeddings to their neighbours'": alike,
        "the same, other patches": neighbours.others.mean,
        "share of outliers on low-information patches": neighbours.outliers_low_information,
        "distance of the predicted position, ordinary tokens, patches": distances.get("ordinary"),
        "distance of the predicted position, outliers, patches": distances.get("outliers"),
        "pixels predicted from ordinary tokens, error relative to guessing": errors.get("ordinary"),
        "pixels predicted from outliers, error relative to guessing": errors.get("outliers"),
        "class predicted from an ordinary token, top-1": classes.get("ordinary patch"),
        "class predicted from an outlier, top-1": classes.get("outlier patch"),
        "class predicted from CLS, top-1": classes.get("CLS"),
        "parameters without registers, millions": model.costs[0].parameters / 1e6 if model.costs else None,
        "GFLOPs per image without registers": model.costs[0].flops / 1e9 if model.costs else None,
    }


# -- the images ----------------------------------------------------------------------------------------------


def _queries(models: Sequence[Inspection]) -> tuple[str, ...]:
    """Who looks, in any of the models."""
    found = [model.survey.attention.queries for model in models if model.survey.attention]
    return tuple(dict.fromkeys(query for queries in found for query in queries))


def _texts(models: Sequence[Inspection]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for model in models for text in model.texts))


def _measured(models: Sequence[Inspection]) -> bool:
    """Whether any model's agreement with its moved views was measured."""
    return any(model.consistency is not None for model in models)


def _layers(models: Sequence[Inspection]) -> dict[str, str]:
    widths = {model.survey.shown[0].features.shape[-1] for model in models}
    averaged = ". Beside them, the same averaged over moved views" if _measured(models) else ""
    basis = "one basis for all models" if len(widths) == 1 else "each model's own basis, aligned to the first"
    return {
        "norms": f"Norm of each patch token after {focus_blocks(models)}, from dark to bright in logarithms; "
        "one scale for all images and models.",
        "features": "Patch features after the last block: three principal components as red, green and "
        f"blue; {basis}{averaged}.",
        "first component": "The first principal component of patch features, from blue to red over three "
        "standard deviations either way.",
        **({agreement.LAYER: agreement.CAPTION} if _measured(models) else {}),
        **{
            f"attention of {query}": f"Where {query} looks in the last block, mean over heads, from dark to "
            "bright; one scale for all images and models."
            for query in _queries(models)
        },
        **{
            f"text: {text}": f"Where patches are like “{text}”; one scale for all images and models."
            for text in _texts(models)
        },
    }


def _cards(
    models: Sequence[Inspection], features: Sequence[Tensor], codes: Sequence[Sequence[SimilarityCodes]]
) -> list[ImageCard]:
    """One card for each image that all models show.

    Args:
        models: The models.
        features: Their features of these images, and then those averaged over views.
        codes: The same, shortened, of all sides that show similarities: the models at least.
    """
    count = len(codes[0])
    layers = {
        "norms": _norm_maps(models, count),
        **_feature_maps(features),
        agreement.LAYER: agreement.agreement_pictures(models, count),
        **{f"attention of {query}": _attention_maps(models, query, count) for query in _queries(models)},
        **{f"text: {text}": _text_maps(models, text, count) for text in _texts(models)},
    }
    # Averaged features have no layers but those of features.
    sides = {name: [*maps, *[None] * (len(features) - len(maps))] for name, maps in layers.items()}
    return [
        ImageCard(
            photo=models[0].photos[index],
            maps={
                name: [pictures[index] if pictures else None for pictures in sides[name]]
                for name in _layers(models)
            },
            patches=[
                *(_patches(model, index, own[index]) for model, own in zip(models, codes, strict=False)),
                *(Patches(own[index].codes.numpy()) for own in codes[len(models) :]),
            ],
        )
        for index in range(count)
    ]


def _norm_maps(models: Sequence[Inspection], count: int) -> list[list[Picture]]:
    norms = [[shown.norms[model.norms.focus] for shown in model.survey.shown[:count]] for model in models]
    low, high = joint_limits(*(grid for side in norms for grid in side))
    return [
        [
            Picture(maps.norm_map(grid, low, high), f"{grid.min():.3g} (dark) to {grid.max():.3g} (bright)")
            for grid in side
        ]
        for side in norms
    ]


def _feature_maps(features: Sequence[Tensor]) -> dict[str, list[list[Picture]]]:
    return {
        "features": [[Picture(pixels) for pixels in side] for side in maps.pca_maps(*features)],
        "first component": [[Picture(pixels) for pixels in side] for side in maps.component_maps(*features)],
    }


def _attention_maps(models: Sequence[Inspection], query: str, count: int) -> list[list[Picture] | None]:
    """Mean over heads; None for a model that has no such query."""
    seen = [_looks(model, query, count) for model in models]
    high = attention_limits(*(grid for side in seen if side for grid in side)).high
    return [[Picture(maps.share_map(grid, high)) for grid in side] if side else None for side in seen]


def _looks(model: Inspection, query: str, count: int) -> list[Tensor] | None:
    attention = model.survey.attention
    if attention is None or query not in attention.queries:
        return None
    index = attention.queries.index(query)
    maps = [shown.attention for shown in model.survey.shown[:count]]
    return [grid[index].mean(dim=0) for grid in maps if grid is not None]


def _text_maps(models: Sequence[Inspection], text: str, count: int) -> list[list[Picture] | None]:
    known = [model.texts[text][:count] if text in model.texts else None for model in models]
    low, high = joint_limits(*(grids for grids in known if grids is not None), trim=0.01)
    return [
        None
        if grids is None
        else [
            Picture(
                maps.text_map(pixels, grid, low, high),
                f"cosine {grid.min():.3f} to {grid.max():.3f}",
                photographic=True,
            )
            for pixels, grid in zip(model.photos, grids, strict=False)
        ]
        for model, grids in zip(models, known, strict=True)
    ]


def _patches(model: Inspection, index: int, short: SimilarityCodes) -> Patches:
    shown = model.survey.shown[index]
    return Patches(
        codes=short.codes.numpy(),
        norms=shown.norms[model.norms.focus].numpy(),
        outliers=model.survey.outliers[index].numpy(),
    )


def _sections(models: Sequence[Inspection]) -> list[Section]:
    found: dict[str, list[Chart]] = {}
    for drawn in figures(models):
        found.setdefault(drawn.section, []).append(
            Chart(png(drawn.figure), drawn.alt, drawn.caption, drawn.name)
        )
    texts = {
        "Sinks": _told(models, [causes(model.sinks) if model.sinks else "" for model in models]),
        AGREEMENT: _told(models, [agreement.agreement_text(model) for model in models]),
    }
    if _measured(models):
        texts[AGREEMENT] += f" {agreement.HOW_TO_READ}"
    lines = {
        AGREEMENT: _table([agreement.agreement_figures(model) for model in models], agreement.LOWER_IS_BETTER)
    }
    if texts[AGREEMENT]:
        found.setdefault(AGREEMENT, [])  # of models that could not be measured there is no chart
    return [
        Section(title, pictures, texts.get(title, ""), lines.get(title, ()))
        for title, pictures in found.items()
    ]


def _told(models: Sequence[Inspection], sentences: Sequence[str]) -> str:
    """Joins what is said of each model, if anything."""
    return " ".join(_of(models, model, said) for model, said in zip(models, sentences, strict=True) if said)
