import copy
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import FAMILIES, LIBRARIES
from safetensors.torch import load_file

import phreg
from phreg import api
from phreg.api import distillation
from phreg.backbones import resolve
from phreg.backbones.readout import set_readout
from phreg.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    LoadError,
    PhregError,
    TrainingError,
)
from phreg.sinks.directions import SinkDirection
from phreg.sinks.locate import Sinks
from phreg.training import runtime, step_log
from phreg.training.task import RetrofitTask
from phreg.training.validation import Measurement, Validator

QUICK = {
    "batch_size": 2,
    "views": {"count": 3, "max_shift": 0.25},
    "measure": {"images": 0},  # which takes most of the time of a run as short as these
    "data": {"workers": 0},
    "device": "cpu",
    "registers": 2,
    "force": True,  # tiny random models have no artifacts
    "checks": {"drift": 0.0, "agreement": 1.0, "outlier_rate": 1.0},  # and may be changed at will
}


def run(model, photos, output, recipe: str | None = "relocate-0.1", **settings):
    """Trains by the recipe with the fewest parts: whole blocks at one rate, and the last state is kept."""
    return api.distill(model, photos, output, recipe=recipe, **(QUICK | {"steps": 4} | settings))


def weights(output):
    return load_file(output / "model" / "adapter.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_recipe_log_state_adapter_and_card(tiny, photos, tmp_path):
    measure = {"images": 2, "views": 3}
    result = run(tiny(), photos, tmp_path / "run", checkpoint_every=2, measure=measure)
    output = tmp_path / "run"
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["images_per_second"] > 0 for line in lines)
    assert [path.name for path in sorted((output / "state").iterdir())] == ["step-000002", "step-000004"]
    description = json.loads((output / "model" / "phreg.json").read_text())
    assert description["registers"] == 2
    assert description["figures"]["images"] == 2
    assert description["figures"]["held_out"] is True
    assert "Before and after" in (output / "model" / "README.md").read_text()
    assert result.model.num_prefix_tokens == 3


def test_the_loss_falls(tiny, photos, tmp_path):
    run(tiny(), photos, tmp_path / "run", steps=40, optim={"lr": 3e-3, "schedule": "constant"})
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


@pytest.fixture
def sinking(monkeypatch):
    """Has sinks found in a model that has none: all that relocation is told of."""

    def find_sinks(_backbone, _batches, norms):
        direction = SinkDirection(1, 0, torch.eye(32)[5], 0.0, 10.0, 0.0, 1.0)
        return Sinks(norms, 1, (), 0.0, (), None, (torch.zeros(1, 32),), (direction,))

    monkeypatch.setattr(distillation, "find_sinks", find_sinks)
    return {"measure": {"images": 0}}


def logged(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# Tracing reads the gradients of everything that enters a block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_relocation_among_them(
    tiny, photos, tmp_path, sinking, monkeypatch
):
    torch.compiler.reset()
    compile_, traced = torch.compile, []

    def tracing(forward):
        traced.append(forward)
        return compile_(forward, backend="aot_eager")  # which traces everything and generates no code

    monkeypatch.setattr(torch, "compile", tracing)
    run(tiny(), photos, tmp_path / "eager", **sinking)
    run(tiny(), photos, tmp_path / "compiled", compile=True, **sinking)
    assert len(traced) == 6, "three blocks of the teacher and three of the student"
    for eager, compiled in zip(logged(tmp_path / "eager"), logged(tmp_path / "compiled"), strict=True):
        assert compiled["terms"].keys() == eager["terms"].keys() >= {"relocation"}
        # Traced graphs sum in another order: fp32 rounding, over four steps.
        assert compiled["terms"] == pytest.approx(eager["terms"], rel=1e-3)


def test_relocation_alone_trains_and_no_loss_at_all_is_an_error(tiny, photos, tmp_path, sinking):
    off = {"cosine": 0, "mse": 0, "pooled": 0}
    run(tiny(), photos, tmp_path / "alone", loss=off, **sinking)
    assert all(line["terms"].keys() == {"relocation"} for line in logged(tmp_path / "alone"))
    assert not any("blocks.2." in name for name in weights(tmp_path / "alone")), "which it does not reach"
    with pytest.raises(ConfigError, match="every weight that applies is 0"):
        run(tiny(), photos, tmp_path / "none", loss=off | {"relocation": 0}, **sinking)


def test_sinks_that_end_up_in_no_register_are_named(tiny, photos, tmp_path, sinking, caplog):
    run(tiny(), photos, tmp_path / "run", steps=1, **sinking)
    assert "no register holds what the sinks held" in caplog.text


KEEP_BEST = {"images": 4, "views": 4, "every": 2, "keep_best": True}


def test_a_run_that_keeps_its_last_state_is_measured_once_and_says_where_it_damages_the_model(
    tiny, photos, tmp_path, caplog
):
    damaging = {"trust_region": False, "lr": 1.0, "warmup_steps": 0}
    last = {"measure": KEEP_BEST | {"keep_best": False}, "steps": 12}
    result = run(tiny(), photos, tmp_path / "run", optim=damaging, **last)
    assert result.outcome.best_step is None
    assert not result.unchanged
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" in line] == [10]
    assert "after 10 steps the model agrees less with its own moved views" in caplog.text


def test_the_best_state_of_a_run_that_averages_its_weights_is_an_average(tiny, photos, tmp_path, monkeypatch):
    rising = map(float, itertools.count(2))
    monkeypatch.setattr(Validator, "__call__", lambda *_: Measurement(next(rising), 0.0, 1.0))
    settings = {"optim": {"ema": 0.5}, "steps": 4}
    best = run(tiny(), photos, tmp_path / "best", measure=KEEP_BEST, **settings)
    last = run(tiny(), photos, tmp_path / "last", measure=KEEP_BEST | {"keep_best": False}, **settings)
    assert best.outcome.best_step == 4
    assert equal(best.model.state_dict(), last.model.state_dict())


def test_a_run_that_only_damages_hands_out_the_original(tiny, photos, tmp_path, caplog):
    model = tiny()
    result = run(model, photos, tmp_path / "run", measure=KEEP_BEST, optim={"lr": 1.0}, steps=6)
    assert result.outcome.best_step == 0
    assert "after 6 steps the model agrees less" not in caplog.text, (
        "nothing is lost, so nothing is to be done"
    )
    assert equal(model.state_dict(), tiny().state_dict()), "registers are gone too"
    assert result.unchanged
    with pytest.raises(LoadError, match="nothing to repair or to gain; use its base"):
        phreg.load(tmp_path / "run")
    report = tmp_path / "run" / "report"
    assert len((report / "log.jsonl").read_text().splitlines()) == 6, "what happened can be looked up"
    looked_at = json.loads((report / "inspect.json").read_text())
    assert [token["name"] for token in looked_at["tokens"]] == ["CLS"], (
        "the original is shown, not the student"
    )
    kept = run(tiny(), photos, tmp_path / "run", steps=1)
    assert not kept.unchanged, "the folder gives way to another run"


def test_the_best_state_is_kept_and_a_resumed_run_keeps_the_same(tiny, photos, tmp_path, monkeypatch):
    settings = {"measure": KEEP_BEST, "optim": {"trust_region": True, "lr": 1e-2, "max_movement": 1e-4}}
    settings |= {"steps": 8, "checkpoint_every": 3}
    straight = run(tiny(), photos, tmp_path / "straight", **settings)
    lines = [json.loads(line) for line in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["held_out"]["agreement"] for line in lines if "held_out" in line}
    assert measured.keys() == {2, 4, 6, 8}, "the log has what the choice was made by"
    assert straight.outcome.best_step == max(measured, key=measured.__getitem__)
    assert straight.comparison.agreement[1].mean == pytest.approx(max(measured.values()), abs=1e-5)

    monkeypatch.setattr(step_log.StepLogger, "write", stopping_at(5, step_log.StepLogger.write))
    with pytest.raises(Interrupted):
        run(tiny(), photos, tmp_path / "resumed", **settings)
    monkeypatch.undo()
    run(tiny(), photos, tmp_path / "resumed", resume=True, **settings)
    assert equal(weights(tmp_path / "resumed"), weights(tmp_path / "straight"))


def stopping_at(step, write):
    """Writes log lines as before, and asks to stop after one step's."""

    def writing(self, metrics):
        return write(self, metrics) or metrics.step == step

    return writing


def test_only_what_was_unlocked_changes(tiny, photos, tmp_path):
    run(tiny(), photos, tmp_path / "run", unlock={"roles": ["pos_embed"]})
    # cls_token: timm keeps the class position inside it once registers are there; it did not train.
    assert set(weights(tmp_path / "run")) == {"reg_token", "pos_embed", "cls_token"}


def test_lora_alone_leaves_the_blocks_as_they_are_but_for_products_of_its_rank(tiny, photos, tmp_path):
    model = tiny()
    lora = {"rank": 2, "blocks": 1}
    plain = {"trust_region": False, "lr": 1e-2}
    only = {"roles": ["pos_embed"], "lora": lora}
    run(model, photos, tmp_path / "run", recipe=None, unlock=only, optim=plain)
    before, after = tiny().state_dict(), model.state_dict()
    changed = {name for name in before if "blocks." in name and not torch.equal(before[name], after[name])}
    linear = {f"blocks.2.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert changed == linear, "no bias, no norm, no other block"
    for name in linear:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        # What is left of the third and later ones is the rounding of weights to fp32.
        assert values[1] > 1e-6
        assert values[2] < 1e-3 * values[1]


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 30), (2, 15), (4, 7), (20, 1)])
def test_epochs_are_passes_over_the_images_however_many_batches_make_a_step(
    accumulate, steps, tiny, photos, tmp_path
):
    # Twelve images: six batches of two a pass, thirty in five passes.
    settings = QUICK | {"measure": {"images": 0}, "optim": {"accumulate": accumulate}, "epochs": 5}
    outcome = api.distill(tiny(), photos, tmp_path / "run", **settings).outcome
    assert outcome.steps == steps
    assert outcome.images == steps * accumulate * 2


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_kernels_are_used_during_the_run_and_not_after_it(
    deterministic, tiny, photos, tmp_path
):
    seen = []

    def observe(_record, _steps):
        seen.append(torch.are_deterministic_algorithms_enabled())

    settings = QUICK | {"measure": {"images": 0}, "steps": 1, "deterministic": deterministic}
    api.distill(tiny(), photos, tmp_path / "run", observe=observe, **settings)
    assert seen == [deterministic]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny, photos, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tiny(), photos, tmp_path / name, seed=seed)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_reader_processes_do_not_change_the_run(tiny, photos, tmp_path):
    run(tiny(), photos, tmp_path / "a")
    run(tiny(), photos, tmp_path / "b", data={"workers": 2})
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"optim": {"ema": 0.9, "accumulate": 2, "clip_norm": 0.5}},
        {"unlock": {"roles": ["pos_embed"], "lora": {"rank": 2, "blocks": 1}}},
        {"target": {"cache": False}},
        {"data": {"workers": 0, "limit": 4}},  # from the third step on, targets are read, not made
        {"mixed_sizes": (24, (48, 24)), "optim": {"accumulate": 2}},
        {
            "mixed_sizes": (48,),
            "data": {"workers": 0, "limit": 10},
        },  # third batches go on into the next pass
    ],
)
def test_a_run_that_stopped_and_resumed_has_the_weights_of_one_that_did_not(
    tiny, photos, tmp_path, monkeypatch, extra
):
    run(tiny(), photos, tmp_path / "whole", steps=6, **extra)
    stop_after = 3
    original = step_log.StepLogger.write

    def write(self, metrics):
        return original(self, metrics) or metrics.step == stop_after

    monkeypatch.setattr(step_log.StepLogger, "write", write)
    with pytest.raises(Interrupted, match="--resume"):
        run(tiny(), photos, tmp_path / "parts", steps=6, **extra)
    monkeypatch.undo()
    seen_again = extra.keys() & {"optim", "data"}  # others see each image once
    kept = extra.get("target", {}).get("cache", True) and bool(seen_again)
    assert (tmp_path / "parts" / "targets").is_dir() == kept, "a killed run leaves them to the next"
    run(tiny(), photos, tmp_path / "parts", steps=6, resume=True, **extra)
    assert not (tmp_path / "parts" / "targets").exists()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def command(*arguments):
    return [sys.executable, "-m", "phreg", *map(str, arguments)]


def flags(saved, photos, output, steps):
    return [
        "distill",
        saved,
        "--images",
        photos,
        "--output",
        output,
        "--recipe",
        "relocate-0.1",
        "--steps",
        steps,
        "--batch-size",
        2,
        "--registers",
        2,
        "--views.count",
        3,
        "--views.max-shift",
        0.25,
        "--measure.images",
        0,
        "--data.workers",
        0,
        "--device",
        "cpu",
        "--checkpoint-every",
        1,
        "--force",
    ]


QUIET = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_a_run_killed_outright_again_and_again_ends_with_the_same_weights(saved, photos, tmp_path):
    steps = 60
    whole = command(*flags(saved, photos, tmp_path / "whole", steps))
    subprocess.run(whole, check=True, env=QUIET, capture_output=True)
    killed = command(*flags(saved, photos, tmp_path / "killed", steps))
    log = tmp_path / "killed" / "log.jsonl"
    for kill_at in sorted(random.Random(0).sample(range(5, 50), 2)):
        process = subprocess.Popen([*killed, "--resume"], env=QUIET, stdout=subprocess.DEVNULL)
        while not (log.exists() and log.read_text().count("\n") >= kill_at):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "model").exists()
    subprocess.run([*killed, "--resume"], check=True, env=QUIET, capture_output=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_polite_signal_ends_in_a_checkpoint_and_a_word_on_how_to_go_on(saved, photos, tmp_path, number):
    arguments = flags(saved, photos, tmp_path / "run", 100_000)
    log = tmp_path / "run" / "log.jsonl"
    with subprocess.Popen(command(*arguments), env=QUIET, stderr=subprocess.PIPE, text=True) as process:
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    logged = len(log.read_text().splitlines())
    newest = sorted((tmp_path / "run" / "state").iterdir())[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == logged


def test_slurm_signals_readers_too_and_they_take_it_well(saved, photos, tmp_path):
    arguments = flags(saved, photos, tmp_path / "run", 100_000)
    arguments[arguments.index("--data.workers") + 1] = 1
    log = tmp_path / "run" / "log.jsonl"
    with subprocess.Popen(
        command(*arguments), env=QUIET, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGUSR1)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors


def test_two_processes_train_what_one_with_twice_the_batch_trains(saved, photos, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    launch += ["--master-port", str(port), "-m", "phreg"]
    arguments = [
        *flags(saved, photos, tmp_path / "two", 4),
        "--unlock.roles",
        "pos_embed",
        "--optim.name",
        "sgd",
    ]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        env=QUIET,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "two" / "state" / "step-000004" / "state.json").read_text())
    assert state["facts"]["processes"] == 2
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 4, "one process logs"
    # With one view nothing is random but the order, and the ranks' batches are the halves of a single one.
    one_view = {
        "views": {"count": 1},
        "batch_size": 4,
        "unlock": {"roles": ["pos_embed"]},
        "optim": {"name": "sgd"},
    }
    # Ten steps, as a run is measured once after the tenth.
    run(saved, photos, tmp_path / "one", steps=10, measure={"images": 5, "views": 3}, **one_view)
    arguments = [
        *flags(saved, photos, tmp_path / "split", 10),
        "--unlock.roles",
        "pos_embed",
        "--optim.name",
        "sgd",
    ]
    arguments[arguments.index("--views.count") + 1] = 1
    arguments[arguments.index("--measure.images") + 1] = 5
    arguments += ["--measure.views", 3]
    launch[launch.index("--master-port") + 1] = str(port + 1)
    subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        env=QUIET,
        check=True,
        capture_output=True,
        timeout=300,
    )
    for name, tensor in weights(tmp_path / "one").items():
        # Means over halves, averaged, against one mean over all: float rounding only.
        torch.testing.assert_close(weights(tmp_path / "split")[name], tensor, atol=1e-6, rtol=1e-5)
    halves, whole = (logged(tmp_path / name)[9]["held_out"] for name in ("split", "one"))
    assert halves == pytest.approx(whole, abs=1e-5), "both measured their share, and agree on the whole"


def test_accelerate_launch_runs_the_same_program(saved, photos, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "-m",
        "phreg",
    ]
    arguments = map(str, flags(saved, photos, tmp_path / "launched", 2))
    subprocess.run([*launch, *arguments], env=QUIET, check=True, capture_output=True, timeout=300)
    subprocess.run(
        command(*flags(saved, photos, tmp_path / "plain", 2)), env=QUIET, check=True, capture_output=True
    )
    assert equal(weights(tmp_path / "launched"), weights(tmp_path / "plain"))


def test_a_nan_loss_names_step_files_and_the_last_good_checkpoint(tiny, photos, tmp_path, monkeypatch):
    real = RetrofitTask.loss
    calls = []

    def poisoned(*arguments):
        loss, terms = real(*arguments)
        calls.append(loss)
        return (loss * float("nan"), terms) if len(calls) == 3 else (loss, terms)

    monkeypatch.setattr(RetrofitTask, "loss", poisoned)
    with pytest.raises(TrainingError, match=r"nan at step 3, on .*\.png.*step-000002"):
        run(tiny(), photos, tmp_path / "run", checkpoint_every=1)
    states = sorted(path.name for path in (tmp_path / "run" / "state").iterdir())
    assert states[-1] == "step-000002", "nothing is saved after a step that was not finite"


def test_one_process_may_run_in_one_precision_and_then_in_another(tiny, photos, tmp_path):
    for number, precision in enumerate(("fp32", "bf16", "fp32")):
        run(tiny(), photos, tmp_path / str(number), steps=1, precision=precision)
    assert equal(weights(tmp_path / "0"), weights(tmp_path / "2"))
    assert not equal(weights(tmp_path / "0"), weights(tmp_path / "1"))


def test_a_tracker_that_is_not_installed_says_what_to_install(tiny, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PhregError, match=r'pip install "phreg\[wandb\]"'):
        run(tiny(), photos, tmp_path / "run", trackers=["wandb"])


def test_tensorboard_gets_the_losses(tiny, photos, tmp_path):
    run(tiny(), photos, tmp_path / "run", trackers=["tensorboard"])
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_a_finished_run_resumed_is_the_same_run(tiny, photos, tmp_path):
    run(tiny(), photos, tmp_path / "run")
    before = weights(tmp_path / "run")
    run(tiny(), photos, tmp_path / "run", resume=True)
    assert equal(before, weights(tmp_path / "run"))


def test_bad_input_is_one_clear_error_each_before_any_training(tiny, photos, tmp_path):
    cases = [
        (DataError, "no images", {"images": tmp_path / "none"}),
        (PhregError, "multiple", {"size": 30}),
        (PhregError, "size 30 asked", {"mixed_sizes": (24, 30)}),
        (PhregError, "48x48 is there already", {"mixed_sizes": (24, 48, (48, 48))}),
        (PhregError, "32x32 is there already", {"mixed_sizes": (32,)}),
        (PhregError, "at this size, 8x8", {"mixed_sizes": (8,)}),
        (DataError, "1 of each size", {"mixed_sizes": (8, 16, 24, 40, 48, 56), "views": {"count": 1}}),
        (ConfigError, "native_size", {"mixed_sizes": (24,), "target": {"native_size": True}}),
        (PhregError, "views.count", {"views": {"count": 30, "max_shift": 0.25}}),
        (DataError, "batch", {"batch_size": 100}),
        (ConfigError, "unlock.roles", {"unlock": {"roles": ["nose"]}}),
        (ConfigError, "did you mean", {"step": 3}),
    ]
    (tmp_path / "none").mkdir()
    for kind, message, settings in cases:
        images = settings.pop("images", photos)
        with pytest.raises(kind, match=message):
            run(tiny(), images, tmp_path / f"run-{message}", **settings)
        assert not (tmp_path / f"run-{message}").exists()


def test_resuming_on_other_images_is_refused(tiny, photos, tmp_path):
    run(tiny(), photos, tmp_path / "run")
    (photos / "00.png").unlink()
    with pytest.raises(CheckpointError, match="images was"):
        run(tiny(), photos, tmp_path / "run", resume=True)


def test_a_model_that_has_registers_is_not_given_more(tiny, photos, tmp_path):
    with pytest.raises(PhregError, match="registers from phreg already"):
        run(phreg.add_registers(tiny(), 2), photos, tmp_path / "run")


def test_recipe_alone_can_name_model_images_and_output(saved, photos, tmp_path):
    recipe = tmp_path / "mine.toml"
    lines = [
        f'{key} = "{value}"'
        for key, value in (("model", saved), ("images", photos), ("output", tmp_path / "run"))
    ]
    recipe.write_text("\n".join(lines))
    result = api.distill(recipe=recipe, **QUICK, steps=1)
    assert result.run == tmp_path / "run"
    with pytest.raises(ConfigError, match="has 3 problems"):
        api.distill(**QUICK)


def test_what_was_written_can_be_rerun_as_it_is(saved, photos, tmp_path):
    run(saved, photos, tmp_path / "first")
    again = api.distill(recipe=tmp_path / "first" / "recipe.toml", output=tmp_path / "second")
    assert again.run == tmp_path / "second"
    assert equal(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_loading_a_run_finds_its_base_and_gives_the_ordinary_class(saved, photos, tmp_path):
    result = run(saved, photos, tmp_path / "run")
    loaded = phreg.load(tmp_path / "run")
    assert type(loaded) is type(result.model)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), result.model(images))
    assert (
        Path(json.loads((tmp_path / "run" / "model" / "phreg.json").read_text())["base"]["source"]) == saved
    )


@pytest.mark.parametrize("library", ["transformers", "open_clip", "timm"])
def test_the_papers_method_for_clip_runs_to_the_letter_and_its_adapter_loads_back(photos, tmp_path, library):
    model, base = LIBRARIES[library]["clip"](), LIBRARIES[library]["clip"]()
    backbone = resolve.adapt(base)
    size = backbone.spec.input_size[0] + 2 * backbone.spec.patch_size[0]
    run(model, photos, tmp_path / "run", recipe=None, method="paper", size=size, steps=2)
    description = json.loads((tmp_path / "run" / "model" / "phreg.json").read_text())
    assert description["readout"] == "value-only"
    assert description["input_size"] == [size, size], "the position embedding was resampled once and stored"
    assert description["recipe"]["optim"]["lr"] == 3e-4
    loaded = resolve.adapt(phreg.load(tmp_path / "run", into=base))
    patched = resolve.adapt(model)
    assert loaded.trained_readout == patched.trained_readout == "value-only"
    assert loaded.readout == patched.readout == "plain", "so that its pooled output means something"
    images = torch.randn(2, 3, size, size)
    for readout in ("plain", "value-only"):
        for side in (loaded, patched):
            set_readout(side, readout)
        assert torch.equal(loaded(images).patches, patched(images).patches)


def test_more_reference_views_than_there_are_means_all_there_are(tiny, photos, tmp_path):
    result = run(tiny(), photos, tmp_path / "run", measure={"images": 2, "views": 500})
    assert result.comparison.reference == "the original averaged over 18 views"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_distilled_and_loads_back_onto_its_base(family, photos, tmp_path):
    model = FAMILIES[family]()
    base = copy.deepcopy(model)  # not built anew: CoCa leaves some memory as it finds it
    run(model, photos, tmp_path / "run", steps=1, measure={"images": 0}, data={"workers": 0})
    patched, loaded = resolve.adapt(model), resolve.adapt(phreg.load(tmp_path / "run", into=base))
    changed = weights(tmp_path / "run")
    assert changed, "training changed something"
    images = torch.randn(2, 3, *patched.spec.input_size, generator=torch.Generator().manual_seed(0))
    assert patched.num_registers == loaded.num_registers == 2
    with torch.no_grad():
        ours, theirs = patched(images), loaded(images)
    assert torch.equal(ours.patches, theirs.patches)
    assert torch.equal(ours.pooled, theirs.pooled)
