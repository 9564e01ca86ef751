"""The curves of short runs stay as they were recorded: a change that should change nothing gives the same numbers, bit for bit.

`python tests/frozen/record.py tests/frozen/curves.json`, with the environment of `PLAIN_KERNELS`, records them anew; two processes:
`tests/frozen/two_processes.json` under torchrun. Record only where a number has to change, and say in the commit which and why.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from frozen import record
from programs import environment, torchrun

HERE = Path(__file__).parent
FILES = {"one process": HERE / "curves.json", "two processes": HERE / "two_processes.json"}


@pytest.fixture(scope="module", params=FILES)
def curves(request, tmp_path_factory):
    """(recorded, found, exact): on the machine and versions of the record every bit counts, elsewhere the sixth digit."""
    folder = tmp_path_factory.mktemp("frozen")
    script, output = HERE / "record.py", folder / "found.json"
    two = request.param == "two processes"
    command = torchrun(2, script, output) if two else [sys.executable, str(script), str(output)]
    env = environment() | record.PLAIN_KERNELS | {"FROZEN_FOLDER": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    recorded, found = (json.loads(path.read_text()) for path in (FILES[request.param], output))
    assert recorded["curves"].keys() == found["curves"].keys() == (record.DISTRIBUTED if two else record.RUNS).keys()
    if found["machine"]["transformers"].split(".")[0] != recorded["machine"]["transformers"].split(".")[0]:
        pytest.skip("another major version of transformers: its text encoder rounds differently")
    return recorded["curves"], found["curves"], recorded["machine"] == found["machine"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_run_is_as_recorded(curves):
    recorded, found, exact = curves
    wrong = {name: differences(recorded[name], found[name], exact) for name in recorded}
    assert not {name: what[:4] for name, what in wrong.items() if what}


def differences(recorded, found, exact, where=""):
    """Where two curves differ, and by what. Digests count only where every bit does."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        missing = [f"{where}.{key}: only one has it" for key in recorded.keys() ^ found.keys()]
        both = [key for key in recorded if key in found and (exact or key != "sha256")]
        return missing + [line for key in both for line in differences(recorded[key], found[key], exact, f"{where}.{key}")]
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        return [
            line for i, pair in enumerate(zip(recorded, found, strict=True)) for line in differences(*pair, exact, f"{where}[{i}]")
        ]
    same = recorded == found
    if not exact and isinstance(recorded, float) and isinstance(found, float | int):
        same = math.isclose(recorded, found, rel_tol=1e-3, abs_tol=1e-5)
    return [] if same else [f"{where}: {recorded} -> {found}"]


def test_the_comparison_sees_a_difference():
    curve = {"metrics": [{"loss": 1.0, "reward": 2.0}], "weights": {"sha256": "a", "magnitude": 1.0}}
    last_bit = {"metrics": [{"loss": math.nextafter(1.0, 2.0), "reward": 2.0}], "weights": {"sha256": "b", "magnitude": 1.0}}
    other = {"metrics": [{"loss": 1.0, "reward": 2.01}], "weights": {"sha256": "a", "magnitude": 1.0}}
    assert not differences(curve, curve, exact=True)
    assert len(differences(curve, last_bit, exact=True)) == 2 and not differences(curve, last_bit, exact=False)
    assert differences(curve, other, exact=False) == [".metrics[0].reward: 2.0 -> 2.01"]
    assert differences(curve, {"metrics": []}, exact=False)
