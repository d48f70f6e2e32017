"""What the package says of itself to installers and type checkers."""

import re
import tomllib
from pathlib import Path

import phreg

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_stands_once_and_the_build_reads_it_there():
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    source = Path(__file__).parents[1] / PROJECT["tool"]["hatch"]["version"]["path"]
    # hatch's own pattern for a version in a Python file.
    (found,) = re.findall(
        r"""(?m)^(?:__version__|VERSION)(?:: str)? *= *['"]v?(.+?)['"]""", source.read_text(encoding="utf-8")
    )
    assert found == phreg.__version__


def test_type_checkers_see_the_types_of_an_installed_phreg():
    marker = Path(phreg.__file__).with_name("py.typed")
    assert marker.is_file()
    (package,) = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert marker.parent.name == package, "the wheel holds the folder it lies in"
