"""What a run leaves on disk, and reading it back."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from rlr_trainer import digits
from rlr_trainer.pipelines import LORA_FILE


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        [digits.PROMPT] * 2, num_inference_steps=4, eta=1.0, guidance_scale=1.0, generator=generator, output_type="pt", **options
    ).images


@pytest.mark.parametrize("alpha", [2, 8])
def test_saved_lora_reproduces_the_trained_pictures_in_an_untouched_pipeline(make_trainer, pipeline, alpha):
    untouched = copy.deepcopy(pipeline)
    trainer = make_trainer(lora_r=2, lora_alpha=alpha, learning_rate=1e-2)
    trainer.train()
    trainer.save_model("saved")
    trained = draw(trainer.adapter.pipeline)
    assert not torch.allclose(trained, draw(untouched), atol=1e-3)
    untouched.load_lora_weights("saved", weight_name=LORA_FILE)
    torch.testing.assert_close(draw(untouched), trained, rtol=0, atol=1e-5)


def test_full_fine_tune_reloads_with_no_missing_key(make_trainer, capfd, recwarn):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    trainer = make_trainer(use_lora=False, learning_rate=1e-4)
    trainer.train()
    trainer.save_model("saved")
    assert not list(Path("saved").glob("*lora*"))
    _, info = UNet2DConditionModel.from_pretrained("saved/unet", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reloaded = StableDiffusionPipeline.from_pretrained("saved")
    reloaded.set_progress_bar_config(disable=True)
    for name, tensor in trainer.adapter.denoiser.state_dict().items():
        assert torch.equal(tensor, reloaded.unet.state_dict()[name]), name
    torch.testing.assert_close(draw(reloaded), draw(trainer.adapter.pipeline), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "rlr"},
        {"estimator": "ddpo"},
        {"estimator": "rlr", "use_lora": False},
        {"estimator": "rlr", "ho_start": "grad_norm", "fo_steps": 1, "control_variate": True},
        {"estimator": "rlr_paper", "zo_num_perturbations": 2},
        {"estimator": "ddpo", "advantage": "per_prompt", "per_prompt_min_count": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_resume_is_bit_for_bit(make_trainer, pipeline, options):
    common = options | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    rows = [{"prompt": digits.class_prompt(d)} for d in range(6)]  # six prompts, batches of four: the order wraps

    def make(folder):
        return make_trainer(sd_pipeline=copy.deepcopy(pipeline), output_dir=folder, train_dataset=rows, **common)

    whole = make("whole")
    whole.train()
    shutil.copytree("whole/checkpoint-2", "resumed/checkpoint-2")
    shutil.copy("whole/metrics.jsonl", "resumed/metrics.jsonl")  # holds lines past the checkpoint, which must go
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    expected, found = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    timed = ("time/", "train_")

    def lines(folder):
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if "loss" in row]

    assert lines("resumed") == lines("whole")


def test_resume_restores_a_prompt_function_that_uses_global_generators(make_trainer, pipeline):
    import random

    import numpy as np

    def prompt():
        choice = (random.randrange(10) + np.random.randint(10) + int(torch.randint(10, ()))) % 10
        return digits.class_prompt(choice), {}

    def make(folder, seen):
        def reward(images, prompts, metadata):
            seen.append(prompts)
            return images.mean((1, 2, 3))

        return make_trainer(
            sd_pipeline=copy.deepcopy(pipeline), output_dir=folder, prompt_function=prompt, reward_function=reward,
            max_steps=4, save_strategy="steps", save_steps=2, check_reward=False,
        )  # fmt: skip

    whole, seen, again = make("whole", first := []), first, []
    whole.train()
    shutil.copytree("whole/checkpoint-2", "resumed/checkpoint-2")
    resumed = make("resumed", again)
    random.seed(99)
    np.random.seed(98)
    resumed.train(resume_from_checkpoint=True)
    assert again == seen[2:]
    expected, found = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_inside_a_rollout_says_so(make_trainer, pipeline):
    options = {"estimator": "ddpo", "num_inner_epochs": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options).train()
    shutil.rmtree("run/checkpoint-2", ignore_errors=True)
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    folder = Path(trainer.args.output_dir)
    with pytest.raises(ValueError, match="saved in the middle of a rollout"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))


def test_damaged_checkpoints_are_refused_by_name(make_trainer, pipeline):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
    weights = checkpoint / "pytorch_lora_weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(ValueError, match="cannot read LoRA weights from .*pytorch_lora_weights.safetensors"):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options).train(resume_from_checkpoint=str(checkpoint))
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="does not fit the adapter being trained"):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline), lora_r=4, **(options)).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "rlr_state.json").write_text("{")
    with pytest.raises(ValueError, match="rlr_state.json is missing or damaged"):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options).train(resume_from_checkpoint=str(checkpoint))


def test_loaded_lora_weights_are_continued(make_trainer, pipeline):
    """Starting from fine-tuned weights trains those, and not a fresh adapter beside them."""
    first = make_trainer(sd_pipeline=copy.deepcopy(pipeline), learning_rate=1e-2, output_dir="first")
    first.train()
    first.save_model("saved")
    pipeline.load_lora_weights("saved", weight_name=LORA_FILE)
    second = make_trainer(sd_pipeline=pipeline, output_dir="second")
    start = weights_of(second)
    assert sorted(tuple(t.shape) for t in start.values()) == sorted(tuple(t.shape) for t in weights_of(first).values())
    assert all(float(t.abs().max()) > 0 for t in start.values())
    second.train()
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights_of(second).items())


def test_model_card_says_how_to_use_the_weights(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.save_pretrained("card")
    card = Path("card/README.md").read_text()
    for words in ("library_name: diffusers", "load_lora_weights", "2502.00639", "`digit`", "| `sample_num_steps` | `4` |"):
        assert words in card, words


def test_best_checkpoint_is_loaded_at_the_end(make_trainer):
    trainer = make_trainer(
        eval_dataset=[{"prompt": digits.PROMPT}] * 4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True, max_steps=3, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    best = max((row for row in trainer.state.log_history if "eval_reward" in row), key=lambda row: row["eval_reward"])
    assert trainer.evaluate()["eval_reward"] == pytest.approx(best["eval_reward"], abs=1e-6)
