"""DiNa-LRM as a trainable module: noised latents -> truncated transformer (the trunk) -> reward head -> score.

For an ensemble of K noise levels, the trunk runs once on a batch of K * B noised latents (arXiv 2602.11146).
"""

import contextlib
from collections.abc import Mapping, Sequence

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from dinalrm_align.flow.noise import add_noise, scheduler_sigmas, snap_sigma, timestep_of
from dinalrm_align.reward.backbones import Taps
from dinalrm_align.reward.backbones.sd3 import SD3Trunk
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.head import RewardHead
from dinalrm_align.train.device import to_device

Sigma = float | Tensor | Sequence[float] | Sequence[Tensor]


class RewardModel(nn.Module):
    """Trainable reward: trunk (first blocks of a diffusion transformer) and head. Built by `build_reward_model`."""

    def __init__(self, config: RewardConfig, trunk: SD3Trunk, head: RewardHead) -> None:
        super().__init__()
        self.config, self.trunk, self.head = config, trunk, head
        self._as_trained: Mapping[str, Tensor] | None = None
        self._snap_table = scheduler_sigmas()

    def forward(
        self, latents: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, sigma: Sigma, noise: Tensor | None
    ) -> Tensor:
        """Return raw scores (B,), float32, differentiable in the latents and in every trainable parameter.

        Args:
            latents: (B, C, H, W), scaled. Noise is added in float32, whatever the dtype of the model.
            prompt_embeds, pooled_prompt_embeds: text embeddings (B, L, text_width) and (B, pooled_width).
            sigma: noise levels in [0, 1], in any form that `noise_levels` takes.
            noise: (B, C, H, W), shared by all levels, or (K, B, C, H, W), one per level. None: `latents` already
                contain noise of the single level `sigma`, which is not rounded to the scheduler's sigmas.
        """
        return self.score(self.features(latents, prompt_embeds, pooled_prompt_embeds, sigma, noise))

    def features(
        self, latents: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, sigma: Sigma, noise: Tensor | None
    ) -> tuple[Taps, ...]:
        """Return the trunk's features at each of the K noise levels. Arguments: see `forward`."""
        batch = latents.shape[0]
        levels = noise_levels(sigma, batch, latents.device)
        if self.config.snap_sigma and noise is not None:
            self._snap_table = self._snap_table.to(levels.device)
            levels = snap_sigma(levels, self._snap_table)
        count, flat = levels.shape[0], levels.flatten()
        x_sigma = latents.float().repeat(count, 1, 1, 1)
        if self.config.add_noise and noise is not None:
            noise = noise.flatten(0, 1) if noise.dim() == 5 else noise.repeat(count, 1, 1, 1)
            x_sigma = add_noise(x_sigma, noise, flat)
        embeds = (prompt_embeds.repeat(count, 1, 1), pooled_prompt_embeds.repeat(count, 1))
        return self.trunk(x_sigma, timestep_of(flat), *embeds).split(count)

    def score(self, features: Sequence[Taps]) -> Tensor:
        """Return raw scores (B,), float32, from the features of one noise level, or of several as an ensemble."""
        with self._head_precision():
            if self.config.ensemble == "average":
                return torch.stack([self.head(level) for level in features]).mean(dim=0)
            return self.head(features)

    def _head_precision(self) -> contextlib.AbstractContextManager:
        """Return the context to run the head in: autocast if the trunk's dtype is half precision, else no autocast."""
        device, dtype = self.trunk.device.type, self.trunk.dtype
        if dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device):
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block of the trunk in the backward pass instead of storing its activations."""
        self.trunk.enable_gradient_checkpointing()

    def tuned_tensors(self) -> dict[str, Tensor]:
        """Return a checkpoint's tensors: `head.*`, and `backbone.*` (the LoRA, or the whole trunk with full tuning).

        Before `freeze`, returns the Parameters themselves. After `freeze`, returns CPU copies of the
        trained weights, made before any cast or LoRA merge.
        """
        if self._as_trained is not None:
            return dict(self._as_trained)
        full = self.config.tuning == "full"
        backbone = self.trunk.state_dict(keep_vars=True) if full else self.trunk.lora_parameters()
        head = self.head.state_dict(keep_vars=True)
        return {f"backbone.{k}": v for k, v in backbone.items()} | {f"head.{k}": v for k, v in head.items()}

    def freeze(
        self, *, merge: bool = False, dtype: torch.dtype | None = None, as_trained: Mapping[str, Tensor] | None = None
    ) -> None:
        """Prepare for scoring: set evaluation mode, freeze all parameters, cast LoRA and unshared weights to `dtype`.

        Args:
            merge: merge the LoRA into the trunk's weights, in float32, before the cast.
            dtype: dtype of the LoRA and of unshared weights; default: the trunk's.
            as_trained: tensors that `tuned_tensors` returns from now on; default: CPU copies of the current tensors.
        """
        if as_trained is None:
            as_trained = {name: tensor.detach().cpu().clone() for name, tensor in self.tuned_tensors().items()}
        self._as_trained = as_trained
        self.eval().requires_grad_(False)
        dtype = dtype or self.trunk.dtype
        if self.config.tuning == "full":
            self.trunk.skip_unread_text()
        if merge:
            self.trunk.float().merge_lora()
        for weight in self.trunk.lora_parameters().values():
            weight.data = weight.data.to(dtype)
        if not self.trunk.shared:
            self.trunk.to(dtype)


def noise_levels(sigma: Sigma, batch: int, device: torch.device) -> Tensor:
    """Return float32 levels (K, B). sigma: a float, a tensor (B,) or (K, B), or a list of K floats or tensors (B,)."""
    if isinstance(sigma, Sequence):
        return torch.cat([noise_levels(level, batch, device) for level in sigma])
    sigma = to_device(torch.as_tensor(sigma, dtype=torch.float32), device)
    if sigma.dim() == 0:
        return sigma.expand(1, batch)
    if sigma.dim() > 2 or sigma.shape[-1] != batch:
        expected = f"a float, ({batch},), or (K, {batch})"
        raise ValueError(f"sigma: got shape {tuple(sigma.shape)} for {batch} latents; expected {expected}")
    return sigma.view(-1, batch)


def build_reward_model(
    config: RewardConfig, transformer: SD3Transformer2DModel, *, share_weights: bool = True, seed: int = 0
) -> RewardModel:
    """Build a reward to train, on the transformer's device. LoRA and head are float32 and initialised from `seed`.

    share_weights: use the transformer's weights, which must be frozen. Must be False if config.tuning is full.
    """
    if not isinstance(config, RewardConfig):
        raise TypeError(f"config: got {type(config).__name__}; expected a RewardConfig")
    if share_weights and config.tuning == "full":
        raise ValueError("share_weights: got True; expected False, since tuning 'full' trains the backbone's weights")
    device = transformer.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        trunk = SD3Trunk(transformer, config, share_weights=share_weights)
        head = RewardHead(config.head, trunk.width, len(config.visual_taps), len(config.text_taps), trunk.temb_dim)
    return RewardModel(config, trunk, head.to(device, torch.float32))
