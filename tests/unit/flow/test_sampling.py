"""The sampler gives the images of diffusers' own pipeline, and Euler's step is Euler's."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dinalrm_align.align.policy import Policy
from dinalrm_align.flow import sampling
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.shapes.stack import StackConfig, build_pipeline


def test_levels_are_the_schedulers_and_it_is_left_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    before = scheduler.sigmas.clone()
    sigmas = sampling.schedule_sigmas(scheduler, 4)
    assert sigmas == pytest.approx([1, 0.8577, 0.6022, 0.0089, 0], abs=1e-4)
    assert torch.equal(scheduler.sigmas, before)


def test_levels_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="num_steps: got 0"):
        sampling.schedule_sigmas(FlowMatchEulerDiscreteScheduler(), 0)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        sampling.schedule_sigmas(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


def test_a_straight_flow_is_followed_exactly():
    """velocity = noise - x0 is constant along a straight path, so any number of Euler steps lands on x0."""
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = sampling.rollout(lambda x, sigma: noise - x0, noise, [1.0, 0.7, 0.2, 0.0])
    torch.testing.assert_close(latents, x0)
    assert sampling.ode_step(x0.bfloat16(), x0, 0.5, 0.25).dtype == torch.float32


def test_a_sample_depends_on_its_own_generator_alone():
    together = sampling.seeded_noise((2, 4, 4), [seeded_generator(0, index) for index in range(3)])
    alone = sampling.seeded_noise((2, 4, 4), [seeded_generator(0, 2)])
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_rollout_is_the_pipelines(guidance_scale):
    config = StackConfig.tiny()
    pipeline = build_pipeline(config, seed=0)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "a blue square"]
    noise = sampling.seeded_noise((16, 16, 16), [seeded_generator(7, index) for index in range(2)])
    expected = pipeline(
        prompts,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        latents=noise,
        height=64,
        width=64,
        max_sequence_length=config.text_length,
        output_type="latent",
    ).images
    with torch.no_grad():
        embeds, negative_embeds, pooled, negative_pooled = pipeline.encode_prompt(
            prompts, None, None, max_sequence_length=config.text_length
        )
    policy = Policy(pipeline.transformer, LoraConfig(rank=2, alpha=4), seed=0)
    conditions, negative = Conditions(prompts, embeds, pooled), Conditions(["", ""], negative_embeds, negative_pooled)

    def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
        return policy.velocity(latents, sigma, conditions, guidance_scale, negative)

    with torch.no_grad():
        latents = sampling.rollout(velocity, noise, sampling.schedule_sigmas(pipeline.scheduler, 5))
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
