"""`estimator="ddpo"` does what TRL 0.23.1's DDPOTrainer does, number for number.

Two constants separate the gradients, and nothing else does. TRL's log-density is the mean over the D entries of a latent and its
loss the mean over the T steps of a trajectory; ours are sums. So ours = TRL's * D * T, for any batch, accumulation, number of inner
epochs and train_timestep_fraction. AdamW does not see a constant factor, but for its epsilon, and max_grad_norm does: the trainer
multiplies both by D * T when it is given a DDPOConfig, and the weights that come out are the same.
"""

import pytest
import torch
import trl

if not hasattr(trl, "DDPOTrainer"):
    pytest.skip("this TRL has no DDPOTrainer: 0.23.1 was the last", allow_module_level=True)

from parity.side_by_side import LATENT_ENTRIES, STEPS, draw_weights, run_ours, run_trl_ddpo, seven, trl_pipeline

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
FACTOR = LATENT_ENTRIES * STEPS
LR = 1e-3


def ddpo_config(**options):
    defaults = {
        "mixed_precision": "no", "num_epochs": 1, "sample_num_steps": STEPS, "sample_guidance_scale": 3.0, "sample_batch_size": 6,
        "train_batch_size": 6, "sample_num_batches_per_epoch": 1, "train_learning_rate": LR, "train_max_grad_norm": 1e6, "save_freq": 1000,
    }  # fmt: skip
    return trl.DDPOConfig(**(defaults | options))


@pytest.fixture
def both(tmp_path, monkeypatch):
    def run(prompts=10, **options):
        pipeline, reward = trl_pipeline(), seven()
        ours = run_ours(ddpo_config(**options), pipeline, reward, tmp_path, prompts)
        theirs = run_trl_ddpo(ddpo_config(**options), pipeline, reward, ours, monkeypatch, prompts)
        return ours, theirs

    return run


def assert_same(ours, theirs, clip_range=1e-4):
    """Float32 rounding: eps is 1.2e-7; a mean log-density is of order 1, and a gradient a sum of some 10^4 terms of both signs."""
    edge = torch.stack(ours.ratios).sub(1).abs().sub(clip_range).abs()
    assert edge.nan_to_num(1).min() > 1e-5, "a ratio so near the clip range that rounding decides: choose another one"
    assert len(ours.latents) == len(theirs.latents)
    for mine, other in zip(ours.latents, theirs.latents, strict=True):
        torch.testing.assert_close(torch.stack(mine), torch.stack(other), rtol=0, atol=2e-5)
    for mine, other in zip(ours.images, theirs.images, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    for mine, other in zip(ours.advantages, theirs.advantages, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    for mine, other in zip(ours.ratios, theirs.ratios, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, equal_nan=True)
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-5)
    assert len(ours.gradients) == len(theirs.gradients)
    for number, (mine, other) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        assert mine.keys() == other.keys()
        largest = FACTOR * max(float(tensor.abs().max()) for tensor in other.values())
        tolerance = 3e-4 if number else 2e-5  # Adam's first step makes whole steps of the rounding of entries that are nearly 0
        for name, tensor in other.items():
            assert float((mine[name] - FACTOR * tensor).abs().max()) < tolerance * largest, name


def starting_weights(run):
    weights = {name: torch.empty_like(tensor) for name, tensor in run.weights.items()}
    draw_weights(weights)
    return weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_batch_size": 3, "train_gradient_accumulation_steps": 2},
        {
            "sample_num_batches_per_epoch": 2,
            "train_batch_size": 3,
            "train_clip_range": 5e-3,
        },  # four updates from one rollout, the later ones off-policy
        {"train_adv_clip_max": 0.7},
        {"train_timestep_fraction": 0.5},
        {"sample_eta": 0.3, "negative_prompts": "blurred", "sample_guidance_scale": 1.5, "seed": 3},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "defaults",
)
def test_an_epoch(both, options):
    ours, theirs = both(**options)
    assert_same(ours, theirs, options.get("train_clip_range", 1e-4))
    assert (ours.ratios[0].nan_to_num(1)[: 6 if len(ours.losses) == 1 else 3] == 1).all()  # TRL's is 1 to rounding, ours is 1
    if "train_timestep_fraction" in options:
        assert (~ours.ratios[0].isnan()).sum(1).tolist() == [2] * 6


def test_three_inner_epochs_with_ppo_and_gradient_clipping(both):
    """The same weights after off-policy passes: max_grad_norm and adam_epsilon have the gradient's unit, and are taken over in ours."""
    limit, clip_range = 0.05, 3e-3
    ours, theirs = both(
        train_num_inner_epochs=3, train_clip_range=clip_range, train_max_grad_norm=limit,
    )  # fmt: skip
    deviations = torch.stack(ours.ratios)[1:].sub(1).abs()
    assert (deviations > clip_range).any() and (deviations < clip_range).any()  # clipped and unclipped entries
    norms = [torch.cat([tensor.flatten() for tensor in gradients.values()]).norm() for gradients in theirs.gradients]
    assert norms[0] == pytest.approx(limit, rel=1e-3)  # the limit binds
    assert norms[1] < 0.9 * limit
    assert_same(ours, theirs, clip_range)
    moved = max(float((theirs.weights[name] - start).abs().max()) for name, start in starting_weights(theirs).items())
    assert moved > 2 * LR
    for name, tensor in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], tensor, rtol=0, atol=0.01 * LR)


def test_per_prompt_statistics_over_two_epochs(both):
    """TRL adds 1e-6 to a prompt's standard deviation, we 1e-8; that is all."""
    ours, theirs = both(
        prompts=2, num_epochs=2, per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=4,
        per_prompt_stat_tracking_buffer_size=5,
    )  # fmt: skip
    assert len(ours.advantages) == 2
    assert_same(ours, theirs)
    alone = (ours.rewards[1] - ours.rewards[1].mean()) / ours.rewards[1].std(correction=0)
    assert (ours.advantages[1] - alone).abs().max() > 0.05  # the second epoch looks at the prompts' own histories


def test_five_epochs_of_a_default_configuration(both):
    """The defaults of train_max_grad_norm (1) and train_adam_epsilon mean what they mean in TRL: nothing is clipped."""
    ours, theirs = both(num_epochs=5, train_max_grad_norm=1.0)
    start = starting_weights(theirs)
    moved = torch.cat([(theirs.weights[name] - tensor).flatten() for name, tensor in start.items()])
    apart = torch.cat([(theirs.weights[name] - ours.weights[name]).flatten() for name in start])
    assert apart.norm() < 1e-3 * moved.norm()  # 0.09 with max_grad_norm=1 on the gradient of the summed density
