"""Schedules of linear heads against torch's own, and whole trainings against loops rolled by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
)

from phreg.backbones.resolve import adapt
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.metrics.scores import IGNORE
from phreg.evaluation.tasks import linear_depth, linear_segmentation
from phreg.evaluation.tasks.depth_settings import first_beta
from phreg.evaluation.tasks.depth_settings import learning_rate as depth_rate
from phreg.evaluation.tasks.linear_segmentation import learning_rate as segmentation_rate
from phreg.evaluation.tasks.table import resolve_settings

CLOSE = 1e-6
STEPS = 400


def of_torch(make, steps=STEPS):
    """Learning rate, as a share of 1, and first beta at each step of a torch scheduler."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["betas"][0]))
        optimizer.step()
        scheduler.step()
    return zip(*found, strict=True)


@pytest.mark.parametrize("power", [0.9, 1.0])
def test_the_decay_of_segmentation_is_torchs_polynomial(power):
    rates, _ = of_torch(lambda optimizer: PolynomialLR(optimizer, STEPS, power))
    settings = linear_segmentation.Settings(steps=STEPS, power=power)
    assert [segmentation_rate(step, settings) for step in range(STEPS)] == pytest.approx(rates, abs=CLOSE)


def test_the_decay_of_depth_is_torchs_cosine():
    rates, _ = of_torch(lambda optimizer: CosineAnnealingLR(optimizer, STEPS))
    settings = linear_depth.Settings(steps=STEPS, warmup=0)
    assert [depth_rate(step, settings) for step in range(STEPS)] == pytest.approx(rates, abs=CLOSE)


def test_a_published_warm_up_is_torchs_linear_one_times_the_decay():
    for start, warmup in ((1e-6, 30), (1e-3, 120)):
        rising, _ = of_torch(lambda optimizer, a=start, n=warmup: LinearLR(optimizer, a, 1.0, n))
        settings = linear_segmentation.Settings(steps=STEPS, power=1.0, warmup=warmup, warmup_start=start)
        expected = [share * (1 - step / STEPS) for step, share in enumerate(rising)]
        found = [segmentation_rate(step, settings) for step in range(STEPS)]
        assert found == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("protocol", ["dvt", "ph-reg"])
def test_the_first_beta_of_depth_is_that_of_torchs_one_cycle(protocol):
    settings = resolve_settings("linear-depth", {"steps": STEPS}, protocol)
    _, betas = of_torch(lambda optimizer: OneCycleLR(optimizer, 1.0, STEPS))  # mmcv's defaults are the same
    assert [first_beta(step, settings) for step in range(STEPS)] == pytest.approx(betas, abs=CLOSE)
    assert min(betas) == pytest.approx(0.85, abs=1e-3)


def dinov3(steps, warmup, lr, *, ratio, final_divisor, skips_first):
    """DINOv3's scheduler with its optimiser, state by state: rate and first beta of each step."""
    highest, lowest = lr, lr / 25 / final_divisor
    done, found = 0, []
    for step in range(steps):
        if done < warmup and ratio:
            k = (1 - done / warmup) * (1 - ratio)
            rate, beta = highest * (1 - k) * (1 - done / steps), 0
        elif done < warmup:
            cosine = highest * (1 + math.cos(math.pi * done / steps)) / 2
            rate, beta = highest / final_divisor + cosine * done / warmup, 0
        else:
            turn = math.cos(math.pi * (done + 1) / steps) + 1
            rate = lowest + (highest - lowest) / 2 * turn
            share = math.cos(math.pi * (done - warmup) / (steps - warmup)) + 1
            beta = 0.95 + (0.85 - 0.95) / 2 * share
        found.append((rate, beta))
        if step > 0 or not skips_first:
            done += 1
    return zip(*found, strict=True)


def test_dinov3s_schedule_of_segmentation():
    settings = resolve_settings("linear-segmentation", {}, "dinov3")
    rates, _ = dinov3(40_000, 1500, 1e-3, ratio=1e-6, final_divisor=math.inf, skips_first=True)
    found = [settings.lr * segmentation_rate(step, settings) for step in range(40_000)]
    assert found == pytest.approx(rates, abs=CLOSE * 1e-3)


def test_dinov3s_schedule_of_depth_moves_the_first_beta_too():
    settings = resolve_settings("linear-depth", {}, "dinov3")
    rates, betas = dinov3(38_400, 12_800, 3e-4, ratio=0, final_divisor=1000, skips_first=False)
    found = [settings.lr * depth_rate(step, settings) for step in range(38_400)]
    assert found == pytest.approx(rates, abs=CLOSE * 3e-4)
    assert [first_beta(step, settings) for step in range(38_400)] == pytest.approx(betas, abs=CLOSE)


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"))


def adamw(parameters, moments, step, *, lr, betas, decay):
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), its bias corrections written out."""
    with torch.no_grad():
        for parameter, (first, second) in zip(parameters, moments, strict=True):
            parameter.mul_(1 - lr * decay)
            first.mul_(betas[0]).add_((1 - betas[0]) * parameter.grad)
            second.mul_(betas[1]).add_((1 - betas[1]) * parameter.grad**2)
            ahead = first / (1 - betas[0] ** (step + 1))
            spread = (second / (1 - betas[1] ** (step + 1))).sqrt()
            parameter.sub_(lr * ahead / (spread + 1e-8))
            parameter.grad = None


def normed(features, norm):
    """A batch norm in training, written out; its own statistics are not needed."""
    mean = features.mean((0, 2, 3), keepdim=True)
    variance = features.var((0, 2, 3), keepdim=True, correction=0)
    weight, bias = (part.view(1, -1, 1, 1) for part in (norm.weight, norm.bias))
    return (features - mean) / (variance + norm.eps).sqrt() * weight + bias


@pytest.mark.parametrize("protocol", ["dinov2", "ph-reg"])
def test_a_segmentation_head_is_trained_as_by_a_loop_rolled_by_hand(protocol, reader):
    settings = resolve_settings("linear-segmentation", {"steps": 12, "warmup": 3}, protocol)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 2, 8, 4, 4, generator=generator)
    truth = torch.randint(3, (12, 2, 16, 16), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = IGNORE

    head = copy.deepcopy(linear_segmentation._head(8, 3, seed=0)).train()
    norm, score = head
    parameters = [norm.weight, norm.bias, score.weight, score.bias]
    moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in parameters]
    start = 1e-6 if protocol == "dinov2" else 1 / 3
    for step in range(12):
        scores = score(normed(features[step], norm))
        scores = interpolate(scores, (16, 16), mode="bilinear", align_corners=False)
        cross_entropy(scores, truth[step], ignore_index=IGNORE).backward()
        rate = 1e-3 * (1 - step / 12) ** settings.power
        if step < 3:
            rate *= start + (1 - start) * step / 3 if protocol == "dinov2" else (step + 1) / 3
        adamw(parameters, moments, step, lr=rate, betas=(0.9, 0.999), decay=settings.weight_decay)

    batches = iter(zip(features, truth, strict=True))
    found = linear_segmentation.train_head(batches, 3, settings, 0, reader)
    for ours, theirs in zip(found.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("protocol", ["dinov3", "ph-reg"])
def test_a_depth_head_is_trained_as_by_a_loop_rolled_by_hand(protocol, reader):
    short = {"steps": 12, "warmup": 3, "scale_only": 4, "bins": 16}
    settings = resolve_settings("linear-depth", short, protocol)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 2, 8, 4, 4, generator=generator)
    truth = 0.5 + 9 * torch.rand(12, 2, 1, 32, 32, generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = 0

    bins = torch.linspace(0.001, 10, 16)
    batched = protocol == "dinov3"
    head = linear_depth.DepthHead(8, bins, 0, finer=settings.finer, batch_norm=batched)
    parameters = [*head.norm.parameters(), *head.score.parameters()]
    moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in parameters]
    for step in range(12):
        inputs = normed(features[step], head.norm) if batched else features[step]
        if not batched:  # theirs are resampled first, and scored then
            inputs = interpolate(inputs, scale_factor=4, mode="bilinear", align_corners=False)
        shares = head.score(inputs).relu() + 0.1
        depths = torch.einsum("bkrc,k->brc", shares / shares.sum(1, keepdim=True), bins)[:, None]
        depths = interpolate(depths, (32, 32), mode="bilinear", align_corners=False)
        known = truth[step] > 0
        g = (depths[known] + 0.001).log() - (truth[step][known] + 0.001).log()
        loss = 0.15 * g.mean() ** 2 + (0 if step < 4 else g.var())
        loss.sqrt().backward()
        nn.utils.clip_grad_norm_(parameters, 35.0)
        rate, beta = settings.lr * depth_rate(step, settings), first_beta(step, settings)
        adamw(parameters, moments, step, lr=rate, betas=(beta, settings.beta2), decay=settings.weight_decay)

    found = linear_depth.train_head(iter(zip(features, truth, strict=True)), settings, 0, reader)
    ours = [*found.norm.parameters(), *found.score.parameters()]
    for part, theirs in zip(ours, parameters, strict=True):
        torch.testing.assert_close(part, theirs, atol=CLOSE, rtol=0)
