"""A run's file and overrides: what TRL's parser makes of them, and what is said of those that cannot be."""

from pathlib import Path

import pytest

from rlr_trainer.cli.settings import RunArguments, SettingsError, load_model, load_prompts, load_reward, parse_run
from rlr_trainer.rewards import RemoteReward

RUN = "model: digits\nreward: ink\nprompts: a handwritten digit\nuse_cpu: true\nsample_num_steps: 3\n"

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def parse(content, *overrides):
    Path("run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_run("run.yaml", overrides)


def values(config, names):
    return {name: getattr(config, name) for name in names}


def test_a_value_means_the_same_in_the_file_and_on_the_command_line():
    expected = {
        "save_strategy": "no", "learning_rate": 1e-4, "run_name": "2026-01-31", "negative_prompt": "no", "check_reward": False,
        "advantage": "none", "reward_weights": [0.1, 2.0], "lora_target_modules": ["to_q", "to_k"],
    }  # fmt: skip
    run, config = parse(
        RUN + "save_strategy: no\nlearning_rate: 1e-4\nrun_name: 2026-01-31\nnegative_prompt: no\ncheck_reward: no\n"
        "advantage: none\nreward_weights: [1e-1, 2]\nlora_target_modules: [to_q, to_k]\n"
    )
    assert values(config, expected) == expected
    assert run == RunArguments("digits", ["ink"], "a handwritten digit")
    overrides = """--save_strategy no --learning-rate 1e-4 --run_name 2026-01-31 --negative_prompt=no --check_reward no
        --advantage none --reward_weights 1e-1 2 --lora_target_modules to_q to_k"""
    _, config = parse(RUN, *overrides.split())
    assert values(config, expected) == expected


def test_the_command_line_is_on_top_of_the_file():
    run, config = parse(
        RUN + "seed: 1\nmax_steps: 4\nuse_lora: true\n", "--seed=2", "--no_use_lora", "--overwrite", "--reward", "ink", "a:b"
    )
    assert values(config, ["seed", "max_steps", "use_lora", "overwrite"]) == {
        "seed": 2, "max_steps": 4, "use_lora": False, "overwrite": True,
    }  # fmt: skip
    assert run.reward == ["ink", "a:b"]


def test_lists_mappings_and_nothing_in_a_file():
    run, config = parse(
        "\ufeffmodel: digits\r\nreward: [ink, a:b]\r\nprompts: {path: a.csv, column: caption}\r\neval_prompts: [häßlich, schön]\r\n"
        "estimator: draft\r\nfo_steps: [2, 5]\r\nlr_scheduler_kwargs: {num_cycles: 2}\r\nclip_range: null\r\nema_decay:\r\nuse_cpu: true"
    )
    assert run == RunArguments("digits", ["ink", "a:b"], {"path": "a.csv", "column": "caption"}, ["häßlich", "schön"])
    assert values(config, ["fo_steps", "lr_scheduler_kwargs", "clip_range", "ema_decay"]) == {
        "fo_steps": [2, 5], "lr_scheduler_kwargs": {"num_cycles": 2}, "clip_range": None, "ema_decay": None,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a cat: with a hat", "a cat # 1", "@home", "*star*", '"No" they said', "- a cat", "no", "[a cat"])
def test_a_prompt_on_the_command_line_stays_as_it_is(text):
    run, config = parse(RUN, "--prompts", text, "--negative_prompt", text)
    assert run.prompts == config.negative_prompt == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a", "must hold `key: value` lines"),
        (b"seed: [1", "run.yaml: cannot be read"),
        (b"negative_prompt: h\xe4\xdflich", "cannot be read: 'utf-8' codec"),
        (b"fo_step: 1", "unknown key 'fo_step'; did you mean 'fo_steps'?"),
        (b"training:\n  max_steps: 1", "unknown key 'training'"),
        (b"seed:", "seed=None: cannot be a NoneType"),
        (b"max_steps: 1.5", "max_steps.*: invalid int value: '1.5'"),
        (b"max_steps: [1]", r"max_steps=\[1\]: cannot be a list"),
        (b"use_lora: fasle", "use_lora.*: Truthy value expected: got fasle"),
        (b"reward_weights: [a]", r"reward_weights=\['a'\]: must be a list of float"),
        (b"reward_weights: {a: 1}", "reward_weights={'a': 1}: cannot be a dict"),
        (b"model: digits\nreward: ink", "key 'prompts' is missing: give it in the file or as --prompts"),
    ],
)
def test_files_that_cannot_be(content, message):
    with pytest.raises(SettingsError, match=message):
        parse(content)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--fo_step 1", "unknown key 'fo_step'; did you mean 'fo_steps'?"),
        ("--nothing=1", "unknown key 'nothing'; `rlr-trainer train --help`"),
        ("stray", "'stray': belongs to no key"),
        ("--max_steps many", "max_steps.*: invalid int value: 'many'"),
        ("--learning_rate", "learning_rate.*: expected one argument"),
        ("--bf16 2", "bf16.*: Truthy value expected: got 2"),
        ("--save_strategy maybe", "save_strategy.*: invalid choice: 'maybe'"),
        ("--reward", "--reward: expected at least one argument"),
        ("--output_dir=", "output_dir='': must be a folder"),
    ],
)
def test_overrides_that_cannot_be(overrides, message):
    with pytest.raises(SettingsError, match=message):
        parse(RUN, *overrides.split())


def test_prompt_sources(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    assert load_prompts("prompts.txt") == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "words.csv").write_text("caption\none\n")
    assert load_prompts({"path": "words.csv", "column": "caption"})[0] == {"prompt": "one"}
    (tmp_path / "own_prompts.py").write_text("def draw():\n    return 'three', {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_prompts("own_prompts:draw")() == ("three", {})
    assert load_prompts(["cat/dog", "two"]) == ["cat/dog", "two"]
    for prompt in ("a handwritten digit", "A cat. On a mat.", "black/white photo: a cat", "cat", "a long prompt " * 300):
        assert load_prompts(prompt) == [prompt]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (" ", "must be a prompt, a list of prompts"),
        ([], "must be a prompt, a list of prompts"),
        ([True, "a"], "put words such as yes and numbers in quotes"),
        ("missing.txt", "prompts='missing.txt': must be a file that exists"),
        ("prompts.tx", "prompts='prompts.tx': must be a file that exists"),
        ("sub/mine.py:f", "prompts='sub/mine.py:f': must be a file that exists"),
        ({"split": "test"}, "the keys are path, and optionally split, name, column"),
        ({"path": "a.csv", "colum": "x"}, "the keys are path, and optionally split, name, column"),
    ],
)
def test_prompts_that_cannot_be(source, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("good", "reward='good': must be ink, .*, or package.module:function"),
        ("digit:12", "reward='digit:12': must be ink"),
        ("sub/mine.py:f", "reward='sub/mine.py:f': must be ink"),
        ("json:nothing", "reward='json:nothing': .*module 'json' has no attribute 'nothing'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
    ],
)
def test_rewards_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_url_is_a_reward():
    reward = load_reward("http://127.0.0.1:8123")
    assert isinstance(reward, RemoteReward)
    assert "http://127.0.0.1:8123" in repr(reward)


def test_bundled_models_go_by_name():
    assert type(load_model("digits")).__name__ == "StableDiffusionPipeline"
    assert type(load_model("digits-flow")).__name__ == "StableDiffusion3Pipeline"
    assert load_model("some/folder") == "some/folder"  # the trainer loads it
