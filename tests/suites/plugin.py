"""A pytest plugin that runs a library's tests on patched models, and writes down what each test did.

    python -m pytest -p suites.plugin --phreg-library timm --phreg-mode patched --phreg-outcomes FILE tests

It works under xdist: the count of patched models travels with a test's report.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import random
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from phreg.backbones.resolve import adapt
from phreg.errors import UnsupportedModelError
from phreg.registers import insert

from .construction import ACTIVE, NUM_REGISTERS, WRAPPERS, Construction

MODELS = "phreg_models"
"""Name of the property of a report that counts the models patched during a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("phreg")
    group.addoption("--phreg-library", choices=sorted(WRAPPERS), help="whose constructors are wrapped")
    group.addoption("--phreg-mode", default="stock", help="stock, patched or removed")
    group.addoption("--phreg-outcomes", type=Path, help="JSON file to write: what each test did")
    group.addoption("--phreg-max-parameters", type=float, help="largest model of a test's `model_name`")


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--phreg-library")
    if library is None:
        return
    _stand_in_for_missing_modules(config.rootpath / "tests")
    construction = Construction(config.getoption("--phreg-mode"))
    ACTIVE[:] = [construction]
    WRAPPERS[library](construction)
    config.pluginmanager.register(Recorder(config, construction), "phreg-recorder")
    if library == "timm":
        config.pluginmanager.register(OnlySupported(config, construction), "phreg-only-supported")
    if library == "open_clip":
        config.pluginmanager.register(OpenClipData(construction), "phreg-open-clip-data")


STAND_INS = {
    "diffusers": "StableDiffusionPipeline",
    "tests.exporters.test_export": "ExportTesterMixin",
    "tests.generation.test_utils": "GenerationTesterMixin",
}
"""Modules that common tests import a class of, which no vision test needs: module -> class.

PEFT's ask whether a model is a pipeline of diffusers, which is large. Transformers' source distribution lacks
the two folders that its common tests inherit from.
"""


def _stand_in_for_missing_modules(tests: Path) -> None:
    """Puts an empty class in the place of what is not there."""
    for name, class_name in STAND_INS.items():
        file = tests.parent.joinpath(*name.split(".")).with_suffix(".py")
        found = file.is_file() if name.startswith("tests.") else importlib.util.find_spec(name) is not None
        if not found:
            stand_in = types.ModuleType(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            vars(stand_in)[class_name] = type(class_name, (), {})
            sys.modules[name] = stand_in


class Recorder:
    """Writes what each test did, and how many models were patched meanwhile."""

    def __init__(self, config: pytest.Config, construction: Construction) -> None:
        self.construction = construction
        self.path: Path | None = config.getoption("--phreg-outcomes")
        self.is_worker = hasattr(config, "workerinput")
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._before = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        self._before = self.construction.count
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(0)  # the same weights on stock and on patched models, and a red run is red again
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if call.when == "teardown":
            item.user_properties.append((MODELS, self.construction.count - self._before))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report.nodeid, "failed", message=str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._note(report.nodeid, report.outcome, report.duration, report.longreprtext)
        if report.when == "teardown":
            self.outcomes[report.nodeid]["models"] = dict(report.user_properties)[MODELS]

    def _note(self, test: str, result: str, seconds: float = 0.0, message: str = "") -> None:
        before = self.outcomes.get(test, {})
        if before.get("result") == "failed":
            return
        failed = result == "failed"
        self.outcomes[test] = {
            "result": result,
            "models": 0,
            "seconds": round(seconds, 3),
            "message": _last_error(message) if failed else "",
        }

    def pytest_sessionfinish(self) -> None:
        if self.path is not None and not self.is_worker:
            self.path.write_text(json.dumps(self.outcomes, indent=1), encoding="utf-8")


def _last_error(text: str) -> str:
    """Finds the error in a traceback as pytest shows it."""
    errors = [line[1:].strip() for line in text.splitlines() if re.match(r"E\s", line)]
    lines = errors or text.strip().splitlines() or [""]
    return lines[0][:300]


class OnlySupported:
    """Leaves out the tests of models that phreg does not patch, or that are too large.

    timm's tests run over all its models, by the parameter `model_name`. Each is built on the meta device, up
    to the allowed number of parameters.
    """

    def __init__(self, config: pytest.Config, construction: Construction) -> None:
        self.construction = construction
        self.limit = config.getoption("--phreg-max-parameters") or float("inf")
        self.known: dict[str, bool] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen, left_out = [], []
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            name = parameters.get("model_name")
            (chosen if name is None or self._is_supported(name) else left_out).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen

    def _is_supported(self, name: str) -> bool:
        architecture = name.partition(".")[0]
        if architecture not in self.known:
            with self.construction.inside():
                self.known[architecture] = can_patch(architecture, self.limit)
        return self.known[architecture]


class TooLargeError(Exception):
    """A model has more parameters than allowed."""


def can_patch(architecture: str, limit: float) -> bool:
    """Tells whether a timm model has at most so many parameters, and takes registers."""
    import timm
    from timm.models._registry import is_model_in_modules

    # Of the names of its modules, these hold every class that phreg knows.
    if not is_model_in_modules(architecture, {"vision_transformer", "eva", "naflexvit", "deit"}):
        return False
    total = 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        total += parameter.numel() if parameter is not None else 0
        if total > limit:
            raise TooLargeError

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture)
            handle.remove()
            backbone = adapt(model)
            insert(backbone, torch.empty(NUM_REGISTERS, backbone.spec.width))
    except (TooLargeError, UnsupportedModelError):
        return False
    finally:
        handle.remove()
    return True


class OpenClipData:
    """Computes what open_clip's regression tests compare with, which its own CI takes from another commit.

    Models with registers added and removed are compared with stock ones; those with registers, whose output
    is another, with themselves.
    """

    MODELS = ("ViT-S-32", "ViT-S-32-alt", "ViT-M-32-alt")
    """Models of the regression tests: all that are small, a width and depth each."""

    def __init__(self, construction: Construction) -> None:
        self.construction = construction

    def pytest_collection(self, session: pytest.Session) -> None:
        folder = session.config.rootpath / "tests"
        if not (folder / "util_test.py").is_file():
            return
        sys.path.insert(0, str(folder))
        util_test = importlib.import_module("util_test")
        patched = self.construction.mode == "patched"
        data = folder / "data" / ("patched" if patched else "stock")

        def get_data_dirs(make_dir: bool = True) -> tuple[str, str]:
            for part in ("input", "output"):
                (data / part).mkdir(parents=True, exist_ok=True)
            return str(data / "input"), str(data / "output")

        util_test.get_data_dirs = get_data_dirs
        before = self.construction.mode, self.construction.count
        self.construction.mode = "patched" if patched else "stock"
        for model in self.MODELS:
            util_test.create_test_data_for_model(model, overwrite=True)
        self.construction.mode, self.construction.count = before
