"""The documentation: its code runs, its links lead somewhere, its commands and options exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    found = []
    for page in PAGES:
        for number, (kind, code) in enumerate(BLOCK.findall(page.read_text())):
            if kind == language:
                found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("code", blocks("bash"))
def test_make_commands_exist(code):
    targets = re.findall(r"^make ([\w-]+)", code, re.MULTILINE)
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_readme_names_the_commands_that_ci_runs():
    assert "make demo" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_option_is_in_the_table():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from options import END, PAGE, START, table
    finally:
        sys.path.pop(0)
    written = PAGE.read_text().split(START)[1].split(END)[0]
    from transformers import __version__

    if int(__version__.split(".")[0]) >= 5:  # the table is made with the newest versions
        assert written == table(), "run python docs/options.py"


def test_every_metric_is_explained():
    page = (ROOT / "docs/logging.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "rlr_trainer").glob("*.py"))
    single = "clip_ratio|kl|diversity|(?:eval_)?reward_queries|reward_errors|samples_dropped"
    names = set(re.findall(rf'"((?:estimator|ratio|time)/[\w{{}}]+|{single})"', sources))
    assert len(names) > 6
    for name in names:
        for part in ("fo", "ho", "zo"):
            assert name.replace("{part}", part) in page, name


def test_public_names_have_docstrings():
    import rlr_trainer
    from rlr_trainer import estimators

    for module in (rlr_trainer, estimators):
        for name in module.__all__:
            value = getattr(module, name)
            assert isinstance(value, str) or (value.__doc__ and len(value.__doc__) > 30), name
