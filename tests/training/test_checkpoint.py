import json
import os

import pytest
import torch

from phreg import api
from phreg.errors import CheckpointError
from phreg.methods import resolve
from phreg.training import checkpoint
from phreg.training.checkpoint import RunFolder


def stepped(value=1.0, seed=0):
    """A weight and an AdamW that has taken one step."""
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.full((3,), value))
    optim = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optim.step()
    return {"w": weight}, optim


def test_what_sessions_took_is_kept_and_added_to_by_the_next(tmp_path):
    run = RunFolder(tmp_path)
    took = checkpoint.Sessions(seconds=12.5, skipped=frozenset({"b.jpg", "a.jpg"}))
    folder = checkpoint.save_state(run, 5, *stepped(), {}, took)
    assert checkpoint.past_sessions(run, 5) == took
    assert checkpoint.past_sessions(run, 0) == checkpoint.Sessions(seconds=0, skipped=frozenset())
    told = json.loads((folder / "state.json").read_text())
    del told["sessions"]  # as 0.1 wrote it
    (folder / "state.json").write_text(json.dumps(told))
    assert checkpoint.past_sessions(run, 5).seconds == 0


def test_a_checkpoint_gives_back_weights_and_optimizer_bit_for_bit(tmp_path):
    run = RunFolder(tmp_path)
    weights, optim = stepped()
    checkpoint.save_state(run, 7, weights, optim, {"processes": 1})
    others, other_optim = stepped(5.0)
    assert checkpoint.load_state(run, others, other_optim, {"processes": 1}) == 7
    for side, opt in ((weights, optim), (others, other_optim)):
        side["w"].grad = torch.ones(3)
        opt.step()
    assert torch.equal(weights["w"], others["w"])


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 10, 15, 20):
        checkpoint.save_state(run, step, *stepped(), {})
    assert [path.name for path in run.states] == ["step-000015", "step-000020"]


def test_checkpoints_are_in_the_order_of_their_steps_beyond_six_digits(tmp_path):
    run = RunFolder(tmp_path)
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save_state(run, step, *stepped(), {})
    assert [path.name for path in run.states] == ["step-999999", "step-1000000"]
    assert checkpoint.load_state(run, *stepped(), {}) == 1_000_000


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 10):
        checkpoint.save_state(run, step, *stepped(), {})
    (run.states[-1] / "state.safetensors").write_bytes(b"cut short")
    assert checkpoint.load_state(run, *stepped(), {}) == 5


def test_a_run_of_other_facts_is_not_resumed(tmp_path):
    run = RunFolder(tmp_path)
    checkpoint.save_state(run, 5, *stepped(), {"processes": 2})
    with pytest.raises(CheckpointError, match="processes was 2, is 1"):
        checkpoint.load_state(run, *stepped(), {"processes": 1})


def test_a_changed_recipe_is_refused_key_by_key_but_where_it_runs_may_change(tmp_path):
    config = resolve(None, {"steps": 5, "optim.lr": 1e-3})
    checkpoint.start_run(tmp_path / "run", config, resume=False)
    moved = resolve(
        None, {"steps": 5, "optim.lr": 1e-3, "device": "cpu", "checkpoint_every": 3, "checks.drift": 0.5}
    )
    checkpoint.start_run(tmp_path / "run", moved, resume=True)
    with pytest.raises(CheckpointError, match=r"optim.lr: was 0.001, is 0.01"):
        checkpoint.start_run(tmp_path / "run", resolve(None, {"steps": 5, "optim.lr": 1e-2}), resume=True)


def test_an_output_that_holds_something_is_never_overwritten(tmp_path):
    config = resolve(None, {})
    checkpoint.start_run(tmp_path / "run", config, resume=False)
    with pytest.raises(CheckpointError, match="--resume"):
        checkpoint.start_run(tmp_path / "run", config, resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(CheckpointError, match="not empty"):
        checkpoint.start_run(tmp_path / "other", config, resume=False)
    with pytest.raises(
        CheckpointError, match="not empty"
    ):  # before the model, which is not there, is asked for
        api.distill("no/model", tmp_path, tmp_path / "other")


def test_the_log_of_a_killed_run_is_cut_back_to_its_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    checkpoint.truncate_log(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_write_that_fails_during_a_run_says_how_to_go_on(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    checkpoint.save_state(run, 1, *stepped(), {})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=f"No space left.*phreg distill --output {run.path} --resume"):
        checkpoint.save_state(run, 2, *stepped(), {})
    assert [path.name for path in run.states] == ["step-000001"]
    with pytest.raises(CheckpointError, match="choose another --output") as error:
        checkpoint.start_run(tmp_path / "other", resolve(None, {}), resume=False)
    assert "--resume" not in str(error.value), "there is nothing to go on with"
