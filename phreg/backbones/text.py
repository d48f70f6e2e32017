"""Text towers: texts in, embeddings in the space that a CLIP-type model shares with images out.

    texts ──tokenizer──► tokens ──text tower──► embeddings (texts, dim), not normalised

The tokenizer is the one that came with the model: in its folder, in its repository on the hub (fetched when
it is first needed), or, for open_clip's own text towers, inside open_clip. Registers never get here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.errors import LoadError, PhregError

Tokenizer = Callable[[list[str]], Any]
"""Makes of texts what the model's text tower takes: ids, or in transformers a mapping of its arguments."""

TextEncoder = Callable[[Sequence[str]], Float[Tensor, "texts dim"]]

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "special_tokens_map.json")
"""What is fetched from the hub beside config and weights."""

AT_ONCE = 256
"""Texts that are encoded at a time."""


def text_encoder(backbone: Backbone, tokenizer: Tokenizer | None = None) -> TextEncoder:
    """Gives what turns texts into embeddings, on the model's device, in fp32.

    Args:
        backbone: A whole open_clip or transformers model, its text tower included.
        tokenizer: Replaces the model's own.

    Raises:
        LoadError: The tokenizer cannot be found.
        PhregError: The model has no text tower.
    """
    model: Any = backbone.model
    if backbone.spec.library == "open_clip" and hasattr(model, "encode_text"):
        tokenize = tokenizer or _open_clip_tokenizer(backbone)

        def encode(texts: list[str]) -> Tensor:
            return model.encode_text(tokenize(texts).to(backbone.device))
    elif backbone.spec.library == "transformers" and hasattr(model, "get_text_features"):
        tokenize = tokenizer or _transformers_tokenizer(backbone)

        def encode(texts: list[str]) -> Tensor:
            tokens = {name: part.to(backbone.device) for name, part in tokenize(texts).items()}
            return model.get_text_features(**tokens, return_dict=True).pooler_output
    else:
        raise PhregError(
            f"texts asked of {backbone.describe()}, which has no text tower; give a whole image-text model, "
            "such as an open_clip CLIP or a transformers CLIPModel, SiglipModel or Siglip2Model"
        )

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        parts = [encode(list(texts[start : start + AT_ONCE])) for start in range(0, len(texts), AT_ONCE)]
        return torch.cat(parts).float()

    return embed


def imagenet_templates() -> tuple[Callable[[str], str], ...]:
    """Takes the 80 prompts that CLIP was evaluated with on ImageNet from the installed open_clip."""
    import open_clip

    return tuple(open_clip.OPENAI_IMAGENET_TEMPLATES)


def imagenet_names() -> tuple[str, ...]:
    """Takes the names of ImageNet's 1000 classes, in their order, from the installed open_clip."""
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


def _open_clip_tokenizer(backbone: Backbone) -> Tokenizer:
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    origin: str | None = getattr(backbone, "origin", None)
    model: Any = backbone.model
    if origin is not None:
        scheme, _, folder = origin.partition(":")
        try:
            if scheme == "local-dir":
                _fetch(Path(folder))
            return open_clip.get_tokenizer(origin)
        except (OSError, ValueError, RecursionError) as error:
            raise _missing(backbone, error) from error
    tokenizer = SimpleTokenizer(context_length=model.context_length)
    if getattr(model, "vocab_size", None) != tokenizer.vocab_size:
        raise LoadError(
            f"texts asked of an instance of {backbone.describe()}, which does not say what its tokenizer is; "
            "give the model by name or folder"
        )
    return tokenizer


def _transformers_tokenizer(backbone: Backbone) -> Tokenizer:
    from transformers import AutoTokenizer

    config: Any = backbone.model.config
    if not config.name_or_path:
        raise LoadError(
            f"texts asked of an instance of {backbone.describe()}, which does not say where its tokenizer "
            "is; give the model by name or folder, or make it by from_pretrained"
        )
    try:
        if Path(config.name_or_path).is_dir():
            _fetch(Path(config.name_or_path))
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
    except (OSError, ValueError, RecursionError) as error:
        raise _missing(backbone, error) from error
    siglip = backbone.spec.family.startswith("siglip")

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        # SigLIP learned lower-case texts, padded to full length, the padding not masked.
        tokens = tokenizer(
            [text.lower() for text in texts] if siglip else texts,
            padding="max_length",
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        return {name: tokens[name] for name in names}

    return tokenize


def _fetch(folder: Path) -> None:
    """Fetches the tokenizer of a folder in the hub's cache, which so far holds config and weights."""
    if folder.parent.name == "snapshots":
        from phreg.backbones import hub

        repository = folder.parents[1].name.removeprefix("models--").replace("--", "/", 1)
        # A config along with them, because the client warns about patterns that match nothing.
        hub.snapshot(repository, folder.name, ["*config.json", *TOKENIZER_FILES])


def _missing(backbone: Backbone, error: Exception) -> LoadError:
    found = " ".join(str(error).split())
    return LoadError(
        f"the tokenizer of {backbone.describe()} asked for, and found none ({found[:200]}); copy the "
        "tokenizer's files into the model's folder"
    )
