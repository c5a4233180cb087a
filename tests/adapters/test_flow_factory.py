"""Flow-Factory: point-wise and group-wise rewards, with and without stored latents."""

import importlib
import logging
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import torch

from dinalrm_align import LatentReward
from dinalrm_align.adapters import samples as adapter_samples
from dinalrm_align.adapters import shared

PROMPTS = ["a red circle", "two blue squares", "a red circle", "two blue squares"]


@dataclass
class RewardModelOutput:
    """Recorded from Flow-Factory a0b2bc5, src/flow_factory/rewards/abc.py."""

    rewards: Any
    extra_info: dict | None = None


class BaseRewardModel:
    """As src/flow_factory/rewards/abc.py at a0b2bc5: device and dtype come from the configuration."""

    def __init__(self, config, accelerator):
        self.accelerator, self.config, self.dtype = accelerator, config, config.dtype
        self.device = accelerator.device if config.device == torch.device("cuda") else config.device


class PointwiseRewardModel(BaseRewardModel):
    use_tensor_inputs = False


class GroupwiseRewardModel(BaseRewardModel):
    use_tensor_inputs = False


@dataclass
class RewardArguments:
    """Some fields of src/flow_factory/hparams/reward_args.py at a0b2bc5; unknown keys of the YAML in extra_kwargs."""

    name: str = "default"
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    extra_kwargs: dict = field(default_factory=dict)


def compute(model, samples):
    """As RewardProcessor._compute_pointwise_batch at a0b2bc5: fields that __call__ names and no sample leaves None."""
    names = [name for name in samples[0] if name in signature(model.__call__).parameters]
    fields = {n: [s[n] for s in samples] for n in names if all(s[n] is not None for s in samples)}
    assert model.use_tensor_inputs  # else images come as PIL images
    return torch.as_tensor(model(**fields).rewards, device="cpu", dtype=torch.float32)


@pytest.fixture
def adapter(monkeypatch):
    for name in ("flow_factory", "flow_factory.rewards", "flow_factory.rewards.abc"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for double in (RewardModelOutput, BaseRewardModel, PointwiseRewardModel, GroupwiseRewardModel):
        setattr(sys.modules["flow_factory.rewards.abc"], double.__name__, double)
    monkeypatch.delitem(sys.modules, "dinalrm_align.adapters.flow_factory", raising=False)
    monkeypatch.setattr(shared, "_REWARDS", {})
    adapter_samples.log_once.cache_clear()
    yield importlib.import_module("dinalrm_align.adapters.flow_factory")
    sys.modules.pop("dinalrm_align.adapters.flow_factory")


@pytest.fixture
def load(adapter, tiny_reward_dir):
    def load(kind="LatentRewardModel", **keys):
        keys = {"reward": f"dinalrm={tiny_reward_dir}", **keys}
        return getattr(adapter, kind)(RewardArguments(extra_kwargs=keys), None)

    return load


@pytest.fixture(scope="module")
def reward(tiny_reward_dir):
    return LatentReward.from_pretrained(tiny_reward_dir)


@pytest.fixture(scope="module")
def samples(reward):
    """Fields of SD3_5Sample at a0b2bc5; two stored steps of five, the clean one first."""
    generator = torch.Generator().manual_seed(0)
    embeds, pooled = reward.encoder(PROMPTS)
    noise = torch.randn(4, 2, 16, 16, 16, generator=generator)
    images = torch.rand(4, 3, 64, 64, generator=generator)
    columns = dict(prompt=PROMPTS, image=images, all_latents=noise, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    columns["latent_index_map"] = torch.tensor([[-1, 1, -1, -1, 0]]).repeat(4, 1)
    return [{name: column[row] for name, column in columns.items()} for row in range(4)]


def clean(samples):
    return torch.stack([sample["all_latents"][0] for sample in samples])


def without_clean(samples):
    return [{**sample, "latent_index_map": torch.tensor([0, 1, -1, -1, -1])} for sample in samples]


def test_clean_latents_are_found_by_the_index_map(load, samples, reward):
    expected = reward(clean(samples), PROMPTS)
    torch.testing.assert_close(compute(load(), samples), expected, rtol=0, atol=1e-5)


def test_images_stand_in_for_latents_at_the_same_level_and_the_log_says_so_once(load, samples, caplog):
    """The checkpoint's level for images differs from the one for latents, so that the wrong one would show."""
    model = load()
    object.__setattr__(model.reward.config, "image_sigma", 0.1)
    images = torch.stack([sample["image"] for sample in samples])
    with caplog.at_level(logging.WARNING):
        scores = [compute(model, without_clean(samples)) for _ in range(2)]
    expected = model.reward.score_images(images, PROMPTS, sigma=model.reward.config.sigma)
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-5)
    assert sum("images are encoded" in record.message for record in caplog.records) == 1
    assert (expected - model.reward.score_images(images, PROMPTS)).abs().max() > 1e-3


def test_evaluation_without_any_latents_scores_images(load, samples, reward):
    bare = [{**sample, "all_latents": None, "latent_index_map": None} for sample in samples]
    images = torch.stack([sample["image"] for sample in samples])
    expected = reward.score_images(images, PROMPTS)
    torch.testing.assert_close(compute(load(), bare), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(compute(load(use_latents=False), samples), expected, rtol=0, atol=1e-5)


def test_embeddings_of_another_length_are_not_read(load, samples, reward):
    short = [{**sample, "prompt_embeds": sample["prompt_embeds"][:20]} for sample in samples]
    expected = reward(clean(samples), PROMPTS)
    torch.testing.assert_close(compute(load(), short), expected, rtol=0, atol=1e-5)


def test_embeddings_of_its_length_are_read(load, samples, reward):
    """Zeros in place of the embeddings change the scores; the strings stay."""
    zeros = [{**sample, "prompt_embeds": torch.zeros_like(sample["prompt_embeds"])} for sample in samples]
    assert (compute(load(), zeros) - reward(clean(samples), PROMPTS)).abs().max() > 1e-3


def test_entries_share_one_copy_and_keep_their_sigma(load, samples, reward):
    one, other = load(), load(sigma=0.2)
    assert one.reward is other.reward
    expected = reward(clean(samples), PROMPTS, sigma=0.2)
    torch.testing.assert_close(compute(other, samples), expected, rtol=0, atol=1e-5)


def test_a_sum_scores_latents_and_images(load, samples, reward, monkeypatch):
    """The image part reads the framework's image: without a VAE, nothing could decode the latents."""
    module = ModuleType("image_rewards")
    module.brightness = lambda images, prompts: images.flatten(1).mean(dim=1)
    monkeypatch.setitem(sys.modules, "image_rewards", module)
    model = load(reward=f"dinalrm={reward.origin.source} + 0.5*image_rewards:brightness")
    images = torch.stack([sample["image"] for sample in samples])
    expected = reward(clean(samples), PROMPTS) + 0.5 * images.flatten(1).mean(dim=1)
    torch.testing.assert_close(compute(model, samples), expected, rtol=0, atol=1e-5)


def test_a_group_has_one_noise_per_prompt(load, samples, reward):
    seeds = [zlib.crc32(prompt.encode()) for prompt in PROMPTS]
    expected = reward(clean(samples), PROMPTS, seeds=seeds)
    scores = compute(load("GroupLatentRewardModel"), samples)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert (scores - reward(clean(samples), PROMPTS)).abs().max() > 1e-3


def test_eight_threads_score_as_one(load, samples, reward):
    model = load()
    expected = reward(clean(samples), PROMPTS)
    with ThreadPoolExecutor(8) as executor:
        scores = list(executor.map(lambda row: compute(model, samples[row : row + 1]), [0, 1, 2, 3] * 4))
    torch.testing.assert_close(torch.cat(scores), expected.repeat(4), rtol=0, atol=1e-5)


def test_a_failure_is_an_error(load, samples):
    broken = [{**sample, "all_latents": sample["all_latents"] * float("nan")} for sample in samples]
    with pytest.raises(ValueError, match="latents: .* NaN"):
        compute(load(), broken)


def test_a_misspelt_key_is_an_error(load):
    with pytest.raises(ValueError, match=r"unknown keys \['sigm'\]"):
        load(sigm=0.3)


def test_packed_latents_of_another_family_are_refused(load, samples):
    packed = [{**sample, "all_latents": torch.zeros(2, 64, 64)} for sample in samples]
    with pytest.raises(ValueError, match="use_latents: false"):
        compute(load(), packed)


def test_a_reward_of_groups_needs_the_groupwise_class(load, monkeypatch):
    monkeypatch.setattr(LatentReward, "wants_groups", True)
    with pytest.raises(ValueError, match="compares all samples"):
        load()
    load("GroupLatentRewardModel")


@pytest.mark.parametrize("name", ["flow_factory", "diffusion_tinker"])
def test_without_the_framework_one_error_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"dinalrm_align.adapters.{name}", raising=False)
    with pytest.raises(ImportError, match=f"needs {name}.*pip install"):
        importlib.import_module(f"dinalrm_align.adapters.{name}")
