"""What the rest of the package asks of a reward, latent, pixel, sum, callable or remote alike.

`Reward` is the interface; `RewardModule` has its defaults for the rewards of this package, which are frozen modules.
Code outside of `reward/` does not ask which kind of reward it has.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor, nn

from dinalrm_align.models.text import Conditions
from dinalrm_align.train.digest import fingerprint, text_digest

if TYPE_CHECKING:
    from dinalrm_align.reward.latent import LatentReward

Text = Conditions | Sequence[str] | str
"""Encoded prompts, or prompts as strings. A string is a list of one."""
Sigma = float | Tensor | Sequence[float]
"""A noise level in [0, 1]; one per sample, (B,); or a sequence of levels, a multi-noise ensemble."""


class Noise(TypedDict, total=False):
    """How latents are noised where a reward reads noise; without effect elsewhere.

    sigma: noise levels; default: each part's own. noise: (B, C, H, W) standard normal, or (K, B, C, H, W), one draw per
    level; or generator: to draw it from.
    """

    sigma: Sigma | None
    noise: Tensor | None
    generator: torch.Generator | None


class Reward(Protocol):
    """Scores of latents for prompts; higher is better.

    Attributes:
        differentiable: gradients reach the latents.
        reads_images: latents are decoded by a VAE before they are scored.
        scores_images: `score_images` works.
        reads_noise: scores depend on sigma and noise.
        wants_groups: scores are comparable within one call only, so all samples of a prompt belong into one call.
        noise_parts: the latent rewards among the parts; empty for image rewards and callables.
        text_lengths: numbers of T5 tokens whose embeddings are read (`Conditions.for_length`); empty where text is
            read as strings.
        named_parts: the parts of a sum by name; {"reward": itself} for any other reward.
        weights: the weight of each part.
        device: where scores are computed.
    """

    differentiable: bool
    reads_images: bool
    scores_images: bool
    reads_noise: bool
    wants_groups: bool
    noise_parts: "Sequence[LatentReward]"
    text_lengths: frozenset[int]
    named_parts: "Mapping[str, Reward]"
    weights: Mapping[str, float]
    device: torch.device

    def __call__(self, latents: Tensor, prompts: Text, **noise: Unpack[Noise]) -> Tensor:
        """Scores (B,), float32, finite, differentiable in the latents where `differentiable` is true.

        latents: (B, C, H, W), scaled and clean, any floating dtype. Raises ValueError or TypeError for invalid input,
        for a gradient that the reward cannot give, and for scores that are not finite.
        """
        ...

    def score_parts(self, latents: Tensor, prompts: Text, **noise: Unpack[Noise]) -> dict[str, Tensor]:
        """The score of each part, (B,) and unweighted, by the names in `weights`. Latents are decoded once."""
        ...

    def score_noisy(self, latents: Tensor, sigma: float | Tensor, prompts: Text) -> Tensor:
        """Scores (B,) of latents (B, C, H, W) at noise level sigma. TypeError where only clean latents are read."""
        ...

    def score_images(self, images: Any, prompts: Sequence[str], *, generator: torch.Generator | None = None) -> Tensor:
        """Scores (B,), float32, of PIL images or of (B, 3, H, W) in [0, 1], without gradient."""
        ...

    def fingerprint(self) -> str:
        """A digest of the weights, stored with checkpoints: a run is resumed with the same reward."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        ...

    def set_decode_slice(self, size: int | None) -> None:
        """Decode at most `size` latents at a time; None: all at once."""
        ...

    def compile_blocks(self, backend: str = "inductor") -> None:
        """torch.compile the blocks of every backbone, each one separately and in place."""
        ...


class RewardModule(nn.Module):
    """Defaults of `Reward` for a frozen module that stays in evaluation mode. A subclass writes `forward`."""

    differentiable = True
    wants_groups = False
    reads_images = False
    scores_images = True
    reads_noise = False
    noise_parts: "tuple[LatentReward, ...]" = ()
    name = "reward"

    @property
    def text_lengths(self) -> frozenset[int]:
        return frozenset(part.config.text_length for part in self.noise_parts)

    @property
    def named_parts(self) -> "dict[str, RewardModule]":
        return {"reward": self}

    @property
    def weights(self) -> dict[str, float]:
        return {"reward": 1.0}

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU where there are none."""
        return next((tensor.device for tensor in self.parameters()), torch.device("cpu"))

    def score_parts(self, latents: Tensor, prompts: Text, **noise: Unpack[Noise]) -> dict[str, Tensor]:
        return {"reward": self(latents, prompts, **noise)}

    def score_noisy(self, latents: Tensor, sigma: float | Tensor, prompts: Text) -> Tensor:
        raise TypeError(f"{self.name} does not score noisy latents; take a reward that does, as dinalrm")

    def fingerprint(self) -> str:
        return text_digest(self.name) if next(self.parameters(), None) is None else fingerprint(self)

    def enable_gradient_checkpointing(self) -> None: ...

    def disable_gradient_checkpointing(self) -> None: ...

    def set_decode_slice(self, size: int | None) -> None: ...

    def compile_blocks(self, backend: str = "inductor") -> None:
        for block in (block for part in self.noise_parts for block in part.backbone.transformer_blocks):
            block.compile(backend=backend)

    def train(self, mode: bool = True) -> "RewardModule":
        """Stay in evaluation mode, with dropout off: equal inputs get equal scores."""
        return super().train(False)

    def check_gradient(self, inputs: Tensor) -> None:
        """ValueError when a gradient is asked for and this reward cannot give one."""
        if not self.differentiable and torch.is_grad_enabled() and isinstance(inputs, Tensor) and inputs.requires_grad:
            raise ValueError(
                f"{self.name} is not differentiable: it can rank and evaluate (GRPO, DPO, NFT), but gives no gradient "
                "to ReFL; score under torch.no_grad(), or detach the latents"
            )


def finite_scores(scores: Any, count: int, name: str) -> Tensor:
    """`scores` as float32 (count,); TypeError unless a tensor, ValueError for another shape and for NaN or infinity."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"reward {name!r} returned {type(scores).__name__}; expected a tensor ({count},)")
    if tuple(scores.shape) != (count,):
        raise ValueError(f"reward {name!r} returned shape {tuple(scores.shape)}; expected ({count},), one per sample")
    if bad := int((~torch.isfinite(scores.detach())).sum()):
        raise ValueError(
            f"reward {name!r} returned {bad} of {count} scores that are NaN or infinite; expected finite numbers "
            "(float16 overflows for some images: use bfloat16 or float32)"
        )
    return scores.float()
