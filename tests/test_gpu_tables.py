"""The script for a GPU, at a small size on the CPU: every row is there, and the sweep's memory does not grow with the number of steps."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
FLAT = 1.02  # a sweep that grows by less than this does not grow


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import gpu_tables

    return gpu_tables


def run(script, folder, *arguments):
    code = script.main(["--size", "tiny", "--output", str(folder / "tables.json"), *arguments])
    return code, json.loads((folder / "tables.json").read_text())["tables"]


def test_every_row_is_there_and_the_sweep_does_not_grow_with_the_chain(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "PLANS", {name: script.PLANS[name] for name in ("rlr", "rlr_black_box")})
    code, tables = run(script, tmp_path, "--models", "flux", "--time_limit", "10000")  # a busy machine must not skip rows
    assert code == 0 and list(tables) == ["flux"]
    expected = {(plan, mode, steps) for plan in script.PLANS for mode in script.RECOMPUTE for steps in script.STEPS}
    printed = capsys.readouterr().out
    for model, rows in tables.items():
        found = {(row["plan"], row["recompute"], row["T"]): row for row in rows}
        assert found.keys() == expected
        assert not [row["failed"] for row in rows if "failed" in row]
        for plan in script.PLANS:
            few, many = (found[plan, "recursive", steps] for steps in script.STEPS)
            # what a step leaves, log-ratios and surrogates of one number per sample, are some hundred bytes
            assert few["sweep_bytes"] <= many["sweep_bytes"] < FLAT * few["sweep_bytes"], (model, plan)
            # T + 1 latents, T noises, T means
            assert many["chain_bytes"] * (3 * 10 + 1) == few["chain_bytes"] * (3 * 50 + 1)
            # the whole update grows by the stored chains alone (the profile counts them as the allocator rounds them)
            growth = many["peak_bytes"] - few["peak_bytes"]
            assert growth <= 1.1 * (many["chain_bytes"] - few["chain_bytes"]), (model, plan)
        assert f"{model}: 16 x 16 pixels" in printed
    assert printed.count("| `rlr` | recursive | 50 |") == 2  # as it was measured, and in the table


def test_the_measure_sees_a_graph_that_grows(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "RECOMPUTE", ("graph",))
    monkeypatch.setattr(script, "PLANS", {"rlr": {}})
    _, tables = run(script, tmp_path, "--models", "flux", "--time_limit", "10000")
    few, many = tables["flux"]
    assert many["sweep_bytes"] > FLAT * few["sweep_bytes"]  # K is 3 of 10 steps, and 15 of 50: the test above would refuse it


def test_a_row_that_does_not_fit_or_fails_or_takes_too_long_says_so(script, tmp_path, monkeypatch, capsys):
    def measure(pipeline, size, device, row, warm_up):
        if row["plan"] == "rlr":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if row["plan"] == "ddpo" and row["T"] == 10:
            raise ValueError("broken")
        return dict.fromkeys(("seconds", "peak_bytes", "held_bytes", "sweep_bytes", "chain_bytes"), 1000.0)

    monkeypatch.setattr(script, "measure", measure)
    code, tables = run(script, tmp_path, "--models", "sd15", "--time_limit", "2000")
    failed = {(row["plan"], row["recompute"], row["T"]): row.get("failed", "") for row in tables["sd15"]}
    assert code == 1  # the broken one; memory and time are no errors
    assert (
        failed["rlr", "recursive", 50] == "out of memory"
        and "| `rlr` | recursive | 10 | out of memory |" in capsys.readouterr().out
    )
    assert failed["ddpo", "recursive", 10] == "ValueError: broken" and not failed["draft", "recursive", 10]
    assert "5000 s expected" in failed["draft", "recursive", 50]
