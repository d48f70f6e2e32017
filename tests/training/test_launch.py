import os
import re
import subprocess
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from short_runs import SHORT

from phreg import api
from phreg.config import DistillConfig
from phreg.errors import PhregError
from phreg.training.launch import check_launch, launched_precision, reshards, shards_weights


def launched(*flags):
    """The environment that `accelerate launch` gives its processes, by its own code."""
    arguments = launch_command_parser().parse_args([*flags, "train.py"])
    # What the launcher itself fills in from its config file or by default.
    arguments.mixed_precision = arguments.mixed_precision or "no"
    arguments.dynamo_backend = arguments.dynamo_backend or "no"
    arguments.num_cpu_threads_per_process = arguments.num_machines = arguments.num_processes = 1
    return prepare_multi_gpu_env(arguments)


REFUSED = [
    (["--use_fsdp", "--fsdp_version", "1"], "FSDP 1, and phreg supports FSDP 2.*--fsdp_version 2"),
    (["--use_fsdp", "--fsdp_version", "2", "--fsdp_offload_params", "true"], "fsdp_offload_params"),
    (
        ["--use_fsdp", "--fsdp_version", "2", "--fsdp_activation_checkpointing", "true"],
        "fsdp_activation_checkpointing.*--checkpoint-activations",
    ),
    (["--use_megatron_lm"], "Megatron-LM.*models written for it"),
    (
        ["--multi_gpu", "--use_parallelism_config", "--parallelism_config_tp_size", "2"],
        "parallelism config.*hooks",
    ),
    (["--dynamo_backend", "inductor"], "dynamo_backend inductor.*--compile"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_accelerate_would_do_past_phreg_is_refused_with_a_reason(flags, message):
    with pytest.raises(PhregError, match=f"(?s)accelerate is configured for.*{message}"):
        check_launch(DistillConfig(), launched(*flags))


# DeepSpeed's launcher asks for the package; what it leaves in the environment is fixed.
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed.*engine of its own"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--optim.accumulate 4"),
    ],
)
def test_variables_that_accelerate_reads_are_read_before_it_does(variable, value, message):
    with pytest.raises(PhregError, match=message):
        check_launch(DistillConfig(), {variable: value})


@pytest.mark.parametrize("flags", [["--cpu"], ["--multi_gpu"], ["--multi_gpu", "--mixed_precision", "bf16"]])
def test_plain_data_parallel_launches_are_taken(flags):
    environment = launched(*flags)
    check_launch(DistillConfig(), environment)
    assert not shards_weights(environment)


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_2_is_taken_and_every_process_loads_the_weights(reshard, monkeypatch):
    # transformers reads this, and would load them in the first process alone.
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    again = ["--fsdp_reshard_after_forward", str(reshard).lower()]
    environment = launched("--use_fsdp", "--fsdp_version", "2", *again)
    check_launch(DistillConfig(), environment)
    assert shards_weights(environment)
    assert reshards(environment) == reshard
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_all_that_is_wrong_is_said_at_once():
    environment = launched("--use_fsdp", "--dynamo_backend", "inductor")
    with pytest.raises(PhregError, match=r"(?s)FSDP 1.*\nand for dynamo_backend"):
        check_launch(DistillConfig(), environment)


def test_a_plugin_is_refused_before_model_and_images_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(PhregError, match="DeepSpeed"):
        api.distill("no/such-model", tmp_path / "no-images", tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launched", "flag", "precision", "warns"),
    [
        ("no", None, None, False),  # which accelerate sets where nobody chose
        ("no", "bf16", "bf16", False),
        ("bf16", None, "bf16", False),
        ("bf16", "bf16", "bf16", False),
        ("bf16", "fp32", "fp32", True),
        ("fp16", "fp32", "fp32", True),
        ("fp8", "bf16", "bf16", True),
    ],
)
def test_the_flag_decides_precision_before_accelerate_does_and_a_conflict_is_told(
    launched, flag, precision, warns, caplog
):
    found = launched_precision(DistillConfig(precision=flag), {"ACCELERATE_MIXED_PRECISION": launched})
    assert found == precision
    told = [record.message for record in caplog.records if "--precision decides" in record.message]
    assert len(told) == warns


@pytest.mark.parametrize(
    ("launched", "reason"), [("fp16", "underflow unless they are scaled"), ("fp8", "fp32 or")]
)
def test_a_precision_that_phreg_does_not_train_in_is_refused(launched, reason):
    with pytest.raises(PhregError, match=f"mixed_precision {launched}, .*{reason}.*--precision"):
        check_launch(DistillConfig(), {"ACCELERATE_MIXED_PRECISION": launched})


def test_a_launched_program_ends_with_the_reason_and_no_traceback(saved, photos, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--mixed_precision", "fp16", "-m", "phreg", "distill", str(saved), "--images", str(photos)]
    done = subprocess.run(
        [*launch, "--output", str(tmp_path / "run")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    own = done.stderr[: done.stderr.find("Traceback")]  # what follows is the launcher's own
    assert re.search(r"phreg: accelerate asks\s+for mixed_precision fp16", own)
