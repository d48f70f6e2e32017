"""What torch.nn.DataParallel runs on every GPU but the first, made without a GPU."""

import torch
from torch import Tensor, nn


def replicate(model: nn.Module, shift: float = 0.0) -> nn.Module:
    """Makes a replica as torch.nn.parallel.replicate does, and shifts its weights.

    Submodules are shallow copies, linked anew; their parameters are plain tensors, and gradients reach the
    original's.
    """
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    tensors: dict[Tensor, Tensor] = {}
    for module, copy in copies.items():
        for key, child in module._modules.items():
            if child is None:
                copy._modules[key] = None
            else:
                setattr(copy, key, copies[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                copy._parameters[key] = None
            else:
                setattr(copy, key, tensors.setdefault(parameter, shifted(parameter, shift)))
        for key, buffer in module._buffers.items():
            if buffer is None:
                copy._buffers[key] = None
            else:
                setattr(copy, key, buffer.clone())
    return copies[model]


def shift_weights(model: nn.Module, shift: float) -> None:
    """Shifts a model's own weights as `replicate` does those of a replica."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(shifted(parameter, shift))


def shifted(parameter: Tensor, shift: float) -> Tensor:
    """Adds noise of some standard deviation; the same to every parameter of a shape."""
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return parameter + shift * noise
