"""`estimator="alignprop"` has the gradient of TRL 0.23.1's AlignPropTrainer, where the truncation step is fixed.

No constant separates the two. TRL's loss is 10 - mean reward and ours the negative mean reward. With a random truncation they
differ on purpose: TRL rolls the dice anew at every step, so that each is cut off on its own; the paper (arXiv:2310.03739) draws one
truncation step per trajectory, and so do we (tests/training/test_trl_defects.py, T22).
"""

import pytest
import torch
import trl

if not hasattr(trl, "AlignPropTrainer"):
    pytest.skip("this TRL has no AlignPropTrainer: 0.23.1 was the last", allow_module_level=True)

from parity.side_by_side import STEPS, run_ours, run_trl_alignprop, seven, trl_pipeline

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
LR = 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"truncated_backprop_timestep": STEPS - 1},
        {"truncated_backprop_timestep": 1, "train_gradient_accumulation_steps": 2, "train_batch_size": 3},
        {"truncated_backprop_timestep": 2, "train_max_grad_norm": 0.05, "num_epochs": 2},
        {"truncated_backprop_timestep": 0, "sample_eta": 0.0},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_gradients_and_weights(tmp_path, monkeypatch, options):
    def config():
        defaults = {
            "mixed_precision": "no", "num_epochs": 1, "sample_num_steps": STEPS, "sample_guidance_scale": 3.0, "train_batch_size": 6,
            "train_learning_rate": LR, "train_max_grad_norm": 1e6, "truncated_backprop_rand": False, "save_freq": 1000,
            "train_adam_epsilon": 1e-4,  # or Adam's first step would make whole steps of the rounding of entries that are nearly 0
        }  # fmt: skip
        return trl.AlignPropConfig(**(defaults | options))

    pipeline, reward = trl_pipeline(), seven()
    ours = run_ours(config(), pipeline, reward, tmp_path)
    theirs = run_trl_alignprop(config(), pipeline, reward, ours, monkeypatch)
    last_batches = theirs.images[config().train_gradient_accumulation_steps - 1 :: config().train_gradient_accumulation_steps]
    torch.testing.assert_close(torch.cat(ours.images), torch.cat(last_batches), rtol=0, atol=2e-5)  # what the hooks get
    torch.testing.assert_close(torch.cat(ours.rewards), torch.cat(theirs.rewards), rtol=1e-4, atol=1e-4)
    assert len(ours.gradients) == len(theirs.gradients) == config().num_epochs
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert mine.keys() == other.keys()
        largest = max(float(tensor.abs().max()) for tensor in other.values())
        assert largest > 0
        for name, tensor in other.items():
            assert float((mine[name] - tensor).abs().max()) < 1e-4 * largest, name
    for name, tensor in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], tensor, rtol=0, atol=0.01 * LR)
