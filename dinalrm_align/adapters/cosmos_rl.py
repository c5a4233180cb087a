"""Rewards for cosmos-rl's reward service: a handler that scores images.

Add one line to `cosmos_rl_reward/model/__init__.py`, so that the service's processes register the handler,

    import dinalrm_align.adapters.cosmos_rl

and to the service's configuration (rewards.toml):

    [[reward_args]]
    reward_type = "dinalrm"
    model_path = "dinalrm + 0.2*pickscore"     # the text of load_reward
    dtype = "bfloat16"                         # their default, float16, overflows for some images
    device = "cuda"

- **What is scored.** uint8 images. The only latents that reach the service are those of Wan's video models.
- **In the trainer**: `reward_fns = [{name = "dinalrm", weight = 1.0, score_key = "dinalrm"}]` under remote_reward. Its
  reward_clip_min and reward_clip_max are -5 and 5 unless set.
- **Failures** stop the run, late: the service logs the error and has no score for the request, and the trainer raises
  when its retries end.
- No gradient. Tried with cosmos-rl 89f2e5b.
"""

import time
from typing import Any

import torch
from torch import Tensor

from dinalrm_align.adapters.shared import finite_floats, framework, pointwise, shared_reward

INSTALL = "pip install ./reward_service in a clone of nvidia-cosmos/cosmos-rl"
_registry = framework("cosmos_rl_reward.handler.registry", INSTALL)
_base = framework("cosmos_rl_reward.handler.reward_base", INSTALL)


@_registry.RewardRegistry.register()
class LatentRewardHandler(_base.BaseRewardHandler):
    """Handler over any reward of this package that scores images."""

    reward_name = "dinalrm"
    NEEDS_LATENT_DECODER = False

    def __init__(
        self, model_path: str = "dinalrm", dtype: str = "bfloat16", device: str = "cuda", **unused: Any
    ) -> None:
        super().__init__()
        self.text, self.place = model_path, dict(dtype=dtype, device=device)

    def set_up(self) -> None:
        self.reward = pointwise(shared_reward(self.text, **self.place))

    @torch.no_grad()
    def calculate_reward(self, images: Tensor, metadata: dict[str, Any]) -> dict[str, Any]:
        """Score images (B, H, W, 3) or (B, 3, H, W), uint8, for metadata["prompts"]. Raises what scoring raises."""
        started = time.perf_counter()
        images = images.movedim(-1, 1).contiguous() if images.dim() == 4 and images.shape[-1] == 3 else images
        scores = finite_floats(self.reward.score_images(images, metadata["prompts"]))
        return {
            "scores": {self.reward_name: scores},
            "input_info": metadata.get("input_info", {}),
            "duration": f"{time.perf_counter() - started:.2f}",
            "decoded_duration": metadata.get("decode_duration", "N/A"),
            "type": self.reward_name,
        }
