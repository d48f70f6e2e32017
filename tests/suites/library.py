"""Says of each library where its tests are, and which of them build vision models that phreg patches."""

import os
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

FAST_FAMILIES = ("vit-tiny", "dinov2-tiny")
FAST_METHODS = ("-LoraConfig-", "-VeraConfig-", "-OFTConfig-", "-IA3Config-")
"""Parts of the names of tests of the fast core of PEFT, in `peft_vision`."""


FAST_CHECKS = ("hidden_state", "attention_outputs", "outputs_equivalence", "save_load", "fp32_pad_left")
"""Parts of the names of tests of the fast core of transformers."""

TRANSFORMERS_FAMILIES = (
    *("aimv2", "clip", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "metaclip_2"),
    *("siglip", "siglip2", "vit", "vit_mae", "vit_msn"),
)
"""Folders of transformers' tests of the families that phreg patches."""


@dataclass(frozen=True)
class Library:
    """One library's tests.

    Attributes:
        name: Its import name, by which it is asked for.
        distribution: Its name on the package index.
        tests: Files or folders of tests, from the folder that holds `tests/`.
        options: Further options of pytest.
        environment: Environment variables of the run.
        own_files: Files of this folder that go among the library's tests: they name models to the library's
            tests of any model, where the distribution has no more than these.
        requirements: Packages that the tests import beyond phreg's own, fetched beside them.
        checkout_tests: The tests that a checkout has beyond those.
        fast: Options that choose the fast core; empty where the library has none.
    """

    name: str
    distribution: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    own_files: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    checkout_tests: tuple[str, ...] = ()
    fast: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        """Environment variable that points to a checkout, to be taken instead of the source distribution."""
        return f"PHREG_{self.name.upper()}_TESTS"

    @property
    def checkout(self) -> Path | None:
        """The checkout that the variable points to."""
        given = os.environ.get(self.variable)
        return Path(given) if given else None

    @property
    def all_tests(self) -> tuple[str, ...]:
        """The tests that there are."""
        return (*self.tests, *(self.checkout_tests if self.checkout else ()))


LIBRARIES = {
    library.name: library
    for library in (
        Library(
            name="timm",
            distribution="timm",
            tests=(
                "tests/test_models.py",
                "tests/test_model_input.py",
                "tests/test_checkpoint_loading.py",
            ),
            options=("--phreg-max-parameters=10e6",),
            # As on timm's own CI: neither its largest models nor weights from the hub.
            environment=(("GITHUB_ACTIONS", "true"),),
            fast=("-m", "forward or features"),
        ),
        Library(
            name="peft",
            distribution="peft",
            tests=("tests/test_phreg_vision.py",),
            own_files=("peft_vision.py",),
            # Methods that add to weights, share what they add, rotate weights, and scale activations.
            fast=("-k", f"({' or '.join(FAST_FAMILIES)}) and ({' or '.join(FAST_METHODS)})"),
        ),
        Library(
            name="open_clip",
            distribution="open_clip_torch",
            tests=("tests/test_inference.py", "tests/test_training_simple.py"),
            requirements=("braceexpand", "webdataset"),  # of open_clip_train
            options=("-k", "not RN50 and not (test_training and not unfreezing and not coca and not jit)"),
        ),
        Library(
            name="transformers",
            distribution="transformers",
            tests=("tests/test_phreg_vision.py",),
            own_files=("transformers_vision.py",),
            requirements=("parameterized",),
            checkout_tests=tuple(f"tests/models/{family}" for family in TRANSFORMERS_FAMILIES),
            fast=("-k", f"(TestVit or TestDinov2) and ({' or '.join(FAST_CHECKS)})"),
        ),
    )
}
