"""The interface of all rewards: latent rewards, image rewards, weighted sums, Python callables and remote models.

`Reward` is the interface. `RewardModule` has default implementations for this package's rewards, which are frozen
modules. Code outside of `reward/` never checks the class of a reward.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from dinalrm_align.models.compilation import compile_blocks
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.backbones.probes import Probes
from dinalrm_align.reward.inputs import ScoreError
from dinalrm_align.reward.origin import Origin
from dinalrm_align.train.checks import check, deferred
from dinalrm_align.train.device import available_device
from dinalrm_align.train.digest import fingerprint, text_digest

if TYPE_CHECKING:
    from dinalrm_align.reward.latent import LatentReward

Text = Conditions | Sequence[str] | str
"""Prompts: encoded, as a list, tuple or NumPy array of strings, or as one string for a batch of one."""
Latents = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]
"""A batch (B, C, H, W) as a tensor, a NumPy array, or a list of (C, H, W); one (C, H, W) is a batch of one."""
Seeds = int | Sequence[int] | Tensor | np.ndarray
"""One integer in [0, 2**32) per sample."""
Sigma = float | Tensor | Sequence[float]
"""Noise level in [0, 1]: a float, a tensor (B,) with one per sample, or a list of levels (multi-noise ensemble)."""


Parted = tuple[Tensor, dict[str, Tensor]]
"""Scores (B,), float32, and what they consist of, if the reward tells: name -> (B,). "a/b" is a component of "a"."""


class Noise(TypedDict, total=False):
    """Keyword arguments for rewards that add noise to latents. Rewards that add no noise ignore these arguments.

    sigma: noise levels; default: those of the reward. noise: standard normal (B, C, H, W), or (K, B, C, H, W) with one
    draw per level. generator: draws the noise of the whole batch. seeds: one integer per sample; the noise of a sample
    depends on its seed only. A caller passes at most one of noise, generator and seeds.
    """

    sigma: Sigma | None
    noise: Tensor | None
    generator: torch.Generator | None
    seeds: Seeds | None


class ImageOptions(TypedDict, total=False):
    """Keyword arguments for rewards that score images.

    sigma, generator, seeds: as in `Noise`. differentiable: whether gradients reach image tensors; default: False.
    """

    sigma: Sigma | None
    generator: torch.Generator | None
    seeds: Seeds | None
    differentiable: bool


class Reward(Protocol):
    """Interface of a reward, which scores latents for prompts. Higher is better.

    Attributes:
        name: name in error messages.
        differentiable: whether gradients reach the latents.
        reads_images: whether the reward decodes the latents with a VAE and scores the images.
        scores_images: whether the reward supports `score_images`.
        reads_noise: whether scores depend on sigma and noise.
        sigmas: for one latent reward, also a served one, its default noise levels of latents and of images; else None.
        wants_groups: whether all samples of a prompt must be scored in one call, so that their scores are comparable.
        noise_parts: for a sum, the latent rewards in the sum; for a latent reward, [self]; otherwise empty.
        text_lengths: T5 sequence lengths at which to encode prompts (see `Conditions.for_length`). Empty if the reward
            reads prompts as strings.
        named_parts: the rewards in a weighted sum, by name; {"reward": self} for a single reward.
        weights: weight of each reward in `named_parts`, by name.
        device: device that computes the scores.
    """

    name: str
    differentiable: bool
    reads_images: bool
    scores_images: bool
    reads_noise: bool
    sigmas: tuple[Sigma, Sigma] | None
    wants_groups: bool
    noise_parts: "Sequence[LatentReward]"
    text_lengths: frozenset[int]
    named_parts: "Mapping[str, Reward]"
    weights: Mapping[str, float]
    device: torch.device

    def __call__(self, latents: Latents, prompts: Text, **noise: Unpack[Noise]) -> Tensor:
        """Return finite scores (B,), float32, differentiable in the latents if `differentiable` is true.

        latents: (B, C, H, W), scaled and clean, any floating dtype. Autocast around the call does not change the
        scores. Raises ValueError or TypeError for invalid input, and ValueError if a score is not finite, or if
        `differentiable` is false and the latents require a gradient.
        """

    def score_parts(self, latents: Tensor, prompts: Text, **noise: Unpack[Noise]) -> dict[str, Tensor]:
        """Return unweighted scores as a dict: name in `weights` -> scores (B,). Latents are decoded at most once."""

    def score_noisy(self, latents: Tensor, sigma: float | Tensor, prompts: Text) -> Tensor:
        """Return scores (B,) of latents that contain noise of level sigma. Raises TypeError if not supported."""

    def score_images(self, images: Any, prompts: Text, **options: Unpack[ImageOptions]) -> Tensor:
        """Return scores (B,), float32. images: see `models.images.image_tensor`."""

    def score_image_parts(self, images: Any, prompts: Text, **options: Unpack[ImageOptions]) -> Parted:
        """Return `score_images` and the parts of the scores, computed in one pass."""

    def fingerprint(self) -> str:
        """Return a digest of the weights. Training resumes from a checkpoint only if the digest is unchanged."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""

    def disable_gradient_checkpointing(self) -> None: ...

    def set_decode_slice(self, size: int | None) -> None:
        """Make the VAE decode at most `size` latents at a time; None: the whole batch."""

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Apply torch.compile, in place, to each transformer block of every latent reward's backbone."""

    def check_gradient(self, inputs: Tensor) -> None:
        """Raise ValueError if `inputs` requires a gradient and `differentiable` is false."""


def scoring(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method of a reward that returns scores.

    It runs without autocast on the reward's device, in the dtype of the weights. Its checks of values on a GPU are read
    in one transfer at its end, or later if the caller defers them (`train.checks.deferred`).
    """

    @functools.wraps(method)
    def call(self: "RewardModule", *arguments: Any, **options: Any) -> Any:
        device = self.device.type if torch.amp.is_autocast_available(self.device.type) else "cpu"
        with torch.autocast(device, enabled=False), deferred():
            return method(self, *arguments, **options)

    return call


class RewardModule(nn.Module):
    """Default implementation of `Reward`: a frozen module in evaluation mode.

    Subclasses must implement `forward`, and `score_images` unless `scores_images` is False.
    """

    differentiable = True
    wants_groups = False
    reads_images = False
    scores_images = True
    reads_noise = False
    sigmas: tuple[Sigma, Sigma] | None = None
    noise_parts: "tuple[LatentReward, ...]" = ()
    name = "reward"
    origin: Origin | None = None
    """The call that loaded the reward. A reward without one is pickled with its weights."""
    _as_loaded: Probes
    _home: torch.device | None = None
    """Device to return to; None unless the reward is offloaded."""

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
        """The device of the weights, or the CPU if the reward has no weights."""
        return next((tensor.device for tensor in self.parameters()), torch.device("cpu"))

    def score_parts(self, latents: Tensor, prompts: Text, **noise: Unpack[Noise]) -> dict[str, Tensor]:
        return {"reward": self(latents, prompts, **noise)}

    def score_image_parts(self, images: Any, prompts: Text, **options: Unpack[ImageOptions]) -> Parted:
        return self.score_images(images, prompts, **options), {}

    def score_noisy(self, latents: Tensor, sigma: float | Tensor, prompts: Text) -> Tensor:
        raise TypeError(f"{self.name} does not score noisy latents; take a reward that does, as dinalrm")

    def offload(self) -> None:
        """Move the weights that this reward owns to the CPU, until `onload`. Scoring raises ValueError meanwhile.

        Weights shared with a transformer, and a VAE or text encoders of a given pipeline, stay where they are.
        """
        if self._home is None:
            self._home = self.device
            self._move(torch.device("cpu"))

    def onload(self, device: torch.device | str | None = None) -> None:
        """Move the weights that this reward owns to `device`; default: the device before `offload`."""
        self._move(self._home or self.device if device is None else available_device(device))
        self._home = None

    def check_onloaded(self) -> None:
        if self._home is not None:
            raise ValueError(f"reward {self.name!r} is offloaded to the CPU; call reward.onload() before scoring")

    def _move(self, device: torch.device) -> None:
        self.to(device)

    def loaded_by(self, origin: Origin) -> None:
        """Pickle the reward as the call `origin` from now on; raise ValueError if its weights have changed by then."""
        self.origin, self._as_loaded = origin, Probes(dict(self.named_parameters()))

    def __reduce_ex__(self, protocol: int) -> Any:
        if self.origin is None:
            return super().__reduce_ex__(protocol)
        self._as_loaded.check(
            "a pickled reward holds no weights, and another process would load the old ones: save the reward, load it "
            "from there, and pickle that"
        )
        return self.origin.reduced(self._home or self.device, **self._dtypes())

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Return dtypes, by submodule of `model`, that a pickled copy is cast to after loading."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewardModule":
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        return copied

    def fingerprint(self) -> str:
        return text_digest(self.name) if next(self.parameters(), None) is None else fingerprint(self)

    def enable_gradient_checkpointing(self) -> None: ...

    def disable_gradient_checkpointing(self) -> None: ...

    def set_decode_slice(self, size: int | None) -> None: ...

    def compile_blocks(self, backend: str = "inductor") -> None:
        for part in self.noise_parts:
            compile_blocks(part.backbone.transformer_blocks, backend)

    def train(self, mode: bool = True) -> "RewardModule":
        """Stay in evaluation mode, whatever `mode` is. Dropout stays off, so equal inputs get equal scores."""
        return super().train(False)

    def check_gradient(self, inputs: Tensor) -> None:
        if not self.differentiable and torch.is_grad_enabled() and isinstance(inputs, Tensor) and inputs.requires_grad:
            raise ValueError(
                f"{self.name} is not differentiable: it can rank and evaluate (GRPO, DPO, NFT), but gives no gradient "
                "to ReFL; score under torch.no_grad(), or detach the latents"
            )


def finite_scores(scores: Any, count: int, name: str) -> Tensor:
    """Return `scores` as float32. Raise TypeError or ValueError unless `scores` is finite and of shape (count,)."""
    if not isinstance(scores, Tensor):
        raise ScoreError(f"reward {name!r} returned {type(scores).__name__}; expected a tensor ({count},)")
    if tuple(scores.shape) != (count,):
        raise ScoreError(f"reward {name!r} returned shape {tuple(scores.shape)}; expected ({count},), one per sample")

    def judge(bad: list[float]) -> None:
        if bad[0]:
            raise ScoreError(
                f"reward {name!r} returned {bad[0]:.0f} of {count} scores that are NaN or infinite; expected finite "
                "numbers (float16 overflows for some images: use bfloat16 or float32)"
            )

    check((~torch.isfinite(scores.detach())).sum(), judge)
    return scores.float()
