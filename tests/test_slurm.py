"""recipes/slurm.md: its job runs with stand-ins for Slurm, and every program takes the flags it is given."""

import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import phreg
from phreg import api, cli, methods

PAGE = (Path(__file__).parents[1] / "recipes" / "slurm.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
JOB, TORCHRUN, ACCELERATE = (block for language, block in BLOCKS if language == "bash")

# Options of sbatch, from its manual page.
SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue"),
    *("open-mode", "output"),
}


def words_of(block):
    """The words of a block's command, as bash splits them, with every variable 2."""
    (line,) = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("srun")]
    words = shlex.split(line)
    if "-c" in words:  # what bash runs
        words = shlex.split(words[words.index("-c") + 1])
    return [re.sub(r"\$\w+", "2", word) for word in words]


@pytest.fixture
def taken(monkeypatch):
    """Runs words as phreg's command line, up to the call."""

    def run(words):
        called = []

        def distill(*arguments, recipe=None, resume=False, observe=None, **settings):
            called.append((arguments, resume, methods.resolve(recipe, settings)))
            raise phreg.PhregError("not run in this test")

        monkeypatch.setattr(api, "distill", distill)
        with pytest.raises(SystemExit):
            cli.main(words)
        ((_, resume, config),) = called
        assert resume, "a job that is queued again goes on"
        return config

    return run


def test_the_jobs_command_is_one_that_phreg_takes(taken):
    words = words_of(JOB)
    config = taken(words[words.index("phreg") + 1 :])
    assert config.precision == "bf16"
    assert config.checkpoint_every == 200


def test_torchrun_takes_its_flags_and_phreg_those_after_it(taken):
    words = words_of(TORCHRUN)
    found = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (found.training_script, found.module) == ("phreg", True)
    assert found.signals_to_handle.split(",") == ["SIGTERM", "SIGINT", "SIGUSR1"]
    assert found.rdzv_backend == "c10d"
    taken(found.training_script_args)


def test_accelerate_takes_its_flags_and_phreg_those_after_it(taken):
    words = words_of(ACCELERATE)
    found = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
    assert (found.training_script, found.module, found.multi_gpu) == ("phreg", True, True)
    assert (found.num_machines, found.machine_rank, found.num_processes) == (2, 2, 8)
    taken(found.training_script_args)


def test_every_option_of_the_job_is_one_of_sbatch():
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", JOB, flags=re.MULTILINE)
    assert len(options) == JOB.count("#SBATCH")
    assert {name for name, _ in options} == SBATCH
    assert dict(options)["signal"].startswith("USR1@")


# srun starts two tasks; the jobs' program says where it is and ends with a status.
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"; first=$?
SLURM_PROCID=1 SLURM_LOCALID=1 "$@"
exit $first
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*"; fi
"""
PHREG = """#!/bin/bash
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK on its node, by $MASTER_ADDR:$MASTER_PORT: $1 $2"
exit $STATUS
"""


@pytest.mark.parametrize(("status", "again"), [(130, True), (0, False), (3, False), (1, False)])
def test_the_job_starts_every_rank_and_queues_again_what_can_go_on(tmp_path, status, again):
    for name, script in {"srun": SRUN, "scontrol": SCONTROL, "phreg": PHREG}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_JOB_ID": "41234", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status)}
    done = subprocess.run(
        ["bash", "-c", JOB], env=os.environ | environment | path, capture_output=True, text=True
    )
    assert done.returncode == status
    told = "rank {0} of 2, {0} on its node, by node7:21234: distill facebook/dinov2-large"
    expected = [told.format(0), told.format(1), *(["scontrol requeue 41234"] if again else [])]
    assert done.stdout.splitlines() == expected
    assert done.stderr == ""


def test_its_python_binds_and_its_error_is_the_one_that_is_raised():
    (python,) = (block for language, block in BLOCKS if language == "python")
    compile(python, "slurm.md", "exec")
    inspect.signature(phreg.distill).bind("model", "photos", "output", resume=True)
    assert issubclass(phreg.errors.Interrupted, phreg.PhregError)
