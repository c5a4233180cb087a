"""Align text-to-image diffusion models with rewards that read their latents.

Public names are imported on first use, so that `import dinalrm_align` costs nothing (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinalrm_align.reward.config import RewardConfig
    from dinalrm_align.reward.latent import LatentReward
    from dinalrm_align.reward.registry import load_reward

__version__ = "0.1.0"
__all__ = ["LatentReward", "RewardConfig", "__version__", "load_reward"]

_HOME = {
    "LatentReward": "dinalrm_align.reward.latent",
    "RewardConfig": "dinalrm_align.reward.config",
    "load_reward": "dinalrm_align.reward.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
