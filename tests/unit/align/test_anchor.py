"""The anchor: which updates it is in, what is mixed, and that nothing but the micro-step decides."""

import dataclasses

import pytest
import torch
from tiny_align import reward_of, with_sampler
from torch import Tensor

from dinalrm_align.align.anchor import Anchor, terms
from dinalrm_align.align.config import AnchorConfig


def reward(latents: Tensor, noise=None) -> Tensor:
    return latents.mean(dim=(1, 2, 3)) + (0 if noise is None else noise.mean(dim=(1, 2, 3)))


def anchor(latents: Tensor) -> Tensor:
    return latents.square().mean(dim=(1, 2, 3))


REWARD, ANCHOR = reward_of(reward), reward_of(anchor)
EVERY_THIRD = Anchor(ANCHOR, every=3, weight=2.0)


def test_every_third_update_is_anchored():
    assert [EVERY_THIRD.is_due(update) for update in range(6)] == [False, False, True] * 2
    assert all(Anchor(ANCHOR, every=1, weight=1.0).is_due(update) for update in range(4))


def test_terms_by_hand():
    assert terms(REWARD, EVERY_THIRD, 1) == {"reward": (1.0, REWARD)}
    assert terms(REWARD, EVERY_THIRD, 2) == {"reward": (1.0, REWARD), "anchor": (2.0, ANCHOR)}
    assert terms(REWARD, None, 2) == {"reward": (1.0, REWARD)}


def test_refl_maximises_the_sum_and_records_both(refl_method):
    """With two micro-steps an update, 4 and 5 are anchored: loss = target - (reward + 2 anchor), both recorded."""
    method = with_sampler(dataclasses.replace(refl_method, reward=REWARD, anchor=EVERY_THIRD), accumulate=2)
    for micro_step, weight in ((3, 0.0), (4, 2.0)):
        loss, metrics = method.step(method.batch_at(micro_step))
        assert ("anchor" in metrics) is (weight > 0)
        expected = 2.0 - metrics["reward"] - weight * metrics.get("anchor", 0.0)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert any(p.grad.abs().sum() > 0 for p in method.sampler.policy.parameters.values())


def test_the_target_is_compared_with_the_first_reward_alone(refl_method):
    """loss = mean relu(target - reward) - 2 mean anchor. With a target far below the reward, the anchor is left."""
    for target, share in ((100.0, 1.0), (-100.0, 0.0)):
        config = dataclasses.replace(refl_method.config, loss="relu", target=target)
        method = dataclasses.replace(refl_method, reward=REWARD, anchor=EVERY_THIRD, config=config)
        loss, metrics = method.step(method.batch_at(2))
        torch.testing.assert_close(loss, share * (target - metrics["reward"]) - 2.0 * metrics["anchor"])


def test_the_rewards_noise_is_the_same_with_and_without_the_anchor(refl_method):
    """Update 2 is anchored, and scored with the noise that is drawn without an anchor."""
    alone, mixed = (dataclasses.replace(refl_method, reward=REWARD, anchor=each) for each in (None, EVERY_THIRD))
    scores = [method.step(method.batch_at(2))[1]["reward"] for method in (alone, mixed)]
    assert torch.equal(*scores)


def test_refl_brings_the_anchor_to_the_rewards_spread(refl_method):
    """A reward and its tenfold: the weight 2 becomes 0.2, with and without a checkpoint to resume from."""
    tenfold = Anchor(reward_of(lambda latents: 10 * latents.mean(dim=(1, 2, 3))), every=1, weight=2.0)
    for resumed in (False, True):
        method = dataclasses.replace(refl_method, anchor=tenfold)
        method.measure(resumed)
        assert method.anchor.weight == pytest.approx(0.2) and method.reward_std is None


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="anchor.every: got 0"):
        AnchorConfig(every=0)
    with pytest.raises(ValueError, match="anchor.weight: got 0"):
        AnchorConfig(weight=0.0)
