"""What a run is made of where nobody says it: the options of the bundled models, and that runs as they are documented learn."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rlr_trainer import RLRConfig, digits
from rlr_trainer.cli import main
from rlr_trainer.cli.settings import options_of_model, parse_run

ROOT = Path(__file__).parents[2]
PAGE, CONFIGS = ROOT / "docs" / "command_line.md", ROOT / "examples" / "configs"
RUN = "model: digits\nreward: digit:7\nprompts: a handwritten digit\nuse_cpu: true\n"

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def values(config, names):
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("model", digits.MODELS)
def test_a_bundled_model_brings_its_options_and_gives_way(model):
    own = options_of_model(model, ())
    Path("run.yaml").write_text(RUN + "learning_rate: 2e-3\n")
    _, config = parse_run("run.yaml", ["--model", model, "--lora-r", "8"])
    assert values(config, own) == own | {"learning_rate": 2e-3, "lora_r": 8}
    assert options_of_model(model, {"learning_rate"}) == {name: own[name] for name in own if name != "learning_rate"}


def test_another_model_has_the_defaults_of_the_config():
    Path("run.yaml").write_text(RUN)
    _, config = parse_run("run.yaml", ["--model", "some/folder"])
    assert values(config, digits.OPTIONS) == values(RLRConfig(use_cpu=True), digits.OPTIONS)
    assert options_of_model("some/folder", ()) == {}


def test_a_constant_schedule_takes_no_warm_up():
    assert RLRConfig(use_cpu=True).lr_scheduler_type == "constant"
    with pytest.raises(
        ValueError, match="lr_scheduler_type='constant' with a warm-up of 5: .* set lr_scheduler_type='constant_with_warmup'"
    ):
        RLRConfig(use_cpu=True, warmup_steps=5)
    RLRConfig(use_cpu=True, warmup_steps=5, lr_scheduler_type="constant_with_warmup")


@pytest.mark.medium
def test_what_nobody_gave_is_said_and_written(capsys):
    Path("run.yaml").write_text(RUN + "sample_num_steps: 2\nnum_log_images: 0\nmax_steps: 1\nlora_r: 2\nsave_strategy: no\n")
    assert main(["train", "--config", "run.yaml", "--output_dir", "out", "--per_device_train_batch_size=2"]) == 0
    printed = capsys.readouterr().out
    assert "options sample_guidance_scale: 1, learning_rate: 0.005 (of this model, because the run gives no others)" in printed
    assert "learning rate 0.005, constant" in printed
    written = yaml.safe_load(Path("out/run.yaml").read_text())
    expected = {
        "learning_rate": 0.005,
        "sample_guidance_scale": 1.0,
        "lora_r": 2,
        "lr_scheduler_type": "constant",
        "estimator": "rlr",
    }
    assert written | expected == written


def rewards(folder):
    """Mean reward of every update."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [row["reward"] for row in rows if "loss" in row]


def learns(found):
    """About one in ten pictures right at the beginning, and most of them at the end."""
    return sum(found[:4]) / 4 < 0.3 and sum(found[-8:]) / 8 > 0.6


@pytest.mark.slow
def test_the_documented_run_learns():
    """Its commands one after the other; it gives nothing but model, reward and prompts, so that the defaults learn is shown, too."""
    text = PAGE.read_text()
    (file,) = re.findall(r"```yaml\n# run.yaml\n(.*?)```", text, re.DOTALL)
    given = yaml.safe_load(file)
    assert given.keys() == {"model", "reward", "prompts", "output_dir", "max_steps", "use_cpu"}
    Path("run.yaml").write_text(file)
    commands = re.findall(r"^rlr-trainer (train --config run.yaml.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main([*command.split(), "--disable_tqdm", "true"]) == 0
    found = rewards(given["output_dir"])
    assert len(found) == 40 and learns(found), found


@pytest.mark.parametrize("model", digits.MODELS)
def test_the_configuration_of_a_bundled_model_shows_what_the_model_brings(model):
    given = yaml.safe_load((CONFIGS / f"{model}.yaml").read_text())
    brought = options_of_model(model, ())
    assert {name: float(given[name]) for name in brought} == brought


@pytest.mark.slow
def test_the_configuration_of_the_flow_model_learns():
    found = rewards_of_configuration("digits-flow")
    assert learns(found), found


@pytest.mark.slow
def test_the_configuration_of_a_black_box_learns():
    """By far more than the mean of sixteen pictures scatters: 0.01 kB."""
    found = rewards_of_configuration("digits-black-box")
    assert sum(found[-8:]) / 8 > sum(found[:4]) / 4 + 0.1, found


def rewards_of_configuration(name):
    assert main(["train", "--config", str(CONFIGS / f"{name}.yaml"), "--num_log_images", "0", "--disable_tqdm", "true"]) == 0
    found = rewards(f"runs/{name}")
    assert len(found) == 40
    return found
