"""What is installed with the package: `setuptools` leaves out files that nobody names."""

import tomllib
from pathlib import Path

from rlr_trainer import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlr_trainer"


def test_every_file_beside_the_code_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["rlr_trainer"]
    installed = {path for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()}
    beside = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert not beside - installed
    assert all(list(PACKAGE.glob(pattern)) for pattern in patterns)  # none names a folder that has moved
    assert all((path / "__init__.py").is_file() for path in PACKAGE.rglob("*") if path.is_dir() and list(path.glob("*.py")))


def test_the_changelog_begins_with_the_version_that_is_built():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].startswith(f"## {__version__}"), headings
