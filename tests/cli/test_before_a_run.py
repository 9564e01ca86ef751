"""`estimate`, `train --dry_run`, `doctor`, the summary at the start, and the configurations that ship."""

import importlib.util
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from rlr_trainer import RLRConfig
from rlr_trainer.cli import doctor, main
from rlr_trainer.cli.settings import parse_run
from rlr_trainer.cli.summary import in_units, when_saved
from rlr_trainer.digits import MODELS
from rlr_trainer.pipelines.skeleton import load_skeleton

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
RUN = """
reward: digit:7
prompts: a handwritten digit
sample_num_steps: 2
sample_guidance_scale: 1.0
per_device_train_batch_size: 2
max_steps: 1
save_strategy: no
num_log_images: 0
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(autouse=True)
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)


@pytest.mark.medium
def test_an_estimate_needs_no_weights_and_leaves_no_files(capsys):
    model = Path("model")
    model.mkdir()
    for path in MODELS["digits"].glob("pipeline/**/*"):  # the configuration alone, as of a hub id that is not in the cache
        if path.is_file() and path.suffix not in (".safetensors", ".bin"):
            target = model / path.relative_to(MODELS["digits"] / "pipeline")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    tables = []
    for name in ("digits", "model"):
        assert main(["train", "--config", "run.yaml", "--model", name, "--lora_r", "4", "--dry_run", "--memory", "1"]) == 0
        printed = capsys.readouterr().out
        assert "fits in 90% of 1 GB" in printed
        assert "8 forward and 4 backward passes of the network" in printed
        assert ("not counted: what text encoders take" in printed) == (name == "model")
        tables.append(printed[printed.index("\nnetwork   ") : printed.index("(other phases:")])
    assert tables[0] == tables[1] and "peak of one process" in tables[0]
    assert logging.getLogger("rlr_trainer").isEnabledFor(logging.WARNING)  # it was quiet for the estimate alone
    assert sorted(path.name for path in Path().iterdir()) == ["model", "run.yaml"]


@pytest.mark.slow
def test_settings_that_fit_are_proposed(capsys):
    arguments = ["estimate", "--config", "run.yaml", "--model", "digits", "--per_device_train_batch_size", "8"]
    assert main([*arguments, "--memory", "0.012"]) == 0
    printed = capsys.readouterr().out
    assert "with these settings it does" in printed
    proposed = printed[printed.index("with these settings") :].splitlines()[1:]
    assert main([*arguments, "--memory", "0.012", *(f"--{line.replace(': ', '=')}" for line in proposed)]) == 0
    assert "fits in 90% of 0.012 GB" in capsys.readouterr().out


def test_a_skeleton_takes_no_memory_and_has_every_weight():
    pipeline = load_skeleton(MODELS["digits"] / "pipeline", torch.bfloat16, torch.float32)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {torch.bfloat16}
    assert all(p.untyped_storage().nbytes() <= 4 for p in pipeline.unet.parameters())
    with pytest.raises(ValueError, match=r"model='nowhere': cannot be made of its configuration"):
        load_skeleton("nowhere", torch.float32, torch.float32)


@pytest.mark.medium
def test_a_run_says_what_it_is_and_how_long_it_takes(capsys):
    assert main(["train", "--config", "run.yaml", "--model", "digits", "--reward", "ink", "--output_dir", "out"]) == 0
    printed = capsys.readouterr().out
    update = "update  2 pictures, 8 forward and 4 backward passes"
    for line in ("model   ", "plan    ", update, "trained ", "memory  ", "files   out", "time    first update"):
        assert line in printed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_steps": 20}, "every 5 updates"),  # the default, as the training itself chooses it
        ({"max_steps": 3}, "after every update"),
        ({"max_steps": 20, "save_steps": 7}, "every 7 updates"),
        ({"max_steps": 20, "save_strategy": "epoch"}, "every epoch"),
        ({"save_strategy": "no"}, "none"),
    ],
)
def test_the_summary_says_when_checkpoints_are_saved(options, text):
    run = SimpleNamespace(args=RLRConfig(use_cpu=True, **options), parts=SimpleNamespace(collector=None))
    assert when_saved(run) == text
    assert (when_saved(run, resumed=True) == text) == ("save_steps" in options or "save_strategy" in options)


def test_a_memory_belongs_to_a_dry_run(capsys):
    assert main(["train", "--config", "run.yaml", "--model", "digits", "--memory", "24"]) == 2
    assert "--memory 24: goes with --dry_run" in capsys.readouterr().err


def test_the_doctor_answers_without_a_network(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("rlr_trainer", "torch", "diffusers", "cpu", "cache", "hub"):
        assert f"\n{name} " in f"\n{printed}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "NOT REACHED" in doctor.hub()[1]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert ("missing", "tensorboard, for report_to: tensorboard: pip install 'rlr-trainer[tensorboard]'") in list(doctor.missing())


def test_numbers_in_words():
    assert [in_units(n, "B") for n in (0, 999, 1234, 12_345_678, 2e12)] == ["0 B", "999 B", "1.23 kB", "12.3 MB", "2 TB"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_that_ships_is_valid(path):
    text = path.read_text()
    run, config = parse_run(path, ["--use_cpu", "true"])
    assert text.startswith(f"# rlr-trainer train --config examples/configs/{path.name}\n")
    assert config.plan and run.prompts and config.output_dir == f"runs/{path.stem}"
    json.dumps(config.rlr_options(), default=str)
    if run.model in MODELS:
        assert "# Reached " in text
        return
    family, memory = re.fullmatch(r"(.+)-(\d+)gb", path.stem).groups()
    assert "Not run at full size" in text
    assert f"# Check: rlr-trainer estimate --config examples/configs/{path.name} --memory {memory}\n" in text
    assert f"# Made by: python examples/configs/make.py {family}\n" in text
    peak, reward = (float(number) for number in re.search(r"\) ([\d.]+) GB, and ([\d.]+) GB for ", text).groups())
    assert peak + reward <= 0.9 * int(memory) + 0.05


def test_every_size_is_in_the_table_of_the_documentation():
    page = (CONFIGS.parents[1] / "docs" / "estimate.md").read_text()
    table = page[page.index("| family | model |") :].split("\n\n")[0].splitlines()
    memories = [int(cell.split()[0]) for cell in table[0].split("|")[3:-1]]
    rows = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[3:-1]] for row in table[2:]}
    sizes = {path.stem: path for path in CONFIGS.glob("*gb.yaml")}
    assert {
        f"{family}-{gb}gb" for family, cells in rows.items() for gb, cell in zip(memories, cells, strict=True) if "GB" in cell
    } == set(sizes)
    for name, path in sizes.items():
        family, memory = re.fullmatch(r"(.+)-(\d+)gb", name).groups()
        peak = re.search(r"\) ([\d.]+ GB), and ", path.read_text()).group(1)
        assert rows[family][memories.index(int(memory))].startswith(f"`{yaml.safe_load(path.read_text())['estimator']}`, {peak}")


@pytest.mark.slow
def test_the_program_writes_the_files_that_ship(tmp_path, monkeypatch, capsys):
    """Of one family; the peak in the comment may differ a little with the versions of diffusers and transformers."""
    spec = importlib.util.spec_from_file_location("make_configs", CONFIGS / "make.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["make.py", "sd15"])
    program.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("| `sd15` | ")
    written = sorted(tmp_path.glob("sd15-*.yaml"))
    assert [path.name for path in written] == sorted(path.name for path in CONFIGS.glob("sd15-*.yaml"))
    for path in written:
        old, new = ((folder / path.name).read_text() for folder in (CONFIGS, tmp_path))
        assert yaml.safe_load(new) == yaml.safe_load(old)
        peaks = [float(re.search(r"\) ([\d.]+) GB, and ", text).group(1)) for text in (old, new)]
        assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
