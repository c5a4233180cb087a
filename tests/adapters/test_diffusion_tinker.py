"""diffusion-tinker: a BaseReward that the trainer resolves and calls."""

import importlib
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dinalrm_align import LatentReward

PROMPTS = ["a red circle", "two blue squares"]


@dataclass
class RewardContext:
    """Recorded from diffusion-tinker 5601ad6, src/diffusion_tinker/rewards/protocol.py."""

    images: list
    prompts: list
    device: torch.device = torch.device("cpu")
    metadata: dict = field(default_factory=dict)


@dataclass
class RewardOutput:
    """As rewards/protocol.py at 5601ad6: scores (B,), float32."""

    scores: torch.Tensor
    metadata: dict = field(default_factory=dict)


class BaseReward(ABC):
    """As rewards/base.py at 5601ad6."""

    name = "base"

    def __init__(self, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype

    @abstractmethod
    def _compute(self, ctx): ...

    @torch.no_grad()
    def __call__(self, ctx):
        return self._compute(ctx)

    def to(self, device):
        self.device = torch.device(device)
        return self


@pytest.fixture
def reward(monkeypatch, tiny_reward_dir):
    """The reward after rewards/resolve.py:resolve_reward, which calls `to` with the device's name."""
    package = "diffusion_tinker.rewards"
    for name in ("diffusion_tinker", package, f"{package}.base", f"{package}.protocol"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[f"{package}.base"].BaseReward = BaseReward
    sys.modules[f"{package}.protocol"].RewardOutput = RewardOutput
    monkeypatch.delitem(sys.modules, "dinalrm_align.adapters.diffusion_tinker", raising=False)
    adapter = importlib.import_module("dinalrm_align.adapters.diffusion_tinker")
    yield adapter.DinalrmReward(f"dinalrm={tiny_reward_dir}").to("cpu")
    sys.modules.pop("dinalrm_align.adapters.diffusion_tinker")


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_images_score_as_in_a_direct_call(reward, images, tiny_reward_dir):
    expected = LatentReward.from_pretrained(tiny_reward_dir).score_images(images, PROMPTS)
    scores = reward(RewardContext(images, PROMPTS)).scores
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_failure_is_an_error(reward, images):
    with pytest.raises(ValueError, match="prompts: got 2 for 1"):
        reward(RewardContext(images[:1], PROMPTS))


def test_draft_is_refused(reward):
    """DRaFTTrainer calls _ensure_loaded before it computes a gradient of its own."""
    with pytest.raises(TypeError, match="recipes/refl_sd35.py"):
        reward._ensure_loaded()
