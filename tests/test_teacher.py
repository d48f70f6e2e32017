import pytest
import torch

from phreg.backbones.resolve import adapt
from phreg.config import TargetConfig, ViewsConfig
from phreg.data.crops import center_crop
from phreg.errors import PhregError
from phreg.seeding import keyed_generator as generator
from phreg.teacher import Teacher
from phreg.view_sampling import context_margin, sample_views

VIEWS = ViewsConfig(count=4, max_shift=0.25)


def images(batch=3, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def slow_target(backbone, pixels, views):
    """The target, view by view and patch by patch, as PH-Reg's text has it."""
    rows = cols = 4
    total = torch.zeros(len(pixels), rows, cols, backbone.spec.width)
    count = torch.zeros(len(pixels), rows, cols, 1)
    white = torch.tensor([(1 - m) / s for m, s in zip(backbone.spec.mean, backbone.spec.std, strict=True)])
    for b in range(len(pixels)):
        for v in range(views.count):
            dy, dx = views.offsets[b, v].tolist()
            flip = bool(views.flips[b, v])
            moved = white.view(3, 1, 1).expand(3, 32, 32).clone()
            where = torch.full((rows, cols, 2), -1)
            for r in range(rows):
                for c in range(cols):
                    if 0 <= r + dy < rows and 0 <= c + dx < cols:
                        y, x, from_y, from_x = r * 8, c * 8, (r + dy) * 8, (c + dx) * 8
                        moved[:, y : y + 8, x : x + 8] = pixels[
                            b, :, from_y : from_y + 8, from_x : from_x + 8
                        ]
                        where[r, c] = torch.tensor([r + dy, c + dx])
            if flip:
                moved, where = moved.flip(-1), where.flip(1)
            features = backbone(moved.unsqueeze(0)).patches[0]
            for r in range(rows):
                for c in range(cols):
                    row, col = where[r, c].tolist()
                    if row >= 0:
                        total[b, row, col] += features[r, c]
                        count[b, row, col] += 1
    return total / count


def test_the_target_is_that_of_a_slow_obvious_reference(tiny):
    backbone = adapt(tiny()).requires_grad_(False)
    pixels = images()
    target = Teacher(backbone, VIEWS)(pixels, generator(7))
    (views,) = sample_views(VIEWS, backbone.spec, (32, 32), 3, generator(7))
    # Sums in another order and batches of another size: a few units in the last place of values around 1.
    torch.testing.assert_close(target.patches, slow_target(backbone, pixels, views), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 100])
def test_the_target_does_not_depend_on_the_micro_batch(tiny, micro_batch):
    backbone = adapt(tiny())
    whole = Teacher(backbone, VIEWS, TargetConfig(micro_batch=64))(images(), generator(0))
    parts = Teacher(backbone, VIEWS, TargetConfig(micro_batch=micro_batch))(images(), generator(0))
    torch.testing.assert_close(
        parts.patches, whole.patches, atol=1e-5, rtol=1e-5
    )  # batched matmuls round otherwise
    torch.testing.assert_close(parts.pooled, whole.pooled, atol=1e-5, rtol=1e-5)


def test_one_unmoved_view_is_the_model_itself(tiny):
    backbone = adapt(tiny())
    target = Teacher(backbone, ViewsConfig(count=1))(images(), generator(0))
    with torch.no_grad():
        features = backbone(images())
    assert torch.equal(target.patches, features.patches)
    assert torch.equal(target.pooled, features.pooled)


def test_the_target_is_an_ordinary_tensor_that_a_loss_may_keep(tiny):
    target = Teacher(adapt(tiny()), VIEWS)(images(), generator(0))
    assert not target.patches.is_inference()
    assert not target.pooled.is_inference()
    weight = torch.ones(32, requires_grad=True)
    (target.patches * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("fill", ["reflect", "replicate", "valid-crop", "black", "mean"])
def test_every_fill_makes_a_finite_target(tiny, fill):
    views = ViewsConfig(count=4, max_shift=0.25, fill=fill)
    target = Teacher(adapt(tiny(dynamic_img_size=True)), views)(images(), generator(0))
    assert target.patches.shape == (3, 4, 4, 32)
    assert torch.isfinite(target.patches).all()


def test_subpatch_views_and_scales_make_a_finite_target(tiny):
    views = ViewsConfig(count=4, max_shift=0.25, subpatch=True, scale=0.1)
    assert torch.isfinite(Teacher(adapt(tiny()), views)(images(), generator(0)).patches).all()


@pytest.mark.parametrize("resampled", [{}, {"subpatch": True}, {"scale": 0.1}], ids=str)
def test_context_is_seen_by_moved_views_alone(tiny, resampled):
    backbone = adapt(tiny())
    views = ViewsConfig(count=4, max_shift=0.25, fill="context", **resampled)
    margin = context_margin(views, backbone.spec, (32, 32))
    whole = torch.randn(3, 3, 32 + 2 * margin[0], 32 + 2 * margin[1], generator=generator("whole"))
    teacher = Teacher(backbone, views)
    target = teacher(whole, generator(0), margin)
    pixels = center_crop(whole, margin)
    with torch.no_grad():
        assert torch.equal(target.pooled, backbone(pixels).pooled)
    other = torch.zeros_like(whole)
    center_crop(other, margin).copy_(pixels)
    moved = teacher(other, generator(0), margin)
    assert torch.equal(moved.pooled, target.pooled)
    assert not torch.allclose(moved.patches, target.patches, atol=1e-2)


def test_the_target_with_context_is_the_mean_over_windows_of_the_whole(tiny):
    backbone = adapt(tiny())
    config = ViewsConfig(count=4, max_shift=0.25, flip=0.0, fill="context")
    whole = torch.randn(1, 3, 48, 48, generator=generator("whole"))
    target = Teacher(backbone, config)(whole, generator(7), (8, 8)).patches[0]
    (views,) = sample_views(config, backbone.spec, (32, 32), 1, generator(7))
    total, count = torch.zeros(6, 6, 32), torch.zeros(6, 6, 1)  # on the whole, in patches of 8 pixels
    for dy, dx in (views.offsets[0] + 1).tolist():
        with torch.no_grad():
            window = whole[:, :, 8 * dy : 8 * dy + 32, 8 * dx : 8 * dx + 32]
            total[dy : dy + 4, dx : dx + 4] += backbone(window).patches[0]
        count[dy : dy + 4, dx : dx + 4] += 1
    # Sums in another order: a few units in the last place of values around 1.
    torch.testing.assert_close(target, (total / count)[1:5, 1:5], atol=1e-5, rtol=1e-5)


def test_images_without_the_context_that_views_show_are_refused(tiny):
    moved = VIEWS.model_copy(update={"fill": "context"})
    with pytest.raises(PhregError, match=r"views.fill = context needs .* \(8, 8\) .* found \(0, 0\)"):
        Teacher(adapt(tiny()), moved)(images(), generator(0))
    with pytest.raises(PhregError, match=r"views.fill = white needs .* \(0, 0\) .* found \(8, 8\)"):
        Teacher(adapt(tiny()), VIEWS)(torch.zeros(1, 3, 48, 48), generator(0), (8, 8))


def test_an_inner_layer_without_norm_can_be_the_target(tiny):
    backbone = adapt(tiny())
    pixels = images()
    target = Teacher(backbone, ViewsConfig(count=1), TargetConfig(layer=-2, norm=False))(pixels, generator(0))
    tokens = backbone.block_tokens(pixels, [1])[1]
    assert torch.equal(target.patches, backbone.layout(pixels).to_grid(tokens))


def test_running_out_of_memory_halves_the_micro_batch_and_changes_no_target(tiny, monkeypatch, caplog):
    backbone = adapt(tiny())
    expected = Teacher(backbone, VIEWS, TargetConfig(micro_batch=3))(images(), generator(0))
    teacher = Teacher(backbone, VIEWS, TargetConfig(micro_batch=12))
    forward = teacher._forward

    def small_only(views):
        if views.shape[0] * views.shape[1] > 3:
            raise torch.OutOfMemoryError("too large")
        return forward(views)

    monkeypatch.setattr(teacher, "_forward", small_only)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    target = teacher(images(), generator(0))
    assert teacher.micro_batch == 3
    assert "ran out of memory" in caplog.text
    torch.testing.assert_close(target.patches, expected.patches)


@pytest.mark.parametrize(("device", "expected"), [("cpu", 16), ("cuda", 256), ("mps", 16)])
def test_the_micro_batch_is_the_devices_where_none_is_asked_for(tiny, monkeypatch, device, expected):
    backbone = adapt(tiny())
    monkeypatch.setattr(type(backbone), "device", torch.device(device))
    assert Teacher(backbone, VIEWS).micro_batch == expected
    assert Teacher(backbone, VIEWS, TargetConfig(micro_batch=5)).micro_batch == 5


def test_running_out_of_memory_with_a_single_view_is_the_callers_error(tiny, monkeypatch):
    teacher = Teacher(adapt(tiny()), VIEWS, TargetConfig(micro_batch=4))
    tried, emptied = [], []

    def never(_views):
        tried.append(teacher.micro_batch)
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(teacher, "_forward", never)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    with pytest.raises(torch.OutOfMemoryError):
        teacher(images(), generator(0))
    assert tried == [4, 2, 1]
    assert len(emptied) == 2, "before each new try"


def test_under_autocast_the_target_is_fp32_and_near_that_of_fp32(tiny):
    backbone = adapt(tiny())
    exact = Teacher(backbone, VIEWS)(images(), generator(0))
    rough = Teacher(backbone, VIEWS, bf16=True)(images(), generator(0))
    for one, other in zip(rough, exact, strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, other), "bf16 was used"
        # bf16 has 8 bits: 1 part in 256 at each of some dozen steps, of values up to 4.
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.02)


def test_images_and_context_that_are_not_square_make_a_target_of_the_images_grid(tiny):
    backbone = adapt(tiny(img_size=(32, 48)))
    views = ViewsConfig(count=3, max_shift=0.34, flip=0.0, fill="context")
    whole = torch.randn(2, 3, 32 + 2 * 8, 48 + 2 * 16, generator=generator("whole"))
    target = Teacher(backbone, views)(whole, generator(0), (8, 16))
    assert target.patches.shape[1:3] == (4, 6)
    with torch.no_grad():
        assert torch.equal(target.pooled, backbone(whole[:, :, 8:-8, 16:-16]).pooled)
    with pytest.raises(PhregError, match=r"32x48 with \(8, 16\).*found \(8, 8\)"):
        Teacher(backbone, views)(torch.zeros(2, 3, 48, 64), generator(0), (8, 8))


def test_the_target_of_a_half_precision_model_is_summed_in_fp32(tiny):
    backbone = adapt(tiny().to(torch.bfloat16))
    target = Teacher(backbone, VIEWS)(images().to(torch.bfloat16), generator(0))
    assert target.patches.dtype == target.pooled.dtype == torch.float32
    # Means over two to four views are finer than any bf16 number.
    assert not torch.equal(target.patches, target.patches.to(torch.bfloat16).float())
