"""`import dinalrm_align` is free: no torch, no diffusers, well under half a second."""

import subprocess
import sys

import pytest

import dinalrm_align

PROBE = """
import sys, time
start = time.process_time()
import dinalrm_align
print(time.process_time() - start, *(name in sys.modules for name in NAMES))
"""


def test_import_is_fast_and_without_torch():
    probe = PROBE.replace("NAMES", "('torch', 'diffusers', 'numpy')")
    seconds, *loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 0.5
    assert loaded == ["False", "False", "False"]


def test_reward_config_needs_no_torch():
    probe = "import sys; from dinalrm_align import RewardConfig; RewardConfig(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_are_listed_and_reached():
    assert dir(dinalrm_align) == [
        "Conditions",
        "LatentReward",
        "LossConfig",
        "Policy",
        "Reward",
        "RewardConfig",
        "__version__",
        "fit",
        "load_reward",
        "preference_loss",
        "preference_probability",
        "thurstone_variance",
    ]
    assert all(getattr(dinalrm_align, name) is not None for name in dir(dinalrm_align))
    assert dinalrm_align.load_reward.__module__ == "dinalrm_align.reward.registry"
    assert dinalrm_align.LatentReward.__module__ == "dinalrm_align.reward.latent"
    with pytest.raises(AttributeError, match="no attribute 'Rewards'; it offers Conditions"):
        dinalrm_align.Rewards  # noqa: B018
