"""Evaluation in a run: rewards and datasets of its own, when it runs, best checkpoints; and the command that samples."""

import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import environment, torchrun
from transformers import TrainerCallback

from rlr_trainer import digits
from rlr_trainer.cli import main
from rlr_trainer.digits.rewards import ink

WORKER = Path(__file__).parents[1] / "evaluation_worker.py"
PROMPTS = [{"prompt": digits.class_prompt(d), "digit": d} for d in range(5)]

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture
def make_trainer(make_trainer):
    """Shorter chains: what is tested here does not depend on their length."""
    return lambda **options: make_trainer(**({"sample_num_steps": 2} | options))


def test_rewards_and_datasets_of_its_own(make_trainer):
    """A black box too, in a run that needs gradients."""

    def number(images, prompts, metadata):
        return [row["digit"] for row in metadata]

    trainer = make_trainer(
        eval_dataset={"low": PROMPTS[:2], "high": PROMPTS[3:]},
        eval_reward_function=[ink, number],
    )
    metrics = trainer.evaluate()
    assert [round(metrics[f"eval_{name}_rewards/number/mean"], 6) for name in ("low", "high")] == [0.5, 3.5]
    assert trainer.evaluate(PROMPTS[2:3], metric_key_prefix="test")["test_rewards/number/mean"] == 2.0
    assert trainer.evaluate() == metrics
    with pytest.raises(NotImplementedError, match=r"generate\(prompts, seed=...\) gives pictures"):
        trainer.predict(PROMPTS)


@pytest.mark.medium
def test_queries_are_counted_apart(make_trainer):
    trainer = make_trainer(eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=1, num_log_images=3, log_images_steps=3)
    trainer.train()
    assert trainer.rewards.queries == 4 + 2 * 4  # the probe and two rollouts
    rows = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert [row["eval_reward_queries"] for row in rows] == [3 + 5, 3 + 10]  # the pictures before training, and each evaluation
    assert all(row["eval_runtime"] > 0 for row in rows)
    pictures = json.loads(Path(trainer.args.output_dir, "samples/step_000000.json").read_text())
    assert pictures["prompts"] == [row["prompt"] for row in PROMPTS[:3]]


@pytest.mark.medium
def test_when_evaluation_runs(make_trainer, pipeline):
    steps = []

    class Watcher(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            steps.append((state.global_step, sorted(metrics)))

    make_trainer(
        sd_pipeline=copy.deepcopy(pipeline), callbacks=[Watcher()], eval_dataset=PROMPTS[:1], eval_strategy="steps", eval_steps=2, max_steps=3,
        eval_on_start=True,
    ).train()  # fmt: skip
    assert [step for step, _ in steps][:2] == [0, 2]  # newer versions of Trainer evaluate at the end as well
    assert "eval_reward" in steps[0][1]
    steps.clear()
    idle = make_trainer(sd_pipeline=copy.deepcopy(pipeline), callbacks=[Watcher()], eval_dataset=PROMPTS[:1], output_dir="idle")
    assert not idle.args.do_eval
    idle.train()
    assert not steps
    with pytest.raises(ValueError, match="pass eval_dataset"):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir="none").evaluate()


@pytest.mark.medium
def test_the_best_checkpoint_is_kept_and_loaded(make_trainer):
    """A reward that is best after one update, and has no slope: the weights after one update are those at the end."""
    values = iter([0.2, 0.9, 0.4, 0.3, 0.9, 0.9])  # evaluations after 1, 2, 3 updates; then the evaluation by hand
    weights = {}

    class Watcher(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights[state.global_step] = {n: p.detach().clone() for n, p in trainer.policy.trainable_parameters().items()}

    def scripted(images, prompts, metadata):
        return [next(values)]

    trainer = make_trainer(
        callbacks=[Watcher()], eval_dataset=PROMPTS[:1], eval_reward_function=scripted, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, max_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_reward",
        save_total_limit=1, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(0.9)
    folder = Path(trainer.args.output_dir)
    assert (folder / "checkpoint-2").is_dir()
    assert not (folder / "checkpoint-1").exists()
    now = trainer.policy.trainable_parameters()
    assert all(torch.equal(now[name], weights[2][name]) for name in now)
    assert any(not torch.equal(now[name], weights[3][name]) for name in now)


def test_the_metric_of_the_best_checkpoint_exists(make_trainer):
    """Trainer's default, a loss, does not; Trainer would say so at the first evaluation."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(eval_dataset=PROMPTS[:1], load_best_model_at_end=True, **options)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_reward", True)
    for known in ("reward", "eval_reward", "eval_rewards/digit_7/mean", "samples_dropped"):
        make_trainer(eval_dataset=PROMPTS[:1], metric_for_best_model=known, **options)
    named = {"low": PROMPTS[:1], "high": PROMPTS[1:]}
    make_trainer(eval_dataset=named, metric_for_best_model="low_reward", **options)
    for dataset, wrong in ((named, "reward"), (PROMPTS, "loss"), (PROMPTS, "eval_accuracy")):
        with pytest.raises(ValueError, match=f"metric_for_best_model='{wrong}' is none of the metrics.*eval_.*reward_std"):
            make_trainer(eval_dataset=dataset, metric_for_best_model=wrong, **options)


# ---- several processes ----


def launch(folder, processes, options):
    """The logs of all ranks of a run under torchrun."""
    folder.mkdir()
    command = torchrun(processes, WORKER, folder, json.dumps(options))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_evaluate_and_show_what_one_does(tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_log_images": 3,
        "eval_images_per_prompt": 3,
        "num_images_per_prompt": 2,
    }
    (one,) = launch(tmp_path / "one", 1, {"per_device_train_batch_size": 4} | options)
    two = launch(tmp_path / "two", 2, {"per_device_train_batch_size": 2} | options)
    (expected,) = [row for row in one if "eval_reward" in row]
    for rank in two:
        (found,) = [row for row in rank if "eval_reward" in row]
        for name in ("eval_reward", "eval_reward_std", "eval_rewards/digit_7/mean", "eval_reward_queries", "eval_samples_dropped"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    assert two[0][0]["diversity"] == pytest.approx(one[0]["diversity"], rel=1e-4)
    samples = [json.loads((tmp_path / name / "run/samples/step_000000.json").read_text()) for name in ("one", "two")]
    assert samples[0]["prompts"] == samples[1]["prompts"]
    assert samples[0]["rewards"] == pytest.approx(samples[1]["rewards"], abs=1e-5)
    rewards = [
        json.loads((tmp_path / name / "run/rewards.jsonl").read_text().splitlines()[0])["rewards"] for name in ("one", "two")
    ]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


# ---- rlr-trainer sample ----


def picture(path):
    with Image.open(path) as image:
        return (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3).permute(2, 0, 1)
            / 255
        )


@pytest.mark.medium
def test_the_command_samples_what_the_run_has_learnt(make_trainer, capsys):
    trainer = make_trainer(learning_rate=1e-2, max_steps=2)
    trainer.train()
    trainer.save_model("lora")
    arguments = ["sample", "--model", "digits", "--prompts", digits.PROMPT, "--num_images", "3", "--seed", "4"]
    expected = trainer.generate([digits.PROMPT] * 3, seed=4)
    # the steps and the guidance come from the run's rlr_config.json
    assert main([*arguments, "--lora", "lora", "--output_dir", "tuned", "--reward", "digit:7", "ink"]) == 0
    found = torch.stack([picture(f"tuned/{number:03d}.png") for number in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255)
    rewards = json.loads(Path("tuned/rewards.json").read_text())
    assert rewards["files"] == ["000.png", "001.png", "002.png"]
    total = [sum(values) for values in zip(*rewards["parts"].values(), strict=True)]
    assert rewards["rewards"] == pytest.approx(total, abs=1e-5)
    assert rewards["parts"]["ink"] == pytest.approx(expected.mean((1, 2, 3)).tolist(), abs=1e-4)
    assert Path("tuned/grid.png").is_file()
    assert "mean reward" in capsys.readouterr().out
    assert main([*arguments, "--output_dir", "base", "--num_steps", "2", "--guidance_scale", "1"]) == 0
    assert not torch.equal(picture("base/000.png"), picture("tuned/000.png"))
    assert not Path("base/rewards.json").exists()


def test_prompts_of_a_file_and_wrong_options(capsys):
    Path("prompts.txt").write_text("a handwritten digit one\na handwritten digit two\n")
    arguments = ["sample", "--model", "digits", "--num_steps", "1", "--guidance_scale", "1", "--prompts", "prompts.txt"]
    assert main([*arguments, "--batch_size", "3", "--num_images", "2", "--output_dir", "out"]) == 0
    assert sorted(path.name for path in Path("out").glob("0*.png")) == ["000.png", "001.png", "002.png", "003.png"]
    wrong = {
        "--output_dir out": "holds 5 pictures",
        "--output_dir a --num_images 0": "--num_images 0: must be at least 1",
        "--output_dir b --lora out": "cannot be loaded on --model digits; must be a folder with pytorch_lora_weights.safetensors",
        "--output_dir c --reward good": "--reward good: must be ink",
        "--output_dir d --eta 2": "--eta 2.0",
    }
    for options, message in wrong.items():
        assert main([*arguments, *options.split()]) != 0
        assert message in capsys.readouterr().err, options
    assert main([*arguments, "--output_dir", "out", "--overwrite"]) == 0
    assert sorted(path.name for path in Path("out").glob("0*.png")) == ["000.png", "001.png"]
