"""The interface between diffusion backbones and reward heads: token streams at some depths, conditioning vector.

A backbone for another model family is one more module here: a callable with `Backbone`'s signature and attributes.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """Features of B samples.

    Args:
        visual: image tokens (B, N, width) of each tap.
        text: text tokens (B, L, width) of each tap, possibly none.
        temb: (B, temb_dim), the embedded timestep and pooled prompt.
    """

    visual: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    temb: Tensor

    def split(self, parts: int) -> tuple["Taps", ...]:
        """Features of parts * B samples as `parts` batches of B, in order."""
        visual = zip(*(tokens.chunk(parts) for tokens in self.visual), strict=True)
        text = zip(*(tokens.chunk(parts) for tokens in self.text), strict=True) if self.text else [()] * parts
        return tuple(Taps(*streams) for streams in zip(visual, text, self.temb.chunk(parts), strict=True))


class Backbone(Protocol):
    """Noisy latents to `Taps`.

    Args:
        width: channels of both token streams.
        temb_dim: of the conditioning vector.
        in_channels: of the latents.
        text_width, pooled_width: of prompt_embeds and pooled_prompt_embeds.
        patch_size: latent height and width must be multiples of it.
        max_size: largest latent height or width.
    """

    width: int
    temb_dim: int
    in_channels: int
    text_width: int
    pooled_width: int
    patch_size: int
    max_size: int

    def __call__(self, x_sigma: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Taps:
        """x_sigma (B, C, H, W), timestep (B,) = 1000 sigma, prompt_embeds (B, L, text_width), pooled embeds (B, P)."""
        ...
