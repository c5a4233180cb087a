"""LatentReward.score_noisy: latents that are at a noise level already, as sampling trajectories hold them."""

import dataclasses

import pytest
import torch
from tiny_reward import encoded

from dinalrm_align import LatentReward
from dinalrm_align.flow.noise import add_noise


@pytest.fixture
def reward(tiny_reward_dir, tiny_pipeline):
    return LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)


def noisy(inputs, sigma):
    """The inputs of `score_noisy` that belong to those of `forward` at this level."""
    prompts = encoded(inputs["prompt_embeds"], inputs["pooled_prompt_embeds"])
    return {"prompts": prompts, "latents": add_noise(inputs["latents"], inputs["noise"], sigma), "sigma": sigma}


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0, torch.tensor([0.2, 0.7])])
def test_noise_added_by_hand_gives_the_ordinary_score(reward, tiny_inputs, sigma):
    ordinary = reward(**tiny_inputs, sigma=sigma)
    torch.testing.assert_close(reward.score_noisy(**noisy(tiny_inputs, sigma)), ordinary, rtol=1e-6, atol=1e-6)


def test_prompts_are_encoded_as_usual(reward, tiny_inputs):
    prompts = ["a red circle", "a blue square"]
    latents = add_noise(tiny_inputs["latents"], tiny_inputs["noise"], 0.3)
    ordinary = reward(tiny_inputs["latents"], prompts, sigma=0.3, noise=tiny_inputs["noise"])
    torch.testing.assert_close(reward.score_noisy(latents, 0.3, prompts), ordinary, rtol=1e-6, atol=1e-6)


def test_the_level_is_taken_as_it_is_even_by_a_reward_that_snaps(reward, tiny_inputs):
    """0.4123 is in no table of 1000 levels: the ordinary score is that of its neighbour, the noisy one its own."""
    expected = reward.score_noisy(**noisy(tiny_inputs, 0.4123))
    ordinary = reward(**tiny_inputs, sigma=0.4123)
    reward.model.config = dataclasses.replace(reward.config, snap_sigma=True)
    assert torch.equal(reward.score_noisy(**noisy(tiny_inputs, 0.4123)), expected)
    assert not torch.equal(reward(**tiny_inputs, sigma=0.4123), ordinary)


def test_it_is_differentiable_and_draws_nothing(reward, tiny_inputs):
    given = noisy(tiny_inputs, 0.5)
    latents = given["latents"].clone().requires_grad_()
    state = torch.get_rng_state()
    score = reward.score_noisy(**(given | {"latents": latents}))
    assert torch.equal(torch.get_rng_state(), state)
    (gradient,) = torch.autograd.grad(score.sum(), latents)
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ends = [reward.score_noisy(**(given | {"latents": latents + h * direction})).sum() for h in (1e-2, -1e-2)]
    finite_difference = ((ends[0] - ends[1]) / 2e-2).item()
    assert (gradient * direction).sum().item() == pytest.approx(finite_difference, rel=2e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sigma": [0.2, 0.5]}, ValueError, "expected one level per sample"),
        ({"sigma": 1.2}, ValueError, "sigma: got 1.2, outside"),
        ({"sigma": torch.tensor([0.1, 0.2, 0.3])}, ValueError, "sigma: got a tensor of shape"),
        ({"sigma": None}, TypeError, "sigma: got None"),
        ({"latents": torch.zeros(2, 3, 16, 12)}, ValueError, "latents: got 3 channels"),
        ({"latents": torch.full((2, 16, 16, 12), torch.nan)}, ValueError, "NaN or infinite"),
        ({"prompts": ["a red circle"]}, ValueError, "got 1 for 2 samples"),
        ({"prompts": None}, TypeError, "prompts: got NoneType"),
    ],
)
def test_what_cannot_be_scored_is_refused(reward, tiny_inputs, change, error, message):
    with pytest.raises(error, match=message):
        reward.score_noisy(**(noisy(tiny_inputs, 0.5) | change))


def test_a_reward_of_clean_latents_alone_says_so(reward, tiny_inputs):
    reward.model.config = dataclasses.replace(reward.config, add_noise=False)
    with pytest.raises(ValueError, match="reads clean latents only"):
        reward.score_noisy(**noisy(tiny_inputs, 0.5))
