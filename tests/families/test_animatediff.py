"""AnimateDiff on Stable Diffusion 1.x, on a tiny pipeline of the real classes."""

from __future__ import annotations

import pytest
from families.conformance import all_but
from families.tiny.animatediff import SIZE, make_pipeline

from rlr_trainer import RLRConfig, RLRTrainer
from rlr_trainer.pipelines import adapt
from rlr_trainer.testing import check_adapter

# "rlr" is left out: at the learning rates tried (1e-2, 5e-2, 1e-1) the tiny network moves the reward by less
# than the noise of a likelihood ratio. First order ("draft") raises it, and the gradients of both plans equal plain autograd ("gradients").
RISES = all_but("ddpo", "rlr")


@pytest.mark.parametrize("check", RISES)
@pytest.mark.medium
def test_it_conforms(check):
    check_adapter(make_pipeline, checks=[check], **SIZE)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((20, 16), "height=20: must be a positive multiple of 8, the pipeline's 8, .*; the nearest are 16 and 24"),
        ((16, 0), "width=0: must be a positive multiple of 8.*; the nearest is 8"),
        ((16, 16, 25), "num_frames=25: must be 1 to 24, the positions of the motion modules; the nearest is 24"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(make_pipeline()).layout(*size)


def test_other_ways_of_sampling_are_refused():
    pipeline = make_pipeline()
    pipeline.enable_free_init()
    with pytest.raises(ValueError, match=r"free_init_enabled=True.*disable_free_init\(\)"):
        adapt(pipeline)
    with pytest.raises(ValueError, match="time_cond_proj_dim=8"):
        adapt(make_pipeline(time_cond_proj_dim=8))


@pytest.mark.medium
def test_rewards_and_pictures_are_videos(tmp_path):
    seen = []

    def brightness(images, prompts, metadata):
        seen.append((tuple(images.shape), float(images.detach().min()), float(images.detach().max())))
        return images.flatten(1).mean(1)

    config = RLRConfig(
        str(tmp_path), estimator="draft", sample_num_steps=2, per_device_train_batch_size=2, max_steps=1, num_log_images=1,
        use_cpu=True, disable_tqdm=True, save_strategy="no", **SIZE,
    )  # fmt: skip
    trainer = RLRTrainer(config, brightness, lambda: ("a seven", {}), make_pipeline())
    trainer.train()
    assert {shape[1:] for shape, *_ in seen} == {(3, 3, 16, 16)}
    assert min(low for _, low, _ in seen) >= 0
    assert max(high for *_, high in seen) <= 1
    assert trainer.generate(["a nine"]).shape == (1, 3, 3, 16, 16)
    assert list((tmp_path / "samples").glob("step_000001/*"))
