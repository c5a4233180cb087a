"""Rewards in diffusion-tinker (https://github.com/srijitiyer/diffusion-tinker, 5601ad6).

    from dinalrm_align.adapters.diffusion_tinker import DinalrmReward
    reward = DinalrmReward("dinalrm + 0.2*pickscore", pipeline="stabilityai/stable-diffusion-3.5-medium")
    trainer = FlowGRPOTrainer(model=..., reward_funcs=reward, config=config, train_prompts=prompts)

The same for DDPOTrainer and DDRLTrainer, and in a list with `reward_weights`.

- **What is scored.** PIL images, rounded to 8 bits. The trajectory's latents are dropped before, so latent rewards
  encode the images and score them at the checkpoint's noise level for images.
- **No gradient.** DRaFTTrainer takes that of its own CLIP rewards only. With this reward it stops with an error.
- **Failures** end the run. The trainers replace NaN by 0; rewards of this package raise instead.
"""

from typing import Any, NoReturn

import torch

from dinalrm_align.adapters.shared import framework, pointwise, shared_reward

_INSTALL = "pip install git+https://github.com/srijitiyer/diffusion-tinker"
_base = framework("diffusion_tinker.rewards.base", _INSTALL)
_protocol = framework("diffusion_tinker.rewards.protocol", _INSTALL)


class DinalrmReward(_base.BaseReward):
    """A reward by the text of `load_reward`; the trainer calls `to`, which loads it.

    place: `pipeline`, `dtype`, `options` and `local_files_only`, as in `load_reward`.
    """

    def __init__(self, reward: str = "dinalrm", **place: Any) -> None:
        super().__init__()
        self.name, self.place = reward, place

    def to(self, device: str | torch.device) -> "DinalrmReward":
        self.reward = pointwise(shared_reward(self.name, device=str(device), **self.place))
        return super().to(device)

    def _compute(self, ctx: Any) -> Any:
        """Return the scores (B,), float32, of the images and prompts in a RewardContext."""
        return _protocol.RewardOutput(scores=self.reward.score_images(ctx.images, ctx.prompts).cpu())

    def _ensure_loaded(self) -> NoReturn:
        raise TypeError("DRaFTTrainer takes gradients of its CLIP rewards only; with latents: recipes/refl_sd35.py")
