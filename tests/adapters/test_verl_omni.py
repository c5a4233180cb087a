"""verl-omni: its reward manager's calls, one sample each, sync in threads and async, latents and images."""

import asyncio
import functools
import inspect

import pytest
import torch

from dinalrm_align import LatentReward
from dinalrm_align.adapters import samples, verl_omni
from dinalrm_align.adapters.samples import log_once
from dinalrm_align.models.text import PromptEncoder

compute_score, compute_score_sync = verl_omni.compute_score, verl_omni.compute_score_sync
PROMPTS = ["a red circle", "two blue squares", "three green crosses"]
TOLERANCE = 1e-4


class Manager:
    """Calls a reward as MultiVisualRewardManager does: one sample per call, by keyword, all samples at once.

    Recorded from verl-omni a1139ba, reward_loop/reward_manager/multi.py and visual.py: the four arguments, then the
    fields of the reward's entry except path, name, weight and required; coroutine functions are awaited, others run in
    the loop's executor; a failure of a reward that is not required counts as 0.
    """

    def __init__(self, function, required=True, **entry):
        self.function, self.required, self.entry = function, required, entry
        takes_all = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
        assert takes_all or entry.keys() <= inspect.signature(function).parameters.keys()

    async def run_single(self, response, ground_truth, extra_info):
        arguments = dict(
            data_source="t",
            solution_image=response,
            ground_truth=ground_truth,
            extra_info={**extra_info, "num_turns": None, "rollout_reward_scores": {}},
            **self.entry,
        )
        try:
            if inspect.iscoroutinefunction(self.function):
                result = await self.function(**arguments)
            else:
                call = functools.partial(self.function, **arguments)
                result = await asyncio.get_running_loop().run_in_executor(None, call)
            return float(result["score"])
        except Exception as error:
            if self.required:
                raise RuntimeError(f"Required sub-reward failed: {error}") from error
            return 0.0

    def run(self, responses, extra_infos, ground_truths=PROMPTS):
        async def together():
            calls = zip(responses, ground_truths, extra_infos, strict=True)
            return await asyncio.gather(*(self.run_single(*call) for call in calls))

        return asyncio.run(together())


@pytest.fixture(scope="module")
def reward(tiny_reward_dir):
    return LatentReward.from_pretrained(tiny_reward_dir)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def embeds(reward):
    return reward.encoder(PROMPTS)


@pytest.fixture
def managed(tiny_reward_dir):
    return functools.partial(Manager, reward=f"dinalrm={tiny_reward_dir}")


def infos(embeds=None, prompts=PROMPTS, **fields):
    """extra_info of three samples: raw_prompt of the data, embeddings of the rollout without a batch axis."""
    found = [{"raw_prompt": prompt} if prompt else {} for prompt in prompts]
    for row, info in enumerate(found):
        if embeds is not None:
            info |= {"prompt_embeds": embeds[0][row], "pooled_prompt_embeds": embeds[1][row]}
        info |= {name: tensor[row : row + 1] for name, tensor in fields.items()}
    return found


@pytest.mark.parametrize("function", [compute_score, compute_score_sync])
def test_latents_score_as_in_a_direct_call(managed, function, reward, latents, embeds):
    expected = pytest.approx(reward(latents, PROMPTS).tolist(), abs=TOLERANCE)
    assert managed(function).run(latents, infos(embeds, prompts=[None] * 3)) == expected
    assert managed(function).run(latents, infos()) == expected
    assert len(set(expected.expected)) == 3


def test_the_clean_latents_are_scored_beside_an_image(managed, reward, latents, images, embeds):
    found = managed(compute_score).run(images, infos(embeds, latents_clean=latents))
    assert found == pytest.approx(reward(latents, PROMPTS).tolist(), abs=TOLERANCE)


def test_images_are_bytes(managed, reward, images):
    found = managed(compute_score).run(images, infos())
    assert found == pytest.approx(reward.score_images(images, PROMPTS).tolist(), abs=TOLERANCE)


def test_concurrent_calls_form_one_batch(managed, monkeypatch, reward, latents, embeds):
    sizes, score = [], samples.score_samples
    monkeypatch.setattr(samples, "score_samples", lambda *given: sizes.append(len(given[2])) or score(*given))
    manager = managed(compute_score, max_batch_size=3, max_wait_ms=20_000)
    manager.run(latents, infos(embeds))
    assert sizes == [3]


def test_the_seed_sets_the_noise(managed, reward, latents):
    found = managed(compute_score, seed=5).run(latents, infos())
    assert found == pytest.approx(reward(latents, PROMPTS, seeds=[5] * 3).tolist(), abs=TOLERANCE)
    assert found != pytest.approx(reward(latents, PROMPTS).tolist(), abs=0.01)


def test_the_prompt_may_be_the_ground_truth(managed, reward, latents):
    found = managed(compute_score, prompt_key="ground_truth").run(latents, infos(prompts=["wrong"] * 3))
    assert found == pytest.approx(reward(latents, PROMPTS).tolist(), abs=TOLERANCE)


def test_embeddings_of_another_length_are_not_used(managed, reward, latents, tiny_pipeline, caplog):
    log_once.cache_clear()
    other = PromptEncoder(tiny_pipeline, text_length=9)(PROMPTS)
    found = managed(compute_score).run(latents, infos(other))
    assert found == pytest.approx(reward(latents, PROMPTS).tolist(), abs=TOLERANCE)
    assert caplog.text.count("prompt_embeds have 25 tokens, dinalrm reads [32]") == 1
    with pytest.raises(RuntimeError, match="prompt: got none"):
        managed(compute_score).run(latents, infos(other, prompts=[None] * 3))


def test_arguments_of_the_manager_are_not_settings(managed, reward, latents):
    added = dict(reward_router_address="http://host", reward_model_tokenizer=None, model_name=None)
    found = managed(compute_score, **added).run(latents, infos())
    assert found == pytest.approx(reward(latents, PROMPTS).tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("function", [compute_score, compute_score_sync])
def test_a_bad_sample_fails_alone(managed, function, reward, latents):
    bad = latents.clone()
    bad[1, 0, 0, 0] = torch.nan
    found = managed(function, required=False).run(bad, infos())
    expected = reward(latents, PROMPTS).tolist()
    assert found == pytest.approx([expected[0], 0.0, expected[2]], abs=TOLERANCE)
    with pytest.raises(RuntimeError, match="1 of 4096 values are NaN"):
        managed(function).run(bad, infos())


@pytest.mark.parametrize(
    ("settings", "message"), [({"sigm": 0.4}, "sigm"), ({"device": "nowhere"}, "nowhere"), ({"seed": -1}, "seeds")]
)
def test_wrong_settings_raise(managed, settings, message, latents):
    with pytest.raises(RuntimeError, match=message):
        managed(compute_score, **settings).run(latents[:1], infos()[:1], PROMPTS[:1])


@pytest.mark.parametrize(
    ("media", "extra", "message"),
    [
        (torch.zeros(2, 16, 16, 16), {}, r"solution_image: got \(2, 16, 16, 16\)"),
        ("image", {}, "solution_image: got str"),
        (torch.zeros(16, 16, 16), {"prompt_embeds": torch.zeros(32, 32)}, "pooled_prompt_embeds: got NoneType"),
    ],
)
def test_a_sample_that_is_no_single_sample_raises(managed, media, extra, message):
    with pytest.raises(RuntimeError, match=message):
        managed(compute_score).run([media], [extra], PROMPTS[:1])
