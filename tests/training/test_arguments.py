"""What people who come from Trainer and TRL's other trainers pass to the trainer and its config, and what is said where it cannot be."""

import copy
import dataclasses
import inspect
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.training.trl import names as replaced

# ---- the constructor ----


@pytest.mark.parametrize("name", replaced.ARGUMENTS)
def test_an_argument_of_another_trainer_is_answered_with_the_name_here(pipeline, seven, name):
    with pytest.raises(TypeError, match=rf"RLRTrainer has other arguments: {name} -> ") as error:
        RLRTrainer(RLRConfig(use_cpu=True), seven, lambda: (digits.PROMPT, {}), pipeline, **{name: None})
    assert replaced.ARGUMENTS[name] in str(error.value)


def test_a_misspelt_argument_is_refused_and_the_signature_stays(seven):
    with pytest.raises(TypeError, match=r"reward_functoin -> unknown\. Its own are config, reward_function, prompt_function"):
        RLRTrainer(RLRConfig(use_cpu=True), reward_functoin=seven)
    parameters = inspect.signature(RLRTrainer).parameters
    assert list(parameters)[:5] == ["config", "reward_function", "prompt_function", "sd_pipeline", "image_samples_hook"]
    assert not replaced.ARGUMENTS.keys() & parameters.keys()
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_an_optimizer_that_would_train_nothing_is_refused(make_trainer, pipeline, caplog):
    """LoRA weights do not exist when the optimizer of a script is made of the pipeline."""
    with pytest.raises(ValueError, match=r"optimizers: the SGD has none of the \d+ trained parameters") as error:
        make_trainer(sd_pipeline=copy.deepcopy(pipeline), optimizers=(torch.optim.SGD(pipeline.unet.parameters(), lr=1.0), None))
    assert "attach them first (pipeline.unet.add_adapter" in str(error.value)

    # the way out that the message names
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    trainer = make_trainer(sd_pipeline=pipeline, optimizers=(torch.optim.SGD(trained, lr=0.1), None))
    trainer.train()
    assert not any("optimizers:" in record.message for record in caplog.records)
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))


def test_an_optimizer_that_leaves_parameters_out_is_warned_of(make_trainer, pipeline, caplog):
    weights = list(pipeline.unet.parameters())
    make_trainer(sd_pipeline=pipeline, use_lora=False, optimizers=(torch.optim.SGD(weights[:3], lr=1.0), None))
    assert f"optimizers: {len(weights) - 3} of {len(weights)} trained parameters are in no group" in caplog.text


def test_lora_and_the_whole_network_are_not_asked_for_at_once(make_trainer):
    with pytest.raises(ValueError, match="peft_config with use_lora=False"):
        make_trainer(use_lora=False, peft_config=LoraConfig(r=2, target_modules=["to_q"]))


def test_a_search_of_hyperparameters_says_what_there_is(make_trainer):
    with pytest.raises(NotImplementedError, match="let the study's objective build a trainer of its own"):
        make_trainer().hyperparameter_search(n_trials=2)


# ---- options ----


@dataclasses.dataclass
class Script:
    prompt_file: str = "prompts.txt"


def parse(parser, words):
    return parser.parse_args_and_config(words) if isinstance(parser, TrlParser) else parser.parse_args_into_dataclasses(words)


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_the_config_is_read_from_a_script_s_command_line(parser_class):
    """As scripts read DDPOConfig and GRPOConfig."""
    parser = parser_class((Script, RLRConfig))
    words = (
        "--prompt_file mine.txt --output_dir here --use_cpu True --estimator alignprop --fo_steps 2,5 --reward_weights 1 0.5 "
        "--report_to tensorboard --prompt_scales 3 5 --no_check_reward --lora_target_modules to_q to_k --learning_rate 1e-4"
    )
    script, config = parse(parser, words.split())
    assert script.prompt_file == "mine.txt"
    assert (config.output_dir, config.estimator, config.learning_rate) == ("here", "alignprop", 1e-4)
    assert (config.fo_steps, config.plan.fo_steps) == ([2, 5], (2, 5))
    assert (config.reward_weights, config.prompt_scales, config.lora_target_modules) == ([1.0, 0.5], [3, 5], ["to_q", "to_k"])
    assert (config.report_to, config.check_reward) == (["tensorboard"], False)
    _, config = parse(parser, ["--use_cpu", "True", "--fo_steps", "auto", "--ho_length", "2", "--ho_start", "uniform"])
    assert (config.fo_steps, config.ho_length, config.ho_start) == ("auto", 2, "uniform")
    _, config = parse(parser, ["--use_cpu", "True", "--fo_steps", "3", "--ho_length", "2", "--ho_start", "2,7"])
    assert (config.fo_steps, config.plan.ho_start) == (3, (2, 7))
    words = ["--use_cpu", "True", "--sample_num_steps", "3", "--fo_steps", "1", "--ho_length", "1", "--ho_start_weights", "0.2,0.8"]
    _, config = parse(parser, words)
    assert config.plan.start_probabilities() == [0.2, 0.8]
    with pytest.raises(ValueError, match=r"ho_start='0.2,0.8': must be a whole number.*weights go into ho_start_weights"):
        parse(parser, ["--use_cpu", "True", "--ho_start", "0.2,0.8"])
    assert "--fo_steps" in parser.format_help()


def test_defaults_survive_the_parser():
    (parsed,) = HfArgumentParser(RLRConfig).parse_args_into_dataclasses(["--use_cpu", "True"])
    plain = RLRConfig(use_cpu=True)
    own = [field.name for field in dataclasses.fields(RLRConfig) if field.name not in TrainingArguments.__dataclass_fields__]
    assert {name: getattr(parsed, name) for name in own} == {name: getattr(plain, name) for name in own}


@pytest.mark.parametrize(
    ("option", "value"),
    [("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0), ("auto_find_batch_size", True), ("use_liger_kernel", True)],
)
def test_an_option_that_cannot_be_honoured_is_refused(option, value):
    assert option in replaced.REFUSED_OPTIONS
    with pytest.raises(ValueError, match=rf"{option}={value}: has no meaning here: "):
        RLRConfig(use_cpu=True, **{option: value})


def test_an_option_without_effect_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        RLRConfig(use_cpu=True)
        assert not caplog.records
        RLRConfig(use_cpu=True, per_device_eval_batch_size=4, data_seed=1)
    assert sorted(record.message for record in caplog.records) == [
        "data_seed=1 has no effect: seed gives the order of the prompts, too",
        "per_device_eval_batch_size=4 has no effect: evaluation samples sample_batch_size pictures at a time",
    ]


def test_the_options_that_are_named_exist():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    renamed = {"group_by_length", "train_sampling_strategy"}  # of transformers 4 and 5
    assert len(renamed & names) == 1
    named = replaced.REFUSED_OPTIONS.keys() | replaced.UNUSED_OPTIONS.keys()
    assert named - names <= renamed
    page = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    assert not [name for name in named if f"`{name}`" not in page]


def test_no_limit_of_the_gradient_may_be_written_as_none(make_trainer):
    trainer = make_trainer(max_grad_norm=None, max_steps=1)
    assert trainer.args.max_grad_norm == 0.0
    trainer.train()
    assert trainer.state.global_step == 1
