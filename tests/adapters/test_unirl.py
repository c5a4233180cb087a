"""UniRL: a backend of its reward service, for RL and with gradients for ReFL."""

import importlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dinalrm_align import LatentReward

PROMPTS = ["a red circle", "two blue squares", "three green crosses"]


class RewardBackend(ABC):
    """Recorded from the wheel unirl 0.2.0, unirl/reward/base.py: __init__, prompts and the abstract methods."""

    input_kind = "image"

    def __init__(self, model_name="", batch_size=8, timeout=60.0, prompt_source="generation", **kwargs):
        if prompt_source not in ("original", "generation"):
            raise ValueError(f"prompt_source must be 'original' or 'generation', got {prompt_source!r}")
        self.model_name, self.batch_size, self.timeout = model_name, batch_size, timeout
        self.prompt_source = prompt_source

    def prompts(self, request):
        prompt = request.original_prompt if self.prompt_source == "original" else request.generation_prompt
        return [] if prompt is None else list(prompt.texts)

    @abstractmethod
    def compute_rewards(self, request): ...

    @abstractmethod
    def is_available(self): ...

    def offload(self):
        return None

    def onload(self):
        return None


class BaseRewardComponentSpec:
    """Marker base of every specification in unirl 0.2.0."""


@dataclass
class RewardResponse:
    """Fields of unirl/types/reward.py:RewardResponse in unirl 0.2.0."""

    rewards: list = field(default_factory=list)
    component_rewards: dict = field(default_factory=dict)
    successes: list = field(default_factory=list)
    errors: list = field(default_factory=list)
    compute_time: float = 0.0


class Sd3ReflPipeline:
    """Sets its stages as experimental/refl/models/sd3.py:Sd3ReflPipeline at 5852cb4 does."""

    def __init__(self, bundle):
        self.bundle, self.diffusion, self.vae_decode = bundle, "diffusion", "decodes with the VAE"


def request(images, generation=PROMPTS, original=PROMPTS):
    """A RewardRequest of unirl 0.2.0: Images.to_list() gives one object per sample, with `pixels` (3, H, W)."""
    rows = [SimpleNamespace(pixels=image) for image in images]
    return SimpleNamespace(
        generated={"image": SimpleNamespace(to_list=lambda: rows)},
        generation_prompt=SimpleNamespace(texts=generation),
        original_prompt=SimpleNamespace(texts=original),
    )


@pytest.fixture
def unirl(monkeypatch):
    """The adapter, imported beside a double of UniRL."""
    named = {"unirl.reward.base": (RewardBackend, BaseRewardComponentSpec), "unirl.types.reward": (RewardResponse,)}
    named |= {"experimental.refl.models.sd3": (Sd3ReflPipeline,)}
    for name, contents in named.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        for found in contents:
            setattr(sys.modules[name], found.__name__, found)
    monkeypatch.delitem(sys.modules, "dinalrm_align.adapters.unirl", raising=False)
    yield importlib.import_module("dinalrm_align.adapters.unirl")
    sys.modules.pop("dinalrm_align.adapters.unirl")


@pytest.fixture
def make(unirl, tiny_reward_dir):
    def make(**settings):
        config = unirl.LatentRewardSpec(**{"reward": f"dinalrm={tiny_reward_dir}", **settings})
        return unirl.LatentRewardBackend(config=config, base_device="cpu")

    return make


@pytest.fixture(scope="module")
def reward(tiny_reward_dir):
    return LatentReward.from_pretrained(tiny_reward_dir)


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def latents():
    return torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def test_images_score_as_in_a_direct_call(make, reward, images):
    backend = make(batch_size=2)
    response = backend.compute_rewards(request(images))
    assert response.rewards == pytest.approx(reward.score_images(images, PROMPTS).tolist(), abs=1e-4)
    assert response.successes == [True] * 3 and response.errors == [None] * 3
    assert backend.is_available() and backend.input_kind == "image" and backend.model_name.startswith("dinalrm=")


def test_the_prompt_is_the_one_that_the_configuration_asks_for(make, reward, images):
    other = ["a blue square"] * 3
    found = make(prompt_source="original").compute_rewards(request(images, original=other)).rewards
    assert found == pytest.approx(reward.score_images(images, other).tolist(), abs=1e-4)


def gradient(function, inputs):
    inputs = inputs.clone().requires_grad_()
    scores = function(inputs)
    scores.sum().backward()
    return scores.detach(), inputs.grad


def test_gradients_reach_images_and_latents(make, reward, images, latents):
    def differentiable(inputs):
        return make().compute_rewards_differentiable(inputs, PROMPTS, records=None)

    for inputs, direct in (
        (images, lambda inputs: reward.score_images(inputs, PROMPTS, differentiable=True)),
        (latents, lambda inputs: reward(inputs, PROMPTS)),
    ):
        for found, expected in zip(gradient(differentiable, inputs), gradient(direct, inputs), strict=True):
            assert torch.allclose(found, expected, atol=1e-5) and expected.abs().max() > 1e-4


def test_options_come_as_a_configuration_gives_them(make, reward, images):
    found = make(options={"dinalrm": {"sigma": (0.2, 0.5)}}).compute_rewards(request(images)).rewards
    assert found == pytest.approx(reward.score_images(images, PROMPTS, sigma=[0.2, 0.5]).tolist(), abs=1e-4)


def test_offloading_moves_the_shared_weights(make, images):
    backend, other = make(), make()
    assert backend.reward is other.reward
    expected = backend.compute_rewards(request(images)).rewards
    backend.offload()
    with pytest.raises(ValueError, match="onload"):
        other.compute_rewards(request(images))
    backend.onload()
    assert backend.compute_rewards(request(images)).rewards == expected


def test_failures_leave_the_backend(make, images):
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"images\[1\]"):
        make().compute_rewards(request(images))
    with pytest.raises(ValueError, match="expected one per sample"):
        make().compute_rewards(request(images[:1], generation=PROMPTS))


def test_the_latent_pipeline_leaves_latents_as_they_are(unirl, latents):
    pipeline = unirl.LatentReflPipeline("bundle")
    assert (pipeline.bundle, pipeline.diffusion) == ("bundle", "diffusion")
    assert pipeline.vae_decode.decode_with_grad(latents) is latents
    assert isinstance(pipeline, Sd3ReflPipeline)
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = unirl.Other


def test_without_unirl_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "unirl", None)
    monkeypatch.delitem(sys.modules, "dinalrm_align.adapters.unirl", raising=False)
    with pytest.raises(ImportError, match="pip install unirl"):
        importlib.import_module("dinalrm_align.adapters.unirl")
