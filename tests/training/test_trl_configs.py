"""TRL's configs, converted field by field, and what functions in scripts for TRL's trainers take and return."""

import copy
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from trl_configs import FIELDS, alignprop_config, ddpo_config, make, trl_class

from rlr_trainer import RLRConfig, RLRTrainer, digits
from rlr_trainer.rewards.interface import RewardError, Rewards
from rlr_trainer.rollouts.prompts import FunctionPrompts
from rlr_trainer.training.option_names import SAME_MEANING
from rlr_trainer.training.trl import configs

PAGE = Path(__file__).parents[2] / "docs/trl_names.md"
# A value for every field that is not its default.
OTHER = {
    "exp_name": "other", "run_name": "mine", "seed": 3, "log_with": "tensorboard", "tracker_kwargs": {"wandb": {"entity": "us"}},
    "accelerator_kwargs": {"cpu": True}, "project_kwargs": {"project_dir": "save"}, "tracker_project_name": "ours", "logdir": "here",
    "num_epochs": 7, "save_freq": 5, "num_checkpoint_limit": 2, "mixed_precision": "bf16", "allow_tf32": False,
    "resume_from": "run/checkpoint-3", "sample_num_steps": 20, "sample_eta": 0.5, "sample_guidance_scale": 3.0, "train_batch_size": 2,
    "train_use_8bit_adam": True, "train_adam_beta1": 0.8, "train_adam_beta2": 0.99, "train_adam_weight_decay": 0.1,
    "train_adam_epsilon": 1e-6, "train_gradient_accumulation_steps": 2, "train_max_grad_norm": 0.5, "push_to_hub": True,
    "sample_batch_size": 2, "sample_num_batches_per_epoch": 3, "train_learning_rate": 0.01, "train_num_inner_epochs": 2, "train_cfg": False,
    "train_adv_clip_max": 3.0, "train_clip_range": 0.1, "train_timestep_fraction": 0.5, "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_buffer_size": 32, "per_prompt_stat_tracking_min_count": 8, "async_reward_computation": True,
    "max_workers": 4, "negative_prompts": "blurred", "log_image_freq": 3, "truncated_backprop_rand": False,
    "truncated_backprop_timestep": 40, "truncated_rand_backprop_minmax": (5, 15),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_a_gpu_or_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configs.torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", FIELDS)
def test_the_stand_ins_are_what_trl_has(name):
    real = trl_class(name)
    if real is None:
        pytest.skip(f"this TRL has no {name}")
    fields = {field.name: getattr(real(), field.name) for field in dataclasses.fields(real)}
    assert fields | {"exp_name": ""} == FIELDS[name]


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in FIELDS.items() for field in fields])
def test_every_field_does_something_or_is_refused(name, field, caplog, monkeypatch):
    """A value other than the default changes an option, or is answered by name."""
    monkeypatch.setattr(configs.torch.cuda, "is_available", lambda: field == "allow_tf32")
    monkeypatch.setattr(configs, "is_torch_tf32_available", lambda: True)
    needs = {"max_workers": {"async_reward_computation": True}, "truncated_backprop_timestep": {"truncated_backprop_rand": False}}
    base = {"resume_from": ""} | needs.get(field, {})
    before = configs.options_of_trl_config(make(name, **base))
    try:
        changed = make(name, **(base | {field: OTHER[field]}))
    except ImportError:  # TRL's own, for bitsandbytes
        changed = make(name, **base)
        changed.train_use_8bit_adam = True
    if field == "train_cfg":
        with pytest.raises(ValueError, match="train_cfg=False with sample_guidance_scale=5.0"):
            configs.options_of_trl_config(changed)
        return
    caplog.clear()
    after = configs.options_of_trl_config(changed)
    if field == "log_image_freq":
        steps = []
        hook = configs.adapt_hook(changed, lambda data, step, tracker: steps.append(step))
        for step in range(7):
            hook([[0] * 5], step, None)
        assert steps == [3, 6]
    elif field in ("tracker_kwargs",):
        assert f"{field}=" in caplog.text
    else:
        assert after != before


def test_what_the_fields_become():
    config = ddpo_config(
        seed=3, num_epochs=7, sample_num_steps=20, sample_batch_size=8, sample_num_batches_per_epoch=2, train_batch_size=4,
        train_gradient_accumulation_steps=2, train_learning_rate=1e-3, save_freq=5, num_checkpoint_limit=2, train_num_inner_epochs=2,
        per_prompt_stat_tracking=True, negative_prompts="blurred", train_timestep_fraction=0.5, logdir="here", run_name="mine",
        exp_name="script", train_adv_clip_max=3.0, async_reward_computation=True, max_workers=4,
    )  # fmt: skip
    converted = RLRConfig.from_ddpo(config, use_cpu=True)
    assert converted.estimator == "ddpo"
    assert (converted.seed, converted.num_train_epochs, converted.learning_rate) == (3, 7, 1e-3)
    assert converted.updates_per_rollout == 4
    assert converted.save_steps == 20  # every five epochs of four updates
    assert converted.save_total_limit == 2
    assert converted.advantage == "per_prompt"
    assert converted.rest_num_steps == 10
    assert converted.negative_prompt == "blurred"
    assert converted.adv_clip_max == 3.0
    assert Path(converted.output_dir) == Path("here/mine")
    assert converted.run_name == "script-mine"
    assert (converted.async_rewards, converted.reward_workers) == (True, 4)
    assert (converted.lora_r, converted.lora_alpha) == (4, 4)


def test_project_kwargs_come_before_the_fields_that_trl_never_read():
    kwargs = {"project_dir": "save", "total_limit": 3, "automatic_checkpoint_naming": True, "logging_dir": "logs"}
    options = configs.options_of_trl_config(ddpo_config(project_kwargs=kwargs, num_checkpoint_limit=9, logdir="elsewhere"))
    assert (options["output_dir"], options["save_total_limit"]) == ("save", 3)
    with pytest.raises(ValueError, match=r"project_kwargs has keys that are not known here \(project_dri\)"):
        configs.options_of_trl_config(ddpo_config(project_kwargs={"project_dri": "save"}))
    with pytest.raises(ValueError, match="mixed_precision='fp8': must be one of no, fp16, bf16"):
        configs.options_of_trl_config(ddpo_config(mixed_precision="fp8"))


def test_precision_follows_the_machine(monkeypatch, caplog):
    assert not configs.options_of_trl_config(ddpo_config(mixed_precision="fp16"))["fp16"]
    assert "mixed_precision='fp16' needs a GPU: training in float32" in caplog.text
    monkeypatch.setattr(configs.torch.cuda, "is_available", lambda: True)
    for tf32 in (True, False):
        monkeypatch.setattr(configs, "is_torch_tf32_available", lambda answer=tf32: answer)
        options = configs.options_of_trl_config(ddpo_config(mixed_precision="fp16"))
        assert options["fp16"]
        assert options["tf32"] is (True if tf32 else None)  # on a GPU without it, transformers refuses the option
    options = configs.options_of_trl_config(ddpo_config(mixed_precision="fp16", accelerator_kwargs={"cpu": True}))
    assert (options["use_cpu"], options["fp16"], options["tf32"]) == (True, False, None)


def test_bf16_without_a_gpu_runs_on_the_cpu_as_in_trl(monkeypatch):
    config = ddpo_config(mixed_precision="bf16", sample_num_steps=3)
    for gpu in (False, True):
        with monkeypatch.context() as patches:
            patches.setattr(configs.torch.cuda, "is_available", lambda answer=gpu: answer)
            patches.setattr(configs, "is_torch_bf16_gpu_available", lambda answer=gpu: answer)
            options = configs.options_of_trl_config(config)
        assert (options["bf16"], options["use_cpu"]) == (True, not gpu)
    assert RLRConfig.from_ddpo(config).bf16


def test_trackers_take_the_project(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    options = configs.options_of_trl_config(ddpo_config(log_with="wandb", tracker_project_name="ours"))
    assert (options["report_to"], options["project"]) == ("wandb", "ours")
    assert configs.os.environ["WANDB_PROJECT"] == "ours"
    configs.options_of_trl_config(ddpo_config(log_with="wandb", tracker_project_name="another"))
    assert configs.os.environ["WANDB_PROJECT"] == "ours"  # what the user set stays
    monkeypatch.delenv("WANDB_PROJECT")
    configs.options_of_trl_config(ddpo_config(log_with=["tensorboard", "wandb"], tracker_project_name="several"))
    assert configs.os.environ["WANDB_PROJECT"] == "several"
    monkeypatch.delenv("WANDB_PROJECT")


def test_resuming_takes_the_newest_of_a_folder(tmp_path):
    for number in (2, 10):
        (tmp_path / f"run/checkpoint-{number}").mkdir(parents=True)
    (tmp_path / "trl/checkpoint_3").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    options = configs.options_of_trl_config(ddpo_config(resume_from="run"))
    assert options["resume_from_checkpoint"] == str(Path("run/checkpoint-10"))
    assert configs.options_of_trl_config(ddpo_config(resume_from="run/checkpoint-2"))["resume_from_checkpoint"].endswith("-2")
    for folder in ("trl", "trl/checkpoint_3"):
        with pytest.raises(ValueError, match="is a checkpoint of TRL's trainer, whose optimizer and counters cannot be taken over"):
            configs.options_of_trl_config(ddpo_config(resume_from=folder))
    with pytest.raises(ValueError, match="neither a checkpoint nor a folder of checkpoints"):
        configs.options_of_trl_config(ddpo_config(resume_from="empty"))


def test_an_unknown_field_is_refused():
    @dataclasses.dataclass
    class DDPOConfig(type(ddpo_config())):
        surprise: int = 1

    with pytest.raises(ValueError, match=r"DDPOConfig has fields that are not known here \(surprise\)"):
        RLRConfig.from_ddpo(DDPOConfig(mixed_precision="no"))


def test_fields_that_a_script_adds_are_its_own(caplog):
    """The class is known by its name: a copy of TRL's DDPOConfig in a project of one's own will do."""

    @dataclasses.dataclass
    class Mine(type(ddpo_config())):
        prompt_file: str = "prompts.txt"
        num_epochs: int = 7

    with caplog.at_level("INFO"):
        converted = RLRConfig.from_ddpo(Mine(mixed_precision="no"), use_cpu=True)
    assert (converted.estimator, converted.num_train_epochs) == ("ddpo", 7)
    assert "Mine has fields of its own, which the trainer does not read: prompt_file" in caplog.text


@pytest.mark.parametrize("field", sorted(set().union(*FIELDS.values()) - {field.name for field in dataclasses.fields(RLRConfig)}))
def test_a_field_in_an_rlr_config_is_answered_with_the_option(field):
    with pytest.raises(TypeError, match=rf"RLRConfig has other options than .*: {field} -> (\w+)") as error:
        RLRConfig(use_cpu=True, **{field: OTHER[field]})
    option = re.search(r"-> (\w+)", str(error.value))[1]
    assert option in {field.name for field in dataclasses.fields(RLRConfig)} | {"the"}
    with pytest.raises(TypeError, match="unknown option 'fo_step'; did you mean 'fo_steps'"):
        RLRConfig(fo_step=3)


def test_several_negative_prompts_become_one():
    assert RLRConfig.from_ddpo(ddpo_config(negative_prompts=["blurred", "dark"]), use_cpu=True).negative_prompt == "blurred, dark"
    assert RLRConfig.from_trl(alignprop_config(negative_prompts=None), use_cpu=True).negative_prompt == ""


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"truncated_rand_backprop_minmax": (5, 15)}, 20, (5, 15)),
        ({}, 50, (1, 50)),
        ({}, 5, (1, 5)),  # the default range is that of 50 steps
        ({"truncated_backprop_rand": False}, 50, 1),
        ({"truncated_backprop_rand": False, "truncated_backprop_timestep": 30}, 50, 20),
        ({"truncated_backprop_rand": False}, 5, 1),
    ],
)
def test_truncation_of_alignprop(options, steps, expected, caplog):
    converted = RLRConfig.from_trl(alignprop_config(sample_num_steps=steps, **options), use_cpu=True)
    assert converted.plan.fo_steps == expected
    assert ("is past the 5 steps: the last step alone is trained" in caplog.text) == (
        options.get("truncated_backprop_rand") is False and steps == 5
    )


@pytest.mark.medium
def test_only_a_ddpo_config_scales_the_clipping_of_the_gradient(make_trainer, pipeline, seven):
    def trainer(config):
        return RLRTrainer(config, seven, lambda: (digits.PROMPT, {}), copy.deepcopy(pipeline)).args

    converted = RLRConfig.from_ddpo(ddpo_config(sample_num_steps=4, train_max_grad_norm=2.0), use_cpu=True, adam_epsilon=1e-7)
    for _ in range(2):  # the caller's config stays as it is
        args = trainer(converted)
        assert args.max_grad_norm == 2.0 * 4 * (4 * 8 * 8)  # steps, entries of a latent
        assert args.adam_epsilon == 1e-7  # given in this library's unit
        assert converted.max_grad_norm == 2.0
    rlr = RLRConfig.from_ddpo(
        ddpo_config(sample_num_steps=4), use_cpu=True, estimator="rlr", advantage=None, adv_clip_max=None, max_grad_norm=2.0
    )
    alignprop = RLRConfig.from_trl(alignprop_config(sample_num_steps=4, train_max_grad_norm=2.0), use_cpu=True)
    for config in (rlr, alignprop):
        assert trainer(config).max_grad_norm == 2.0


# ---- a script's calls ----


@pytest.mark.medium
def test_train_takes_a_number_of_epochs(pipeline, seven):
    config = ddpo_config(sample_num_steps=2, sample_guidance_scale=1.0, sample_num_batches_per_epoch=1, save_freq=100)
    trainer = RLRTrainer(config, seven, lambda: (digits.PROMPT, {}), pipeline)
    for call in ((3,), {"epochs": 2}):
        _ = trainer.train(**call) if isinstance(call, dict) else trainer.train(*call)
        assert trainer.state.global_step == (2 if isinstance(call, dict) else 3)


def test_prompts_drawn_by_numpy_do_not_spoil_checkpoints():
    """numpy's strings are strings to Python, but not to torch's safe loader."""
    prompts = FunctionPrompts(lambda: (np.random.choice(["seven", "eight"]), {}))  # as scripts do
    assert type(prompts.take(1)[0].prompt) is str


@pytest.mark.medium
def test_a_prompt_function_may_return_a_list(pipeline, seven):
    """TRL unpacks any pair."""
    config = ddpo_config(num_epochs=1, sample_num_steps=2, sample_guidance_scale=1.0)
    seen = []
    RLRTrainer(config, seven, lambda: [digits.PROMPT, {"n": 1}], pipeline, lambda data, *rest: seen.append(data[0][1:3])).train()
    assert seen == [[(digits.PROMPT,), ({"n": 1},)]]
    with pytest.raises(TypeError, match="must return a pair"):  # prompts without metadata
        FunctionPrompts(lambda: ["coarse", "fine"]).take(1)


@pytest.mark.parametrize(
    ("returned", "rewards", "notes"),
    [
        (([1, 2], {"a": 1}), [1, 2], {"a": 1}),
        ([[1, 2], {"a": 1}], [1, 2], {"a": 1}),  # TRL unpacks a list, too
        ((1.0, 2.0), [1, 2], {}),
        ((torch.tensor(1.0), torch.tensor(2.0)), [1, 2], {}),
        ([torch.tensor([1.0]), torch.tensor([2.0])], [1, 2], {}),
        ((np.array([1, 2], dtype=np.float16), None), [1, 2], None),
    ],
)
def test_what_reward_functions_in_scripts_return(returned, rewards, notes):
    images = torch.zeros(2, 3, 4, 4)
    result = Rewards(lambda *batch: returned)(images, ("a", "b"), ({}, {}), differentiable=False)
    assert (result.total.tolist(), result.metadata) == (rewards, notes)


def test_a_reward_that_returns_three_things_is_answered_clearly():
    with pytest.raises(RewardError, match=r"returned tuple .* or a pair \(rewards, reward_metadata\)"):
        Rewards(lambda *batch: (torch.ones(2), {}, {}))(torch.zeros(2, 3, 4, 4), ("a", "b"), ({}, {}), differentiable=False)


@pytest.mark.medium
def test_the_futures_of_an_asynchronous_ddpo_reward_are_waited_for(pipeline):
    """DDPOTrainer calls `result()` on both parts, so rewards that worked there return futures."""
    config = ddpo_config(num_epochs=1, sample_num_steps=2, sample_guidance_scale=1.0, async_reward_computation=True)
    rewards = []
    with ThreadPoolExecutor(1) as pool:

        def reward(images, prompts, metadata):
            return pool.submit(lambda: images.mean((1, 2, 3))), pool.submit(dict)

        def hook(data, step, tracker):
            rewards.extend((batch[0].mean((1, 2, 3)), batch[3]) for batch in data)

        RLRTrainer(config, reward, lambda: (digits.PROMPT, {}), pipeline, hook).train()
    assert len(rewards) == 2
    for wanted, got in rewards:
        torch.testing.assert_close(got, wanted)


@pytest.mark.medium
def test_a_hook_logs_what_accelerate_s_trackers_take(pipeline, seven):
    config = ddpo_config(num_epochs=1, sample_num_steps=2, sample_guidance_scale=1.0, sample_batch_size=2, log_with="tensorboard")
    names = []

    def hook(data, step, tracker):
        names.append(tracker.name)
        tracker.log({"all": data[-1][3], "by": {"least": data[-1][3].min(), "most": np.float32(1)}, "text": "words"}, step=step)

    RLRTrainer(config, seven, lambda: (digits.PROMPT, {}), pipeline, hook).train()
    assert names == ["tensorboard"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {"histograms": set(), "scalars": set()}
    for folder in {path.parent for path in Path("logs").rglob("events.out.tfevents*")}:
        events = EventAccumulator(str(folder)).Reload()
        for kind in found:
            found[kind] |= set(events.Tags()[kind])
    assert "all" in found["histograms"]
    assert {"by/least", "by/most"} <= found["scalars"]


@pytest.mark.medium
def test_alignprop_hook_gets_the_last_batch_as_a_dict(pipeline, seven):
    seen = []
    config = alignprop_config(
        num_epochs=4,
        sample_num_steps=2,
        sample_guidance_scale=1.0,
        train_batch_size=2,
        train_gradient_accumulation_steps=2,
        log_image_freq=2,
    )
    RLRTrainer(
        config, lambda *data: (seven(*data), {}), lambda: (digits.PROMPT, {"n": 1}), pipeline, lambda *data: seen.append(data)
    ).train()
    assert [step for _, step, _ in seen] == [2, 4]
    data = seen[0][0]
    assert set(data) == {"images", "prompts", "prompt_metadata", "rewards"}
    assert data["images"].shape == (2, 3, 32, 32) and data["rewards"].shape == (2,)
    assert (data["prompts"], data["prompt_metadata"]) == ((digits.PROMPT,) * 2, ({"n": 1},) * 2)


# ---- the page ----


def rows_of_the_page():
    """field -> what it becomes."""
    section = PAGE.read_text().split("## Fields")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)`.*? \| (.*?) \|$", section, re.MULTILINE))


def test_the_page_has_a_row_for_every_field():
    fields, rows = set().union(*FIELDS.values()), rows_of_the_page()
    assert fields == rows.keys()
    options = {field.name for field in dataclasses.fields(RLRConfig)} | {"logging_dir"}
    for name, text in rows.items():
        first = re.match(r"none: \w+|the same name|`(\w+)\b", text)
        assert first, f"{name}: say what it becomes, or why it has none"
        assert first[1] is None or first[1] in options, name
        assert not text.startswith("the same name") or name in options, name
    for name, option in SAME_MEANING.items():
        assert f"`{option}`" in rows[name] or (rows[name].startswith("the same name") and option == name), name
