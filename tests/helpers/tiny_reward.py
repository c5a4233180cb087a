"""A latent reward on the tiny stack, and inputs for it."""

import torch

from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import HeadConfig, LoraConfig, RewardConfig


def tiny_reward_config(**changes) -> RewardConfig:
    """The config of a reward on the tiny stack; keyword arguments replace fields."""
    values = dict(
        base_model_id="../pipeline", num_layers=3, visual_taps=(1, 3), text_taps=(0, 3), lora=LoraConfig(4, 8),
        head=HeadConfig(), sigma=0.4, score_scale=2.0, score_bias=0.5, text_length=16, vae_scaling_factor=1.0,
        vae_shift_factor=0.0,
    )  # fmt: skip
    return RewardConfig(**(values | changes))


def shake(model: torch.nn.Module, seed: int, scale: float = 0.1) -> None:
    """Add noise to every trainable parameter, so that LoRA and the layers that start at zero matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def encoded(prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor) -> Conditions:
    """Embeddings whose text is unknown."""
    return Conditions([""] * len(prompt_embeds), prompt_embeds, pooled_prompt_embeds)


def raw_scores(reward, latents, prompt_embeds, pooled_prompt_embeds, **noise) -> torch.Tensor:
    """The reward's raw scores of inputs as `make_inputs` makes them."""
    return reward.raw(latents, encoded(prompt_embeds, pooled_prompt_embeds), **noise)


def make_inputs(transformer, batch: int = 2, height: int = 16, width: int = 12, tokens: int = 9, seed: int = 0):
    """latents, noise, prompt_embeds and pooled_prompt_embeds of the transformer's sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = transformer.config
    shapes = {
        "latents": (batch, sizes.in_channels, height, width),
        "noise": (batch, sizes.in_channels, height, width),
        "prompt_embeds": (batch, tokens, sizes.joint_attention_dim),
        "pooled_prompt_embeds": (batch, sizes.pooled_projection_dim),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
