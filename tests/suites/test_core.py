"""The fast core of the libraries' own tests, and that their plugin patches what they construct."""

import pytest

from suites.library import LIBRARIES, Library
from suites.runner import as_table, run, run_tests
from suites.sources import IndexUnreachableError

BUILDERS = {
    "timm": 'return timm.create_model("test_vit")',
    "timm-class": "return timm.models.VisionTransformer(img_size=32, patch_size=8, depth=1)",
    "timm-features": 'return timm.create_model("test_vit", features_only=True).model',
    "open_clip": "return families_open_clip.clip()",
    "open_clip-tower": "return families_open_clip.clip().visual",
    "transformers": 'return families_transformers.FAMILIES["vit-classifier"]()',
    "transformers-saved": """
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        families_transformers.FAMILIES["vit-classifier"]().save_pretrained(folder)
        return AutoModelForImageClassification.from_pretrained(folder)""",
}
"""Ways to construct a model: body of a function that returns one."""

ASKS = """
import families_open_clip, families_transformers, timm
from transformers import AutoModelForImageClassification
from phreg.backbones.resolve import adapt

def build():
    {build}

def test_registers():
    assert adapt(build()).num_registers == {expected}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "expected"), [("stock", 0), ("patched", 3), ("removed", 0)])
def test_the_plugin_patches_what_a_test_constructs(mode, expected, tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, build in BUILDERS.items():
        folder = tmp_path / name.partition("-")[0]
        folder.mkdir(exist_ok=True)
        (folder / f"test_{name.replace('-', '_')}.py").write_text(ASKS.format(build=build, expected=expected))

    for library in ("timm", "open_clip", "transformers"):
        tests = tmp_path / library
        outcomes = run_tests(tmp_path, Library(library, library, ()), mode, [str(tests)])
        assert len(outcomes) == len(list(tests.glob("test_*.py")))
        assert {outcome.result for outcome in outcomes.values()} == {"passed"}, outcomes
        assert all((outcome.models > 0) == (mode != "stock") for outcome in outcomes.values())


@pytest.mark.slow
@pytest.mark.parametrize("library", [name for name, library in LIBRARIES.items() if library.fast])
def test_the_fast_core_of_a_librarys_tests_does_as_expected_on_patched_models(library):
    try:
        suite = run(LIBRARIES[library], fast=True)
    except IndexUnreachableError as error:
        pytest.skip(f"the tests of {library} cannot be fetched: {error}")

    assert not suite.problems, "\n".join([as_table([suite]), *suite.problems])
