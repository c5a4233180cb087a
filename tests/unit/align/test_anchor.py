"""The anchor: which updates it is in, what is mixed, and that nothing but the micro-step decides."""

import dataclasses

import pytest
import torch
from torch import Tensor

from dinalrm_align.align.anchor import AnchoredReward, matching_scale, terms
from dinalrm_align.align.config import AnchorConfig


def reward(latents: Tensor, *, prompts, sigma=None, noise=None) -> Tensor:
    return latents.mean(dim=(1, 2, 3)) + (0 if noise is None else noise.mean(dim=(1, 2, 3)))


def anchor(latents: Tensor, *, prompts, sigma=None, noise=None) -> Tensor:
    return latents.square().mean(dim=(1, 2, 3))


def anchored(**changes: float) -> AnchoredReward:
    config = AnchorConfig(reward="pixel", **{"every": 3, "weight": 0.5, **changes})
    return AnchoredReward(reward, anchor, config, accumulate=2, scale=4.0)


def test_every_third_update_of_two_micro_steps_is_anchored():
    found = [anchored().is_anchored(micro_step) for micro_step in range(12)]
    assert found == [False] * 4 + [True] * 2 + [False] * 4 + [True] * 2
    assert all(anchored(every=1).is_anchored(micro_step) for micro_step in range(4))


def test_terms_by_hand():
    """Weight 0.5 at scale 4 makes 2; latents of 3 give 3 and 9."""
    mixed, latents = anchored(), torch.full((2, 1, 2, 2), 3.0)
    assert terms(mixed, 3) == {"reward": (1.0, reward)}
    assert terms(mixed, 4) == {"reward": (1.0, reward), "anchor": (2.0, anchor)}
    assert terms(reward, 4) == {"reward": (1.0, reward)}
    assert mixed(latents, prompts=["a", "b"]).tolist() == [3.0, 3.0]  # what is judged held out is the reward alone


def test_refl_climbs_the_sum_and_records_both(refl_method):
    """Of a fixed batch: loss = target - (reward + 2 anchor), both recorded apart; unanchored updates see the reward."""
    method = dataclasses.replace(refl_method, reward=anchored())
    for micro_step, weight in ((3, 0.0), (4, 2.0)):
        loss, metrics = method.step(method.batch_at(micro_step))
        assert ("anchor" in metrics) is (weight > 0)
        expected = 2.0 - metrics["reward"] - weight * metrics.get("anchor", 0.0)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert any(p.grad.abs().sum() > 0 for p in method.policy.parameters.values())


def test_the_rewards_noise_is_the_same_with_and_without_the_anchor(refl_method):
    """Micro-step 4 is anchored, and read with the noise that is drawn without an anchor."""
    alone, mixed = (dataclasses.replace(refl_method, reward=r) for r in (reward, anchored()))
    scores = [method.step(method.batch_at(4))[1]["reward"] for method in (alone, mixed)]
    assert torch.equal(*scores)


def test_the_scale_brings_the_anchor_to_the_rewards_spread():
    """s.d. of 1, 3 is sqrt 2, of 0.1, 0.2 it is 0.1 / sqrt 2: their ratio is 20."""
    assert matching_scale(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.2])) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="do not differ"):
        matching_scale(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="one score of each per sample"):
        matching_scale(torch.ones(3), torch.ones(2))


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="anchor.every: got 0"):
        AnchorConfig(every=0)
    with pytest.raises(ValueError, match="anchor.weight: got 0"):
        AnchorConfig(weight=0.0)
    with pytest.raises(ValueError, match="accumulate 0"):
        AnchoredReward(reward, anchor, AnchorConfig(), accumulate=0)
