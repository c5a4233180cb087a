"""MixGRPO: a reward in the place of PickScore, whose failure ends the run."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from dinalrm_align import LatentReward
from dinalrm_align.adapters import mixgrpo

MODULE = "fastvideo.models.reward_model.pick_score"


def compute_reward(images, prompts, models):
    """Recorded from MixGRPO e5cdd6a, fastvideo/models/reward_model/utils.py: a thread, a class name, errors are 0."""

    def single(model):
        try:
            if type(model).__name__ != "PickScoreRewardModel":
                raise ValueError(f"Unknown reward model: {type(model).__name__}")
            return model(images, prompts)
        except Exception as error:
            raise ValueError(f"Error in _compute_single_reward: {error}") from error

    with ThreadPoolExecutor(max_workers=len(models)) as executor:
        for future in [executor.submit(single, model) for model in models]:
            try:
                return future.result()
            except Exception:
                return [0.0] * len(prompts)


@pytest.fixture
def model(monkeypatch, tiny_reward_dir):
    """The reward as train_grpo_flux.py makes it for --reward_model pick_score."""
    for name in ("fastvideo", "fastvideo.models", "fastvideo.models.reward_model", MODULE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    mixgrpo.install(f"dinalrm={tiny_reward_dir}")
    return sys.modules[MODULE].PickScoreRewardModel(device="cpu", http_proxy=None, https_proxy=None)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))


def test_one_image_scores_as_in_a_direct_call(model, image, tiny_reward_dir):
    expected = LatentReward.from_pretrained(tiny_reward_dir).score_images([image], ["a red circle"]).item()
    assert compute_reward([image], ["a red circle"], [model]) == [pytest.approx(expected, abs=1e-5)]


def test_a_failure_ends_the_run_and_is_not_0(model, image):
    with pytest.raises(mixgrpo.ScoringFailed, match="prompts"):
        compute_reward([image], [""] * 2, [model])


def test_without_mixgrpo_one_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastvideo", None)
    with pytest.raises(ImportError, match="needs fastvideo.*clone"):
        mixgrpo.install()
