"""moving-digits: its clips, prompts, classifiers and training program with random weights; the bundled weights; and the demo."""

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bundled_files import assert_small_and_anonymous, training_program
from PIL import Image
from safetensors.torch import save_file

from rlr_trainer import digits
from rlr_trainer.cli import demo, demo_subjects
from rlr_trainer.digits import moving
from rlr_trainer.digits.moving_classifiers import DIRECTIONS, MOVING_CLASSIFIERS
from rlr_trainer.digits.rewards import moving_digit_reward
from rlr_trainer.pipelines import adapt

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "digits"
WEIGHTS = digits.MODELS["moving-digits"]
WEIGHT_LIMIT = 8_000_000


@pytest.fixture(scope="module")
def program():
    yield from training_program("pretrain_moving")


@pytest.fixture(scope="module")
def tokenizer(program, tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    program.write_tokenizer(folder, program.TOKENS, program.WORDS)
    return CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def weights(program, tokenizer, tmp_path_factory):
    """A folder of random weights in the layout of the training program, with one layer in place of all."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "LAYERS", 1)
        torch.manual_seed(0)
        transformer = program.make_transformer()
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
        program.save_pipeline(folder / "pipeline", program.make_vae(), program.make_text_encoder(tokenizer), transformer, tokenizer)
        for name, kind in MOVING_CLASSIFIERS.items():
            save_file(kind().state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def bundled(weights, monkeypatch):
    """The random weights in the place of the bundled ones."""
    monkeypatch.setitem(digits.MODELS, "moving-digits", weights)
    return digits.load_pipeline("moving-digits")


def rendered(program, count=8, seed=0):
    """Clips of white discs, one for each canvas, and the directions."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    canvas = ((x.square() + y.square()) < 36).float().expand(count, 1, 32, 32)
    directions = torch.arange(count) % 4
    paths = program.draw_paths(directions, torch.Generator().manual_seed(seed))
    return program.render(canvas, paths), directions, paths


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompts():
    assert moving.moving_prompt(3, "left") == "a handwritten digit three moving left"
    assert moving.moving_prompt(3) == "a handwritten digit three moving"
    assert moving.moving_prompt(direction="up") == "a handwritten digit moving up"
    assert moving.moving_prompt() == "a handwritten digit moving"
    with pytest.raises(ValueError, match="direction='north': must be one of left, right, up, down"):
        moving.moving_prompt(3, "north")
    with pytest.raises(ValueError, match="digit=10: must be"):
        moving.moving_prompt(10, "left")


def test_training_prompts_name_what_their_clips_show(program):
    table = program.prompt_table()
    assert len(table) == len(set(table)) == 67 and table[66] == ""
    assert {digits.PROMPT, moving.moving_prompt(), moving.moving_prompt(7, "right"), digits.class_prompt(4)} <= set(table)
    count = 20_000
    labels, directions = torch.arange(count) % 10, torch.arange(count) // 10 % 4
    rows = program.choose_prompts(labels, directions, torch.Generator().manual_seed(0))
    kinds = {"empty": 0, "digit": 0, "direction": 0, "moving": 0}
    for row, label, direction in zip(rows.tolist(), labels.tolist(), directions.tolist(), strict=True):
        words = table[row].split()
        kinds["empty"] += not words
        kinds["moving"] += "moving" in words
        for kind, names, right in (("digit", digits.DIGIT_NAMES, label), ("direction", DIRECTIONS, direction)):
            named = [word for word in words if word in names]
            assert named in ([], [names[right]])
            kinds[kind] += len(named)
    for kind, share in {"empty": 0.1, "digit": 0.9 * 0.8, "direction": 0.9 * 0.8, "moving": 0.9 * 0.9}.items():
        assert kinds[kind] / count == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5)


def test_every_word_of_the_prompts_is_one_token(program, tokenizer):
    assert {
        len(tokenizer(moving.moving_prompt(digit, direction)).input_ids) for digit in range(10) for direction in DIRECTIONS
    } == {8}
    assert len({tuple(tokenizer(prompt).input_ids) for prompt in program.prompt_table()}) == 67


# --------------------------------------------------------------------------------------------------------------- clips


def test_clips_move_as_their_direction_says_and_stay_in_the_picture(program):
    videos, directions, paths = rendered(program, count=200)
    assert videos.shape == (200, moving.NUM_FRAMES, 3, 32, 32)
    position = torch.arange(32) - 15.5
    mass = videos[:, :, 0].sum((-2, -1))
    centre = (
        torch.stack([(videos[:, :, 0].sum(-2) * position).sum(-1), (videos[:, :, 0].sum(-1) * position).sum(-1)], -1)
        / mass[..., None]
    )
    torch.testing.assert_close(centre, paths, rtol=0, atol=0.05)
    steps = centre.diff(dim=1)
    ahead = (steps * program.STEPS_XY[directions][:, None]).sum(-1)
    assert ahead.min() > program.SPEEDS[0] - 0.1 and ahead.max() < program.SPEEDS[1] + 0.1
    torch.testing.assert_close(steps.abs().sum(-1), ahead, rtol=0, atol=0.1)  # nothing across
    room = (program.PIXELS - program.DIGIT_PIXELS) / 2 + program.OVERHANG
    assert paths.abs().max() <= room + 1e-4 and paths.abs().max() > room - 0.5


def test_data_split_is_that_of_the_pictures(program):
    pytest.importorskip("sklearn")
    small, pictures = program.load_data(), importlib.import_module("pretrain").load_data()
    assert torch.equal(small.train_labels, pictures.train_labels) and torch.equal(small.test_labels, pictures.test_labels)
    assert small.train_images.shape == (1437, 1, 32, 32)
    assert small.train_images[..., :6, :].abs().max() == 0


# --------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("name", MOVING_CLASSIFIERS)
def test_classifiers_read_clips_of_any_length_and_give_gradients(name, weights):
    classifier = moving.load_moving_classifier(name, weights)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    for frames in (2, 9):
        videos = torch.rand(3, frames, 3, 32, 32, requires_grad=True)
        of_digits, of_directions = moving.read_clips(classifier, videos)
        torch.testing.assert_close(of_digits.sum(-1), torch.ones(3))
        torch.testing.assert_close(of_directions.sum(-1), torch.ones(3))
        (of_digits[:, 7].log().sum() + of_directions[:, 1].log().sum()).backward()
        assert (videos.grad != 0).float().mean() > 0.99  # no pixel of any frame is ignored
    assert classifier(videos)[0].shape == (3, 9, 10)
    for wrong in (torch.rand(3, 3, 32, 32), torch.rand(3, 1, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"videos has shape .*at least 2 frames"):
            classifier(wrong)


@pytest.mark.parametrize("name", MOVING_CLASSIFIERS)
@pytest.mark.medium
def test_classifiers_learn_directions_from_clips(program, name):
    """Of discs; a network that does not see the order of the frames stays at 25 or 50 %."""
    torch.manual_seed(0)
    classifier = MOVING_CLASSIFIERS[name]()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3)
    for step in range(60):
        videos, directions, _ = rendered(program, count=16, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(classifier.read_directions(videos), directions).backward()
        optimizer.step()
    videos, directions, _ = rendered(program, count=200, seed=1000)
    with torch.no_grad():
        found = classifier.read_directions(videos).argmax(-1)
    assert (found == directions).float().mean() > 0.9


def test_unknown_classifiers_and_missing_weights_are_errors(tmp_path):
    with pytest.raises(ValueError, match="name='jury': must be one of reward, judge"):
        moving.load_moving_classifier("jury", tmp_path)
    with pytest.raises(RuntimeError, match="are missing or damaged"):
        moving.load_moving_classifier("judge", tmp_path)


def test_reward_is_the_mean_of_both_probabilities(weights, bundled):
    videos, prompts = torch.rand(4, 9, 3, 32, 32), ("a handwritten digit moving",) * 4
    of_digits, of_directions = moving.read_clips(moving.load_moving_classifier("reward"), videos)
    reward = moving_digit_reward(7, "right")
    torch.testing.assert_close(reward(videos, prompts, ({},) * 4), (of_digits[:, 7] + of_directions[:, 1]) / 2)
    assert reward.__name__ == "digit_7_right"
    with pytest.raises(ValueError, match="direction='back'"):
        moving_digit_reward(7, "back")


def test_share_of_frames_that_stay_one_digit():
    class Reader(torch.nn.Module):
        def forward(self, videos):
            return F.one_hot(videos[:, :, 0, 0, 0].long(), 10).float(), None

    classes = torch.tensor([[3, 3, 3, 3], [3, 3, 4, 5], [0, 1, 2, 3]])
    videos = classes[..., None, None, None].float().expand(-1, -1, 3, 4, 4)
    assert moving.one_digit_share(Reader(), videos).tolist() == [1.0, 0.5, 0.25]


# ------------------------------------------------------------------------------------------------------------ pipeline


def test_pipeline_makes_clips_with_few_rows_of_text(bundled):
    assert type(bundled).__name__ == "WanPipeline"
    assert {p.dtype for part in (bundled.transformer, bundled.vae, bundled.text_encoder) for p in part.parameters()} == {
        torch.float32
    }
    adapter = adapt(bundled)
    assert adapter.layout(32, 32, moving.NUM_FRAMES).shape == (4, 5, 8, 8)
    assert adapter.encode_prompts([moving.moving_prompt()])["encoder_hidden_states"].shape == (1, 16, 32)
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3.0, **moving.SIZE}
    clips = [
        bundled([moving.moving_prompt(3, "left")], generator=torch.Generator().manual_seed(seed), **options).frames
        for seed in (0, 0, 1)
    ]
    assert clips[0].shape == (1, 9, 3, 32, 32)
    assert torch.equal(clips[0], clips[1]) and not torch.equal(clips[0], clips[2])


def test_a_diffusers_that_cannot_clean_prompts_is_said(bundled, monkeypatch):
    from diffusers.pipelines.wan import pipeline_wan

    def calls_what_is_missing(text):
        raise NameError("name 'ftfy' is not defined")

    monkeypatch.setattr(pipeline_wan, "prompt_clean", calls_what_is_missing)
    with pytest.raises(RuntimeError, match="name 'ftfy' is not defined.*pip install ftfy"):
        digits.load_pipeline("moving-digits")


def test_the_vae_is_trained_on_what_it_decodes_before_the_clamp(bundled, program):
    latents = 3 * torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded, unclamped = bundled.vae.decode(30 * latents).sample, program.decode_unclamped(bundled.vae, 30 * latents)
    assert unclamped.abs().max() > 1
    torch.testing.assert_close(unclamped.clamp(-1, 1), decoded)
    assert not bundled.vae.decoder._forward_hooks


def test_training_encodes_prompts_as_the_pipeline_does(bundled, program):
    prompts = [moving.moving_prompt(3, "left"), ""]
    with torch.no_grad():
        table = program.encode_table(bundled.text_encoder, program.tokenize(bundled.tokenizer, prompts))
        of_pipeline, _ = bundled.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(table, of_pipeline)


@pytest.mark.parametrize("rows", [16, 40, 512])
def test_weighted_rows_equal_many_zero_rows(bundled, program, rows):
    generator, transformer = torch.Generator().manual_seed(0), bundled.transformer.double()
    noisy = torch.randn(2, 4, 5, 8, 8, dtype=torch.float64, generator=generator)
    text, lengths = torch.randn(2, 16, 32, dtype=torch.float64, generator=generator), torch.tensor([8, 2])
    text = text * (torch.arange(16) < lengths[:, None])[..., None]
    times = torch.tensor([300.0, 900.0])
    with torch.no_grad():
        expected = transformer(noisy, times, F.pad(text, (0, 0, 0, rows - 16))).sample
        weighted = program.WeightedRows()
        weighted.mask = program.row_weights(lengths, torch.full((2,), float(rows), dtype=torch.float64))
        for block in transformer.blocks:
            block.attn2.set_processor(weighted)
        computed = transformer(noisy, times, text).sample
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-6)
    assert rows == 16 or (computed - transformer_without_mask(transformer, weighted, noisy, times, text)).abs().max() > 1e-5


def transformer_without_mask(transformer, processor, noisy, times, text):
    processor.mask = None
    with torch.no_grad():
        return transformer(noisy, times, text).sample


def test_numbers_of_rows(program):
    counts = program.choose_rows(10_000, torch.Generator().manual_seed(0))
    assert counts.min() == 16 and counts.max() == 512 and torch.equal(counts, counts.round())
    assert (counts == 16).float().mean() == pytest.approx(0.5, abs=0.03) and (counts == 512).float().mean() == pytest.approx(
        0.25, abs=0.03
    )


# ------------------------------------------------------------------------------------------------- the bundled weights


def test_bundled_files_are_small_and_anonymous():
    assert_small_and_anonymous(WEIGHTS, WEIGHT_LIMIT)


def test_the_model_card_is_that_of_quality_json(program, tmp_path):
    quality = json.loads((WEIGHTS / "quality.json").read_text())
    program.write_card(tmp_path, quality)
    assert (tmp_path / "README.md").read_text() == (WEIGHTS / "README.md").read_text()
    own = program.Settings()
    assert quality["settings"] | {"threads": own.threads} == asdict(own)  # made by the program as it stands


@pytest.mark.parametrize("name", MOVING_CLASSIFIERS)
@pytest.mark.medium
def test_bundled_classifiers_read_held_out_clips(program, name):
    pytest.importorskip("sklearn")
    clips = program.held_out_clips(program.load_data(), seed=7)  # other paths than those of quality.json
    with torch.no_grad():
        of_digits, of_directions = moving.read_clips(moving.load_moving_classifier(name), clips.videos)
    assert (of_digits.argmax(-1) == clips.labels).float().mean() >= 0.95
    assert (of_directions.argmax(-1) == clips.directions).float().mean() >= 0.95


@pytest.mark.medium
def test_the_judge_is_undecided_about_clips_that_stand(program):
    pytest.importorskip("sklearn")
    videos = program.held_out_clips(program.load_data(), seed=7).videos[:200, :1].expand(-1, moving.NUM_FRAMES, -1, -1, -1)
    with torch.no_grad():
        of_directions = moving.read_clips(moving.load_moving_classifier("judge"), videos)[1]
    assert of_directions.amax(-1).mean() < 0.5


@pytest.mark.medium
def test_bundled_pipeline_draws_what_prompts_name(program):
    prompts, labels, directions = program.every_prompt(80)
    videos = program.sample(digits.load_pipeline("moving-digits"), prompts, program.Mode(), seed=12345)
    judge = moving.load_moving_classifier("judge")
    with torch.no_grad():
        of_digits, of_directions = moving.read_clips(judge, videos)
    assert (of_directions.argmax(-1) == directions).float().mean() >= 0.95
    assert (of_digits.argmax(-1) == labels).float().mean() >= 0.75
    assert moving.one_digit_share(judge, videos).mean() >= 0.85


@pytest.mark.slow
def test_bundled_pipeline_learns_a_digit_and_a_direction(tmp_path):
    """The demo, at two thirds of its length: both judged probabilities are below 0.3 before."""
    demo.demo(demo_options(tmp_path / "out", max_steps=32))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["judge_before"] < 0.3 > summary["judge_direction_before"]
    assert summary["judge_after"] > 0.6 < summary["judge_direction_after"]
    assert summary["one_digit_after"] > 0.8 and summary["motion_after"] > 0.5 * summary["motion_before"]


# ------------------------------------------------------------------------------------------------------------- program


@pytest.fixture
def flow_training(program, tokenizer):
    """Makes the transformer's training of 4 steps on random latents."""
    generator = torch.Generator().manual_seed(0)
    pool = {
        "latents": torch.randn(8, 4, 5, 8, 8, generator=generator),
        "labels": torch.arange(8),
        "directions": torch.arange(8) % 4,
    }
    return lambda: program.train_flow(tokenizer, pool, program.Settings(batch_size=2, flow_steps=4))[0]


@pytest.mark.medium
def test_a_stopped_training_goes_on_bit_by_bit(program, flow_training, tmp_path):
    whole, first, second = (flow_training() for _ in range(3))
    losses = [whole.advance() for _ in range(4)]
    assert [first.advance() for _ in range(2)] == losses[:2]
    program.write_whole(tmp_path / "flow.pt", first.state())
    second.restore(torch.load(tmp_path / "flow.pt", weights_only=True))
    assert [second.advance() for _ in range(2)] == losses[2:]
    for training in (whole, second):
        training.finish()
    for one, other in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_runner_stops_in_time_and_goes_on(program, tmp_path):
    def training():
        module = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
        return program.Training("line", module, lambda generator: (module(torch.ones(1, 1)) - 1).square().sum(), 150, seed=0)

    log = program.Log(tmp_path / "log.jsonl")
    with pytest.raises(SystemExit, match="line: stopped after step 1 of 150"):
        program.Runner(tmp_path / "state", log, minutes=0).run(training())
    made = training()
    program.Runner(tmp_path / "state", log, minutes=1).run(made)
    assert made.step == 150 and not made.module.training
    again = training()
    program.Runner(tmp_path / "state", log, minutes=0).run(again)  # nothing is left to do
    assert torch.equal(again.module.weight, made.module.weight)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_learning_rate_rises_and_falls_to_zero(program):
    factors = [program.decay(step, 1000) for step in range(1000)]
    assert max(factors[:99]) < factors[100] == pytest.approx(0.5 * (1 + torch.tensor(0.1 * torch.pi).cos().item()))
    assert factors[-1] < 1e-5 and program.decay(2000, 1000) == 0


@pytest.mark.slow
def test_program_runs_stops_and_goes_on(tmp_path):
    pytest.importorskip("sklearn")
    made = tmp_path / "made"
    command = [sys.executable, str(FOLDER / "pretrain_moving.py"), "--output_dir", str(made), "--quick", "--quality_samples", "10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    quality = json.loads((made / "quality.json").read_text())
    assert quality["settings"]["flow_steps"] == 2 and quality["cpu_seconds"].keys() == {"vae", "reward", "judge", "flow"}
    assert "--quick" in (made / "README.md").read_text()
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file() and "state" not in path.parts)
    assert size < 8_000_000


# ---------------------------------------------------------------------------------------------------------------- demo


def demo_options(folder, **others):
    options = {
        "model": "moving-digits", "target": 7, "direction": None, "reward": "digit", "estimator": None, "max_steps": 1, "seed": 0,
        "output_dir": str(folder), "overwrite": False, "quiet": True,
    }  # fmt: skip
    return argparse.Namespace(**options | others)


@pytest.mark.medium
def test_demo_trains_and_shows_clips(bundled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "EVALUATION_SAMPLES", 72)
    demo.demo(demo_options(tmp_path / "out"))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["target"], summary["direction"], summary["updates"]) == (7, "right", 1)
    for name in ("reward", "judge", "judge_direction", "one_digit", "motion"):
        assert {type(summary[f"{name}_{when}"]) for when in ("before", "after")} == {float}
    with Image.open(tmp_path / "out/before_after.gif") as clip:
        assert clip.n_frames == 9
    assert (tmp_path / "out/before_after.png").stat().st_size > 0
    assert 'digits.load_pipeline("moving-digits")' in (tmp_path / "out/README.md").read_text()
    assert "judged as the direction" in capsys.readouterr().out


def test_a_direction_needs_clips_and_a_reward_that_asks_for_it(bundled, tmp_path):
    with pytest.raises(ValueError, match="--direction up: digits-flow makes pictures"):
        demo_subjects.make_subject(demo_options(tmp_path, model="digits-flow", direction="up"))
    with pytest.raises(ValueError, match="--direction up: the reward ink asks for none"):
        demo_subjects.make_subject(demo_options(tmp_path, reward="ink", direction="up"))


def test_tiles_are_in_rows():
    images = torch.arange(6.0).view(6, 1, 1, 1, 1).expand(6, 2, 3, 1, 1)
    tiled = demo_subjects.tile(images, 2, 3)
    assert tiled.shape == (2, 3, 2, 3)
    assert tiled[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
