"""A user's model comes back as it was, whatever ends the call that works on it.

All that a model is (classes, attributes, hooks, parameters and buffers, what they hold, gradients, modes) is
noted before it is patched, trained or moved, and can be put back exactly. Values are never copied for that.
Whoever changes a tensor gives it new memory instead. So a frozen twin of the model, the teacher, shares with
it all that does not train:

    before  model ──► own tensors            during  model ──► own tensors, and copies of those that train
                                                     twin  ──► own tensors, frozen: the teacher

It notes the attributes of modules, and what lists, dictionaries and configs among those hold; not what lies
deeper, such as the inside of a tokenizer.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from phreg.errors import TrainingError

_Model = TypeVar("_Model", bound=nn.Module)

HALF = (torch.float16, torch.bfloat16)
"""Precisions that are too coarse to train in: a small step leaves a weight as it is."""


class ModelState(Generic[_Model]):
    """What a model was when this was made.

    Args:
        model: The model. Its tensors are held, not copied.
    """

    def __init__(self, model: _Model) -> None:
        self.model = model
        self._classes = [(module, type(module)) for module in model.modules()]
        self._containers = [(found, copy.copy(found)) for found in _containers(model)]
        self._tensors = [
            (tensor, tensor.data, tensor.grad if tensor.is_leaf else None, tensor.requires_grad)
            for tensor in _tensors(model).values()
        ]
        self._modes = {name: module.training for name, module in model.named_modules()}
        self._dtypes = {name: tensor.dtype for name, tensor in _tensors(model).items()}
        self._trains = {name: tensor.requires_grad for name, tensor in model.named_parameters()}

    def restore(self) -> None:
        """Makes the model exactly what it was."""
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
        for container, before in self._containers:
            _refill(container, before)
        for tensor, data, gradient, trains in self._tensors:
            tensor.grad = None  # one of another precision or device would not let the data change
            tensor.data = data
            if tensor.requires_grad != trains:
                tensor.requires_grad_(trains)
            tensor.grad = gradient

    def frozen_twin(self) -> _Model:
        """Copies the model, frozen; both hold the same tensors, in the same memory, without gradients.

        Whoever trains the model gives the tensors that train memory of their own first, as `unlock` does.
        """
        for tensor in _tensors(self.model).values():
            tensor.grad = None
        return shallow_twin(self.model).requires_grad_(False)

    def restore_precision(self, model: nn.Module | None = None) -> None:
        """Gives tensors the precision that those of their name had, and new ones that of most weights.

        Args:
            model: The model to change; None means the model itself. Another is a copy of it.

        Raises:
            TrainingError: A trained weight is too large for that precision.
        """
        sizes: Counter[torch.dtype] = Counter()
        for tensor, data, _, _ in self._tensors:
            if isinstance(tensor, nn.Parameter) and data.is_floating_point():
                sizes[data.dtype] += data.numel()
        for name, tensor in _tensors(model or self.model).items():
            if not tensor.is_floating_point():
                continue
            dtype = self._dtypes.get(name) or sizes.most_common(1)[0][0]
            cast = tensor.data.to(dtype)
            if tensor.isfinite().all() and not cast.isfinite().all():
                raise TrainingError(
                    f"trained values of {name}, up to {tensor.abs().max():.3g}, do not fit the model's own "
                    f"precision, {str(dtype).removeprefix('torch.')}; give the model in bfloat16 or float32"
                )
            tensor.data = cast

    def restore_settings(self) -> None:
        """Gives modules the mode, and parameters the `requires_grad`, that those of their name had.

        New modules are in the mode of the whole, and new parameters train where any parameter did.
        """
        for name, module in self.model.named_modules():
            module.training = self._modes.get(name, self._modes[""])
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self._trains.get(name, any(self._trains.values())))


def shallow_twin(model: _Model) -> _Model:
    """Copies what a model is built of, and not what its tensors hold: the twin's lie in the same memory.

    On the twin a change of structure can be tried first: parameters added or replaced, hooks, attributes. The
    model does not see it, as long as nothing is written into the twin's tensors.
    """
    twins: dict[int, Any] = {}
    for tensor in _tensors(model).values():
        same = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        twins[id(tensor)] = nn.Parameter(same, tensor.requires_grad) if is_parameter else same
    return copy.deepcopy(model, twins)


@contextmanager
def rollback_on_error(model: _Model) -> Iterator[ModelState[_Model]]:
    """Puts a model back exactly as it was if anything is raised inside, `KeyboardInterrupt` included.

    Whoever changes tensors inside gives them new memory (`tensor.data = …`), and writes into none.

    Args:
        model: The model; a backbone includes the user's model.
    """
    state = ModelState(model)
    try:
        yield state
    except BaseException:
        state.restore()
        raise


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Puts models back exactly as they were at the end: mode, device, hooks.

    Args:
        models: The models; their tensors may be moved inside, and must not be written into.
    """
    states = [ModelState(model) for model in models]
    try:
        yield
    finally:
        for state in states:
            state.restore()


def to_fp32(model: _Model) -> _Model:
    """Turns half-precision tensors of a model into fp32 in place, which is exact; others stay as they are.

    Returns:
        The same model.
    """
    for tensor in _tensors(model).values():
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Lists parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _containers(model: nn.Module) -> Iterator[Any]:
    """Lists what an attribute, a hook, a parameter or an entry of a config is added to or replaced in."""
    seen: set[int] = set()
    for module in model.modules():
        for value in [vars(module), *vars(module).values()]:
            if _is_plain_object(value):
                value = vars(value)
            if isinstance(value, dict | list | set) and id(value) not in seen:
                seen.add(id(value))
                yield value


def _is_plain_object(value: Any) -> bool:
    """Tells configs and the like from modules, tensors, classes and functions."""
    others = nn.Module | Tensor | type | ModuleType | dict | list | set
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, others)


def _refill(container: Any, before: Any) -> None:
    """Gives a container back what it held, in order; one that holds it is not touched."""
    if len(container) == len(before):
        pairs = zip(_entries(container), _entries(before), strict=True)
        if all(now is then for now, then in pairs):
            return
    container.clear()
    if isinstance(container, list):
        container.extend(before)
    else:
        container.update(before)


def _entries(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for key, value in container.items():
            yield key
            yield value
    else:
        yield from container
