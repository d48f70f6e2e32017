"""Old names still work, and warn of the new ones; what an earlier phreg wrote loads without a warning."""

import copy
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import phreg
from phreg import cli, config, errors, methods
from phreg.deprecated import RENAMED, OldNameWarning
from phreg.errors import ConfigError, PhregError
from phreg.evaluation import features
from phreg.evaluation.record import Summary
from phreg.evaluation.results import Difference, Results
from phreg.formats import info as info_module
from phreg.formats.info import info
from phreg.settings import fields
from phreg.sinks import locate
from phreg.sinks.units import Unit

GOLDEN = Path(__file__).parent / "golden" / "0.1"
OLD_RECIPE = '[target]\nkeep = false\n[views]\nfill = "surroundings"\n[gate]\ndrift = 0.5\n'


def test_old_settings_in_a_recipe_mean_the_new_ones_and_warn(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(OLD_RECIPE)
    with pytest.warns(OldNameWarning) as warned:
        resolved = methods.resolve(recipe)
    assert (resolved.target.cache, resolved.views.fill, resolved.checks.drift) == (False, "context", 0.5)
    assert [str(warning.message).partition(";")[0] for warning in warned] == [
        "target.keep is called target.cache now",
        "views.fill = surroundings is called views.fill = context now",
        "gate.drift is called checks.drift now",
    ]


def test_old_settings_as_keyword_arguments_win_over_a_recipe_as_the_new_ones_do(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[target]\ncache = true\n[checks]\ndrift = 0.9\n")
    with pytest.warns(OldNameWarning):
        resolved = methods.resolve(recipe, {"target": {"keep": False}, "gate.drift": 0.25})
    assert (resolved.target.cache, resolved.checks.drift) == (False, 0.25)
    paper = {"method": "paper", "target.keep": True}  # which implies that no target is cached
    with pytest.warns(OldNameWarning):
        assert methods.resolve(None, paper).target.cache is True


def test_a_setting_given_by_both_its_names_is_refused():
    with pytest.raises(ConfigError, match=r"target\.keep: is the old name of target\.cache, which is given"):
        methods.resolve(None, {"target.keep": True, "target.cache": False})


def test_what_is_wrong_with_an_old_setting_is_told_by_its_new_name():
    with (
        pytest.warns(OldNameWarning),
        pytest.raises(ConfigError, match=r"checks\.drift: .* found 2") as error,
    ):
        methods.resolve(None, {"gate": {"drift": 2, "drfit": 1}})
    assert "checks.drfit: unknown key; did you mean checks.drift?" in str(error.value)


def test_a_script_sees_the_warning_at_its_own_line(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from phreg import methods\n"
        'methods.resolve(None, {"target.keep": True})\n'
        "from phreg.errors import GateError\n"
    )
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    seen = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert [line.partition(" is called")[0] for line in seen] == [
        f"{script}:2: OldNameWarning: target.keep",
        f"{script}:3: OldNameWarning: phreg.errors.GateError",
    ]


@pytest.mark.parametrize("run", sorted(GOLDEN.glob("*/run/recipe.toml")), ids=lambda path: path.parts[-3])
def test_the_recipe_of_an_earlier_run_resolves_without_a_warning(run):
    written = tomllib.loads(run.read_text())
    resolved = methods.resolve(run, written_by_phreg=True)  # a warning would be an error here
    assert resolved.target.cache is written["target"]["keep"]
    assert resolved.checks.model_dump() == written["gate"]


def test_a_run_that_wrote_old_names_resumes_without_a_warning(tiny, photos, tmp_path):
    quick = {
        "steps": 2,
        "batch_size": 2,
        "views": {"count": 3, "max_shift": 0.25, "fill": "context"},
        "measure": {"images": 2, "views": 3, "keep_best": False},
        "data": {"workers": 0},
        "device": "cpu",
        "registers": 2,
        "force": True,
    }
    run = tmp_path / "run"
    first = phreg.distill(tiny(), photos, run, **quick)
    recipe = (run / "recipe.toml").read_text()
    for new, old in (("cache =", "keep ="), ('"context"', '"surroundings"'), ("[checks]", "[gate]")):
        assert recipe.count(new) == 1
        recipe = recipe.replace(new, old)
    (run / "recipe.toml").write_text(recipe)
    again = phreg.distill(tiny(), output=run, resume=True)
    assert again.outcome.steps == first.outcome.steps == 2
    assert 'fill = "context"' in (run / "recipe.toml").read_text()


def test_denoise_takes_the_old_fill_and_asks_for_the_context(tiny):
    images = torch.zeros(1, 3, 32, 32)
    with pytest.warns(OldNameWarning), pytest.raises(PhregError, match=r"views\.fill = context needs"):
        phreg.denoise(tiny(), images, count=2, max_shift=0.25, fill="surroundings")


def test_old_arguments_of_inspect_and_evaluate_mean_the_new_ones_and_warn(tmp_path):
    with (
        pytest.warns(OldNameWarning, match="against is called baseline now"),
        pytest.raises(PhregError, match="other"),
    ):
        phreg.inspect("demo", tmp_path, against=[tmp_path / "other"])
    with (
        pytest.warns(OldNameWarning, match="gate is called max_drop now"),
        pytest.raises(ConfigError, match=r"max_drop: should be greater than or equal to 0, found -1\.0"),
    ):
        phreg.evaluate("demo", task="classification", data="nowhere", baseline="demo", gate=-1.0)
    with pytest.raises(TypeError, match="against: is the old name of baseline, which is given too"):
        phreg.inspect("demo", tmp_path, against=["a"], baseline=["b"])


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (phreg, "show", info),
        (errors, "GateError", errors.MaxDropError),
        (config, "GateConfig", config.ChecksConfig),
        (locate, "locate", locate.find_sinks),
        (features, "Reading", features.FeatureConfig),
        (info_module, "Shown", info_module.ModelInfo),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_public_name_is_found_by_its_old_spelling_with_a_warning(module, old, new):
    with pytest.warns(OldNameWarning, match=rf"{module.__name__}\.{old} is called {module.__name__}\."):
        assert getattr(module, old) is new
    assert old not in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def handed_on(verb, *words):
    """Returns what the program hands on of a command line."""
    given = {}

    def record(*arguments, **settings):
        given.update(settings, arguments=arguments)
        raise PhregError("not run in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"phreg.{'formats.info' if verb == 'info' else 'api'}.{verb}", record)
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
    assert end.value.code == 1
    return given


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--target.keep"], {"target": {"cache": True}}),
        (["--target.no-keep"], {"target": {"cache": False}}),
        (["--views.fill", "surroundings"], {"views": {"fill": "context"}}),
        (["--views.fill=surroundings"], {"views": {"fill": "context"}}),
        (["--gate.drift", "0.5"], {"checks": {"drift": 0.5}}),
        (["--gate.outlier-rate=0.5"], {"checks": {"outlier_rate": 0.5}}),
        (["--gate.outlier_rate", "0.5"], {"checks": {"outlier_rate": 0.5}}),
    ],
    ids=" ".join,
)
def test_an_old_flag_of_distill_is_taken_for_the_new_one_and_logged(old, new, caplog):
    with caplog.at_level(logging.WARNING, "phreg"):
        given = handed_on("distill", "distill", "demo", *old)
    assert {key: given[key] for key in new} == new
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(old[0].partition("=")[0])
    assert message.endswith("; the next version drops the old name")


def test_old_flags_of_inspect_and_evaluate_and_the_old_verb_are_taken_and_logged(caplog):
    with caplog.at_level(logging.WARNING, "phreg"):
        asked = ["--against", "b", "c", "--queries", "a cat", "--images", "i", "--output", "o"]
        seen = handed_on("inspect", "inspect", "a", *asked)
        judged = handed_on(
            "evaluate", "evaluate", "a", "--task", "t", "--data", "d", "--output", "o", "--gate", "0.1"
        )
        described = handed_on("info", "show", "runs/a")
    assert (seen["baseline"], seen["texts"]) == (("b", "c"), ("a cat",))
    assert judged["max_drop"] == 0.1
    assert described["arguments"] == ("runs/a",)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "--against is called --baseline now",
        "--queries is called --texts now",
        "--gate is called --max-drop now",
        "phreg show is called phreg info now",
    ]


def test_new_names_pass_without_a_word(caplog):
    with caplog.at_level(logging.WARNING, "phreg"):
        handed_on("distill", "distill", "demo", "--target.no-cache", "--views.fill", "context", "--no-force")
    assert not caplog.records


def test_a_recipes_old_names_are_logged_once_on_the_command_line(tmp_path, caplog, photos):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(OLD_RECIPE)
    asked = ["distill", "demo", "--recipe", recipe, "--images", photos, "--output", tmp_path / "run"]
    with caplog.at_level(logging.WARNING, "phreg"), pytest.raises(SystemExit):
        cli.main([*map(str, asked), "--size", "31"])  # no multiple of the patch size
    messages = [record.getMessage() for record in caplog.records]
    assert sum("target.keep" in message for message in messages) == 1
    assert len(messages) == 3


def test_every_new_name_exists():
    known = {*fields(), *(key.partition(".")[0] for key in fields())}
    for old, new in RENAMED["distill"].items():
        assert new.partition("=")[0] in known
        assert old.partition("=")[0] not in known or "=" in old
    assert set(RENAMED["phreg"].values()) <= set(phreg.__all__)


def test_attributes_of_a_unit_are_found_by_their_old_names_with_a_warning():
    unit = Unit(3, 7, sink_level=10.0, baseline=0.5, share=0.9, cluster=1)
    for old, value in (("level", 10.0), ("ordinary", 0.5), ("kind", 1)):
        with pytest.warns(OldNameWarning, match=rf"Unit\.{old} is called"):
            assert getattr(unit, old) == value
    assert unit.to_json() == {
        "block": 3, "index": 7, "level": 10.0, "ordinary": 0.5, "share": 0.9, "kind": 1
    }  # fmt: skip
    assert copy.deepcopy(unit) == unit
    with pytest.raises(AttributeError, match="'Unit' object has no attribute 'nothing'"):
        _ = unit.nothing


def test_attributes_of_results_are_found_by_their_old_names_and_keep_their_keys_in_json():
    summary = Summary.of([1.0, 3.0])
    difference = Difference(change=1.0, std=2.0, better=True, beyond_std=False)
    with pytest.warns(OldNameWarning, match=r"Summary\.spread is called .*Summary\.std now"):
        assert summary.spread == 2**0.5  # of 1 and 3, divided by n - 1
    with pytest.warns(OldNameWarning, match=r"Difference\.spread is called"):
        assert difference.spread == 2.0
    with pytest.warns(OldNameWarning, match=r"Difference\.beyond_spread is called"):
        assert difference.beyond_spread is False
    with pytest.warns(OldNameWarning, match=r"Results\.check_gate is called .*Results\.check_max_drop now"):
        assert Results(()).check_gate(None) is None
    assert summary.to_json() == {"mean": 2.0, "spread": 2**0.5, "values": (1.0, 3.0)}
    assert difference.to_json() == {"change": 1.0, "spread": 2.0, "better": True, "beyond_spread": False}
    for one in (summary, difference, Results(())):
        assert copy.deepcopy(one) == one
        with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
            _ = one.nothing
