"""Published protocols: each row of the code is that of the README, which gives its sources, and no other."""

import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

import phreg
from phreg.errors import ConfigError
from phreg.evaluation.record import Metrics, MetricSpec, summarise
from phreg.evaluation.results import Results
from phreg.evaluation.tasks.table import TASKS, find_task, protocols, resolve_settings
from phreg.settings import flatten

README = Path(phreg.__file__).parent / "evaluation" / "README.md"
ROW = re.compile(r"\| `(?P<protocol>[^`]+)` \| `(?P<key>[^`]+)` \| `(?P<value>[^`]+)` \| (?P<source>.+) \|")
LIMIT = re.compile(r"- `(?P<protocol>[^`]+)`: (?P<text>.+)")


def documented():
    """Settings, limits and sources of each task and protocol, as the README has them."""
    settings, limits, sources = defaultdict(dict), defaultdict(list), []
    text = README.read_text(encoding="utf-8").split("## Published protocols")[1].split("\n## ")[0]
    for section in text.split("\n### ")[1:]:
        task = section.split("\n")[0]
        for line in section.split("\n"):
            if row := ROW.fullmatch(line):
                settings[task, row["protocol"]][row["key"]] = json.loads(row["value"])
                sources.append(row["source"])
            elif limit := LIMIT.fullmatch(line):
                limits[task, limit["protocol"]].append(limit["text"])
    return settings, limits, sources


CODED = [(task, name) for task in TASKS for name in protocols(find_task(task))]


def test_the_readme_has_every_protocol_of_the_code_and_no_other():
    settings, limits, _ = documented()
    assert set(settings) == set(CODED)
    assert set(limits) <= set(CODED)


@pytest.mark.parametrize(("task", "protocol"), CODED)
def test_a_protocol_has_the_settings_of_the_readme(task, protocol):
    settings, limits, _ = documented()
    row = json.loads(json.dumps(flatten(protocols(find_task(task))[protocol])))
    assert row.pop("differs", []) == limits[task, protocol]
    assert row == settings[task, protocol]


def test_every_value_has_a_source_of_a_repository_and_a_file():
    sources = documented()[2]
    assert len(sources) > 100
    assert [text for text in sources if not re.search(r"[\w.-]+/[\w.-]+, `[^`]+`", text)] == []


@pytest.mark.parametrize(("task", "protocol"), CODED)
def test_resolved_settings_are_those_of_the_protocol_and_say_its_name(task, protocol):
    settings, limits, _ = documented()
    resolved = resolve_settings(task, {}, protocol)
    found = json.loads(json.dumps(flatten(resolved.model_dump())))
    assert {key: found[key] for key in settings[task, protocol]} == settings[task, protocol]
    assert found["published"] == protocol
    assert found["differs"] == limits[task, protocol]


def test_numbers_given_beside_a_protocol_are_said_to_differ():
    settings = resolve_settings("linear-segmentation", {"steps": "7", "layout": "voc20"}, "dinov2")
    assert settings.differs[-1] == "steps is 7", "the layout says what the data is, not how it is measured"
    same = resolve_settings("linear-segmentation", {"steps": 40_000}, "dinov2")
    assert same.differs == resolve_settings("linear-segmentation", {}, "dinov2").differs
    assert resolve_settings("linear-segmentation", {"steps": 7}).differs == ()


def test_no_setting_makes_a_record_claim_a_protocol_that_was_not_asked_for():
    settings = resolve_settings("linear-segmentation", {"published": "dinov2"})
    assert settings.published is None
    with pytest.raises(ConfigError, match="no protocol 'dino'; there are dinov2, dinov3"):
        resolve_settings("linear-segmentation", {}, "dino")


def test_the_table_of_results_says_which_protocol_it_follows_and_in_what_it_does_not():
    settings = resolve_settings("zero-shot-segmentation", {}, "naclip")
    record = summarise(
        [Metrics({"miou": 0.5}, notes={"limits": ["few pictures"]})], [MetricSpec("miou")],
        task="zero-shot-segmentation", model="m", sha256="", registers=0, data="data",
        settings=settings.model_dump(mode="json"), seeds=(0,), hardware={}, seconds=0.0,
    )  # fmt: skip
    text = Results((record,)).to_markdown()
    assert "Protocol naclip." in text
    assert re.search(r"Not as published: .*antialiased.*; no PAMR.*; few pictures\.", text)
    plain = replace(record, settings={}, notes=({},))
    assert "published" not in Results((plain,)).to_markdown()
