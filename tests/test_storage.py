"""A write that fails leaves the old file, and advice that whoever asked for it can follow."""

import errno
import inspect
import os
import re

import pytest
from families import FAMILIES

import phreg
from phreg import api, storage
from phreg.cli import commands
from phreg.errors import CheckpointError, PhregError
from phreg.report.html import Report

QUICK = {
    "steps": 1,
    "batch_size": 2,
    "views": {"count": 2, "max_shift": 0.25},
    "measure": {"images": 0},
    "device": "cpu",
    "data": {"workers": 0},
    "force": True,
}


def full(_file):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def run(saved, photos, tmp_path):
    return api.distill(saved, photos, tmp_path / "run", **QUICK).run


def test_a_text_is_written_whole_or_the_old_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "text"
    storage.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_text(path, "new")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["text"]


def test_a_failed_write_is_an_error_of_the_kind_and_with_the_advice_that_the_caller_gives(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*place .*No space left.*; plant a tree"),
        storage.writing(tmp_path / "place", "plant a tree", CheckpointError),
    ):
        full(tmp_path)


COMMANDS = {
    "distill": lambda run, photos, out: api.distill(run / ".." / "vit", photos, out, **QUICK),
    "inspect": lambda run, photos, out: phreg.inspect(run, photos, output=out, count=1, device="cpu"),
    "evaluate": lambda run, photos, out: phreg.evaluate(
        run, task="consistency", data=photos, output=out, device="cpu", views=2
    ),
    "export": lambda run, photos, out: phreg.export(run, out, format="adapter"),
    "push": lambda run, photos, out: phreg.push(run, "me/vit", dry_run=out),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_on_a_full_disk_every_command_advises_only_what_it_can_do(
    command, run, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PhregError, match="No space left on device") as error:
        COMMANDS[command](run, photos, tmp_path / "out")
    flags = inspect.signature(getattr(commands, command)).parameters
    known = {f"--{name.replace('_', '-')}" for name in flags}
    known |= {"--output"} if command == "distill" else set()  # one of its settings
    advised = set(re.findall(r"--[a-z][a-z.-]*", str(error.value)))
    assert advised <= known
    assert "free space" in str(error.value)


def test_a_report_and_a_patched_model_that_cannot_be_saved_are_one_clear_error(tmp_path, monkeypatch):
    model = phreg.add_registers(FAMILIES["transformers/dinov2"](), 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PhregError, match="free space"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(PhregError, match="free space"):
        Report("a title", "<html>").save(tmp_path / "report.html")


def test_unreadable_images_are_counted_by_the_runs_own_limit_and_advice_names_flags_that_there_are(
    tiny, photos, tmp_path
):
    for number in range(3):
        (photos / f"broken-{number}.png").write_text("not an image")
    settings = QUICK | {"data": {"workers": 0, "max_broken": 0.5}, "measure": {"images": 3, "views": 2}}
    assert api.distill(tiny(), photos, tmp_path / "run", **settings).outcome.steps == 1
    with pytest.raises(PhregError, match=r"raise --data\.max-broken"):
        api.distill(tiny(), photos, tmp_path / "strict", **QUICK)
    with pytest.raises(PhregError, match="replace or remove them") as error:
        phreg.inspect(tiny(), photos, device="cpu")
    assert "--" not in str(error.value).partition("broken-0.png")[2].rpartition("\n")[2]


@pytest.mark.parametrize("format", ["merged", "timm"])
def test_what_is_there_to_be_shared_names_no_folder_of_this_disk(format, saved, photos, tmp_path):
    measured = QUICK | {"measure": {"images": 2, "views": 2, "source": photos}}
    run = api.distill(saved, photos, tmp_path / "run", **measured).run
    phreg.export(run, tmp_path / "out", format=format)
    phreg.inspect(run, photos, output=tmp_path / "look", count=1, device="cpu")

    shared = [*(tmp_path / "out").rglob("*"), *(tmp_path / "look").rglob("*"), run / "report" / "report.html"]
    assert len(shared) > 6
    naming = [file for file in shared if file.is_file() and os.fsencode(tmp_path) in file.read_bytes()]
    assert naming == []
    assert "photos" in (run / "report" / "report.html").read_text(), "what is left of a path"
