"""The verdict on a library's tests, on small inputs."""

import pytest

from suites.comparison import Comparison, Expected, Outcome, compare, read_expected
from suites.runner import Suite, as_json, as_table

PASSED, FAILED, SKIPPED = Outcome("passed"), Outcome("failed", message="ValueError: no"), Outcome("skipped")
SIZES = Expected("test_size[*]", "it counts tokens")


def test_a_failure_that_is_not_listed_is_a_problem_and_names_its_error():
    found = compare({"test_a": FAILED, "test_b": PASSED}, {}, [])

    assert found.failures == {"test_a": "ValueError: no"}
    assert found.problems == ["fails, and is not listed: test_a: ValueError: no"]


def test_a_pattern_covers_every_parametrisation_and_nothing_else():
    outcomes = {"test_size[1-vit]": FAILED, "test_size[2-vit]": FAILED, "test_sizes": FAILED}

    found = compare(outcomes, {}, [SIZES])

    assert found.expected == {"it counts tokens": ["test_size[1-vit]", "test_size[2-vit]"]}
    assert list(found.failures) == ["test_sizes"]


def test_brackets_and_dots_of_a_pattern_stand_for_themselves():
    assert Expected("test.py::test_a[1]", "").covers("test.py::test_a[1]")
    assert not Expected("test.py::test_a[1]", "").covers("test.py::test_a1")
    assert not Expected("test.py::test_a", "").covers("test_py::test_a")


def test_a_listed_test_that_passes_is_a_problem():
    found = compare({"test_size[1]": PASSED, "test_size[2]": FAILED}, {}, [SIZES])

    assert found.passes == {"test_size[1]": "test_size[*]"}
    assert found.problems == ["passes, though listed as test_size[*]: test_size[1]"]


def test_a_test_that_fails_on_stock_models_too_is_counted_and_left_out():
    outcomes = {"test_hub": FAILED, "test_size[1]": FAILED}
    stock = {"test_hub": FAILED, "test_size[1]": FAILED}

    found = compare(outcomes, stock, [SIZES])

    assert found.stock_failures == ["test_hub", "test_size[1]"]
    assert not found.problems
    assert not found.expected


def test_a_test_that_is_skipped_on_patched_models_alone_is_a_problem():
    found = compare({"test_a": SKIPPED, "test_b": SKIPPED}, {"test_a": PASSED, "test_b": SKIPPED}, [])

    assert found.problems == ["is skipped, though it passes on stock models: test_a"]


def test_a_pattern_without_a_test_is_a_problem_where_all_tests_were_run():
    assert compare({"test_a": PASSED}, {}, [SIZES]).problems == [
        "is listed, and there is no such test: test_size[*]"
    ]
    assert not compare({"test_a": PASSED}, {}, [SIZES], whole=False).problems


def test_expected_failures_are_read_by_library_and_mode_and_each_needs_a_reason(tmp_path):
    path = tmp_path / "expected.toml"
    path.write_text('[timm.patched]\n"test_size[*]" = "it counts tokens"\n[peft.patched]\n"test_b" = " "\n')

    assert read_expected("timm", "patched", path) == [SIZES]
    assert read_expected("timm", "removed", path) == []
    with pytest.raises(ValueError, match="no reason for"):
        read_expected("peft", "patched", path)


def test_a_mode_that_does_not_exist_is_refused(tmp_path):
    path = tmp_path / "expected.toml"
    path.write_text('[timm.patch]\n"test_a" = "it counts tokens"\n')

    with pytest.raises(ValueError, match="patch"):
        read_expected("timm", "patched", path)


def test_the_list_of_the_repository_is_well_formed():
    for library in ("timm", "peft", "open_clip", "transformers"):
        for mode in ("patched", "removed"):
            read_expected(library, mode)


def suite(models=1):
    outcomes = {
        "stock": {"test_a": PASSED, "test_hub": FAILED, "test_size[1]": PASSED},
        "patched": {"test_a": Outcome("passed", models), "test_hub": FAILED, "test_size[1]": FAILED},
        "removed": {"test_a": Outcome("passed", 1), "test_hub": FAILED, "test_size[1]": PASSED},
    }
    expected = {"patched": [SIZES], "removed": []}
    return Suite(
        "timm",
        outcomes,
        {mode: compare(outcomes[mode], outcomes["stock"], expected[mode]) for mode in expected},
    )


def test_a_run_that_patched_no_model_is_a_problem():
    assert not suite().problems
    assert suite(models=0).problems == ["timm, patched: no model was patched, so that nothing was tested"]


def test_the_table_counts_each_mode_and_gives_the_reasons():
    row = as_table([suite()]).splitlines()[-1]

    assert row == ("| timm | 2 / 1 / 0 | 1 / 1 / 0 | 2 / 0 / 0 | 1 | 1 | patched: 1 x it counts tokens |")


def test_the_json_says_the_same_and_names_the_tests():
    found = as_json(suite())

    assert found["counts"]["patched"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert found["fail_on_stock_too"] == {"test_hub": "ValueError: no"}
    assert found["expected_failures"]["patched"] == {"it counts tokens": ["test_size[1]"]}
    assert found["problems"] == []
    assert Comparison().problems == []
