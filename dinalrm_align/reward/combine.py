"""A weighted sum of rewards behind `LatentReward`'s call: latents are decoded once for all parts that read pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinalrm_align.reward.callables import LatentFunction
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.pixel.base import PixelReward, check_decodable, check_picture_prompts
from dinalrm_align.train.settings import check_number

Part = LatentReward | PixelReward | LatentFunction


class RewardSum(nn.Module):
    """score = sum of weight x part, over named parts.

    Each part keeps its own scale. Where those differ, as in GRPO, `score_parts` gives the parts unweighted, to be
    normalised each by itself and weighted then (`add_up`, `weights`).
    """

    def __init__(self, parts: Mapping[str, Part], weights: Mapping[str, float]) -> None:
        """ValueError unless there are parts, each has a finite weight, and those that decode share one VAE."""
        super().__init__()
        if not parts or parts.keys() != weights.keys():
            raise ValueError(
                f"got parts {list(parts)}, weights for {list(weights)}; expected one or more, each weighted"
            )
        for name, weight in weights.items():
            check_number(f"weight of {name}", weight)
        self.names = tuple(parts)
        self.parts = nn.ModuleList(parts.values())
        self.weights = {name: float(weight) for name, weight in weights.items()}
        # a buffer, so that sums with other weights have other fingerprints
        values = torch.tensor([self.weights[name] for name in self.names], dtype=torch.float64)
        self.register_buffer("_weights", values, persistent=False)
        vaes = {id(part.vae) for part in self.pixel_parts.values() if part.has_vae}
        if len(vaes) > 1:
            raise ValueError(f"{', '.join(self.pixel_parts)} decode with {len(vaes)} different VAEs; give them one")
        self.eval()

    @property
    def pixel_parts(self) -> dict[str, PixelReward]:
        """Those that read decoded pictures."""
        named = zip(self.names, self.parts, strict=True)
        return {name: part for name, part in named if isinstance(part, PixelReward)}

    @property
    def differentiable(self) -> bool:
        """Whether every part is."""
        return all(part.differentiable for part in self.parts)

    @property
    def device(self) -> torch.device:
        """Of the first part that has one."""
        return next((part.device for part in self.parts if not isinstance(part, LatentFunction)), self._weights.device)

    def forward(
        self,
        latents: Tensor,
        prompts: Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: Any = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scores (B,), float32, differentiable in the latents if every part is; arguments as `score_parts`."""
        parts = self.score_parts(latents, prompts, prompt_embeds, pooled_prompt_embeds, sigma, noise, generator)
        return self.add_up(parts)

    def add_up(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what `score_parts` gave, or of the same after normalisation: each (B,) -> (B,)."""
        return sum(weight * parts[name] for name, weight in self.weights.items())

    def score_parts(
        self,
        latents: Tensor,
        prompts: Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: Any = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Every part's own score by name, unweighted, each (B,) float32. Latents are decoded once.

        Arguments as `LatentReward`'s, except that prompts and embeddings may both be given: parts that read pictures
        take the text, parts that read latents the embeddings, or the text where there are none. Raises as the parts do,
        and ValueError when a gradient is wanted and a part has none.
        """
        pixel = self.pixel_parts
        for name, part in zip(self.names, self.parts, strict=True):
            if not part.differentiable and torch.is_grad_enabled() and latents.requires_grad:
                raise ValueError(
                    f"{name} is not differentiable, and with it the sum of {', '.join(self.names)}: it can rank and "
                    "judge (GRPO, DPO, evaluation), and give no gradient to ReFL"
                )
        images = None
        if pixel:
            if prompts is None:
                raise ValueError(f"{', '.join(pixel)} read prompts as text: got none; pass prompts=[...]")
            decoder = next((part for part in pixel.values() if part.has_vae), next(iter(pixel.values())))
            check_decodable(decoder.vae, latents)
            check_picture_prompts(prompts, len(latents))
            images = decoder.decode(latents)
        text = dict(prompts=None if prompt_embeds is not None else prompts)
        text |= dict(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)
        scores = {}
        for name, part in zip(self.names, self.parts, strict=True):
            if name in pixel:
                scores[name] = part.score_pixels(images.to(part.device), prompts)
            elif isinstance(part, LatentReward):
                scores[name] = part(latents, **text, sigma=sigma, noise=noise, generator=generator)
            else:
                scores[name] = part(
                    latents, prompts, prompt_embeds, pooled_prompt_embeds, sigma=sigma, noise=noise, generator=generator
                )
        return {name: score.to(latents.device) for name, score in scores.items()}

    @torch.no_grad()
    def score_images(self, images: Any, prompts: Sequence[str], *, generator: torch.Generator | None = None) -> Tensor:
        """PIL pictures, or (B, 3, H, W) in [0, 1], and B prompts -> the weighted sum (B,), float32.

        generator: of the noise that parts over latents draw. ValueError when a part cannot score pictures.
        """
        total: Tensor | None = None
        for name, part in zip(self.names, self.parts, strict=True):
            if isinstance(part, LatentFunction):
                raise ValueError(f"{name} reads latents, not pictures; leave it out of what judges pictures")
            own = dict(generator=generator) if isinstance(part, LatentReward) else {}
            score = self.weights[name] * part.score_images(images, prompts, **own)
            total = score if total is None else total + score.to(total.device)
        return total

    def enable_gradient_checkpointing(self, slice_size: int | None = None) -> None:
        """In every part; slice_size: pictures decoded at a time (`pixel.base.decode_in_slices`)."""
        for part in self.parts:
            if isinstance(part, LatentReward):
                part.enable_gradient_checkpointing()
            else:
                part.enable_gradient_checkpointing(slice_size)

    def disable_gradient_checkpointing(self) -> None:
        for part in self.parts:
            part.disable_gradient_checkpointing()

    def train(self, mode: bool = True) -> "RewardSum":
        """Stay in evaluation mode, as every part does."""
        return super().train(False)
