"""Rewards for UniRL, in RL and in ReFL.

    reward:
      _target_: unirl.reward.service.RewardService
      backend:
        _target_: dinalrm_align.adapters.unirl.LatentRewardBackend
        base_device: cuda
        config: {_target_: dinalrm_align.adapters.unirl.LatentRewardSpec, reward: dinalrm + 0.2*pickscore}

- **RL.** Only decoded images reach the reward. UniRL's own scorers truncate them to 8 bits; this backend does not.
- **ReFL** (experimental/refl). Gradients reach the image, for a latent reward through the VAE encoder. To train without
  VAE, replace Sd3ReflPipeline: `pipeline_target: dinalrm_align.adapters.unirl.LatentReflPipeline`.
- The released reward scores images at sigma 0.1, latents at 0.4; `options: {dinalrm: {sigma: 0.4}}` sets both. Prompts
  are encoded with the text encoders of its base model, or of `pipeline`. Failures stop the run. Tried with unirl 0.2.0.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dinalrm_align.adapters.samples import plain
from dinalrm_align.adapters.shared import finite_floats, framework, pointwise, shared_reward

_base = framework("unirl.reward.base", "pip install unirl==0.2.0")
_types = framework("unirl.types.reward", "pip install unirl==0.2.0")


@dataclass
class LatentRewardSpec(_base.BaseRewardComponentSpec):
    """reward, pipeline, dtype, options: as in `load_reward`. device: "auto" is base_device. prompt_source: UniRL's."""

    reward: str = "dinalrm"
    pipeline: str | None = None
    device: str = "auto"
    dtype: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    prompt_source: str = "generation"


class LatentRewardBackend(_base.RewardBackend):
    """Backend over any reward of this package. All backends of a process share the weights, `offload` included."""

    def __init__(self, *, config: LatentRewardSpec, base_device: str) -> None:
        super().__init__(config.reward, batch_size=config.batch_size, prompt_source=config.prompt_source)
        device = base_device if config.device == "auto" else config.device
        place = dict(device=device, dtype=config.dtype, pipeline=config.pipeline)
        self.reward = pointwise(shared_reward(config.reward, options=plain(config.options), **place))
        self.offload, self.onload = self.reward.offload, self.reward.onload

    def is_available(self) -> bool:
        return True

    @torch.no_grad()
    def compute_rewards(self, request: Any) -> Any:
        """Return a RewardResponse with one score per image, in batches of `batch_size`. Raises what scoring raises."""
        images, prompts = [image.pixels for image in request.generated["image"].to_list()], self.prompts(request)
        batches = [slice(start, start + self.batch_size) for start in range(0, len(images), self.batch_size)]
        scores = [finite_floats(self.reward.score_images(images[rows], prompts[rows])) for rows in batches]
        rewards = sum(scores, [])
        return _types.RewardResponse(rewards=rewards, successes=[True] * len(rewards), errors=[None] * len(rewards))

    def compute_rewards_differentiable(self, media_tensor: Tensor, prompts: list[str], records: Any = None) -> Tensor:
        """Return scores (B,), differentiable in images (B, 3, H, W) in [0, 1] or latents (B, C, h, w)."""
        if media_tensor.shape[1:2] == (3,):
            return self.reward.score_images(media_tensor, prompts, differentiable=True)
        return self.reward(media_tensor, prompts)


def __getattr__(name: str) -> type:
    """Make LatentReflPipeline when asked for: only a clone of UniRL, not its wheel, has the base class."""
    if name != "LatentReflPipeline":
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    base = framework("experimental.refl.models.sd3", "run in a clone of Tencent-Hunyuan/UniRL").Sd3ReflPipeline
    stage = SimpleNamespace(decode_with_grad=lambda latents: latents)
    return type(name, (base,), {"vae_decode": property(lambda self: stage, lambda self, decoder: None)})
