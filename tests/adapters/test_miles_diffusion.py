"""miles_diffusion: its batched reward function, images and latents."""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from dinalrm_align import LatentReward
from dinalrm_align.adapters import miles_diffusion

PROMPTS = ["a red circle", "two blue squares", "three green crosses"]


@dataclass
class DiTTrajectory:
    """Recorded from miles_diffusion 2929e49, miles/utils/types.py: T + 1 latents of one sample, and their sigmas."""

    latents: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None


@dataclass
class Sample:
    """Some fields of miles/utils/types.py:Sample at 2929e49. generated_output: (C, T, H, W), T = 1 for images."""

    prompt: str = ""
    generated_output: torch.Tensor | None = None
    dit_trajectory: DiTTrajectory | None = None


async def batched_async_rm(rm, samples):
    """As miles/rollout/rm_hub: the function gets args and a list of samples, and returns a list."""
    return await rm(SimpleNamespace(custom_rm_path="mine"), samples)


@pytest.fixture(scope="module")
def reward(tiny_reward_dir):
    return LatentReward.from_pretrained(tiny_reward_dir)


@pytest.fixture(scope="module")
def rollout():
    generator = torch.Generator().manual_seed(0)
    images, latents = torch.rand(3, 3, 64, 64, generator=generator), torch.randn(3, 16, 16, 16, generator=generator)
    sigmas = torch.tensor([1.0, 0.0])
    found = [
        Sample(prompt, image[:, None], DiTTrajectory(torch.stack([torch.zeros_like(clean), clean]), sigmas[:1], sigmas))
        for prompt, image, clean in zip(PROMPTS, images, latents, strict=True)
    ]
    return SimpleNamespace(samples=found, images=images, latents=latents)


def test_images_score_as_in_a_direct_call(reward, rollout, tiny_reward_dir):
    rm = miles_diffusion.make_rm(f"dinalrm={tiny_reward_dir}")
    expected = pytest.approx(reward.score_images(rollout.images, PROMPTS).tolist(), abs=1e-4)
    assert asyncio.run(batched_async_rm(rm, rollout.samples)) == expected
    assert all(type(score) is float for score in asyncio.run(batched_async_rm(rm, rollout.samples)))


def test_latents_score_as_in_a_direct_call_also_from_many_calls_at_once(reward, rollout, tiny_reward_dir):
    rm = miles_diffusion.make_rm(f"dinalrm={tiny_reward_dir}", latents=True)

    async def together():
        return await asyncio.gather(*(batched_async_rm(rm, [sample]) for sample in rollout.samples))

    expected = pytest.approx(reward(rollout.latents, PROMPTS).tolist(), abs=1e-4)
    assert asyncio.run(batched_async_rm(rm, rollout.samples)) == expected
    assert [score for (score,) in asyncio.run(together())] == expected


@pytest.mark.parametrize(
    ("latents", "sample", "message"),
    [
        (False, Sample("a"), "generated_output: got none"),
        (False, Sample("a", torch.zeros(3, 2, 64, 64)), r"got \(3, 2, 64, 64\); expected one image"),
        (False, Sample("a", torch.full((3, 1, 64, 64), torch.nan)), "nan"),
        (True, Sample("a", torch.zeros(3, 1, 64, 64)), "latents=False"),
        (True, Sample("a", None, DiTTrajectory(torch.zeros(2, 16, 16, 16), None, torch.tensor([1.0, 0.3]))), "0.3"),
        (True, Sample("a", None, DiTTrajectory(torch.zeros(1, 16, 16, 16), None, torch.tensor([1.0, 0.0]))), "got 1"),
    ],
)
def test_failures_leave_the_function(tiny_reward_dir, latents, sample, message):
    rm = miles_diffusion.make_rm(f"dinalrm={tiny_reward_dir}", latents=latents)
    with pytest.raises(ValueError, match=message):
        asyncio.run(batched_async_rm(rm, [sample]))


def test_the_function_without_settings_is_the_released_reward(monkeypatch, rollout):
    asked = []
    queue = SimpleNamespace(submit=lambda sample: asked.append(sample.prompt) or done(1.0))
    monkeypatch.setattr(miles_diffusion, "sample_queue", lambda reward: asked.append(reward) or queue)
    assert asyncio.run(batched_async_rm(miles_diffusion.rm, rollout.samples[:1])) == [1.0]
    assert asked == ["dinalrm", PROMPTS[0]]


def done(value):
    from concurrent.futures import Future

    future = Future()
    future.set_result(value)
    return future


def test_a_reward_that_compares_groups_is_refused(monkeypatch, rollout):
    grouped = SimpleNamespace(wants_groups=True, name="ranker")
    monkeypatch.setattr("dinalrm_align.adapters.samples.shared_reward", lambda reward: grouped)
    with pytest.raises(ValueError, match="'ranker' compares all samples of a prompt"):
        asyncio.run(batched_async_rm(miles_diffusion.make_rm("ranker"), rollout.samples))
