"""Reward guidance in diffusers' own pipelines, on the tiny stack; the step's arithmetic on numbers worked by hand."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from dinalrm_align import LatentReward, load_reward
from dinalrm_align.adapters.diffusers import RewardGuidance, RewardGuider, best_of, early_strength
from dinalrm_align.reward.combine import RewardSum

PROMPTS = ["a small red circle on black", "a large blue square on white"]
WHERE = torch.tensor([3.0, 4.0, 0.0, 0.0]).view(1, 2, 2)  # RMS 2.5


class Linear:
    """A reward with the gradient `weights` everywhere, that keeps what it is called with."""

    def __init__(self, weights=1.0):
        self.weights, self.calls = weights, []

    def score_noisy(self, latents, sigma, prompts):
        self.calls.append((latents.detach().clone(), sigma, prompts))
        return (latents * self.weights).sum((1, 2, 3))


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    tiny_pipeline.set_progress_bar_config(disable=True)
    return tiny_pipeline


@pytest.fixture(scope="module")
def reward(tiny_reward_dir, tiny_pipeline):
    return LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)


def sample(pipeline, callback=None, **changes):
    options = dict(negative_prompt=[""] * len(PROMPTS), num_inference_steps=4, guidance_scale=3.0, height=64, width=64)
    options |= dict(max_sequence_length=16, output_type="latent", generator=torch.Generator().manual_seed(0))
    return pipeline(PROMPTS, callback_on_step_end=callback, **(options | changes)).images


def after_one_step(guidance, before, reached, sigma=0.5, embeds=None):
    """What `guidance` returns at the second step's end, called as by diffusers 0.42.1,
    pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py: `callback_on_step_end(self, i, t, callback_kwargs)`."""
    given = torch.zeros(len(reached), 3, 8) if embeds is None else embeds
    scheduler = SimpleNamespace(sigmas=torch.tensor([1.0, 0.7, sigma, 0.0]), step_index=1)
    texts = dict(prompt_embeds=given, pooled_prompt_embeds=given[:, 0])
    guidance(SimpleNamespace(scheduler=scheduler), 0, torch.tensor(1000.0), dict(latents=before, **texts))
    scheduler.step_index = 2
    with torch.no_grad():
        return guidance(SimpleNamespace(scheduler=scheduler), 1, torch.tensor(700.0), dict(latents=reached, **texts))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_step_is_the_unit_gradient_times_the_samplers_step(scale):
    """RMS of the step 2 (rows: 6), gradient (3, 4, 0, 0) / RMS 2.5, strength 0.5: (1.2, 1.6, 0, 0); per sample."""
    before, reached = torch.zeros(2, 1, 2, 2), torch.tensor([2.0, 6.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    found = after_one_step(RewardGuidance(Linear(scale * WHERE), 0.5), before, reached)["latents"]
    expected = torch.tensor([[3.2, 3.6, 2.0, 2.0], [9.6, 10.8, 6.0, 6.0]]).view(2, 1, 2, 2)
    torch.testing.assert_close(found, expected)


def test_a_value_moves_by_at_most_two_steps():
    """Strength 2: (4.8, 6.4) in units of 2, clipped to 4."""
    found = after_one_step(RewardGuidance(Linear(WHERE), 2.0), torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0))
    torch.testing.assert_close(found["latents"].flatten(), torch.tensor([6.0, 6.0, 2.0, 2.0]))


@pytest.mark.parametrize("sigma", [0.0, 0.19, 1.0])
def test_a_number_guides_the_middle_levels_only(sigma):
    reward, reached = Linear(), torch.randn(1, 1, 2, 2)
    found = after_one_step(RewardGuidance(reward, 0.5), torch.zeros(1, 1, 2, 2), reached, sigma)
    assert found["latents"] is reached and not reward.calls


def test_the_default_strength_is_high_at_the_first_levels():
    levels = {1.0: 0.0, 0.95: 0.3, 0.8: 0.05, 0.21: 0.05, 0.2: 0.0, 0.0: 0.0}
    assert {level: early_strength(level) for level in levels} == levels


def test_a_function_of_sigma_decides_itself():
    reward, reached = Linear(), torch.ones(1, 1, 2, 2)
    found = after_one_step(RewardGuidance(reward, lambda sigma: 1 - sigma), reached * 0, reached, 0.0)
    torch.testing.assert_close(found["latents"], 2 * reached)
    assert [sigma for _, sigma, _ in reward.calls] == [0.0]


def test_a_zero_gradient_moves_nothing_and_one_that_is_not_finite_raises():
    start, reached = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert torch.equal(after_one_step(RewardGuidance(Linear(0.0)), start, reached)["latents"], reached)
    with pytest.raises(ValueError, match="sigma 0.5: the gradient is not finite"):
        after_one_step(RewardGuidance(Linear(float("nan"))), start, reached)


def test_half_precision_latents_keep_their_dtype():
    start, reached = torch.zeros(1, 1, 2, 2).bfloat16(), torch.ones(1, 1, 2, 2).bfloat16()
    reward = Linear()
    assert after_one_step(RewardGuidance(reward), start, reached)["latents"].dtype == torch.bfloat16
    assert reward.calls[0][0].dtype == torch.float32


@pytest.mark.parametrize("strength", [0, lambda sigma: 0.0])
def test_strength_zero_gives_bit_identical_images(pipeline, reward, strength):
    images = [sample(pipeline, guidance, output_type="pt") for guidance in (None, RewardGuidance(reward, strength))]
    assert torch.equal(*images)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_reward_reads_the_level_reached_and_the_prompts_own_embeddings(pipeline, guidance_scale):
    reward, path = Linear(), []

    class Watch(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            path.append(callback_kwargs["latents"].clone())
            return callback_kwargs

    sample(pipeline, MultiPipelineCallbacks([Watch(), RewardGuidance(reward)]), guidance_scale=guidance_scale)
    levels = pipeline.scheduler.sigmas.tolist()
    assert [sigma for _, sigma, _ in reward.calls] == [level for level in levels[2:] if level >= 0.2]
    assert torch.equal(reward.calls[0][0], path[1])
    options = dict(do_classifier_free_guidance=False, max_sequence_length=16)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, **options)
    text = reward.calls[0][2]
    torch.testing.assert_close(text.prompt_embeds, embeds)
    torch.testing.assert_close(text.pooled_prompt_embeds, pooled)


def test_image_to_image_starts_at_a_lower_level(pipeline):
    reward, second = Linear(), StableDiffusion3Img2ImgPipeline(**pipeline.components)
    second.set_progress_bar_config(disable=True)
    options = dict(image=torch.rand(2, 3, 64, 64), strength=0.75, num_inference_steps=8, max_sequence_length=16)
    guidance = RewardGuidance(reward, lambda sigma: 0.1, prompts=PROMPTS)
    second(PROMPTS, callback_on_step_end=guidance, output_type="latent", **options)
    assert [sigma for _, sigma, _ in reward.calls] == second.scheduler.sigmas.tolist()[4:]
    assert reward.calls[0][2] == PROMPTS
    with pytest.raises(ValueError, match="prompt_embeds: got none from the pipeline; pass the prompts"):
        second(PROMPTS, callback_on_step_end=RewardGuidance(reward), output_type="latent", **options)


@pytest.mark.parametrize("inference", [False, True])
def test_guidance_raises_the_score_at_its_level(pipeline, reward, inference):
    """A small step along the gradient of the real latent reward, under no_grad and in inference mode."""
    with torch.inference_mode(inference):
        before, reached = torch.randn(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=16)
        guidance = RewardGuidance(reward, 0.01, prompts=PROMPTS)
        guided = after_one_step(guidance, before, reached, embeds=embeds)["latents"]
        gain = reward.score_noisy(guided, 0.5, PROMPTS) - reward.score_noisy(reached, 0.5, PROMPTS)
    assert (gain > 0).all(), gain


@pytest.mark.parametrize("name", ["oracle", "sum"])
def test_rewards_that_read_clean_latents_are_refused(pipeline, reward, name):
    pixel = load_reward("oracle", pipeline=pipeline)
    given = pixel if name == "oracle" else RewardSum({"dinalrm": reward, "oracle": pixel}, {"dinalrm": 1, "oracle": 1})
    with pytest.raises(TypeError, match="oracle does not score noisy latents; take a reward that does"):
        sample(pipeline, RewardGuidance(given))


def test_sums_of_latent_rewards_guide(pipeline, reward):
    twice = RewardSum({"a": reward, "b": reward}, {"a": 1.5, "b": 0.5})
    one, two = (sample(pipeline, RewardGuidance(given)) for given in (reward, twice))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, sample(pipeline), atol=1e-2)


@pytest.fixture(scope="module")
def modular(pipeline):
    from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks

    blocks = StableDiffusion3AutoBlocks().init_pipeline()
    blocks.set_progress_bar_config(disable=True)
    blocks.update_components(**{name: part for name, part in pipeline.components.items() if name in blocks.components})
    return blocks


def sample_modular(modular, guider):
    modular.update_components(guider=guider)
    options = dict(prompt=PROMPTS, negative_prompt=["", ""], num_inference_steps=4, height=64, width=64)
    options |= dict(generator=torch.Generator().manual_seed(0), max_sequence_length=16, output_type="latent")
    return modular(output="latents", **options)


def test_the_guider_at_strength_zero_is_classifier_free_guidance(modular, reward):
    from diffusers.guiders import ClassifierFreeGuidance

    plain = sample_modular(modular, ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(sample_modular(modular, RewardGuider(reward, 0, guidance_scale=3.0)), plain)
    copied = RewardGuider(reward, 0, guidance_scale=2.0).new(guidance_scale=3.0)
    assert torch.equal(sample_modular(modular, copied), plain)


def test_the_guider_reads_the_level_before_each_step(modular, pipeline):
    reward = Linear()
    sample_modular(modular, RewardGuider(reward, guidance_scale=3.0))
    levels = [level for level in modular.scheduler.sigmas.tolist() if 0.2 <= level < 1]
    assert [sigma for _, sigma, _ in reward.calls] == pytest.approx(levels, abs=1e-6)
    options = dict(do_classifier_free_guidance=False, max_sequence_length=16)
    torch.testing.assert_close(
        reward.calls[0][2].prompt_embeds, pipeline.encode_prompt(PROMPTS, None, None, **options)[0]
    )


def test_the_guider_bends_the_velocity():
    """Velocity of RMS 2, gradient (3, 4, 0, 0) / 2.5, strength 0.5: the velocity falls by (1.2, 1.6, 0, 0)."""
    guider = RewardGuider(Linear(WHERE), 0.5, guidance_scale=1.0)
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(500.0))
    shape = (1, 1, 2, 2)
    given = guider.prepare_inputs(
        {
            "hidden_states": torch.zeros(shape),
            "encoder_hidden_states": torch.zeros(1, 3, 8),
            "text_embeds": torch.zeros(1, 8),
        }
    )
    given[0].noise_pred = torch.full(shape, 2.0)
    torch.testing.assert_close(guider(given).pred.flatten(), torch.tensor([0.8, 0.4, 2.0, 2.0]))


def test_best_of_keeps_the_best_sample_of_each_prompt(pipeline, reward):
    options = dict(num_inference_steps=2, guidance_scale=1.0, height=64, width=64, max_sequence_length=16)
    latents, scores = best_of(3, pipeline, reward, PROMPTS, generator=torch.Generator().manual_seed(0), **options)
    generator = torch.Generator().manual_seed(0)
    drawn = [pipeline(PROMPTS, generator=generator, output_type="latent", **options).images for _ in range(3)]
    with torch.no_grad():
        alone = torch.stack([reward(part, PROMPTS) for part in drawn], dim=1)
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)
    assert scores.std(dim=1).min() > 1e-3
    for row, best in enumerate(scores.argmax(dim=1)):
        assert torch.equal(latents[row], drawn[best][row])


def test_best_of_refuses_fixed_latents(pipeline, reward):
    with pytest.raises(ValueError, match="latents: got some; expected none"):
        best_of(2, pipeline, reward, PROMPTS, latents=torch.zeros(2, 16, 16, 16))
