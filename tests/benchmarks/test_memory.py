"""benchmarks/memory: what it counts is what the allocator gives out."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

FOLDER = Path(__file__).parents[2] / "benchmarks" / "memory"

# Other benchmarks have a run.py too.
found = importlib.util.spec_from_file_location("memory_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(found)
sys.modules["memory_run"] = run  # its dataclasses look there
found.loader.exec_module(run)

TINY = {"model": "test_vit", "size": 160, "batch_size": 48, "rank": 2}


SCRATCH = 1e-3
"""What kernels ask for themselves, in GB: 1 MB."""


@pytest.mark.parametrize("variant", ["shared, fp32 products", "checkpointed, frozen bf16"])
def test_the_count_on_fake_tensors_is_what_the_allocator_gives_out(variant):
    options = run.Options(**TINY | run.VARIANTS[variant])
    predicted, measured = run.predict(options), run.measure(options)
    assert measured["measured_peak"] > predicted["weights"]
    assert predicted["peak"] == pytest.approx(measured["measured_peak"], abs=SCRATCH)


def test_a_step_in_parts_is_counted_too():
    whole, parts = (run.predict(run.Options(**TINY | {"micro_batch": size})) for size in (48, 12))
    assert parts["weights"] == whole["weights"]
    assert parts["peak"] < whole["peak"]


def test_live_bytes_are_those_of_tensors_that_are_alive_views_and_old_ones_once():
    there = torch.zeros(1000)
    with run.LiveBytes(iter([there, there[:10]])) as live:
        assert live.now == 4000
        one = torch.zeros(500)
        view = one[:100]
        added = there.view(10, 100) + 1
        assert live.now == 4000 + 2000 + 4000
        del one
        assert live.now == 10_000, "a view keeps it"
        del view, added
        assert live.now == 4000
    assert live.peak == 10_000


def test_shared_weights_count_once_and_rounded_ones_half():
    figures = {}
    for variant in ("two copies", "shared", "frozen bf16"):
        options = run.Options("vit_tiny_patch16_224", 64, **run.VARIANTS[variant])
        backbones = run.models(options, "meta")
        with FakeTensorMode():
            run.to_fake(*backbones)
            figures[variant] = run.Step(options, *backbones).weights()
    width, depth = 192, 12
    matrices = depth * 12 * width**2  # of the blocks
    assert figures["two copies"] - figures["shared"] > 4 * matrices, "all but what trains"
    assert figures["shared"] - figures["frozen bf16"] == 2 * matrices


def test_the_record_says_what_was_asked_and_found(tmp_path):
    output = tmp_path / "record.json"
    flags = ["--models", "test_vit", "--size", "160", "--batch-size", "32", "--rank", "2", "--measure"]
    run.main([*flags, "--variants", "shared", "checkpointed", "--output", str(output)])
    record = json.loads(output.read_text())
    assert [row["variant"] for row in record["rows"]] == ["shared", "checkpointed"]
    for row in record["rows"]:
        assert (row["size"], row["batch_size"], row["rank"]) == (160, 32, 2)
        assert row["peak"] == pytest.approx(row["measured_peak"], abs=SCRATCH)
    assert record["rows"][1]["peak"] < record["rows"][0]["peak"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_opening_a_transformers_model_maps_its_weights_and_copies_none(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, image_size=56)
    Dinov2Model(config).save_pretrained(tmp_path / "model")
    program = [sys.executable, FOLDER / "opening.py", tmp_path / "model", "--output", tmp_path / "found.json"]
    subprocess.run(program, check=True, capture_output=True, timeout=300)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["weights"] > 100  # MiB
    # No copy in memory of its own, only the pages of the file: opening takes about 10 MiB beside.
    assert found["anonymous_peak"] < 0.3 * found["weights"]
    assert found["all_peak"] < 1.3 * found["weights"]
