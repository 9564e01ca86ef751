"""The trained weights on disk: for use, for going on, averaged; and the model card beside them."""

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlr_trainer import digits
from rlr_trainer.digits.rewards import ink
from rlr_trainer.persistence.weights import AVERAGE_FOLDER, Weights
from rlr_trainer.pipelines import LORA_FILE, Policy, adapt, attach_lora
from rlr_trainer.pipelines.average import WeightAverage

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture
def make(pipeline):
    """Weights to save, in a copy of the bundled pipeline: trained by hand, with an average that has the values before."""
    from peft import LoraConfig

    def make(use_lora, trained=True):
        adapter = adapt(copy.deepcopy(pipeline))
        if use_lora:
            attach_lora(adapter.denoiser, LoraConfig(r=2, lora_alpha=8, target_modules=list(adapter.lora_targets)), 0)
        parameters = Policy(adapter.denoiser).trainable_parameters()
        if trained:
            move(parameters, 0)
        average = WeightAverage(parameters, 0.5)
        if trained:
            move(parameters, 1)
        return Weights(adapter, use_lora, average), parameters

    return make


def move(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def values(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def same(left, right):
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        [digits.PROMPT] * 2, num_inference_steps=4, eta=1.0, guidance_scale=1.0, generator=generator, output_type="pt"
    ).images


@pytest.mark.parametrize("use_lora", [True, False])
def test_training_goes_on_with_what_was_saved_and_its_average(make, use_lora):
    weights, parameters = make(use_lora)
    weights.save(Path("saved"))
    other, found = make(use_lora, trained=False)
    other.load(Path("saved"))
    assert same(values(found), values(parameters))
    with weights.averaged(), other.averaged():
        assert same(values(found), values(parameters))
        averaged = values(found)
    assert not same(averaged, values(parameters))


def test_a_run_that_begins_to_average_begins_with_the_weights_of_the_checkpoint(make):
    weights, parameters = make(True)
    weights.average = None
    weights.save(Path("saved"))
    assert not Path("saved", AVERAGE_FOLDER).exists()
    other, found = make(True, trained=False)
    other.load(Path("saved"))
    with other.averaged():
        assert same(values(found), values(parameters))


def test_lora_weights_for_use_give_the_averaged_pictures_in_an_untouched_pipeline(make, pipeline):
    weights, _ = make(True)
    weights.save_result(Path("saved"))
    with weights.averaged():
        expected = draw(weights.adapter.pipeline)
    assert not torch.allclose(expected, draw(pipeline), atol=1e-3)
    pipeline.load_lora_weights("saved", weight_name=LORA_FILE)
    torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=1e-5)


def test_a_whole_network_for_use_is_a_pipeline_with_the_averaged_weights(make):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    weights, _ = make(False)
    weights.save_result(Path("saved"))
    _, info = UNet2DConditionModel.from_pretrained("saved/unet", output_loading_info=True)
    assert not info["missing_keys"] + info["unexpected_keys"]
    with weights.averaged():
        assert same(StableDiffusionPipeline.from_pretrained("saved").unet.state_dict(), weights.adapter.denoiser.state_dict())


@pytest.mark.medium
def test_a_trainer_writes_the_result_to_any_folder_and_a_model_card(make_trainer):
    """A checkpoint's weights are not averaged; this folder is none, whatever it is called."""
    name = "checkpoint-final"
    trainer = make_trainer(ema_decay=0.5, max_steps=1, learning_rate=1e-2)
    trainer.train()
    trainer.save_pretrained(name)
    with trainer.parts.weights.averaged():
        trainer.parts.adapter.save_lora(Path("averaged"))
    assert same(load_file(f"{name}/{LORA_FILE}"), load_file(f"averaged/{LORA_FILE}"))
    card = Path(name, "README.md").read_text()
    for words in ("library_name: diffusers", "load_lora_weights", "2502.00639", "`digit_7`", "| `sample_num_steps` | `4` |"):
        assert words in card, words


def test_a_model_card_holds_no_html_of_options_and_names(make_trainer):
    """A prompt with line breaks ended its row of the table, and what followed was Markdown and HTML of its own."""
    evil = "a|b `c`\n\n<img src=x onerror=alert(1)>\r\u2028```\n# <b>"
    trainer = make_trainer(negative_prompt=evil, hub_model_id='x"\n```\n<i>', reward_function=[ink, ink])
    trainer.rewards.names[0] = evil
    trainer.create_model_card(model_name=evil)
    card = Path(trainer.args.output_dir, "README.md").read_text()
    block = re.search(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert len(block[1].splitlines()) == 7 and "<img" in block[1]
    outside = card.replace(block[0], "").replace("\\|", "")
    shown = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", outside)  # without code
    assert "<img" in outside
    assert not re.search(r"<(img|b|i)\b", shown)
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    (row,) = [row for row in rows if "negative_prompt" in row]
    assert row.startswith("| `negative_prompt` | ```` a\\|b `c`\\n")


def test_loaded_lora_weights_are_continued(make_trainer, make, pipeline):
    """Starting from fine-tuned weights trains those, and not a fresh adapter beside them."""
    weights, parameters = make(True)
    weights.save(Path("saved"))
    pipeline.load_lora_weights("saved", weight_name=LORA_FILE)
    found = make_trainer(sd_pipeline=pipeline).policy.trainable_parameters()
    assert sorted(float(p.detach().abs().sum()) for p in found.values()) == sorted(
        float(p.detach().abs().sum()) for p in parameters.values()
    )
