"""Patches every vision model that a test constructs, once its outermost constructor is done.

A model is built by constructors inside of constructors: `from_pretrained` calls a class, whose `__init__`
builds its tower. Registers must wait for the outermost, which may still load or draw weights.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import phreg
from phreg.backbones.resolve import adapt_inside
from phreg.errors import UnsupportedModelError
from phreg.storage import ADAPTER_FILE, EXPORT_FILE

NUM_REGISTERS = 3

WRAPPED = "_phreg_wrapped"
"""Marks a constructor that is wrapped already."""


ACTIVE: list["Construction"] = []
"""What treats the models of this process."""


@contextmanager
def untouched() -> Iterator[None]:
    """Lets a test file of ours build stock models in any mode."""
    with ExitStack() as stack:
        for construction in ACTIVE:
            stack.enter_context(construction.inside())
        yield


class Construction:
    """Wraps constructors, and does to what they construct what the mode says.

    Args:
        mode: `stock`: nothing; `patched`: registers are added; `removed`: added and removed again.

    Attributes:
        count: Models treated so far.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.count = 0
        self._depth = 0

    def finish(self, model: nn.Module) -> None:
        """Treats each supported vision tower of a finished model; others stay as they are."""
        if self.mode == "stock":
            return
        try:
            towers = adapt_inside(model)
        except UnsupportedModelError:
            return
        for tower in towers:
            if tower.num_registers:
                continue
            try:
                phreg.add_registers(tower.model, NUM_REGISTERS)
            except UnsupportedModelError:  # which only inserting finds out
                continue
            self.count += 1
            if self.mode == "removed":
                phreg.remove_registers(tower.model)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Leaves what is constructed alone: it is part of something else, or wanted as it is."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def wrap(self, build: Callable[..., Any], *, is_init: bool = False) -> Callable[..., Any]:
        """Wraps a constructor: an `__init__`, or a function that returns a model or a tuple with one."""

        @functools.wraps(build)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.inside():
                built = build(*args, **kwargs)
            if self._depth == 0:
                for part in args[:1] if is_init else built if isinstance(built, tuple) else (built,):
                    if isinstance(part, nn.Module):
                        self.finish(part)
            return built

        return wrapped

    def wrap_function(self, name: str, *modules: Any) -> None:
        """Wraps a function wherever a library offers it."""
        wrapped = self.wrap(getattr(modules[0], name))
        for module in modules:
            setattr(module, name, wrapped)

    def wrap_class(self, model_class: type) -> None:
        """Wraps the constructors of a class and of its subclasses, as far as they are imported."""
        own = vars(model_class).get("__init__")
        if own is not None and not hasattr(own, WRAPPED):
            wrapped = self.wrap(own, is_init=True)
            vars(wrapped)[WRAPPED] = True
            model_class.__init__ = wrapped
        for subclass in model_class.__subclasses__():
            self.wrap_class(subclass)


def wrap_timm(construction: Construction) -> None:
    import timm
    from timm.models import _factory
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit
    from timm.models.vision_transformer import VisionTransformer

    stock = timm.create_model
    patched = construction.wrap(stock)

    @functools.wraps(stock)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        if not model_name.startswith("local-dir:"):
            return patched(model_name, *args, **kwargs)
        with construction.inside():  # what a patched model saved, timm builds with its registers
            return stock(model_name, *args, **kwargs)

    for module in (timm, timm.models, _factory):
        module.create_model = create_model
    for model_class in (VisionTransformer, Eva, NaFlexVit):
        construction.wrap_class(model_class)


def wrap_open_clip(construction: Construction) -> None:
    import open_clip
    from open_clip import factory
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import VisionTransformer

    for name in ("create_model", "create_model_and_transforms", "create_model_from_pretrained"):
        construction.wrap_function(name, factory, open_clip)
    for model_class in (CLIP, CustomTextCLIP, CoCa, VisionTransformer):
        construction.wrap_class(model_class)

    script = torch.jit.script

    @functools.wraps(script)
    def script_patched(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, nn.Module):
            construction.finish(obj)  # `create_model(jit=True)` hands out the script alone
        return script(obj, *args, **kwargs)

    torch.jit.script = script_patched


def wrap_transformers(construction: Construction) -> None:
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto as _defines_the_auto_classes  # noqa: F401
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    construction.wrap_class(PreTrainedModel)
    stock_subclass = PreTrainedModel.__init_subclass__.__func__

    def init_subclass(cls: type, **kwargs: Any) -> None:
        stock_subclass(cls, **kwargs)
        construction.wrap_class(cls)  # model classes are imported when they are first asked for

    PreTrainedModel.__init_subclass__ = classmethod(init_subclass)
    # Each class of transformers' Auto* has copies of its own.
    for owner in (PreTrainedModel, *_BaseAutoModelClass.__subclasses__()):
        for name in ("from_pretrained", "from_config", "_from_config"):
            stock = vars(owner).get(name)
            if stock is not None:
                build = _leads_to_phreg(stock.__func__) if name == "from_pretrained" else stock.__func__
                setattr(owner, name, classmethod(construction.wrap(build)))


def _leads_to_phreg(stock_load: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `from_pretrained` load through phreg what a patched model saved, as its user has to."""

    @functools.wraps(stock_load)
    def load(
        cls: type, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        folder = Path(pretrained_model_name_or_path or "")
        if not any((folder / file).is_file() for file in (ADAPTER_FILE, EXPORT_FILE)):
            return stock_load(cls, pretrained_model_name_or_path, *args, **kwargs)
        return phreg.load(folder, cls=cls, **kwargs)

    return load


WRAPPERS = {
    "timm": wrap_timm,
    "open_clip": wrap_open_clip,
    "transformers": wrap_transformers,
    "peft": wrap_transformers,
}
"""What wraps the constructors of which library."""
