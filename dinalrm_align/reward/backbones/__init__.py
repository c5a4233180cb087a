"""The interface between a diffusion backbone and a reward head. Each family, such as SD3, has its own module."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """Features of B samples, read by the reward head. The config selects the tapped backbone layers.

    Args:
        visual: image tokens (B, N, width) of each tapped layer.
        text: text tokens (B, L, width) of each tapped layer.
        temb: joint embedding of timestep and pooled prompt (B, temb_dim).
    """

    visual: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    temb: Tensor

    def split(self, parts: int) -> tuple["Taps", ...]:
        """Split the batch into `parts` chunks of consecutive samples. The batch size must be a multiple of `parts`."""
        visual = zip(*(tokens.chunk(parts) for tokens in self.visual), strict=True)
        text = zip(*(tokens.chunk(parts) for tokens in self.text), strict=True) if self.text else [()] * parts
        return tuple(Taps(*streams) for streams in zip(visual, text, self.temb.chunk(parts), strict=True))


class Backbone(Protocol):
    """Interface of a diffusion backbone that maps noisy latents to the features of selected layers (`Taps`)."""

    width: int  # channels of both token streams
    temb_dim: int
    in_channels: int
    text_width: int
    pooled_width: int
    patch_size: int  # latent height and width must be multiples of it
    max_size: int  # largest latent height or width

    def __call__(self, x_sigma: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Taps:
        """Return features of noisy latents x_sigma (B, C, H, W). timestep: (B,), equal to 1000 sigma.

        prompt_embeds: (B, L, text_width). pooled_prompt_embeds: (B, pooled_width).
        """
