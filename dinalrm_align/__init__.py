"""Align text-to-image diffusion models with rewards that read their latents.

A public name is imported on its first use (PEP 562), so `import dinalrm_align` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinalrm_align.align.policy import Policy
    from dinalrm_align.models.text import Conditions
    from dinalrm_align.reward.config import LossConfig, RewardConfig
    from dinalrm_align.reward.latent import LatentReward
    from dinalrm_align.reward.losses import preference_loss, preference_probability, thurstone_variance
    from dinalrm_align.reward.protocol import Reward
    from dinalrm_align.reward.registry import load_reward
    from dinalrm_align.train.loop import fit

__version__ = "0.1.0"
__all__ = [
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

_HOME = {
    "Conditions": "dinalrm_align.models.text",
    "LatentReward": "dinalrm_align.reward.latent",
    "LossConfig": "dinalrm_align.reward.config",
    "Policy": "dinalrm_align.align.policy",
    "Reward": "dinalrm_align.reward.protocol",
    "RewardConfig": "dinalrm_align.reward.config",
    "fit": "dinalrm_align.train.loop",
    "load_reward": "dinalrm_align.reward.registry",
    "preference_loss": "dinalrm_align.reward.losses",
    "preference_probability": "dinalrm_align.reward.losses",
    "thurstone_variance": "dinalrm_align.reward.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
