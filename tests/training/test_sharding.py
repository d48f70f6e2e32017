"""phreg.training.sharding: two processes that shard what trains do what one does with twice the batch."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from families import LIBRARIES
from safetensors.torch import load_file
from short_runs import logged
from torch import nn

from phreg import api
from phreg.backbones import resolve
from phreg.config import UnlockConfig
from phreg.errors import PhregError
from phreg.training.sharding import ShardedStudent, fill, is_sharded, like, whole
from phreg.training.trainable import unlock

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` leaves to its processes."""

# With one view nothing is random but the order, and the batches of both are the halves of a single one.
SETTINGS = {
    "steps": 10, "views": {"count": 1}, "data": {"workers": 0}, "device": "cpu", "registers": 2,
    "force": True,
    "measure": {"images": 5, "views": 3}, "checkpoint_every": 5, "precision": "fp32",
    "checks": {"drift": 0.0, "agreement": 1.0, "outlier_rate": 1.0},
}  # fmt: skip

WHOLE_BLOCKS = {"recipe": "relocate-0.1", "optim": {"clip_norm": 1.0, "ema": 0.9}}
LORA = {
    "recipe": None,
    "method": "denoise",
    "unlock": {"roles": ["vectors"], "lora": {"rank": 2, "blocks": "all"}},
    "checkpoint_activations": True,
    "optim": {"trust_region": False},  # rates are measured on the batch of one process
    "measure": {"images": 5, "views": 3, "keep_best": False},
}

LAUNCHED = """
import json, sys
from torch import nn

from phreg import api
from phreg.backbones import resolve
from phreg.config import UnlockConfig
from phreg.errors import PhregError
from phreg.training.sharding import ShardedStudent, fill, is_sharded, like, whole
from phreg.training.trainable import unlock
saved, photos, output, settings = sys.argv[1:]
result = api.distill(saved, photos, output, **json.loads(settings))
kinds = {type(module).__name__ for module in result.model.modules()}
assert not any(kind.startswith("FSDP") for kind in kinds), kinds
assert not any("DTensor" in type(value.data).__name__ for value in result.model.parameters())
"""


def in_two(saved, photos, output, **settings):
    """Distils in two processes under FSDP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = output.parent / "launched.py"
    script.write_text(LAUNCHED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    done = subprocess.run(
        [*launch, script, saved, photos, output, json.dumps(settings)],
        env=os.environ | FSDP | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(WHOLE_BLOCKS, id="whole blocks"), pytest.param(LORA, id="LoRA", marks=pytest.mark.slow)],
)
def test_sharded_runs_have_the_losses_and_weights_of_one_process_and_resume(saved, photos, tmp_path, kind):
    settings = SETTINGS | kind
    api.distill(saved, photos, tmp_path / "one", batch_size=4, **settings)
    in_two(saved, photos, tmp_path / "two", batch_size=2, **settings)
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(two) == 10
    for alone, sharded in zip(one, two, strict=True):
        assert sharded["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert two[9]["held_out"] == pytest.approx(one[9]["held_out"], abs=1e-5)

    # A checkpoint has whole tensors, named as those of one process.
    states = [tmp_path / name / "state" / "step-000010" / "state.safetensors" for name in ("one", "two")]
    first, second = map(load_file, states)
    assert {name: value.shape for name, value in first.items()} == {n: v.shape for n, v in second.items()}

    # Killed after the first checkpoint: what is left of the run goes on with it.
    trained = load_file(tmp_path / "two" / "model" / "adapter.safetensors")
    shutil.rmtree(tmp_path / "two" / "state" / "step-000010")
    shutil.rmtree(tmp_path / "two" / "model")
    in_two(saved, photos, tmp_path / "two", batch_size=2, resume=True, **settings)
    resumed = load_file(tmp_path / "two" / "model" / "adapter.safetensors")
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    again = logged(tmp_path / "two")
    assert [line["loss"] for line in again] == [line["loss"] for line in two]


@pytest.mark.slow
def test_sharded_states_are_measured_and_the_best_one_kept_as_on_one_process(photos, tmp_path):
    saved = tmp_path / "clip"
    LIBRARIES["transformers"]["clip"]().save_pretrained(saved)
    settings = SETTINGS | {
        "recipe": None,
        "method": "denoise",
        # Such a read-out takes the last block apart.
        "target": {"student_readout": "naclip", "teacher_readout": "naclip"},
        "unlock": {"roles": ["blocks"], "lora": {"rank": 0}},
        "measure": {"images": 5, "views": 3, "keep_best": True, "every": 2},
        "optim": {"trust_region": False, "lr": 1e-5, "warmup_steps": 0},
        # Those two are divided by the scale of the batch of one process.
        "loss": {"mse": 1.0, "relative_mse": 0.0, "pooled": 0.0},
    }
    one = api.distill(saved, photos, tmp_path / "one", batch_size=4, **settings)
    in_two(saved, photos, tmp_path / "two", batch_size=2, **settings)
    logs = [next((tmp_path / name).rglob("log.jsonl")) for name in ("one", "two")]
    first, second = (logged(log.parent) for log in logs)
    assert sum("held_out" in line for line in second) >= 4
    for alone, sharded in zip(first, second, strict=True):
        assert sharded["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert sharded.get("held_out") == pytest.approx(alone.get("held_out"), abs=1e-5)
    assert (tmp_path / "two" / "model").exists() == (one.outcome.best_step > 0)


def test_lora_in_fused_attention_is_refused_with_what_to_do(photos, tmp_path):
    student = resolve.adapt(LIBRARIES["open_clip"]["clip"]())
    trained = unlock(student, UnlockConfig(roles=("vectors",), lora={"rank": 2, "blocks": "all"}))
    with pytest.raises(PhregError, match=r"FSDP, and .* has LoRA in fused attention.*--unlock\.roles"):
        ShardedStudent(student, trained)


def test_tensors_that_are_not_sharded_are_whole_as_they_are():
    tensor, value = torch.zeros(3), torch.arange(3.0)
    assert whole(tensor) is tensor
    fill(tensor, value)
    assert torch.equal(tensor, value)
    assert like(value, tensor) is value
    assert not is_sharded(nn.Linear(2, 2))
