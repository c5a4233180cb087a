"""The spread of a reward: by hand, on which samples it is measured, and what has none."""

import pytest
import torch
from tiny_align import brightness, make_sampler, move, reward_of
from torch import Tensor

from dinalrm_align.align.spread import base_spreads, spread


def test_one_sample_per_prompt_gives_the_deviation_over_prompts():
    """s.d. of 1, 3 is sqrt 2; of 0.1, 0.2 it is 0.1 / sqrt 2."""
    assert spread(torch.tensor([[1.0], [3.0]])) == pytest.approx(2**0.5)
    assert spread(torch.tensor([[0.1], [0.2]])) == pytest.approx(0.1 / 2**0.5)


def test_several_samples_per_prompt_leave_out_the_prompts():
    """Rows 1, 3 and 101, 105 have variances 2 and 8: sqrt((2 + 8) / 2); another prompt mean changes nothing."""
    scores = torch.tensor([[1.0, 3.0], [101.0, 105.0]])
    assert spread(scores) == pytest.approx(5**0.5)
    assert spread(scores + torch.tensor([[0.0], [1000.0]])) == pytest.approx(5**0.5)


@pytest.mark.parametrize("scores", [[[2.0, 2.0]], [[1e6, 1e6 + 0.0625]], [[float("nan"), 1.0]], [[3.0], [3.0]]])
def test_scores_that_are_equal_up_to_rounding_are_refused(scores):
    with pytest.raises(ValueError, match="expected scores that differ"):
        spread(torch.tensor(scores))


def test_small_scores_that_differ_have_a_spread():
    assert spread(torch.tensor([[1e-9, 3e-9]])) == pytest.approx(2**0.5 * 1e-9)


def test_the_base_model_is_measured_with_the_runs_reward_settings():
    """16 prompts x 4 samples of the reference, whatever the policy; the levels reach the rewards."""
    sampler, seen = make_sampler(), []

    def reward(latents: Tensor, prompts, sigma) -> Tensor:
        seen.append((list(prompts), sigma))
        return brightness(latents)

    rewards = [reward_of(reward), reward_of(lambda latents: 10 * brightness(latents))]
    first, tenfold = base_spreads(sampler, rewards, lambda generators: [0.3], per_prompt=4)
    assert tenfold == pytest.approx(10 * first)
    prompts = [prompt for batch, _ in seen for prompt in batch]
    assert prompts == [f"prompt {number // 4 % 5}" for number in range(64)] and {str(s) for _, s in seen} == {"[0.3]"}
    move(sampler.policy)
    assert base_spreads(sampler, rewards, lambda generators: [0.3], per_prompt=4) == [first, tenfold]
    assert base_spreads(sampler, rewards, lambda generators: [0.3], per_prompt=1)[0] != first
