"""Batches of images: one noise level for a run, whether a reward is in this process, on a server, or in a sum."""

import pytest
import torch
from reward_server import running

from dinalrm_align.adapters.batches import score_batch
from dinalrm_align.adapters.shared import shared_reward
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.callables import as_reward
from dinalrm_align.reward.combine import RewardSum
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.registry import load_reward

WEIGHTS = MODELS["shapes"].pipeline
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def reward(tiny_world):
    loaded = LatentReward.from_pretrained(tiny_world / "dinalrm", pipeline=str(tiny_world / "pipeline"))
    loaded.config.sigma, loaded.config.image_sigma = 0.4, 0.1
    return loaded


@pytest.fixture(scope="module")
def address(reward):
    bright = as_reward(lambda images, prompts: images.mean(dim=(1, 2, 3)), name="brightness")
    both = RewardSum({"dinalrm": reward, "brightness": bright}, {"dinalrm": 1.0, "brightness": 2.0})
    with running({"default": reward, "sum": both}) as found:
        yield found


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("sigma", "level"), [(None, 0.4), (0.7, 0.7), ([0.2, 0.6], [0.2, 0.6])])
def test_images_of_a_served_reward_are_scored_at_the_level_of_its_latents(reward, address, images, sigma, level):
    wanted = reward.score_images(images, PROMPTS, sigma=level)
    for part in (reward, load_reward(address)):
        found = score_batch(part, PROMPTS, latents=None, images=images, sigma=sigma)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(wanted, reward.score_images(images, PROMPTS), atol=1e-4)


def test_a_served_sum_needs_a_level(reward, address, images):
    both = load_reward(f"{address}#sum")
    found = score_batch(both, PROMPTS, latents=None, images=images, sigma=0.3)
    wanted = reward.score_images(images, PROMPTS, sigma=0.3) + 2 * images.mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="sigma: got none for 'sum'.*pass sigma"):
        score_batch(both, PROMPTS, latents=None, images=images)


def test_image_rewards_of_a_shared_sum_decode_with_one_vae():
    """Each of them was loaded by itself, with a VAE of its own."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    both = shared_reward("pixel + 0.5*oracle", pipeline=WEIGHTS)
    prompts = ["three small green crosses on black", "a small red circle left of a large blue square on gray"]
    alone = [shared_reward(name, pipeline=WEIGHTS).score_images(images, prompts) for name in ("pixel", "oracle")]
    torch.testing.assert_close(both.score_images(images, prompts), alone[0] + 0.5 * alone[1])
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert both(latents, prompts).shape == (2,)
