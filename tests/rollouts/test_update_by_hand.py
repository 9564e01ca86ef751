"""CONTRIBUTING's "one update, in code": ten lines with the parts give what the trainer's own update is made of."""

import pytest
import torch

from rlr_trainer import digits
from rlr_trainer.estimators import Feedback, Sweep
from rlr_trainer.estimators.chain import sample_chain, seeded_generator
from rlr_trainer.rollouts.batches import CHOICES, NOISE


class Recorder:
    """Stands in for `backward`: ascends, as `estimate_gradient` does."""

    def __call__(self, surrogate):
        surrogate.backward()
        return 1.0


@pytest.mark.medium
def test_ten_lines_are_the_trainers_update(make_trainer):
    trainer = make_trainer(max_grad_norm=0.0)
    parts, model, seed = trainer.parts, trainer.model, trainer.args.seed
    for name, parameter in trainer.policy.trainable_parameters().items():
        if "lora_B" in name:  # starts at 0, and would hide half of the gradient
            parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    plan, params, metadata = trainer.plan, trainer.policy.trainable_parameters(), ({},) * 4

    rows = parts.prompts.peek(4)
    conditioning = parts.sampler.condition(rows)
    chain = parts.sampler.chain(model, conditioning)
    draw = plan.draw(4, seeded_generator(seed, CHOICES, 0, 0), shared=True)
    rollout = sample_chain(chain, 4, [seeded_generator(seed, NOISE, 0, i) for i in range(4)])
    scored = parts.scorer.score_with_gradient(rollout.sample, (digits.PROMPT,) * 4, metadata, "by hand")
    advantages, _ = parts.advantage_rule().of_rollout(scored.result.total, scored.result.values.T, (digits.PROMPT,) * 4)
    feedback = Feedback.of(plan, advantages, 1 / 4, reward_gradient=scored.gradient)
    sweep = Sweep.of_plan(plan, chain, params, Recorder(), parts.scorer.differentiable((digits.PROMPT,) * 4, metadata))
    sweep.run(rollout, draw.expand(4), feedback)
    by_hand = {name: p.grad.clone() for name, p in params.items()}

    trainer.model.zero_grad()
    batches, summary = parts.collector.collect(model, 0)
    parts.updater.begin(batches, summary.valid_fraction)
    for batch in batches:
        parts.updater.accumulate(model, batch, lambda surrogate, ends: Recorder()(surrogate))
    assert summary.rewards.tolist() == scored.result.total.tolist()
    assert max(float(g.abs().max()) for g in by_hand.values()) > 0
    for name, p in params.items():
        torch.testing.assert_close(p.grad, by_hand[name], rtol=1e-5, atol=1e-8)
