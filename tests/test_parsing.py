"""Every way into a file of JSON or TOML ends in one clear error, however the file is damaged."""

import json
import shutil

import pytest
import torch
from families_transformers import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

import phreg
from phreg import methods
from phreg.backbones import resolve
from phreg.errors import PhregError
from phreg.evaluation.datasets.boxes import _read_json as read_boxes
from phreg.evaluation.datasets.labelled import _listed as read_labels
from phreg.evaluation.datasets.vocabulary import _read as read_words
from phreg.parsing import DEEPEST, parse_json, parse_toml
from phreg.training import checkpoint
from phreg.training.checkpoint import RunFolder

DEPTHS = (150, 900, 990, 100_000)


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", DEPTHS)
def test_json_nested_without_end_is_a_value_error(depth):
    for text in (nested(depth), '{"a":' * depth + "1" + "}" * depth):
        with pytest.raises(ValueError, match="nested"):
            parse_json(text)


@pytest.mark.parametrize("depth", DEPTHS)
def test_toml_nested_without_end_is_a_value_error(depth):
    for text in (
        f"a = {nested(depth)}",
        "a = " + "{a=" * depth + "1" + "}" * depth,
        "a." * depth + "a = 1",
        "[" + "a . " * depth + "a]",
    ):
        with pytest.raises(ValueError, match="nested"):
            parse_toml(text)


def test_what_is_as_deep_as_is_allowed_is_read():
    assert json.dumps(parse_json(nested(DEEPEST))) == nested(DEEPEST)
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        parse_json(nested(DEEPEST + 1))


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_whatever_is_wrong_with_a_text_is_a_value_error(text):
    for parse in (parse_json,) if isinstance(text, bytes) else (parse_json, parse_toml):
        try:
            parse(text)
        except ValueError:
            continue


# -- readers: a file in a folder of a timm model, and what reads it ------------------------------------------


def model_config(folder):
    return folder / "config.json", lambda: resolve.load(folder)


def index(folder):
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / "model.safetensors").unlink()
    return folder / "model.safetensors.index.json", lambda: resolve.load(folder)


def image_processor(folder):
    shutil.rmtree(folder)
    FAMILIES["vit"]().save_pretrained(folder)
    return folder / "preprocessor_config.json", lambda: resolve.load(folder)


def open_clip_config(folder):
    (folder / "config.json").unlink()
    return folder / "open_clip_config.json", lambda: resolve.load(folder)


def loaded_record(folder):
    return folder / "phreg_export.json", lambda: phreg.load(folder)


def shown_record(folder):
    return folder / "phreg_export.json", lambda: phreg.info(folder)


def results(folder):
    for name in "ab":
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
    asked = {"task": "classification", "data": folder / "data", "output": folder}
    return folder / "results.json", lambda: phreg.evaluate("demo", **asked)


def boxes(folder):
    return folder / "boxes.json", lambda: read_boxes(folder / "boxes.json", "COCO's")


def labels(folder):
    return folder / "labels.json", lambda: read_labels(folder, folder / "labels.json")


OF_MODELS = [model_config, index, open_clip_config, loaded_record, shown_record, results]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("make", [*OF_MODELS, image_processor, boxes, labels])
def test_every_reader_of_json_words_endless_nesting_as_an_error_of_phreg(make, depth, saved):
    file, read = make(saved)
    known = '{"format": "timm", "architecture": "vit_base", "model_cfg": 1, "models": [{"task": %s}]}'
    for text in (nested(depth), known % nested(depth)):
        file.write_text(text)
        with pytest.raises(PhregError, match=file.name.replace(".", r"\.")):
            read()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b"{", b"\xff\xfe", b'{"format": []}', b'{"format": {}}']
)
@pytest.mark.parametrize("make", OF_MODELS)
def test_a_file_of_something_else_is_worded_as_an_error_of_phreg(make, content, saved):
    file, read = make(saved)
    file.write_bytes(content)
    with pytest.raises(PhregError):
        read()


@pytest.mark.parametrize("depth", DEPTHS)
def test_recipes_and_lists_of_words_nested_without_end_are_errors_of_phreg(depth, tmp_path):
    file = tmp_path / "mine.toml"
    for text in (f"steps = {nested(depth)}", "optim." + "a." * depth + "a = 1", "[" + "a . " * depth + "a]"):
        file.write_text(text)
        for read in (methods.resolve, read_words):
            with pytest.raises(PhregError, match=r"mine\.toml"):
                read(file)


# -- runs ----------------------------------------------------------------------------------------------------


def stepped():
    weight = torch.nn.Parameter(torch.ones(3))
    optim = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optim.step()
    return {"w": weight}, optim


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "\0", '{"step": "5", "facts": {}}', '{"step": 5}', nested(100_000)]
)
def test_a_checkpoint_whose_description_is_damaged_gives_way_to_the_one_before(content, tmp_path, caplog):
    run = RunFolder(tmp_path)
    for step in (5, 10):
        checkpoint.save_state(run, step, *stepped(), {})
    (run.states[-1] / "state.json").write_text(content)
    assert checkpoint.load_state(run, *stepped(), {}) == 5
    assert "step-000010 is damaged" in caplog.text


def test_a_checkpoint_of_other_numbers_gives_way_to_the_one_before(tmp_path):
    run = RunFolder(tmp_path)
    for step in (5, 10):
        checkpoint.save_state(run, step, *stepped(), {})
    file = run.states[-1] / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    assert checkpoint.load_state(run, *stepped(), {}) == 5


@pytest.mark.parametrize(
    "line",
    [b"3", b"null", b"{}", b"[]", b'"x"', b'{"step": "2"}', b'{"step": null}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_line_of_a_log_is_dropped_as_a_half_written_one_is(line, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    checkpoint.truncate_log(log, 3)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
