"""What only a GPU can show: speed is measured in benchmarks, these are promises about results and waiting."""

import gc
import json
import logging

import pytest
import torch

import phreg
from phreg.backbones.resolve import adapt
from phreg.config import TargetConfig, ViewsConfig
from phreg.data.crops import normalise
from phreg.teacher import Teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Which warnings a driver and a build of torch for it give cannot be known from here.
    pytest.mark.filterwarnings("default"),
]

DEVICE = "cuda"
SETTINGS = {
    "device": DEVICE,
    "precision": "bf16",
    "steps": 4,
    "checkpoint_every": 2,
    "batch_size": 2,
    "registers": 2,
    "views.count": 3,
    "data.workers": 0,
    "measure.images": 0,
}


@pytest.fixture
def distil(tiny, photos, tmp_path):
    """Distils the tiny model on the GPU into a folder of a given name."""

    def run(name, model=None, **changes):
        return phreg.distill(model or tiny(), photos, tmp_path / name, **(SETTINGS | changes))

    return run


@pytest.fixture
def deterministic(monkeypatch):
    """Has torch add up in a fixed order; left to itself it takes attention gradients as they come."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def full_fp32(monkeypatch):
    """Switches off TF32, which torch uses in convolutions by default and which keeps 11 bits of 24."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def waiting_is_an_error():
    """Switches on and off that torch refuses to wait for the device."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


def seeded():
    return torch.Generator().manual_seed(0)


def losses(result):
    return [json.loads(line)["loss"] for line in (result.run / "log.jsonl").read_text().splitlines()]


def same_weights(one, other):
    states = one.model.state_dict(), other.model.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def test_a_run_in_bf16_trains_and_its_adapter_loads_on_a_cpu(distil, tiny):
    before = tiny().state_dict()
    result = distil("run")
    state = result.model.state_dict()

    assert len(losses(result)) == 4
    assert all(torch.isfinite(torch.tensor(losses(result))))
    assert next(result.model.parameters()).device.type == DEVICE
    assert {value.dtype for value in state.values()} == {torch.float32}, "master weights stay fp32"
    assert not torch.equal(state["blocks.2.mlp.fc1.weight"].cpu(), before["blocks.2.mlp.fc1.weight"])
    assert torch.equal(state["blocks.0.mlp.fc1.weight"].cpu(), before["blocks.0.mlp.fc1.weight"])

    loaded = phreg.load(result.run, into=tiny()).state_dict()
    assert all(torch.equal(loaded[key], state[key].cpu()) for key in state)


@pytest.mark.usefixtures("deterministic")
def test_the_same_seed_gives_the_same_bits(distil):
    assert same_weights(distil("one"), distil("two"))


@pytest.mark.usefixtures("deterministic")
def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(distil):
    class Stopped(Exception):
        pass

    def stop_after_the_checkpoint(record, steps):
        if record.step == 3:
            raise Stopped

    whole = distil("whole")
    with pytest.raises(Stopped):
        distil("parts", observe=stop_after_the_checkpoint)
    assert same_weights(distil("parts", resume=True), whole)


@pytest.mark.usefixtures("full_fp32")
@pytest.mark.parametrize(
    ("bf16", "tolerance"),
    [
        # Sums in another order: a few of fp32's last bits (6e-8), through three blocks.
        pytest.param(False, 1e-5, id="fp32"),
        # bf16 rounds each product and sum to 8 bits (0.4 %); three blocks add some of that up.
        pytest.param(True, 0.02, id="bf16"),
    ],
)
def test_the_target_is_the_cpus(tiny, bf16, tolerance):
    images = torch.randn(4, 3, 32, 32, generator=seeded())

    def target(device, bf16):
        teacher = Teacher(adapt(tiny().to(device)), ViewsConfig(count=5), bf16=bf16)
        return teacher(images.to(device), seeded()).patches.cpu()

    expected, found = target("cpu", False), target(DEVICE, bf16)
    assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("views", [{}, {"fill": "reflect"}, {"fill": "valid-crop"}], ids=str)
def test_the_teacher_never_waits_for_the_device(tiny, waiting_is_an_error, views):
    teacher = Teacher(adapt(tiny().to(DEVICE)), ViewsConfig(count=3, **views), bf16=True)
    images = torch.randn(4, 3, 32, 32, device=DEVICE)
    expected = teacher(images, seeded()).patches  # the first time, libraries load, and that waits

    waiting_is_an_error(True)
    found = teacher(images, seeded()).patches
    waiting_is_an_error(False)
    assert torch.equal(found, expected)


def test_normalising_never_waits_for_the_device(waiting_is_an_error):
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    normalise(images, mean, std)
    waiting_is_an_error(True)
    normalise(images, mean, std)


def test_the_loop_never_waits_for_the_device(distil, waiting_is_an_error):
    # Step 1 is reported during step 2, when all is warm; the checkpoint after the last step has to wait.
    result = distil(
        "run",
        steps=6,
        checkpoint_every=6,
        observe=lambda record, steps: waiting_is_an_error(record.step < steps - 1),
    )
    assert len(losses(result)) == 6


def test_a_teacher_that_runs_out_of_memory_goes_on_with_fewer_views_at_a_time(tiny, caplog):
    backbone = adapt(tiny(img_size=224, patch_size=16, embed_dim=192, depth=2, num_heads=3).to(DEVICE))
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    # 256 views are 154 MB, and several times that on the way through the model.
    views = ViewsConfig(count=64, max_shift=0.3)
    expected = Teacher(backbone, views, TargetConfig(micro_batch=16))(images, seeded()).patches

    greedy = Teacher(backbone, views, TargetConfig(micro_batch=256))
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 300 * 2**20) / total)
    try:
        with caplog.at_level(logging.WARNING, "phreg"):
            found = greedy(images, seeded()).patches
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert 1 <= greedy.micro_batch < 256
    assert f"{greedy.micro_batch} views at a time" in caplog.text
    # The same views, averaged in other portions, by kernels for other shapes and in TF32 (11 bits).
    assert (found - expected).norm() / expected.norm() < 1e-3


def test_compiled_blocks_give_the_same_loss_and_are_put_back(distil, tiny):
    model = tiny()
    plain, compiled = distil("plain"), distil("compiled", model, compile=True)
    # Both in bf16 (8 bits, 0.4 %), which fused kernels round at other places.
    assert losses(compiled)[0] == pytest.approx(losses(plain)[0], rel=0.02)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_run_that_fails_on_the_gpu_leaves_the_instance_on_the_cpu_with_its_own_weights(
    tiny, distil, monkeypatch
):
    model, before = tiny(), tiny().state_dict()

    def failing(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("phreg.api.distillation.save_run", failing)
    with pytest.raises(KeyboardInterrupt):
        distil("run", model)
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name])
