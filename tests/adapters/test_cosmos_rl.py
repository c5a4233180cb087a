"""cosmos-rl: a handler of its reward service."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

from dinalrm_align import LatentReward

PROMPTS = ["a red circle", "two blue squares"]


class RewardRegistry:
    """Recorded from cosmos-rl 89f2e5b, reward_service/cosmos_rl_reward/handler/registry.py."""

    found: dict[str, type] = {}

    @classmethod
    def register(cls, *, allow_override=False):
        def decorator(handler):
            cls.found[handler.reward_name] = handler
            return handler

        return decorator


class BaseRewardHandler:
    """As handler/reward_base.py at 89f2e5b: one instance per process, made from the fields of [[reward_args]]."""

    reward_name = "base"

    def __init__(self, **kwargs):
        self.started = True

    @classmethod
    def initialize(cls, **kwargs):
        if not hasattr(cls, "_instance"):
            cls._instance = cls(**kwargs)
        cls._instance.set_up()


ARGUMENTS = dict(dtype="float32", device="cpu", download_path="/workspace", endpoint_url="", endpoint_api_key="")
"""What launcher/reward_compute.py passes beside model_path, all from the command line."""


@pytest.fixture
def handler(monkeypatch, tiny_reward_dir):
    """The handler as the service makes it, beside a double of cosmos_rl_reward."""
    package = "cosmos_rl_reward"
    for name in (package, f"{package}.handler", f"{package}.handler.registry", f"{package}.handler.reward_base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[f"{package}.handler.registry"].RewardRegistry = RewardRegistry
    sys.modules[f"{package}.handler.reward_base"].BaseRewardHandler = BaseRewardHandler
    monkeypatch.delitem(sys.modules, "dinalrm_align.adapters.cosmos_rl", raising=False)
    importlib.import_module("dinalrm_align.adapters.cosmos_rl")
    cls = RewardRegistry.found["dinalrm"]
    cls.initialize(model_path=f"dinalrm={tiny_reward_dir}", **ARGUMENTS)
    yield cls._instance
    sys.modules.pop("dinalrm_align.adapters.cosmos_rl")


@pytest.fixture
def images():
    return torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_images_score_as_in_a_direct_call(handler, images, tiny_reward_dir):
    expected = LatentReward.from_pretrained(tiny_reward_dir).score_images(images, PROMPTS).tolist()
    metadata = {"prompts": PROMPTS, "uuid": "1", "input_info": {"min": "0.000"}, "decode_duration": "0.00"}
    for layout in (images, images.permute(0, 2, 3, 1)):
        result = handler.calculate_reward(layout, metadata)
        assert result["scores"] == {"dinalrm": pytest.approx(expected, abs=1e-4)}
        assert result.keys() == {"scores", "input_info", "duration", "decoded_duration", "type"}
        assert (result["input_info"], result["decoded_duration"], result["type"]) == (
            {"min": "0.000"},
            "0.00",
            "dinalrm",
        )
    assert handler.started and not handler.NEEDS_LATENT_DECODER


@pytest.mark.parametrize(
    ("shape", "metadata", "message"),
    [
        ((2, 3, 64, 64), {"prompts": PROMPTS[:1]}, "expected one per sample"),
        ((2, 4, 64, 64), {"prompts": PROMPTS}, "expected uint8"),
        ((2, 3, 5, 64, 64), {"prompts": PROMPTS}, "expected uint8"),
    ],
)
def test_failures_leave_the_handler(handler, shape, metadata, message):
    with pytest.raises(ValueError, match=message):
        handler.calculate_reward(torch.zeros(shape, dtype=torch.uint8), metadata)


def test_without_the_service_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cosmos_rl_reward", None)
    monkeypatch.delitem(sys.modules, "dinalrm_align.adapters.cosmos_rl", raising=False)
    with pytest.raises(ImportError, match="clone of nvidia-cosmos/cosmos-rl"):
        importlib.import_module("dinalrm_align.adapters.cosmos_rl")
