"""flow_grpo and DiffusionNFT: multi_score with rewards of this package beside theirs, images or latents."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from dinalrm_align import LatentReward
from dinalrm_align.adapters import flow_grpo, shared

PROMPTS = ("a red circle", "two blue squares")


def multi_score(device, score_dict):
    """Recorded from flow_grpo/rewards.py at flow_grpo ac4c86e and DiffusionNFT 24af555, with one score function."""
    functions = {"brightness": lambda images, prompts, metadata: (images.flatten(1).mean(1).numpy(), {})}
    chosen = {name: functions[name] for name in score_dict}

    def _fn(images, prompts, metadata, only_strict=True):
        details, total = {}, []
        for name, weight in score_dict.items():
            details[name], _ = chosen[name](images, prompts, metadata)
            weighted = [weight * score for score in details[name]]
            total = [a + b for a, b in zip(total, weighted)] if total else weighted
        return {**details, "avg": total}, {}

    return _fn


def pipeline_with_logprob(pipeline, prompt_embeds=None, pooled_prompt_embeds=None, output_type="pil"):
    """As flow_grpo/diffusers_patch/sd3_pipeline_with_logprob.py at ac4c86e: images, latents of all steps, log-probs."""
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(2, 16, 16, 16, generator=generator) for _ in range(3)]
    return torch.rand(2, 3, 64, 64, generator=generator), steps, [torch.zeros(2)] * 2


@pytest.fixture(params=["sd3_pipeline_with_logprob", "pipeline_with_logprob"], ids=["flow_grpo", "DiffusionNFT"])
def project(request, monkeypatch):
    """Doubles of the modules of one of the two projects; returns the module of its sampler."""
    sampler = f"flow_grpo.diffusers_patch.{request.param}"
    for name in ("flow_grpo", "flow_grpo.rewards", "flow_grpo.diffusers_patch", sampler):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flow_grpo"].__path__ = sys.modules["flow_grpo.diffusers_patch"].__path__ = []
    sys.modules["flow_grpo.rewards"].multi_score = multi_score
    sys.modules[sampler].pipeline_with_logprob = pipeline_with_logprob
    monkeypatch.setattr(shared, "_REWARDS", {})
    return sys.modules[sampler]


@pytest.fixture
def texts(tiny_reward_dir):
    return {"dinalrm": f"dinalrm={tiny_reward_dir}"}


@pytest.fixture(scope="module")
def reward(tiny_reward_dir):
    return LatentReward.from_pretrained(tiny_reward_dir)


def scorer(weights):
    """As their scripts call it, for training and again for evaluation."""
    return sys.modules["flow_grpo.rewards"].multi_score(torch.device("cpu"), weights)


def sampled(project, reward):
    embeds, pooled = reward.encoder(list(PROMPTS))
    images, steps, log_probs = project.pipeline_with_logprob(
        object(), prompt_embeds=embeds, pooled_prompt_embeds=pooled, output_type="pt"
    )
    assert len(steps) == 3 and len(log_probs) == 2
    return images, steps[-1]


def test_images_beside_a_reward_of_theirs(project, texts, reward):
    """avg = 2 * dinalrm + 0.5 * brightness; brightness comes from their function."""
    flow_grpo.install(texts)
    images, _ = sampled(project, reward)
    scores, info = scorer({"dinalrm": 2.0, "brightness": 0.5})(images, PROMPTS, [{}, {}], only_strict=True)
    expected, brightness = reward.score_images(images, list(PROMPTS)), images.flatten(1).mean(1)
    torch.testing.assert_close(torch.as_tensor(scores["dinalrm"]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.as_tensor(scores["brightness"]), brightness)
    torch.testing.assert_close(torch.as_tensor(scores["avg"]).float(), 2 * expected + 0.5 * brightness)
    assert info == {}


def test_latents_of_their_sampler(project, texts, reward):
    flow_grpo.install(texts, latents=True, sigma=0.2)
    images, clean = sampled(project, reward)
    scores, _ = scorer({"dinalrm": 1.0})(images, PROMPTS, [{}, {}])
    expected = reward(clean, list(PROMPTS), sigma=0.2)
    torch.testing.assert_close(torch.as_tensor(scores["dinalrm"]), expected, rtol=0, atol=1e-5)


def test_training_and_evaluation_share_one_copy(project, texts):
    flow_grpo.install(texts)
    scorer({"dinalrm": 1.0}), scorer({"dinalrm": 1.0})
    assert len(shared._REWARDS) == 1


def test_eight_threads_score_as_one(project, texts, reward):
    flow_grpo.install(texts, latents=True)
    score = scorer({"dinalrm": 1.0})
    images, clean = sampled(project, reward)
    with ThreadPoolExecutor(8) as executor:
        found = [executor.submit(score, images, PROMPTS, [{}, {}], only_strict=True) for _ in range(16)]
    expected = reward(clean, list(PROMPTS))
    for future in found:
        torch.testing.assert_close(torch.as_tensor(future.result()[0]["avg"]), expected, rtol=0, atol=1e-5)


def test_a_failure_reaches_the_future(project, texts, reward):
    flow_grpo.install(texts, latents=True)
    images, clean = sampled(project, reward)
    clean[0, 0, 0, 0] = float("nan")
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="latents: 1 of"):
        executor.submit(scorer({"dinalrm": 1.0}), images, PROMPTS, [{}, {}]).result()


def test_images_without_latents_are_an_error(project, texts):
    flow_grpo.install(texts, latents=True)
    with pytest.raises(ValueError, match="got no latents"):
        scorer({"dinalrm": 1.0})(torch.rand(2, 3, 64, 64), PROMPTS, [{}, {}])


def test_latents_need_a_known_sampler(project, texts, monkeypatch):
    monkeypatch.delitem(sys.modules, project.__name__)
    with pytest.raises(ImportError, match="latents=False"):
        flow_grpo.install(texts, latents=True)


def test_a_broken_sampler_is_not_taken_for_a_missing_one(project, texts, monkeypatch):
    """Their sampler exists, and a package that it imports is missing: the error names that package."""

    def fail(name):
        raise ModuleNotFoundError("No module named 'tensordict'", name="tensordict")

    monkeypatch.setattr(flow_grpo.importlib, "import_module", fail)
    monkeypatch.setattr(flow_grpo, "framework", lambda module, install: sys.modules[module])
    with pytest.raises(ModuleNotFoundError, match="tensordict"):
        flow_grpo.install(texts, latents=True)


def test_a_reward_of_groups_is_refused(project, texts, monkeypatch):
    flow_grpo.install(texts)
    monkeypatch.setattr(LatentReward, "wants_groups", True)
    with pytest.raises(ValueError, match="compares all samples"):
        scorer({"dinalrm": 1.0})


def test_without_flow_grpo_one_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "flow_grpo", None)
    with pytest.raises(ImportError, match="needs flow_grpo.*clone"):
        flow_grpo.install()
