"""Linear probes: what a linear map can read off frozen features, solved, not trained by a schedule.

Both problems are convex and have one answer, whatever the start.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear map of standardised tokens; calling it maps tokens (…, width) to scores or values."""

    mean: Float[Tensor, " width"]
    std: Float[Tensor, " width"]
    weight: Float[Tensor, "width outputs"]
    bias: Float[Tensor, " outputs"]

    def __call__(self, tokens: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens outputs"]:
        """Maps tokens, in fp32."""
        return (tokens - self.mean) / self.std @ self.weight + self.bias


def fit_softmax(
    tokens: Float[Tensor, "tokens width"],
    labels: Int64[Tensor, " tokens"],
    num_classes: int,
    penalty: float,
    max_steps: int = 200,
) -> LinearProbe:
    """Fits multinomial logistic regression by full-batch L-BFGS, in fp32, from zero.

    The loss is mean cross-entropy plus half of `penalty` times the sum of squared weights, biases left out,
    on features standardised by these tokens.

    Args:
        tokens: Features.
        labels: Class of each.
        num_classes: Number of classes; one may have no token.
        penalty: Strength of the L2 penalty.
        max_steps: Most steps of L-BFGS.
    """
    mean, std = _standardise(tokens)
    inputs = (tokens - mean) / std
    weight = torch.zeros(tokens.shape[1], num_classes, device=tokens.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=tokens.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_steps,
        history_size=10,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(torch.addmm(bias, inputs, weight), labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)  # pyright: ignore[reportArgumentType] - its stub asks for a float
    return LinearProbe(mean, std, weight.detach(), bias.detach())


def fit_linear(
    tokens: Float[Tensor, "tokens width"], targets: Float[Tensor, "tokens values"], penalty: float
) -> LinearProbe:
    """Fits ridge regression by its normal equations, in fp64.

    The loss is the mean squared error plus `penalty` times the sum of squared weights, biases left out, on
    features standardised by these tokens.

    Args:
        tokens: Features.
        targets: Values to tell.
        penalty: Strength of the L2 penalty.
    """
    mean, std = _standardise(tokens)
    inputs, bias = ((tokens - mean) / std).double(), targets.mean(0)
    gram = inputs.T @ inputs / len(inputs) + penalty * torch.eye(inputs.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, inputs.T @ (targets - bias).double() / len(inputs))
    return LinearProbe(mean, std, weight.float(), bias)


def _standardise(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel; a channel that never changes has a standard deviation of 1."""
    std = tokens.std(0, correction=0)
    return tokens.mean(0), torch.where(std > 1e-6, std, 1.0)
