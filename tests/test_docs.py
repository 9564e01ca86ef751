"""The documentation: its code runs, its links lead somewhere, its commands and options exist."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documentation_blocks import run_program

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)")


def blocks(language):
    """All blocks of the pages."""
    found = []
    for page in PAGES:
        for number, (kind, code) in enumerate(BLOCK.findall(page.read_text())):
            if kind == language:
                found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.medium
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path):
    exit_code, output = run_program(code, tmp_path)
    assert exit_code == 0, output[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_a_page_write_to_folders_of_their_own(page):
    """Run one after the other in one folder, as a reader does, none may meet the run of another."""
    folders = [set(re.findall(r'output_dir="([^"]+)"', code)) for kind, code in BLOCK.findall(page.read_text()) if kind == "python"]
    named = [folder for block in folders for folder in block]
    assert len(named) == len(set(named))


@pytest.mark.medium
def test_each_block_is_a_program_of_its_own(tmp_path):
    assert run_program("left = 1; import json, os; json.left = 1; os.environ['LEFT'] = '1'", tmp_path) == (0, "")
    exit_code, output = run_program("import json, os, sys; print(vars(json).get('left'), os.environ.get('LEFT')); left", tmp_path)
    assert exit_code == 1
    assert output.startswith("None None")
    assert "NameError: name 'left' is not defined" in output
    loaded = (
        "import sys; assert 'torch' in sys.modules; assert not [name for name in sys.modules if name.startswith('rlr_trainer')]"
    )
    assert run_program(loaded, tmp_path) == (0, "")
    assert run_program("import os; os._exit(7)", tmp_path)[0] == 7


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


@pytest.mark.parametrize("code", blocks("py"))
def test_blocks_that_need_a_gpu_or_weights_parse(code):
    """And name options that exist: of RLRConfig in its calls."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RLRConfig":
            assert {keyword.arg for keyword in node.keywords} <= fields()


@pytest.mark.parametrize("code", blocks("bash"))
def test_commands_of_the_program_exist(code):
    from rlr_trainer.cli import build_parser

    (commands,) = (action.choices for action in build_parser()._actions if action.dest == "command")
    for line in re.findall(r"(?:^|-m )rlr[-_]trainer(?:\.cli)? (.*)", code, re.MULTILINE):
        command, *words = line.split("#")[0].split()
        if command == "--version":
            continue
        flags = {flag for action in commands[command]._actions for flag in action.option_strings}
        if commands[command].get_default("takes_overrides"):
            flags |= {f"--{name}" for name in fields() | {"model", "reward", "prompts", "eval_prompts"}}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= flags, line


def anchors(page):
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in LINK.findall(page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target}#{anchor}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "README.md":
            assert f"]({page.name})" in index, page.name
            assert f"](docs/{page.name})" in readme, page.name


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


def fields():
    from rlr_trainer import RLRConfig

    return {field.name for field in dataclasses.fields(RLRConfig)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    """A word with an underscore in backticks is an option, or stands in a source file."""
    text = BLOCK.sub("", page.read_text())
    names = set(re.findall(r"`(?:\w+\.)*([a-z][a-z0-9]*(?:_[a-z0-9]+)+)(?:=[^`]*|\([^`]*\))?`", text))
    if page.name in ("migrating.md", "trl_names.md"):  # TRL's names, which tests/training/test_trl_names.py compares with TRL's own
        return
    unknown = {name for name in names - fields() - OF_OTHERS if not re.search(rf"\b{name}\b", source())}
    assert not unknown


# Names in the documentation that belong to libraries below, and that nothing here uses.
OF_OTHERS = {"rename_column", "get_active_adapters", "set_alpha_to_one", "channels_last"}


def source():
    files = [path for folder in ("rlr_trainer", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text() for path in files if path != Path(__file__))


def test_every_public_name_is_documented():
    import rlr_trainer
    from rlr_trainer import rewards

    text = "\n".join(page.read_text() for page in PAGES)
    documented = set(re.findall(r"`(?:\w+\.)*(\w+)[^`]*`", BLOCK.sub("", text)))
    assert not {*rlr_trainer.__all__, *rewards.__all__} - documented - {"__version__"}


@pytest.mark.slow
def test_network_calls_are_those_of_the_table():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import network_calls
    finally:
        sys.path.pop(0)
    page = (ROOT / "docs/memory_and_speed.md").read_text()
    assert network_calls.table() in page, "run python benchmarks/network_calls.py"


def test_every_metric_is_explained():
    page = (ROOT / "docs/logging.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "rlr_trainer").rglob("*.py"))
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


def test_the_site_has_every_page_and_no_link_that_leads_out_of_it():
    import yaml

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [page for part in settings["nav"] for pages in part.values() for page in ([pages] if isinstance(pages, str) else pages)]
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    hook: dict = {}
    exec((ROOT / settings["hooks"][0]).read_text(), hook)
    for page in (ROOT / "docs").glob("*.md"):
        assert "](../" not in hook["on_page_markdown"](page.read_text()), page.name
    assert hook["on_page_markdown"]("[a](../b.py), [x/c.py](../x/c.py#d), [e](f.md)") == "a (`b.py`), x/c.py, [e](f.md)"
