"""The record beside a model: one type on the way out and back, whatever format or version it is of."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phreg.errors import LoadError
from phreg.record import Base, Equality, RecordError, RunRecord, read_record, write_record
from phreg.run_summary import Gates, RunSummary

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*/*/**/phreg*.json"))
ADAPTER = {
    "format": "phreg-adapter",
    "format_version": 1,
    "class": "ViT",
    "base": {"source": "x", "library": "timm", "revision": None, "sha256": "0"},
    "registers": 2,
    "input_size": [32, 32],
    "readout": "naclip",
    "size": [32, 48],
    "recipe": {"method": "relocate", "optim": {"lr": 0.1}},
    "gates": {"passed": False, "failures": ["worse"]},
    "figures": None,
}


def written(path, said):
    path.write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: "/".join(file.parts[-4:-1]))
def test_what_an_earlier_phreg_wrote_is_written_again_as_it_was(file, tmp_path):
    said = json.loads(file.read_text())
    write_record(tmp_path / file.name, read_record(file))
    assert json.loads((tmp_path / file.name).read_text()) == said


def test_an_adapters_run_is_told_side_by_side_with_the_rest_and_read_as_any_other(tmp_path):
    record = read_record(written(tmp_path / "phreg.json", ADAPTER))
    assert record.run.size == (32, 48)
    assert record.run.setting("optim.lr") == 0.1
    assert record.run.setting("optim.lr.more") is None
    assert record.failures == ["worse"]
    assert (record.readout, record.run.readout) == ("naclip", "naclip")
    assert record.to_json() == ADAPTER
    export = record.model_copy(update={"format": "timm"})
    write_record(tmp_path / "phreg_export.json", export)
    said = json.loads((tmp_path / "phreg_export.json").read_text())
    assert said["run"]["recipe"] == ADAPTER["recipe"]
    assert "recipe" not in said
    assert read_record(tmp_path / "phreg_export.json").run == record.run


names = st.text(min_size=1)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(names.map("later ".__add__), values, max_size=3))
def test_what_a_record_says_beyond_what_this_phreg_knows_is_kept(more):
    record = RunRecord.model_validate_json(json.dumps({**ADAPTER, **more}), strict=True)
    assert {name: record.to_json()[name] for name in more} == more


def test_a_record_without_a_version_is_of_the_first_and_a_newer_one_says_what_to_do(tmp_path):
    said = {name: value for name, value in ADAPTER.items() if name != "format_version"}
    assert read_record(written(tmp_path / "phreg.json", said)).format_version == 1
    written(tmp_path / "phreg.json", ADAPTER | {"format_version": 3})
    with pytest.raises(RecordError, match=r"phreg\.json is of .* version 3; .* 1 to 2: upgrade"):
        read_record(tmp_path / "phreg.json")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"registers": None}, "registers: "),
        ({"base": None}, "base: missing"),
        ({"figures": {"images": 2}}, "figures.held_out: "),
        ({"outcome": {"steps": "two"}}, "outcome.steps: "),
        ({"size": 1.5}, "size.int: "),
    ],
)
def test_what_is_wrong_is_named_as_the_file_has_it_and_by_no_means_for_whom(change, found, tmp_path):
    file = written(tmp_path / "phreg.json", ADAPTER | change)
    with pytest.raises(LoadError) as caught:
        read_record(file)
    assert str(caught.value).startswith("phreg.json is not whole (")
    assert found in str(caught.value)
    assert "run." not in str(caught.value)


def test_a_record_that_is_made_says_what_was_given_and_nothing_more():
    base = Base("x", "timm", None, "0")
    record = RunRecord(
        format="timm",
        model_class="ViT",
        registers=1,
        base=base,
        mean=(0, 0, 0),
        equality=[Equality((16, 32), 0.0, float("nan"), claimed=False)],
        run=RunSummary(gates=Gates(passed=None)),
    )
    said = record.to_json()
    assert list(said) == ["format", "class", "base", "registers", "mean", "equality", "run"]
    assert said["run"] == {"gates": {"passed": None}}
    assert json.loads(json.dumps(said["equality"]))[0]["size"] == [16, 32]
    assert "run" not in record.model_copy(update={"run": None}).to_json()


def test_settings_that_were_changed_are_noticed_and_a_copy_of_the_record_is_sealed_anew(tmp_path):
    file, tensors = tmp_path / "phreg.json", {"w": torch.ones(2)}
    record = read_record(written(file, ADAPTER)).with_sums(tensors)
    write_record(file, record)
    assert read_record(file) == record
    said = json.loads(file.read_text())
    written(file, said | {"registers": 3})
    with pytest.raises(RecordError, match="damaged or changed since"):
        read_record(file)
    write_record(file, record.model_copy(update={"registers": 3}))
    assert read_record(file).registers == 3
