"""Misspelt keys are found without torch, by a list read from the source."""

import subprocess
import sys

import pytest

from rlr_trainer import RLRConfig
from rlr_trainer.cli.keys import SettingsError, check_keys, known_keys
from rlr_trainer.cli.settings import _parser
from rlr_trainer.training.option_names import CONVERTED, ELSEWHERE, SAME_MEANING


def test_the_list_is_that_of_the_parser():
    assert known_keys() == {action.dest for action in _parser()._actions}


def test_every_name_of_other_programs_leads_to_an_option():
    assert not ELSEWHERE.keys() & (known_keys() - {"model", "reward", "prompts"} | SAME_MEANING.keys() | CONVERTED.keys())
    for target in ELSEWHERE.values():
        assert target.startswith("the argument ") or set(target.split(" and ")) <= known_keys(), target


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train_batch_size", "train_batch_size -> per_device_train_batch_size"),
        ("num_epochs", "num_epochs -> num_train_epochs"),
        ("guidance_scale", "here it is sample_guidance_scale"),
        ("learing_rate", "did you mean 'learning_rate'?"),
        ("lora_rank", "here it is lora_r"),
        ("reward", "the argument reward_function of RLRTrainer"),
        ("qqqq", "`rlr-trainer train --help` lists all"),
    ],
)
def test_a_misspelt_option_in_python_names_the_near_one(name, said):
    with pytest.raises(TypeError, match="RLRConfig") as error:
        RLRConfig(use_cpu=True, **{name: 1})
    assert said in str(error.value)


def test_a_misspelt_key_is_named_before_torch_is_loaded(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: digits\nlora_rank: 4\n")
    with pytest.raises(SettingsError, match="unknown key 'lora_rank'; here it is lora_r"):
        check_keys(str(file), [])
    with pytest.raises(SettingsError, match="unknown key 'train_batch_size'; here it is per_device_train_batch_size"):
        check_keys(None, ["--train_batch_size", "2"])  # a name of TRL's DDPOConfig
    check_keys(None, ["--learning-rate", "1", "--no_use_lora", "--fo_steps=1", "stray"])  # the rest is the parser's
    check_keys(str(tmp_path / "absent.yaml"), [])
    with pytest.raises(SettingsError, match=r"'run.yaml' stands before any option; .* write --config run.yaml"):
        check_keys(None, ["run.yaml", "--fo_steps", "1"])
    script = (
        "import sys; from rlr_trainer.cli import main; code = main(sys.argv[1:]); sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script, "train", "--learing_rate", "1"], capture_output=True, text=True)
    assert (done.returncode, "did you mean 'learning_rate'" in done.stderr) == (2, True), done.stderr
    file.write_text("a: [\n")
    check_keys(str(file), [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3': is text, but must be a number"),
        ({"max_steps": "2"}, "must be a number"),
        ({"sample_eta": "1"}, "must be a number"),
        ({"use_lora": "false"}, "use_lora='false': is text, but must be True or False"),
        ({"lora_target_modules": "to_q"}, "must be a list"),
    ],
)
def test_text_where_a_number_belongs_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RLRConfig(use_cpu=True, **options)
    RLRConfig(
        use_cpu=True, fo_steps="2", ho_start="0,1", noise_steps="3", report_to="none", lr_scheduler_type="constant", optim="sgd"
    )
