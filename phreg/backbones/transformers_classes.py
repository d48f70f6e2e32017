"""A patched transformers model as another class of its family: with another head, or with none.

This is what `from_pretrained` of that class does with a folder of the unpatched model, and it is done by it:
weights of the same name are taken over, a new head starts afresh, and transformers reports both. Registers
and repaired weights come along.

    patched model ─► tower, parts around it ──named as in the class──► from_pretrained ──registers──► model
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phreg.backbones.base import NORMALISATION, TRAINED_READOUT
from phreg.backbones.transformers import LOAD_FAILURES, TransformersBackbone, adapt, constructor_arguments
from phreg.backbones.transformers_registers import disk_names
from phreg.errors import LoadError, UnsupportedModelError

HOW_TO_PATCH_AROUND = "for a model of another kind around the same tower, use phreg.load(adapter, into=model)"
"""What to do where a class holds the tower in a way that this module does not know."""


def as_class(
    backbone: TransformersBackbone, model_class: type | None, settings: Mapping[str, Any]
) -> TransformersBackbone:
    """Builds a model of another class around the weights and registers of one, in fp32 and eval mode.

    A pooler whose weights the model lacks is left out, unless `add_pooling_layer=True` is among the settings.

    Args:
        backbone: The model; it is not changed.
        model_class: The class, or one of transformers' Auto classes; None means the model's own.
        settings: What `from_pretrained` takes: fields of the config, such as `num_labels`, arguments of the
            constructor, and options of loading, such as `ignore_mismatched_sizes`.

    Raises:
        LoadError: The class is none of transformers or of another family, or it needs weights of the image's
            path or of a text tower that the model does not have, or a setting does not fit.
    """
    asked = f"a {getattr(model_class or type(backbone.model), '__name__', model_class)} asked for"
    try:
        found = _concrete(model_class or type(backbone.model), backbone, asked)
        config, options = _config_of(found, backbone, asked, settings)
        weights = _weights(backbone)
        options = {"dtype": torch.float32} | constructor_arguments(found, weights) | options
        with torch.device("meta"):  # to learn its names alone
            known = inspect.signature(found.__init__).parameters
            named = adapt(found(config, **{name: options[name] for name in options.keys() & known}))
        disk = disk_names(named.model, _renamed(weights, backbone, named))
        model, report = found.from_pretrained(
            None, config=config, state_dict=disk, output_loading_info=True, **options
        )
    except UnsupportedModelError as error:
        raise _wrong_class(asked, backbone) from error
    except (*LOAD_FAILURES, LookupError, AttributeError) as error:
        raise LoadError(
            f"{asked}, which cannot be built of a {type(backbone.model).__name__} with settings "
            f"{sorted(settings)} ({error}); correct the settings, or give ignore_mismatched_sizes=True to "
            "have a head of another size start afresh"
        ) from error
    other = adapt(model.eval())
    _check(other, report, asked, backbone)
    if backbone.registers is not None:
        other.insert_registers(backbone.registers.detach()[0])
    noted = {
        key: value for key, value in vars(backbone.model).items() if key in (NORMALISATION, TRAINED_READOUT)
    }
    vars(other.model).update(noted)
    return adapt(other.model)


def _concrete(model_class: Any, backbone: TransformersBackbone, asked: str) -> Any:
    """Finds the class that an Auto class takes for the model's config; other classes stay as they are.

    It is `Any`, as its `from_pretrained` returns a pair when asked for a report.
    """
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    if not getattr(model_class, "__module__", "").startswith("transformers.models.auto"):
        raise _wrong_class(asked, backbone)
    try:
        with torch.device("meta"):
            return type(model_class.from_config(backbone.model.config))
    except ValueError as error:  # it has no class for this config
        raise _wrong_class(asked, backbone) from error


def _config_of(
    model_class: Any, backbone: TransformersBackbone, asked: str, settings: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Makes the config of a class out of the model's, and tells which settings are no fields of it."""
    kind: Any = model_class.config_class
    whole: Any = backbone.model.config
    tower: Any = backbone.tower.config
    if kind is type(whole):
        told = whole.to_dict()
    elif kind is type(tower):
        told = tower.to_dict()
    elif getattr(kind, "sub_configs", {}).get("vision_config") is type(tower):
        told = {"vision_config": tower.to_dict()}
    else:
        raise _wrong_class(asked, backbone)
    renamed = {{"torch_dtype": "dtype"}.get(name, name): value for name, value in settings.items()}
    options = {name: renamed.pop(name) for name in ("dtype",) if name in renamed}
    config, unused = kind.from_dict(told, return_unused_kwargs=True, **renamed)
    return config, options | unused


def _weights(backbone: TransformersBackbone) -> dict[str, Tensor]:
    """Lists the model's tensors, registers left out."""
    registers = backbone.roles()["registers"]
    return {name: tensor for name, tensor in backbone.model.state_dict().items() if name not in registers}


def _renamed(
    weights: Mapping[str, Tensor], backbone: TransformersBackbone, other: TransformersBackbone
) -> dict[str, Tensor]:
    """Names the tower's tensors by where the other model has its tower; the rest keep their names."""
    before, after = _prefix(backbone), _prefix(other)
    return {
        after + name.removeprefix(before) if name.startswith(before) else name: tensor
        for name, tensor in weights.items()
    }


def _prefix(backbone: TransformersBackbone) -> str:
    return f"{backbone.tower_name}." if backbone.tower_name else ""


def _check(
    other: TransformersBackbone,
    report: Mapping[str, Collection[Any]],
    asked: str,
    backbone: TransformersBackbone,
) -> None:
    """Refuses a model in which more than its head would be random.

    Raises:
        LoadError: Weights of the vision tower or of another encoder are missing, or have another shape.
    """
    parts = set(other.tower.modules())
    encoders = [
        name
        for name, module in other.model.named_modules()
        if isinstance(module, PreTrainedModel) and module not in parts and other.tower not in module.modules()
    ]
    prefix = _prefix(other)
    inside = tuple(
        f"{name}." for name in (*encoders, *(prefix + name for name, _ in other.tower.named_children()))
    )
    mismatched = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    random = sorted(
        name
        for name in (*report["missing_keys"], *mismatched)
        if name.startswith(inside) and not name.startswith(f"{prefix}pooler.") and "mask_token" not in name
    )
    if random:
        raise LoadError(
            f"{asked}, and {backbone.describe()} lacks {len(random)} of the weights of its encoders, such as "
            f"{random[0]}; give a class without that part, or settings that leave it out"
        )


def _wrong_class(asked: str, backbone: TransformersBackbone) -> LoadError:
    config = type(backbone.model.config).__name__
    return LoadError(
        f"{asked}, and what was saved is a {backbone.describe()}; give a class of transformers with that "
        f"vision tower and a {config}, such as {type(backbone.model).__name__}; {HOW_TO_PATCH_AROUND}"
    )
