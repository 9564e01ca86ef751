"""Messages in the command line's language, and the file that a run leaves."""

import logging

import pytest
import yaml

from rlr_trainer.cli.keys import keys_of_file
from rlr_trainer.cli.language import CommandFormatter, in_command_language
from rlr_trainer.cli.resolved import keys_of, resolved
from rlr_trainer.cli.settings import parse_run


@pytest.mark.parametrize(
    ("python", "command"),
    [
        ("max_steps=0: must be a number", "--max_steps 0: must be a number"),
        ("fo_steps=[2, 5], or fo_steps=3, or fo_steps='auto'", "--fo_steps 2,5, or --fo_steps 3, or --fo_steps auto"),
        ("reward_weights=[1, 0.5]: must be 3 finite numbers", "--reward_weights 1 0.5: must be 3 finite numbers"),
        (
            "continue it with train(resume_from_checkpoint=True), or overwrite=True (--overwrite)",
            "continue it with --resume, or --overwrite",
        ),
        ("set check_reward=False", "set --check_reward false"),
        ("leave kl_coef unset (kl_coef=None)", "leave kl_coef unset (kl_coef: null)"),
        ("output_dir='my run' holds", "--output_dir 'my run' holds"),
        ("train_dataset: row 3 has no text", "prompts: row 3 has no text"),
        ("pass eval_dataset", "pass eval_prompts"),
        ("learning_rate=0.1 -> 0.2", "--learning_rate 0.1 -> 0.2"),
        (
            "sample_batch_size * processes = 3 and x.max_steps=3",
            "sample_batch_size * processes = 3 and x.max_steps=3",
        ),  # no option's value
    ],
)
def test_options_are_written_as_on_the_command_line(python, command):
    assert in_command_language(python) == command


def test_a_command_with_flags_of_its_own_is_answered_in_them():
    assert in_command_language("sample_eta=2.0: must", "sample") == "--eta 2.0: must"


def test_log_records_too():
    record = logging.LogRecord("any", logging.WARNING, "", 0, "%s=True: removing %s", ("overwrite", "checkpoint-3"), None)
    assert CommandFormatter("%(levelname)s: %(message)s").format(record) == "WARNING: --overwrite: removing checkpoint-3"


def test_the_file_of_a_run_describes_the_same_run(tmp_path):
    file, overrides = (
        tmp_path / "run.yaml",
        ["--learning-rate", "1e-4", "--no_use_lora", "--reward", "digit:1", "digit:2", "--fo_steps=2,3", "--ho_length", "0"],
    )
    file.write_text(
        "model: digits\nreward: ink\nprompts: ['a: cat', a dog]\nsave_strategy: no\nsample_num_steps: 4\nhub_token: hush\nkl_coef: null\n"
        f"output_dir: {tmp_path / 'out'}\nlr_scheduler_type: constant\nuse_cpu: true\n"
    )
    first = parse_run(file, overrides)
    text = resolved(*first, keys_of(keys_of_file(file), overrides))
    assert "hush" not in text
    assert yaml.safe_load(text)["reward"] == ["digit:1", "digit:2"]
    again = tmp_path / "again.yaml"
    again.write_text(text)
    second = parse_run(again)
    assert second[0] == first[0]
    assert second[1].rlr_options() == first[1].rlr_options()
    assert second[1].changed_options().keys() == first[1].changed_options().keys() - {"hub_token"}
    assert resolved(*second, keys_of_file(again)) == text
