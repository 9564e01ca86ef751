"""What a run leaves on disk, and reading it back."""

import copy
import re
from pathlib import Path

import pytest
import torch

from rlr_trainer import digits
from rlr_trainer.persistence.checkpoints import CheckpointError
from rlr_trainer.pipelines import LORA_FILE

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


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


def test_damaged_checkpoints_are_refused_by_name(make_trainer, pipeline):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"

    def resume(**more):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline), **(options | more)).train(resume_from_checkpoint=str(checkpoint))

    for name in sorted(path.name for path in checkpoint.iterdir()):
        path = checkpoint / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} is damaged"):
            resume()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} is damaged"):
            resume()
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}.* is missing"):
            resume()
        path.write_bytes(content)
    with pytest.raises(ValueError, match="does not fit the adapter being trained"):
        resume(lora_r=4)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        make_trainer(sd_pipeline=copy.deepcopy(pipeline), **options).train(resume_from_checkpoint="nowhere")


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


def test_any_folder_gets_the_whole_result(make_trainer):
    """Whatever it is called: what a checkpoint holds is the network alone, with the weights that are not averaged."""
    from diffusers import StableDiffusionPipeline

    trainer = make_trainer(use_lora=False, ema_decay=0.5, learning_rate=1e-4)
    trainer.train()
    trainer.save_model("checkpoint-final")
    reloaded = StableDiffusionPipeline.from_pretrained("checkpoint-final")
    with trainer.averaged_weights():
        for name, tensor in trainer.adapter.denoiser.state_dict().items():
            assert torch.equal(tensor, reloaded.unet.state_dict()[name]), name
