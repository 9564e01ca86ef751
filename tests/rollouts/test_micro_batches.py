"""Micro-batches of a rollout, and what may be done with a batch."""

import torch
from tiny_adapter import tiny_run

from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.rollouts.batches import ScoredBatch
from rlr_trainer.rollouts.micro_batches import MicroBatches, micro_batch_rows


def test_rows_are_in_order_first_and_then_shuffled():
    rows = micro_batch_rows(6, 2, 3, seed=1, rollout=0)
    passes = [torch.cat(rows[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert passes[0] == list(range(6))
    assert sorted(passes[1]) == sorted(passes[2]) == passes[0]
    assert len({tuple(order) for order in passes}) == 3
    assert micro_batch_rows(6, 2, 3, 1, 1)[3].tolist() != rows[3].tolist()


def test_every_sample_is_handed_out_and_let_go_after_its_last_use():
    parts, _ = tiny_run(EstimatorPlan.from_preset("ddpo", 4), batch_size=2, num_batches=3).collect()
    whole = ScoredBatch.concatenate(parts)
    queue = MicroBatches()
    queue.fill(parts, rows := [torch.tensor(r) for r in ([0, 1], [5, 2], [3, 4], [4, 1])])
    assert len(queue) == 4
    held = []
    for expected in rows:
        batch = queue.pop()
        held.append(sorted(queue._parts))
        assert batch.index.tolist() == expected.tolist()
        assert batch.prompts == tuple(whole.prompts[i] for i in expected)
        assert torch.equal(batch.rollout.sample, whole.rollout.sample[expected])
        assert torch.equal(batch.conditioning.positive["prompt"], whole.conditioning.positive["prompt"][expected])
    assert held == [[0, 1, 2], [0, 1, 2], [0, 2], []]
    assert not queue


def test_everything_large_moves():
    """Shown with the device that holds no data, as there may be no accelerator."""
    run = tiny_run(batch_size=2)
    (batch,), _ = run.collect()
    moved = batch.to("meta")
    large = [*moved.rollout.latents, *moved.rollout.noises, *moved.rollout.means, *moved.conditioning.positive.values()]
    assert {t.device.type for t in (*large, moved.reward_gradient, moved.advantage, moved.scale)} == {"meta"}
    assert {t.device.type for t in (moved.index, moved.rewards, batch.rollout.sample)} == {"cpu"}
