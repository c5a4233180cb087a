"""The names that `dinalrm_align` exports."""

import pytest

import dinalrm_align


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
