import ast
import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import phreg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phreg import config, load, methods
from phreg.cli.commands import COMMANDS
from phreg.cli.printing import console
from phreg.cli.progress import LINE_EVERY, ProgressReporter
from phreg.cli.suggestions import suggestions
from phreg.errors import LoadError
from phreg.evaluation.record import Metrics, MetricSpec, summarise
from phreg.evaluation.results import RESULTS, Results
from phreg.settings import fields, recipes

QUICK = [
    "--batch-size",
    2,
    "--views.count",
    3,
    "--views.max-shift",
    0.25,
    "--measure.images",
    2,
    "--measure.views",
    3,
    "--data.workers",
    0,
    "--device",
    "cpu",
    "--registers",
    2,
    "--measure.no-keep-best",
    "--force",
]


def test_distill_prints_the_table_and_leaves_the_run(saved, photos, tmp_path, capsys):
    code = phreg("distill", saved, "--images", photos, "--output", tmp_path / "run", "--steps", 2, *QUICK)
    printed = capsys.readouterr().out
    assert code == 0
    assert "outlier rate" in printed
    assert "pooled output" in printed
    assert "images not trained on" in " ".join(printed.split())
    assert "Artifacts went from " in printed
    assert "step 2/2" in printed, "a line where there is no terminal"
    assert (tmp_path / "run" / "report" / "report.html").is_file()


def test_a_flag_wins_over_the_recipe_even_if_it_says_the_default(saved, photos, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('method = "paper"\nregisters = 7\n')
    same_as_default = ["--loss.pooled", config.DistillConfig().loss.pooled]
    phreg(
        "distill",
        saved,
        "--images",
        photos,
        "--output",
        tmp_path / "run",
        "--recipe",
        recipe,
        "--steps",
        1,
        *QUICK,
        *same_as_default,
    )
    resolved = methods.resolve(tmp_path / "run" / "recipe.toml")
    assert resolved.registers == 2
    assert resolved.method == "paper"
    assert resolved.loss.pooled == 1.0


def test_errors_are_printed_without_a_traceback_and_exit_non_zero(tmp_path, capsys):
    code = phreg("distill", "demo", "--images", tmp_path / "nowhere", "--output", tmp_path / "run")
    errors = capsys.readouterr().err
    assert code == 1
    assert errors.startswith("phreg:")
    assert "nowhere" in errors
    assert "Traceback" not in errors


def test_what_is_missing_is_listed_at_once(capsys):
    assert phreg("distill", "demo") == 1
    errors = capsys.readouterr().err
    assert "images: not given" in errors
    assert "output: not given" in errors


def test_inspect_prints_a_verdict_and_writes_its_files(saved, photos, tmp_path, capsys):
    assert phreg("inspect", saved, "--images", photos, "--output", tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "No sinks found" in printed
    assert "Patch features agree to " in printed
    assert "vit: sinks …" in printed, "a line where there is no terminal"
    written = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert (written["outlier_rate"], written["emergence_block"]) == (0.0, None)
    assert (tmp_path / "out" / "report.html").is_file()


def test_size_takes_one_number_or_two_and_the_normalisation_three_each(saved, photos, tmp_path):
    given = ["--size", 16, 48, "--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6]
    several = ["--mixed-sizes", 24, 32]
    assert (
        phreg("inspect", saved, "--images", photos, "--output", tmp_path / "look", "--count", 2, *given) == 0
    )
    assert json.loads((tmp_path / "look" / "inspect.json").read_text())["size"] == [16, 48]
    run = tmp_path / "run"
    assert phreg(
        "distill", saved, "--images", photos, "--output", run, "--steps", 1, *QUICK, *given, *several
    ) in (
        0,
        3,
    )
    resolved = methods.resolve(run / "recipe.toml")
    assert resolved.mixed_sizes == (24, 32), "each number is a square"
    assert (resolved.size, resolved.mean, resolved.std) == ((16, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    record = json.loads((run / "model" / "phreg.json").read_text())
    assert (record["size"], record["mean"], record["std"]) == ([16, 48], [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_inspect_sets_models_side_by_side_in_one_report(saved, photos, tmp_path, capsys):
    other = saved.with_name("other")
    shutil.copytree(saved, other)
    classes = tmp_path / "classes"
    for number, name in enumerate("xxyy"):
        (classes / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / f"{number:02}.png", classes / name / f"{number}.png")
    asked = ["inspect", saved, "--baseline", other, "--images", photos, "--labels", classes, "--count", 3]
    assert phreg(*asked, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("No sinks found") == 2
    written = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert written["model"] == "vit"
    assert [against["model"] for against in written["against"]] == ["other"]
    assert written["class_probe"]["images"] == 4
    assert [path.name for path in (tmp_path / "out").glob("*.html")] == ["report.html"]
    assert "vit against other" in (tmp_path / "out" / "report.html").read_text()


def test_texts_asked_of_a_model_without_a_text_tower_end_in_one_error(saved, photos, tmp_path, capsys):
    asked = ["inspect", saved, "--images", photos, "--count", 2, "--texts", "a cat", "a dog"]
    assert phreg(*asked, "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("phreg:")
    assert not (tmp_path / "out").exists()


def test_recipes_lists_every_shipped_recipe(capsys):
    assert phreg("recipes") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipes())


def test_every_setting_is_a_flag_of_its_section():
    done = subprocess.run(
        [sys.executable, "-m", "phreg", "distill", "--help"], check=True, capture_output=True, text=True
    )
    printed = done.stdout
    for key in fields():
        if key != "model":
            leaf = "--" + key.replace("_", "-")
            assert leaf in printed, key
    sections = {key.rpartition(".")[0] for key in fields()} - {""}
    for section in sections:
        assert f" {section} options " in printed, section
    assert "{None}" not in printed, "no flag asks for None"


def test_what_a_method_changes_is_said_beside_the_default(capsys):
    assert phreg("distill", "--help") == 0
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "(default: 4; paper: 16; test-time: auto)" in printed
    assert "(default: 8; paper: 1)" in printed
    assert "(default: vectors; paper: pos_embed patch_embed block.-1)" in printed


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["inspct"], ["There is no command inspct; did you mean phreg inspect?"]),
        (["frobnicate"], []),
        (["--verison"], []),
        (["distill", "m", "--method", "relocat"], ["--method relocat: did you mean relocate?"]),
        (["distill", "m", "--method=relocat"], ["--method relocat: did you mean relocate?"]),
        (["distill", "m", "--method", "relocate", "denois"], []),
        (["export", "run", "--format", "onxx"], ["--format onxx: did you mean onnx?"]),
        (
            ["distill", "m", "--optim.learning-rate", "1e-3"],
            [
                "--optim.learning-rate: no flag of phreg distill; did you mean --optim.lr?",
                "All flags: phreg distill --help",
            ],
        ),
        (
            ["distill", "m", "--views=5"],
            [
                "--views: no flag of phreg distill; did you mean --views.count?",
                "All flags: phreg distill --help",
            ],
        ),
        (["distill", "m", "--views.no-subpatch", "--resume"], []),
        (
            ["inspect", "m", "--imags", "photos", "--zzz"],
            [
                "--imags: no flag of phreg inspect; did you mean --images?",
                "--zzz: no flag of phreg inspect",
                "All flags: phreg inspect --help",
            ],
        ),
    ],
)
def test_what_a_mistyped_command_line_may_have_meant(typed, said):
    assert suggestions(typed, COMMANDS) == said


def test_a_mistyped_command_gets_its_suggestion_after_the_parsers_message(capsys):
    assert phreg("inspct") == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == "There is no command inspct; did you mean phreg inspect?"
    )


def test_the_help_begins_with_what_the_program_does_and_in_which_order(capsys):
    assert phreg("--help") == 0
    printed = capsys.readouterr().out
    commands = ["phreg inspect", "phreg distill", "phreg evaluate", "phreg export"]
    places = [printed.index(f"  {command} ") for command in commands]
    assert places == sorted(places)
    assert "--version" in printed


def test_the_help_of_distill_begins_with_examples_and_common_flags(capsys):
    assert phreg("distill", "--help") == 0
    printed = capsys.readouterr().out
    assert printed.index("  phreg distill --recipe") < printed.index("--recipe NAME")
    flags = ["--images", "--output", "--method", "--registers", "--size", "--epochs", "--revision", "--steps"]
    places = [printed.index(f"{flag} ") for flag in flags]
    assert places == sorted(places)


def test_output_that_nobody_reads_to_its_end_is_no_crash(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "phreg", "distill", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (141, "")


def test_the_version_is_told(capsys):
    assert phreg("--version") == 0
    assert capsys.readouterr().out.split() == ["phreg", version("phreg")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_run_told_to_stop_before_its_first_step_leaves_nothing(
    saved, photos, tmp_path, monkeypatch, number
):
    before = signal.getsignal(number)
    monkeypatch.setattr("phreg.api.distillation.find_sinks", lambda *_: os.kill(os.getpid(), number))
    asked = ["distill", saved, "--images", photos, "--output", tmp_path / "run", "--steps", 1, *QUICK]
    assert phreg(*asked) == 143
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(number) is before


def test_an_export_that_differs_at_some_size_says_why_and_what_to_do(monkeypatch, capsys):
    same, other = (SimpleNamespace(size=(48, 48), difference=0.1, relative=0.1, claimed=is_equal)
                   for is_equal in (True, False))  # fmt: skip
    for figures, says_why in (([same], False), ([same, other], True)):
        monkeypatch.setattr("phreg.api.export", returning(figures))
        assert phreg("export", "x", "--output", "out", "--format", "timm") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("resamples position embeddings in another way" in printed) == says_why
        assert ("--target.native-size" in printed) == says_why


@pytest.mark.parametrize("arguments", [["--help"], ["quickstart", "--help"], ["inspect", "--help"]])
def test_help_is_there(arguments, capsys):
    assert phreg(*arguments) == 0
    assert "usage: phreg" in capsys.readouterr().out


def test_a_failed_check_ends_in_status_3_and_keeps_the_adapter(saved, photos, tmp_path, capsys):
    asked = ["distill", saved, "--images", photos, "--output", tmp_path / "run", "--steps", 3, *QUICK]
    assert phreg(*asked, "--optim.lr", 0.1, "--checks.drift", 1.0) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "Check failed: the pooled output drifted" in printed
    assert "The adapter is written" in printed
    assert (tmp_path / "run" / "model" / "adapter.safetensors").is_file()


def test_nothing_to_repair_is_a_verdict_and_no_failure(saved, photos, tmp_path, capsys):
    asked = ["distill", saved, "--images", photos, "--output", tmp_path / "run", "--steps", 1]
    asked += [*QUICK[:-1], "--method", "relocate"]
    assert phreg(*asked) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Nothing to repair. No sinks found" in printed
    assert "phreg.load" not in printed, "there is nothing to load"
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(
        LoadError, match="holds no model, since it found nothing to repair or to gain; use its base"
    ):
        load(tmp_path / "run")


def test_a_quickstart_that_fails_a_check_exits_with_status_3(tmp_path, monkeypatch):
    result = SimpleNamespace(failures=["the pooled output drifted"])
    monkeypatch.setattr("phreg.api.quickstart", lambda *_, **__: result)
    monkeypatch.setattr("phreg.cli.commands.print_run", lambda _: None)
    assert phreg("quickstart", "--output", tmp_path / "run") == 3
    result.failures = []
    assert phreg("quickstart", "--output", tmp_path / "run") == 0


def test_a_run_that_is_not_measured_or_on_what_it_trained_on_says_so(saved, photos, tmp_path, capsys):
    for path in sorted(photos.iterdir())[3:]:
        path.unlink()
    asked = ["distill", saved, "--images", photos, "--steps", 1, *QUICK]
    assert phreg(*asked, "--output", tmp_path / "seen", "--checks.drift", 0) == 0
    assert "images that were trained on too" in " ".join(capsys.readouterr().out.split())
    assert phreg(*asked, "--output", tmp_path / "not", "--measure.images", 0) == 0
    assert "Not measured" in capsys.readouterr().out


# -- what is printed can be copied ---------------------------------------------------------------------------

NAMES = st.text("ab[]/x:=#\"\\ '{}", min_size=1, max_size=30).filter(lambda name: str(Path(name)) != "/")
"""Names of folders as people have them, with all that rich, Python or a shell would take for their own."""


def output_of(arguments, places, wide=False):
    """Runs a command whose work is done by stand-ins, and returns what it prints."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr("phreg.report.verdict.outcome", returning("It is better."))
        for place, value in places.items():
            patch.setattr(place, value)
        if wide:  # so that no cell of a table is broken
            patch.setattr(console, "_width", 1000)
        code = phreg(*arguments)
    return code, out.getvalue() + err.getvalue()


def squeezed(text):
    return "".join(text.split())


def returning(value):
    return lambda *_, **__: value


def outcome(path):
    """What a run says that skipped a picture and failed a check."""
    done = SimpleNamespace(images=3, steps=1, seconds=1.0, skipped=[f"{path}/1.png"])
    block = SimpleNamespace(outlier_rate=0.0)
    comparison = SimpleNamespace(rows=list, held_out=True, images=2, most_outliers=(block, block))
    return SimpleNamespace(
        run=path,
        outcome=done,
        unchanged=False,
        sinks=None,
        comparison=comparison,
        failures=[f"{path} drifted"],
        main_process=True,
    )


def evaluated(path):
    """What an evaluation of one model has to say."""
    record = summarise(
        [Metrics({"miou": 0.5})], [MetricSpec("miou", about="overlap")], task="segmentation", model=str(path),
        sha256="0", registers=0, data=str(path), settings={}, seeds=(0,), hardware={}, seconds=1.0,
    )  # fmt: skip
    return Results((record,))


@settings(max_examples=5)  # each runs eight commands
@given(NAMES)
@example("a[bold]b")
@example("a[/x]b")
@example("runs/:smile:")
@example("runs/" + 30 * "long ")
def test_a_path_is_printed_whole_by_every_command_that_names_it(name):
    path = Path("runs", name)
    code, printed = output_of(
        ["quickstart", "--output", path], {"phreg.api.quickstart": returning(outcome(path))}
    )
    assert code == 3
    assert f"{path / 'report' / 'report.html'}" in printed
    assert f"unreadable images were skipped: {path}/1.png" in printed
    assert f"Check failed: {path} drifted." in printed

    code, printed = output_of(
        ["distill", "demo", "--output", path], {"phreg.api.distill": returning(outcome(path))}
    )
    assert code == 3
    assert f"Run folder: {path}\n" in printed
    assert f"Report:     {path / 'report' / 'report.html'}\n" in printed
    assert f"phreg evaluate demo {shlex.quote(str(path))} --task" in printed
    assert f"phreg export {shlex.quote(str(path))} --format" in printed

    code, printed = output_of(
        ["export", "x", "--output", path, "--format", "timm"], {"phreg.api.export": returning([])}
    )
    assert code == 0
    assert f"Written and loaded back by timm: {path}\n" in printed

    pushed = SimpleNamespace(files=[], num_bytes=0, commit=None, folder=path)
    code, printed = output_of(["push", "x", "me/x"], {"phreg.api.push": returning(pushed)})
    assert code == 0
    assert f"me/x would hold {path}: 0 files" in printed

    code, printed = output_of(
        ["evaluate", "x", "--task", "t", "--data", "d", "--output", path],
        {"phreg.api.evaluate": returning(evaluated(path))},
        wide=True,
    )
    assert code == 0
    assert f"Written: {path / RESULTS}" in printed
    assert f"segmentation on {path}: {path}\n" in printed

    found = SimpleNamespace(name=str(path), sinks=None, norms=SimpleNamespace(blocks=[], normed=[]))
    code, printed = output_of(
        ["inspect", "x", "--images", "d", "--output", path],
        {
            "phreg.api.inspect": returning(SimpleNamespace(models=[found])),
            "phreg.report.verdict.verdict": returning(f"No artifacts in {path}"),
            "phreg.report.verdict.advice": returning(f"Nothing to gain in {path}"),
        },
        wide=True,
    )
    assert code == 0
    assert squeezed(f"{path}┏") in squeezed(printed), "a title is as wide as its table"
    assert f"No artifacts in {path}\nNothing to gain in {path}\n" in printed
    assert f"Written: {path / 'report.html'}" in printed

    code, printed = output_of(
        ["info", path],
        {
            "phreg.formats.info.info": returning(SimpleNamespace(figures=())),
            "phreg.cli.commands.description": returning([("base", str(path))]),
        },
        wide=True,
    )
    assert code == 0
    assert f"│ {path} " in printed

    def fail(*_, **__):
        raise LoadError(f"nothing is in {path}; look elsewhere")

    code, printed = output_of(["push", "x", "me/x"], {"phreg.api.push": fail})
    assert (code, printed) == (1, f"phreg: nothing is in {path}; look elsewhere\n")


@settings(max_examples=5)
@given(NAMES)
@example('say "hello"')
@example("C:\\new")
@example("a[/x]b" + 30 * " long")
def test_python_that_is_printed_names_the_folder_it_is_about(name):
    path = Path("runs", name)
    _, printed = output_of(
        ["distill", "demo", "--output", path], {"phreg.api.distill": returning(outcome(path))}
    )
    (line,) = [line for line in printed.splitlines() if line.startswith("In Python:")]
    call = ast.parse(line.removeprefix("In Python:").strip()).body[0].value
    assert ast.literal_eval(call.args[0]) == str(path)

    for format, prefix in {"timm": "local-dir:", "onnx": "", "merged": "", "transformers": ""}.items():
        _, printed = output_of(
            ["export", "x", "--output", path, "--format", format], {"phreg.api.export": returning([])}
        )
        (line,) = [line for line in printed.splitlines() if line.startswith("In Python:")]
        call = ast.parse(line.removeprefix("In Python:").strip()).body[0].value
        suffix = "/model.onnx" if format == "onnx" else ""
        assert ast.literal_eval(call.args[0]) == f"{prefix}{path}{suffix}"


@given(NAMES)
@example("a[/x]b")
def test_progress_names_what_is_done_as_it_is(name):
    with contextlib.redirect_stdout(io.StringIO()) as out, ProgressReporter() as doing:
        doing(name, 0, 2)
        doing(name, 1, 2)
        doing._last -= LINE_EVERY
        doing(name, 2, 2)
    assert squeezed(out.getvalue()) == squeezed(f"{name} … {name} 2/2"), "one line, then every few seconds"
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        ProgressReporter() as doing,
    ):
        patch.setattr(console, "_force_terminal", True)
        patch.setattr(console, "_width", 1000)
        doing(name, 1, 2)
        patch.setattr(console, "_force_terminal", False)
        with contextlib.redirect_stdout(io.StringIO()) as bar:
            console.print(doing._progress.get_renderable())
    assert bar.getvalue().startswith(f"{name} ━"), "a bar where there is one"
