"""DiNa-LRM as a trainable module: add noise to the latents, run the trunk, score its taps with the head.

The K noise levels of an ensemble pass the backbone as one batch of K B samples (arXiv 2602.11146).
"""

import contextlib
from collections.abc import Mapping, Sequence

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from dinalrm_align.flow.noise import add_noise, scheduler_sigmas, snap_sigma, timestep_of
from dinalrm_align.reward.backbones.sd3 import SD3Trunk
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.head import RewardHead

Sigma = float | Tensor | Sequence[float] | Sequence[Tensor]


class RewardModel(nn.Module):
    """Trunk and head. Build one with `build_reward_model`."""

    def __init__(self, config: RewardConfig, trunk: SD3Trunk, head: RewardHead) -> None:
        super().__init__()
        self.config, self.trunk, self.head = config, trunk, head
        self._as_trained: Mapping[str, Tensor] | None = None
        self._snap_table = scheduler_sigmas()

    def forward(
        self, latents: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, sigma: Sigma, noise: Tensor | None
    ) -> Tensor:
        """Raw scores (B,), float32, differentiable in the latents and in every trainable parameter.

        Args:
            latents: (B, C, H, W), scaled. Noising and timesteps are float32 for every dtype of the model.
            prompt_embeds, pooled_prompt_embeds: (B, L, text_width), (B, pooled_width).
            sigma: as in `noise_levels`.
            noise: (B, C, H, W), shared by all levels, or (K, B, C, H, W), one per level. None: the latents are x_sigma
                already, at the one level sigma, which is not snapped.
        """
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
        taps = self.trunk(x_sigma, timestep_of(flat), *embeds)
        with self._head_precision():
            if self.config.ensemble == "average":
                return self.head(taps).view(count, batch).mean(dim=0)
            return self.head(taps.split(count))

    def _head_precision(self) -> contextlib.AbstractContextManager:
        """Run the float32 head under autocast after a half-precision trunk, as in training."""
        device, dtype = self.trunk.device.type, self.trunk.dtype
        if dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device):
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=dtype)

    def tuned_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint: `backbone.*` (the LoRA, or with full tuning the trunk) and `head.*`; live in
        training, for a frozen model copies on the CPU from before casts and merging.
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
        """Prepare for scoring: no gradients for parameters, evaluation mode, LoRA in the trunk's dtype or merged into
        its weights in float32. as_trained: `tuned_tensors` from here on; default: a copy of the present ones.
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
    """The levels (K, B), float32, of a float, of (B,), or for an ensemble of K floats, K tensors (B,), or (K, B)."""
    if isinstance(sigma, Sequence):
        return torch.cat([noise_levels(level, batch, device) for level in sigma])
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=device)
    if sigma.dim() == 0:
        return sigma.expand(1, batch)
    if sigma.dim() > 2 or sigma.shape[-1] != batch:
        expected = f"a float, ({batch},), or (K, {batch})"
        raise ValueError(f"sigma: got shape {tuple(sigma.shape)} for {batch} latents; expected {expected}")
    return sigma.view(-1, batch)


def build_reward_model(
    config: RewardConfig, transformer: SD3Transformer2DModel, *, share_weights: bool = True, seed: int = 0
) -> RewardModel:
    """A reward to train: LoRA and head initialised from `seed`, float32, on the transformer's device.

    share_weights: use the transformer's own weights, which must be frozen; not for full tuning.
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
    return RewardModel(config, trunk, head.to(device))
