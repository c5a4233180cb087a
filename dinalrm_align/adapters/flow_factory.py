"""Rewards in Flow-Factory (a0b2bc5), https://github.com/X-GenGroup/Flow-Factory. In its YAML:

    rewards:
      - name: dinalrm
        reward_model: dinalrm_align.adapters.flow_factory.LatentRewardModel
        reward: dinalrm + 0.2*pickscore     # the text of load_reward, also http://host:port; default: dinalrm
        pipeline: stabilityai/stable-diffusion-3.5-medium
        dtype: float32                      # Flow-Factory's default is bfloat16

Further keys: `sigma` (default: the checkpoint's level for latents, also for images), `options`, `local_files_only`, and
`use_latents: false`, which encodes images in place of reading latents, as FLUX and other families need.

- **What is scored.** The clean latent if the trainer stored it, `latent_index_map[-1] >= 0`; otherwise the image is
  encoded, which the log says once. NFT, DPO and AWM store the clean latent. GRPO stores only the steps that it trains,
  so with an early SDE window the clean latent is missing. Evaluation, which needs an entry in `eval_rewards`, stores
  no latents.
- **Text.** Flow-Factory encodes SD3.5 prompts with 256 T5 tokens. The released reward reads 128, so it encodes the
  prompts itself and loads its own text encoders. A reward trained with 256 reads Flow-Factory's embeddings.
- **Groups.** `GroupLatentRewardModel` scores all samples of a prompt in one call, with one noise per prompt. Unless
  the sampler is `group_contiguous`, Flow-Factory gathers latents across ranks and restores prompts from token ids.
- **Memory.** Entries that differ only in name, weight or sigma share one copy. The policy's weights cannot be shared.
  `async_reward` and any `num_workers` work. No gradient.
- **Failures** end the run, also with `async_reward`.
"""

import zlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, stack

from dinalrm_align.adapters.batches import score_batch
from dinalrm_align.adapters.samples import log_once
from dinalrm_align.adapters.shared import framework, pointwise, shared_reward

_abc = framework("flow_factory.rewards.abc", "pip install -e . in a clone of X-GenGroup/Flow-Factory")
_KEYS = {"reward", "pipeline", "sigma", "options", "local_files_only", "use_latents"}


class _Scorer(_abc.BaseRewardModel):
    required_fields = ("prompt", "image", "all_latents", "latent_index_map", "prompt_embeds", "pooled_prompt_embeds")
    use_tensor_inputs = True
    grouped = False

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        keys = dict(config.extra_kwargs)
        if unknown := sorted(keys.keys() - _KEYS):
            raise ValueError(f"reward {config.name!r}: got unknown keys {unknown}; expected {sorted(_KEYS)}")
        self.sigma, self.use_latents = keys.pop("sigma", None), keys.pop("use_latents", True)
        name = keys.pop("reward", "dinalrm")
        self.reward = shared_reward(name, device=self.device, dtype=self.dtype, **keys)
        if not self.grouped:
            pointwise(self.reward)

    def __call__(
        self,
        prompt: Sequence[str],
        image: Sequence[Tensor],
        all_latents: Sequence[Tensor] | None = None,
        latent_index_map: Sequence[Tensor] | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        pooled_prompt_embeds: Sequence[Tensor] | None = None,
    ) -> Any:
        """Return `rewards` (B,). Each argument lists B tensors without batch axis.

        image: (3, H, W) in [0, 1]. all_latents: (K, C, h, w), the stored steps. latent_index_map: (T + 1,), the row in
        `all_latents` of each step, or -1. prompt_embeds: (L, D). pooled_prompt_embeds: (P,).
        """
        embeds = None
        if prompt_embeds is not None and pooled_prompt_embeds is not None:
            embeds = stack(list(prompt_embeds)), stack(list(pooled_prompt_embeds))
        scores = score_batch(
            self.reward,
            prompt,
            latents=self._clean(all_latents, latent_index_map) if self.use_latents else None,
            images=list(image),
            embeds=embeds,
            sigma=self.sigma,
            seeds=[zlib.crc32(text.encode()) for text in prompt] if self.grouped else None,
        )
        return _abc.RewardModelOutput(rewards=scores)

    def _clean(self, stored: Sequence[Tensor] | None, maps: Sequence[Tensor] | None) -> list[Tensor] | None:
        """Return the clean latents, B of (C, h, w), or None if the trainer did not store them for all samples."""
        if stored is None or maps is None or any(int(rows[-1]) < 0 for rows in maps):
            if self.reward.noise_parts:
                log_once("Flow-Factory did not store the clean latents of some samples: their images are encoded")
            return None
        if (dims := stored[0].dim()) != 4:
            message = f"all_latents: got {dims} axes per sample, as of another model family; expected (K, C, h, w)"
            raise ValueError(f"{message}: set use_latents: false, and the reward encodes the images")
        return [latents[int(rows[-1])] for latents, rows in zip(stored, maps, strict=True)]


class LatentRewardModel(_Scorer, _abc.PointwiseRewardModel):
    """Any reward of `load_reward`, sample by sample."""


class GroupLatentRewardModel(_Scorer, _abc.GroupwiseRewardModel):
    """Any reward of `load_reward`, group by group, with noise that depends on the prompt only."""

    grouped = True
