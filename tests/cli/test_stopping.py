"""Ctrl-C ends every command in one line, with exit code 130 and the command to go on with."""

import json
import os
import shlex
import signal

import pytest
from command_line import phreg

from phreg.cli.progress import ProgressReporter

QUICK = shlex.split(
    "--steps 6 --batch-size 2 --views.count 3 --measure.images 2 --measure.views 3 --data.workers 0 "
    "--registers 2 --measure.no-keep-best --force --device cpu --checkpoint-every 2"
)


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("verb", "command"),
    [
        ("quickstart", ["quickstart", "--output", "a run"]),
        ("distill", ["distill", "demo", "--images", "photos", "--output", "run"]),
        ("inspect", ["inspect", "demo", "--images", "my photos", "--output", "look"]),
        ("export", ["export", "run", "--format", "timm", "--output", "out"]),
        ("push", ["push", "run", "me/model"]),
        ("evaluate", ["evaluate", "demo", "--task", "dense-nn", "--data", "d", "--output", "out"]),
    ],
)
def test_ctrl_c_ends_a_command_in_one_line_that_says_how_to_go_on(verb, command, monkeypatch, capsys):
    monkeypatch.setattr(f"phreg.api.{verb}", interrupt)
    assert phreg(*command) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("phreg: stopped.")
    assert shlex.split(line.partition("To go on: ")[2]) == ["phreg", *command]


def test_a_run_that_has_begun_goes_on_by_resume(saved, photos, tmp_path, monkeypatch, capsys):
    run = tmp_path / "a run"

    def stop_at_once(self, record, steps):
        if record.step == 4:
            raise KeyboardInterrupt  # as a second Ctrl-C does, wherever the program is

    monkeypatch.setattr(ProgressReporter, "step", stop_at_once)
    assert phreg("distill", saved, "--images", photos, f"--output={run}", *QUICK) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "phreg: stopped. The run goes on from its last checkpoint. "
        f"To go on: phreg distill --output {shlex.quote(str(run))} --resume"
    )
    newest = sorted((run / "state").iterdir())[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == 2, "the checkpoint before is whole"
    monkeypatch.undo()
    assert phreg("distill", "--output", run, "--resume") in (0, 3)
    assert len((run / "log.jsonl").read_text().splitlines()) == 6


def test_a_run_stopped_by_sigterm_before_its_first_step_says_how_to_begin_again(monkeypatch, capsys):
    monkeypatch.setattr("phreg.api.distill", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    command = ["distill", "demo", "--images", "photos", "--output", "run"]
    assert phreg(*command) == 143
    assert capsys.readouterr().err == f"phreg: stopped. To go on: {shlex.join(['phreg', *command])}\n"


def test_the_first_ctrl_c_in_training_is_answered_at_once(monkeypatch, capfd):
    ProgressReporter().stopping()
    assert "Stopping after this step; a checkpoint follows." in capfd.readouterr().err
    monkeypatch.setenv("RANK", "1")
    ProgressReporter().stopping()
    assert capfd.readouterr().err == "", "one of many processes speaks"
