"""Every example runs from the repository as it is; one that no test runs is an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from documentation_blocks import run_program

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = {
    "custom_reward.py": ["--max_steps", "2"],
    "black_box_reward.py": ["--max_steps", "2"],
    "third_party_reward.py": ["--max_steps", "2"],
}
SLOW = {
    "diffusive_chain_of_thought.py": ["--max_steps", "2"],
    "configs/make.py": None,  # tests/cli/test_before_a_run.py looks at the files that it wrote
    "digits/pretrain.py": None,  # run by tests/digits/test_digits.py
    "digits/pretrain_flow.py": None,  # run by tests/digits/test_digits_flow.py
    "digits/pretrain_moving.py": None,  # run by tests/digits/test_moving_digits.py
}


def test_no_example_is_left_out():
    found = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    assert found == QUICK.keys() | SLOW.keys()


def run(name, arguments, folder):
    command = [sys.executable, str(EXAMPLES / name), *arguments, "--output_dir", str(folder / "out")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "name", [name if name.startswith("black_box") else pytest.param(name, marks=pytest.mark.slow) for name in QUICK]
)
@pytest.mark.medium
def test_example_runs(name, tmp_path):
    assert "share of" in run(name, QUICK[name], tmp_path)


@pytest.mark.slow
def test_chain_of_thought_example(tmp_path):
    """The digit is decided in the first half of the steps."""
    lines = run("diffusive_chain_of_thought.py", SLOW["diffusive_chain_of_thought.py"], tmp_path).splitlines()
    table = {
        int(line.split()[0]): [float(x) for x in line.split()[1:]]
        for line in lines
        if line.split()[:1] and line.split()[0].isdigit() and len(line.split()) == 3
    }
    assert len(table) == 9
    assert table[1][1] > 0.9  # a fine prompt from step 1 on decides everything
    assert table[8][0] > 0.9  # from step 8 on, nothing


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "UPDATES = 20" in code
    exit_code, output = run_program(code.replace("UPDATES = 20", "UPDATES = 1"), tmp_path)
    assert exit_code == 0, output[-3000:]
    assert "judged: 0." in output
    assert not any(cell.get("outputs") for cell in cells)
