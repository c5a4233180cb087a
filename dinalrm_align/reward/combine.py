"""Weighted sum of rewards. The latents are decoded once for all image rewards in the sum."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from dinalrm_align.models.text import prompts_of
from dinalrm_align.reward.inputs import as_batch
from dinalrm_align.reward.pixel.base import PixelReward, check_decodable
from dinalrm_align.reward.protocol import (
    ImageOptions,
    Latents,
    Noise,
    Parted,
    RewardModule,
    Text,
    finite_scores,
    scoring,
)
from dinalrm_align.train.settings import check_number


class RewardSum(RewardModule):
    """Weighted sum of named rewards: score = sum_i weight_i * score_i. The summed rewards are called parts.

    Parts can have scores on different scales. GRPO therefore takes each part's unweighted scores from `score_parts`,
    and normalises each part's scores before it adds up the parts.
    """

    def __init__(self, parts: Mapping[str, RewardModule], weights: Mapping[str, float]) -> None:
        """Combine named rewards. Raises ValueError if a weight is missing or not finite, or if VAEs of parts differ."""
        super().__init__()
        if not parts:
            raise ValueError("parts: got none; expected at least one reward")
        if unpaired := sorted(parts.keys() ^ weights.keys()):
            got = "a reward without a weight" if unpaired[0] in parts else "a weight without a reward"
            raise ValueError(f"{unpaired[0]!r}: got {got}; expected one weight for each reward")
        for name, weight in weights.items():
            check_number(f"weight of {name}", weight)
        self.names = tuple(parts)
        self.name = " + ".join(parts)
        self.parts = nn.ModuleList(parts.values())
        self._weight_of = {name: float(weight) for name, weight in weights.items()}
        # a buffer, so that sums with other weights have other fingerprints
        values = torch.tensor([self._weight_of[name] for name in self.names], dtype=torch.float64)
        self.register_buffer("_weights", values, persistent=False)
        vaes = {id(part.vae) for part in self._pixel_parts.values() if part.has_vae}
        if len(vaes) > 1:
            raise ValueError(f"{', '.join(self._pixel_parts)} decode with {len(vaes)} different VAEs; give them one")
        self.differentiable = all(part.differentiable for part in self.parts)
        self.reads_images = any(part.reads_images for part in self.parts)
        self.scores_images = all(part.scores_images for part in self.parts)
        self.reads_noise = any(part.reads_noise for part in self.parts)
        self.wants_groups = any(part.wants_groups for part in self.parts)
        self.noise_parts = tuple(inner for part in self.parts for inner in part.noise_parts)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the first summed reward that has weights or a VAE, or the CPU if there is none."""
        return next((part.device for part in self.parts if part.reads_images or part.noise_parts), torch.device("cpu"))

    @property
    def named_parts(self) -> dict[str, RewardModule]:
        return dict(zip(self.names, self.parts, strict=True))

    @property
    def _pixel_parts(self) -> dict[str, PixelReward]:
        return {name: part for name, part in self.named_parts.items() if part.reads_images}

    @property
    def weights(self) -> dict[str, float]:
        return self._weight_of

    @scoring
    def forward(self, latents: Latents, prompts: Text, **noise: Unpack[Noise]) -> Tensor:
        """Return the weighted sum (B,), float32. The sum is differentiable in the latents if every summed reward is."""
        return self.add_up(self.score_parts(latents, prompts, **noise))

    def add_up(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum (B,) of the scores in `parts`. Raise ValueError if the sum is not finite."""
        total = sum(weight * parts[name] for name, weight in self._weight_of.items())
        return finite_scores(total, len(total), self.name)

    @scoring
    def score_parts(self, latents: Latents, prompts: Text, **noise: Unpack[Noise]) -> dict[str, Tensor]:
        """Return a dict from part name to unweighted scores (B,), float32, on the latents' device.

        Latents are decoded once. Raises ValueError if the latents require a gradient and a part is not differentiable.
        """
        latents = as_batch("latents", latents, self.device)
        for part in self.parts:
            part.check_onloaded()
            part.check_gradient(latents)
        images, strings = None, []
        if pixel := self._pixel_parts:
            strings = prompts_of(prompts, len(latents))
            decoder = next((part for part in pixel.values() if part.has_vae), next(iter(pixel.values())))
            check_decodable(decoder.vae, latents)
            images = decoder.decode(latents)
        scores = {}
        for name, part in self.named_parts.items():
            score = part.score_decoded(images, strings) if name in pixel else part(latents, prompts, **noise)
            scores[name] = finite_scores(score, len(latents), name).to(latents.device)
        return scores

    def score_noisy(self, latents: Tensor, sigma: float | Tensor, prompts: Text) -> Tensor:
        """Return the weighted sum (B,), float32. Raises TypeError if a summed reward does not score noisy latents."""
        return self.add_up({name: part.score_noisy(latents, sigma, prompts) for name, part in self.named_parts.items()})

    @scoring
    def score_images(self, images: Any, prompts: Text, **options: Unpack[ImageOptions]) -> Tensor:
        """Return the weighted sum (B,), float32, for images as `image_tensor` takes them.

        Arguments are as in `Reward.score_images`. Raises ValueError if a summed reward cannot score images.
        """
        return self.score_image_parts(images, prompts, **options)[0]

    @scoring
    def score_image_parts(self, images: Any, prompts: Text, **options: Unpack[ImageOptions]) -> Parted:
        """Return `score_images`, and the unweighted scores of the summed rewards, each followed by its own parts.

        Their names have no sources: "dinalrm=FOLDER" is "dinalrm". Equal names are numbered: "dinalrm1", "dinalrm2".
        """
        scores, found, kinds = {}, dict[str, Tensor](), [name.partition("=")[0] for name in self.names]
        for index, (name, part) in enumerate(self.named_parts.items()):
            score, own = part.score_image_parts(images, prompts, **options)
            scores[name] = score.to(next(iter(scores.values()), score).device)
            kind = kinds[index] + (f"{kinds[: index + 1].count(kinds[index])}" if kinds.count(kinds[index]) > 1 else "")
            found |= {kind: scores[name], **{f"{kind}/{inner}": values for inner, values in own.items()}}
        return self.add_up(scores), found

    def offload(self) -> None:
        for part in self.parts:
            part.offload()

    def onload(self, device: torch.device | str | None = None) -> None:
        for part in self.parts:
            part.onload(device)

    def __reduce_ex__(self, protocol: int) -> Any:
        return sum_of, (self.named_parts, self._weight_of)

    def enable_gradient_checkpointing(self) -> None:
        for part in self.parts:
            part.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        for part in self.parts:
            part.disable_gradient_checkpointing()

    def set_decode_slice(self, size: int | None) -> None:
        for part in self.parts:
            part.set_decode_slice(size)


def sum_of(parts: Mapping[str, RewardModule], weights: Mapping[str, float]) -> RewardSum:
    """Return a sum of rewards that were loaded one by one. Image rewards that have a VAE each share the first one's."""
    pixel = [part for part in parts.values() if part.reads_images and part.has_vae]
    for part in pixel:
        part.borrow(pixel[0].vae)
    return RewardSum(parts, weights)
