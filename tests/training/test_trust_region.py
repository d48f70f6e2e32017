"""Learning rates from what a step does: closed forms on features of two numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from phreg.backbones.base import Features
from phreg.training.trust_region import TOLERANCE, calibrate, movement, stepped


def turned_by(angle: Tensor) -> Features:
    """One patch and a pooled output that stands still; the patch turns by an angle in radians."""
    patch = torch.stack([angle.cos(), angle.sin()])
    return Features(patch.view(1, 1, 1, 2), torch.tensor([[1.0, 0.0]]))


def with_gradient(value: float, gradient: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    parameter.grad = torch.tensor([gradient], dtype=torch.float64)
    return parameter


def angle_of(distance: float) -> float:
    """The angle at which two vectors have a cosine distance."""
    return math.acos(1 - distance)


def near(rate: float, exact: float) -> bool:
    """A movement is right within TOLERANCE, and grows with the square of the rate."""
    slack = math.sqrt(TOLERANCE) * 1.01
    return exact / slack <= rate <= exact * slack


@given(st.floats(1e-4, 0.1), st.floats(1e-3, 1e3), st.sampled_from([-7.0, 0.01]))
def test_a_role_gets_the_rate_whose_step_turns_the_features_by_the_angle_allowed(
    allowed: float, sensitivity: float, gradient: float
) -> None:
    weight = with_gradient(0.0, gradient)
    rates = calibrate({"role": {"w": weight}}, lambda: turned_by(sensitivity * weight[0]), allowed)
    assert near(rates["role"].rate, angle_of(allowed) / sensitivity)


def test_roles_share_the_movement_that_all_make_together() -> None:
    weights = {f"role {at}": {"w": with_gradient(0.0, 1.0)} for at in range(4)}
    sensitivity = [1.0, 10.0, 100.0, 0.1]

    def features() -> Features:
        angles = [s * role["w"][0] for s, role in zip(sensitivity, weights.values(), strict=True)]
        return turned_by(torch.stack(angles).sum())

    rates = calibrate(weights, features, 0.01)
    for scale, role in zip(sensitivity, weights, strict=True):
        assert near(rates[role].alone, angle_of(0.01) / scale)
    joint = sum(scale * rates[role].rate for scale, role in zip(sensitivity, weights, strict=True))
    assert near(joint, angle_of(0.01))


def test_roles_that_undo_each_other_are_not_given_more_than_each_has_alone() -> None:
    weights = {"one way": {"w": with_gradient(0.0, 1.0)}, "back": {"w": with_gradient(0.0, -1.0)}}

    def features() -> Features:
        return turned_by(weights["one way"]["w"][0] + weights["back"]["w"][0])

    rates = calibrate(weights, features, 0.01)
    assert all(role.rate == role.alone for role in rates.values())
    assert near(rates["back"].rate, angle_of(0.01))


def test_a_rate_that_is_near_enough_is_taken_without_another_try() -> None:
    sensitivity = angle_of(0.01) / 1e-5  # the rate that is tried first is exact
    weight, calls = with_gradient(0.0, 1.0), []

    def features() -> Features:
        calls.append(1)
        return turned_by(sensitivity * weight[0])

    assert calibrate({"role": {"w": weight}}, features, 0.01)["role"].rate == pytest.approx(1e-5)
    assert len(calls) == 3, "before, the role alone, all roles"


def test_the_pooled_output_bounds_the_step_where_it_moves_further_than_the_patches() -> None:
    weight = with_gradient(0.0, 1.0)

    def features() -> Features:
        still, moved = turned_by(0 * weight[0]), turned_by(5 * weight[0])
        return Features(still.patches, moved.patches.flatten(0, 2))

    rates = calibrate({"role": {"w": weight}}, features, 0.01)
    assert near(rates["role"].rate, angle_of(0.01) / 5)


def test_the_model_is_left_as_it_was() -> None:
    weight = with_gradient(0.3, 1.0)
    calibrate({"role": {"w": weight}}, lambda: turned_by(weight[0]), 0.01)
    assert weight.item() == 0.3


def test_a_step_goes_against_the_gradient_by_the_rate_whatever_the_gradients_size() -> None:
    up, down, unreached = with_gradient(1.0, 1e-6), with_gradient(1.0, -1e6), with_gradient(1.0, 0.0)
    unreached.grad = None
    roles = {"a": {"up": up, "down": down}, "b": {"unreached": unreached}}
    with torch.no_grad(), stepped(roles, {"a": 0.5, "b": 0.5}):
        assert [up.item(), down.item(), unreached.item()] == [0.5, 1.5, 1.0]
    assert [up.item(), down.item(), unreached.item()] == [1.0, 1.0, 1.0]


def test_a_role_without_a_gradient_does_not_set_where_the_next_one_starts() -> None:
    idle, weight, asked = with_gradient(0.0, 0.0), with_gradient(0.0, 1.0), []

    def features() -> Features:
        asked.append(float(weight[0]))
        return turned_by(weight[0])

    rates = calibrate({"idle": {"w": idle}, "role": {"w": weight}}, features, 0.01)
    assert near(rates["role"].alone, angle_of(0.01))
    assert max(map(abs, asked)) < 1, "no step of this role is tried that the idle one's rate would make"


def test_a_role_that_moves_nothing_ends_with_a_finite_rate() -> None:
    idle = with_gradient(0.0, 1.0)
    rates = calibrate({"idle": {"w": idle}}, lambda: turned_by(torch.zeros(())), 0.01)
    assert math.isfinite(rates["idle"].rate)


@pytest.mark.parametrize(("angle", "distance"), [(0.0, 0.0), (math.pi / 2, 1.0), (math.pi, 2.0)])
def test_movement_is_the_cosine_distance(angle: float, distance: float) -> None:
    start = turned_by(torch.zeros((), dtype=torch.float64))
    assert movement(start, turned_by(torch.tensor(angle, dtype=torch.float64))) == pytest.approx(distance)
