"""Fetches the tests of a library's installed version, by pip, to a cache outside of the repository."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .library import HERE, Library

CACHE_VARIABLE = "PHREG_SUITES_CACHE"


class SuiteError(Exception):
    """A library's tests cannot be run."""


class IndexUnreachableError(SuiteError):
    """The package index does not answer, or does not have the source distribution."""


def cache() -> Path:
    """Gives the folder of fetched tests."""
    own = os.environ.get(CACHE_VARIABLE)
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else user / "phreg" / "suites"


def fetch(library: Library) -> Path:
    """Finds the folder that holds a library's `tests/`, fetching it where it is not there yet.

    Raises:
        IndexUnreachableError: pip cannot get the source distribution.
        SuiteError: The library is not installed, or what was fetched holds no tests.
    """
    try:
        version = importlib.metadata.version(library.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise SuiteError(
            f"tests of {library.name} asked for, and {library.distribution} is not installed; install phreg "
            "with its dependencies"
        ) from error
    checkout = library.checkout
    if checkout and not (checkout / "tests").is_dir():
        raise SuiteError(
            f"{library.variable} is '{checkout}', which has no folder tests; point it to a checkout of "
            f"{library.name} {version}"
        )
    folder = cache() / f"{library.name}-{version}{'-checkout' if checkout else ''}"
    if checkout or not folder.is_dir():
        with tempfile.TemporaryDirectory() as work:
            fetched = Path(work) / "fetched"
            if checkout:
                shutil.copytree(checkout / "tests", fetched / "tests")
            else:
                _unpack_tests(_download(library, version, Path(work)), fetched)
            # Distributions hold files named test*.py, which a package's __init__.py is not.
            for inner in (fetched / "tests", *(path for path in fetched.rglob("tests/*") if path.is_dir())):
                (inner / "__init__.py").touch()
            (fetched / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
            _install(library, fetched / "requirements")
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(fetched, folder)
    for name in library.own_files:
        shutil.copy(HERE / name, folder / "tests" / f"test_phreg_{name.partition('_')[2]}")
    return folder


def _download(library: Library, version: str, work: Path) -> Path:
    """Downloads the source distribution of a version, and returns the archive."""
    asked = f"{library.distribution}=={version}"
    _pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(work), asked)
    archives = list(work.glob("*.tar.gz"))
    if not archives:
        raise SuiteError(
            f"pip download {asked} left no .tar.gz; set {library.variable} to a checkout instead"
        )
    return archives[0]


def _install(library: Library, folder: Path) -> None:
    folder.mkdir()
    for requirement in library.requirements:
        _pip("install", "--no-deps", "--target", str(folder), requirement)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_DEFAULT_TIMEOUT": "20"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise IndexUnreachableError(f"pip {' '.join(arguments)} failed: {lines[-1]}")


def _unpack_tests(archive: Path, folder: Path) -> None:
    """Unpacks the folder `tests` alone: the library that is tested is the installed one.

    Raises:
        SuiteError: There is none.
    """
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            _, _, inner = member.name.partition("/")
            if inner.startswith("tests/"):
                member.name = inner
                source.extract(member, folder, filter="data")
    if not (folder / "tests").is_dir():
        raise SuiteError(f"{archive.name} holds no folder tests; point the library's variable to a checkout")
