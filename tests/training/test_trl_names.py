"""What people who come from Trainer and TRL's trainers pass, read, assign and override, and what is said where it cannot be."""

import copy
import dataclasses
import inspect
import logging
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser
from trl_configs import alignprop_config, ddpo_config

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.training.checks import check_optimizer
from rlr_trainer.training.trl import names
from rlr_trainer.training.trl.names import check_pipeline

pytestmark = pytest.mark.usefixtures("in_temporary_folder")

# ---- the constructor ----


@pytest.mark.parametrize("name", names.ARGUMENTS)
def test_an_argument_of_another_trainer_is_answered_with_the_name_here(name):
    with pytest.raises(TypeError, match=rf"RLRTrainer has other arguments: {name} -> ") as error:
        RLRTrainer(RLRConfig(use_cpu=True), **{name: None})
    assert names.ARGUMENTS[name] in str(error.value)


def test_a_misspelt_argument_is_refused_and_the_signature_stays(seven):
    with pytest.raises(TypeError, match=r"reward_functoin -> unknown\. Its own are config, reward_function, prompt_function"):
        RLRTrainer(RLRConfig(use_cpu=True), reward_functoin=seven)
    parameters = inspect.signature(RLRTrainer).parameters
    assert list(parameters)[:5] == ["config", "reward_function", "prompt_function", "sd_pipeline", "image_samples_hook"]
    assert not names.ARGUMENTS.keys() & parameters.keys()
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@pytest.mark.medium
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


def test_an_optimizer_that_leaves_parameters_out_is_warned_of(caplog):
    params = {name: torch.nn.Parameter(torch.ones(1)) for name in "abc"}
    check_optimizer(torch.optim.SGD([params["b"]], lr=1.0), params)
    assert "optimizers: 2 of 3 trained parameters are in no group, such as a" in caplog.text
    check_optimizer(None, params)


def test_lora_and_the_whole_network_are_not_asked_for_at_once(make_trainer):
    with pytest.raises(ValueError, match="peft_config with use_lora=False"):
        make_trainer(use_lora=False, peft_config=LoraConfig(r=2, target_modules=["to_q"]))


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
    assert option in names.REFUSED_OPTIONS
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
    options = {field.name for field in dataclasses.fields(TrainingArguments)}
    renamed = {"group_by_length", "train_sampling_strategy"}  # of transformers 4 and 5
    assert len(renamed & options) == 1
    named = names.REFUSED_OPTIONS.keys() | names.UNUSED_OPTIONS.keys()
    assert named - options <= renamed
    page = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    assert not [name for name in named if f"`{name}`" not in page]


@pytest.mark.medium
def test_no_limit_of_the_gradient_may_be_written_as_none(make_trainer):
    trainer = make_trainer(max_grad_norm=None, max_steps=1)
    assert trainer.args.max_grad_norm == 0.0
    trainer.train()
    assert trainer.state.global_step == 1


# ---- what a script for TRL's trainers does with the trainer ----


class DefaultDDPOStableDiffusionPipeline:
    """What TRL's class looks like from outside."""

    def __init__(self, pipeline):
        self.use_lora, self.sd_pipeline = True, pipeline

    def __call__(self):
        raise AssertionError

    get_trainable_layers = scheduler_step = save_pretrained = __call__


@pytest.mark.medium
def test_a_ddpo_script_runs_with_the_class_name_changed(pipeline, seven, tmp_path):
    images, prompts = [], lambda: (digits.PROMPT, {})
    config = ddpo_config(
        num_epochs=2, sample_num_steps=4, sample_batch_size=2, train_batch_size=2, sample_guidance_scale=2.0, mixed_precision="fp16"
    )

    def reward(images, prompts, metadata):
        return seven(images, prompts, metadata), {"note": "kept"}

    wrapped = DefaultDDPOStableDiffusionPipeline(copy.deepcopy(pipeline))
    trainer = RLRTrainer(config, reward, prompts, wrapped, lambda data, step, tracker: images.append((data, step)))
    assert (trainer.sd_pipeline, trainer.prompt_fn, trainer.reward_fn) == (wrapped, prompts, reward)
    assert trainer.sd_pipeline.sd_pipeline.unet is trainer.policy.denoiser
    trainer.train()
    assert trainer.state.global_step == 4  # two epochs of two batches
    assert [step for _, step in images] == [0, 2]
    pictures, texts, metadata, rewards, notes = images[0][0][0]
    assert pictures.shape == (2, 3, 32, 32) and 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    assert (texts, metadata, notes) == ((digits.PROMPT,) * 2, ({}, {}), {"note": "kept"})
    assert rewards.shape == (2,)
    assert (tmp_path / "logs" / "checkpoint-4").is_dir()
    assert not hasattr(config, "output_dir")  # the caller's config is left as it was
    trainer.save_model()
    assert (tmp_path / "logs/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.medium
def test_assignments_work_or_are_refused(make_trainer, seven):
    """They were kept in an attribute that nothing reads: a statistics tracker of one's own, or another reward, had no effect."""
    calls = []
    trainer = make_trainer(max_steps=1, image_samples_hook=lambda *data: calls.append("first"))
    for name in (*names.MEMBERS, *names.OF_PARTS, *names.READ_ONCE):
        with pytest.raises(AttributeError, match=rf"RLRTrainer\.{name} = \.\.\. would have no effect: use \w+"):
            setattr(trainer, name, None)
    trainer.image_samples_callback = lambda *data: calls.append("second")  # DDPOTrainer's name
    assert trainer.image_samples_callback is trainer.image_samples_hook
    trainer.train()
    trainer.image_samples_callback = None
    trainer.train()
    assert calls == ["second"]


@pytest.mark.medium
def test_an_assigned_callback_of_alignprop_is_called_as_there(pipeline, seven):
    seen = []
    config = alignprop_config(num_epochs=2, sample_num_steps=2, sample_guidance_scale=1.0, log_image_freq=2)
    trainer = RLRTrainer(config, seven, lambda: (digits.PROMPT, {}), pipeline)
    trainer.image_samples_callback = lambda data, step, tracker: seen.append((sorted(data), step))
    trainer.train()
    assert seen == [(["images", "prompt_metadata", "prompts", "rewards"], 2)]


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.medium
def test_a_scheduler_made_on_the_trainer_s_optimizer_trains(make_trainer, pipeline, resumes):
    """The optimizer exists before the training, as in DDPOTrainer."""

    def make(**options):
        trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), sample_num_steps=2, max_steps=3, **options)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda update: 0.5**update)
        return trainer

    trainer = make(save_strategy="steps", save_steps=1)
    trainer.train()
    if resumes:
        trainer = make()
        trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == [1e-3, 0.5e-3, 0.25e-3]


def test_attributes_of_trainer_and_of_subclasses_are_assigned(make_trainer, seven, pipeline):
    class Mine(RLRTrainer):
        def __init__(self, *arguments, weight, **keywords):
            self.weight = weight
            self.reward_function = seven  # kept for itself, before the constructor has run
            super().__init__(*arguments, **keywords)

        def score(self):
            return self.weight

    mine = Mine(RLRConfig(use_cpu=True, sample_num_steps=2), seven, lambda: (digits.PROMPT, {}), pipeline, weight=2)
    assert mine.score() == 2
    for name in ("model", "model_wrapped", "optimizer", "lr_scheduler", "control", "state"):
        value = getattr(mine, name)
        setattr(mine, name, value)
        assert getattr(mine, name) is value


def test_a_subclass_that_does_not_call_the_constructor_is_told(seven):
    class Mine(RLRTrainer):
        def __init__(self):
            self.mine = 1

    for use in (lambda: Mine().train(), lambda: Mine().policy, lambda: Mine().args):
        with pytest.raises(
            AttributeError, match=r"Mine has no '\w+' yet: .* a subclass must call super\(\).__init__\(\.\.\.\) first"
        ):
            use()


@pytest.mark.parametrize("name", [*names.MEMBERS, *names.NEVER_CALLED])
def test_overriding_what_is_never_called_is_refused(name):
    class Parent:
        pass

    class Mine(Parent, RLRTrainer):
        pass

    setattr(Parent, name, lambda self, *arguments: None)
    with pytest.raises(TypeError, match=rf"Mine overrides {name}, which RLRTrainer never calls; use instead: {name} -> "):
        Mine(RLRConfig(use_cpu=True), None)


def test_what_took_the_place_of_a_name_is_said(make_trainer):
    trainer = make_trainer()
    for name, way_out in names.MEMBERS.items():
        with pytest.raises(
            AttributeError, match=re.escape(f"RLRTrainer has no {name!r}: TRL's trainers had it; here it is {way_out}")
        ):
            getattr(trainer, name)
    with pytest.raises(AttributeError, match=r"RLRTrainer has no 'nothing'$"):
        _ = trainer.nothing


@pytest.mark.parametrize("name", names.PIPELINE_REPLACED)
def test_a_pipeline_subclass_that_changes_what_is_never_called_is_refused(name):
    class Mine(DefaultDDPOStableDiffusionPipeline):
        pass

    check_pipeline(Mine(None))
    setattr(Mine, name, lambda self, *arguments: None)
    with pytest.raises(TypeError, match=rf"sd_pipeline is a Mine, which overrides {name}: the trainer never calls them"):
        check_pipeline(Mine(None))


def test_the_repository_of_a_push_is_named_as_in_trl():
    """PyTorchModelHubMixin's `push_to_hub(repo_id, *, ..., token, branch)`; what it does is tested with HubUploads."""
    parameters = inspect.signature(RLRTrainer.push_to_hub).parameters
    assert list(parameters)[1] == "repo_id"
    assert {"token", "private", "branch", "commit_message", "revision", "blocking"} <= parameters.keys()


def test_the_page_says_what_takes_the_place_of_names():
    text = (Path(__file__).parents[2] / "docs/trl_names.md").read_text()
    for name in (*names.MEMBERS, *names.NEVER_CALLED, *names.PIPELINE_REPLACED, *names.ARGUMENTS):
        assert f"`{name}`" in text, name
