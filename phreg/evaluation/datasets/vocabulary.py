"""What classes are called in words: names with their synonyms, and words for the background.

phreg's own lists lie in `vocabularies/`, a TOML file a data set: its class names as keys, and for each the
words that are tried. They are our wording; the field's lists differ in detail, and with them the figures. A
data set is known by its class names, so a list serves any layout; one that is not known is called what it
calls itself, synonyms separated by commas.

    classes of a data set ──vocabulary──► words of each ──templates, text tower, mean──► queries (words, dim)
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from phreg.backbones.text import TextEncoder, imagenet_templates
from phreg.data.paths import read_text, walk
from phreg.errors import DataError, PhregError
from phreg.parsing import parse_toml

FOLDER = Path(__file__).with_name("vocabularies")


class Vocabulary(NamedTuple):
    """Words for classes.

    Attributes:
        name: Of the list they come from.
        words: Those of each class.
    """

    name: str
    words: tuple[tuple[str, ...], ...]


class Queries(NamedTuple):
    """Text embeddings that features are compared with.

    Attributes:
        embeddings: Of length 1.
        classes: Class that each stands for.
    """

    embeddings: Float[Tensor, "words dim"]
    classes: Int64[Tensor, " words"]

    def best(self, scores: Float[Tensor, "words ..."]) -> Float[Tensor, "classes ..."]:
        """Takes the best word of each class."""
        count = int(self.classes.max()) + 1
        return torch.stack([scores[self.classes == number].amax(0) for number in range(count)])


def shipped() -> dict[str, dict[str, tuple[str, ...]]]:
    """Reads phreg's own lists, by name."""
    return {path.stem: _read(path) for path in _lists()}


def find_vocabulary(classes: Sequence[str], given: str | None = None) -> Vocabulary:
    """Finds words for the classes of a data set.

    Args:
        classes: Their names in the data set.
        given: A list of phreg's, or a TOML file like them; None means the list that has just these classes,
            or, where there is none, the names themselves.

    Raises:
        DataError: There is no such list, it cannot be read, or lacks classes.
    """
    lists = shipped()
    if given is None:
        name = next((name for name, words in lists.items() if set(words) == set(classes)), None)
        if name is None:
            own = (tuple(part.strip() for part in label.split(",") if part.strip()) for label in classes)
            return Vocabulary("the data set's own", tuple(own))
    else:
        name = given
    words = lists.get(name) or _read(Path(name))
    missing = [label for label in classes if label not in words]
    if missing:
        raise DataError(
            f"words of {name} asked for {len(classes)} classes, {len(missing)} of which it lacks: "
            f"{', '.join(missing[:5])}; add them to a copy of the list, and give its path"
        )
    return Vocabulary(name, tuple(words[label] for label in classes))


def embed_words(
    words: Sequence[str], encode: TextEncoder, templates: Sequence[Callable[[str], str]]
) -> Float[Tensor, "words dim"]:
    """Embeds each word in every template, and averages: each normalised before, and the mean after."""
    texts = [template(word) for word in words for template in templates]
    each = normalize(encode(texts), dim=-1).unflatten(0, (len(words), len(templates)))
    return normalize(each.mean(1), dim=-1)


def embed_vocabulary(
    vocabulary: Vocabulary,
    encode: TextEncoder,
    template: str | None = None,
    synonyms: Literal["max", "mean"] = "max",
) -> Queries:
    """Embeds the words of classes.

    Args:
        vocabulary: The words.
        encode: The text tower.
        template: A sentence with {} for the word; None means open_clip's 80 for ImageNet.
        synonyms: Whether each word is a query of its own, or a class's words are averaged into one.

    Raises:
        PhregError: The template has no place for a word.
    """
    if template is not None and "{}" not in template:
        raise PhregError(f"template {template!r} has no place for the word; write {{}} there")
    templates = imagenet_templates() if template is None else (lambda word: template.replace("{}", word),)
    flat = [word for words in vocabulary.words for word in words]
    embeddings = embed_words(flat, encode, templates)
    counts = torch.tensor([len(words) for words in vocabulary.words])
    classes = torch.arange(len(counts)).repeat_interleave(counts).to(embeddings.device)
    if synonyms == "max":
        return Queries(embeddings, classes)
    means = torch.stack([embeddings[classes == number].mean(0) for number in range(len(counts))])
    return Queries(normalize(means, dim=-1), torch.arange(len(counts), device=embeddings.device))


def _lists() -> list[Path]:
    return [path for path in map(Path, walk(os.fspath(FOLDER))) if path.suffix == ".toml"]


def _read(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    known = ", ".join(file.stem for file in _lists())
    try:
        table = parse_toml(read_text(Path(path)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read a list of words from {path}: {error}; give one of {known}, or a TOML file of lines "
            'class = ["word", "synonym"]'
        ) from error
    broken = [
        label
        for label, words in table.items()
        if not (isinstance(words, list) and words and all(isinstance(word, str) and word for word in words))
    ]
    if broken:
        raise DataError(
            f"{path} has no list of words for {', '.join(broken[:5])}; write lines "
            'class = ["word", "synonym"]'
        )
    return {label: tuple(words) for label, words in table.items()}
