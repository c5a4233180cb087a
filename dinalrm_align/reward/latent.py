"""LatentReward: a frozen, differentiable score of latents against prompts. The public face of the package.

    reward = LatentReward.from_pretrained("liuhuohuo/DiNa-LRM-SD35M-12layers", pipeline=pipeline)
    score = reward(latents, prompts)            # (B,) float32, higher is better; gradients reach the latents

score = raw * score_scale + score_bias, with the checkpoint's own scale and bias.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dinalrm_align.models.images import image_tensor
from dinalrm_align.models.pipeline import load_transformer
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.models.vae import encode_images, load_vae
from dinalrm_align.models.weights import load_tensors
from dinalrm_align.reward import inputs
from dinalrm_align.reward.backbones.sd3 import SD3Trunk
from dinalrm_align.reward.checkpoint import base_location, read_checkpoint, relocated, save_checkpoint
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.model import RewardModel, build_reward_model
from dinalrm_align.train.device import available_device

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from PIL.Image import Image

STATISTICS_CALLS = 10
"""How many first calls look at the statistics of their latents, which reads every value and waits for the device."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LatentReward(nn.Module):
    """A frozen reward over scaled latents. Load one with `from_pretrained`.

    Its parameters take no gradient and it stays in evaluation mode; gradients flow to the latents. Text encoders and
    VAE are no part of the module: they are borrowed from a pipeline, or loaded when prompts or pictures need them.

    A score is a function of its own latent, prompt, sigma and noise. What it is batched with, longer prompts beside its
    own and earlier calls change it by rounding alone: in float32 less than 2e-5 of the scores' standard deviation. The
    same call repeated on one CPU gives the same bits. Noise drawn from a generator depends on the place in the batch;
    pass `noise` where latents are to be scored in another order or in batches of another size.
    """

    differentiable = True

    def __init__(
        self,
        model: RewardModel,
        *,
        encoder: PromptEncoder,
        vae: "AutoencoderKL | None" = None,
        folder: Path = Path(),
        local_files_only: bool = False,
    ) -> None:
        """model: frozen (`RewardModel.freeze`). folder: of the checkpoint; a relative base_model_id starts there."""
        super().__init__()
        self.model = model
        self.encoder = encoder
        self._borrowed = {"vae": vae}  # in a dict, so that the module does not own it
        self._folder = folder
        self._local_files_only = local_files_only
        self._statistics_calls = STATISTICS_CALLS
        self.eval()

    @property
    def config(self) -> RewardConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.trunk.device

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        transformer: "SD3Transformer2DModel | str | Path | None" = None,
        pipeline: "StableDiffusion3Pipeline | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        share_weights: bool = True,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "LatentReward":
        """Load a reward in our layout or in DiNa-LRM's released one.

        Args:
            source: a hub id (with `revision`) or a folder.
            transformer: a frozen SD3Transformer2DModel to share weights with, or where to load one. Default: the
                pipeline's, else the base model that the checkpoint names.
            pipeline: to borrow text encoders, VAE and (by default) the transformer from.
            device, dtype: of the backbone; a shared transformer keeps its own and must agree. Default: the
                transformer's, or the CPU and the config's dtype when the transformer is loaded here.
            share_weights: read with the given transformer's own weights; False: with a private copy, LoRA merged in.
            local_files_only: never ask the hub.

        Raises ValueError when tensors are missing, unexpected or of another shape, when the base model does not fit,
        and when the weights to be shared are trained.
        """
        if isinstance(dtype, str) and dtype in DTYPES:
            dtype = DTYPES[dtype]
        if dtype is not None and dtype not in DTYPES.values():
            raise ValueError(f"dtype: got {dtype!r}; known: {', '.join(DTYPES)}")
        device = None if device is None else available_device(device)
        if pipeline is not None:
            _check_pipeline(pipeline)
        checkpoint = read_checkpoint(source, revision=revision, local_files_only=local_files_only)
        config = checkpoint.config
        base = base_location(config.base_model_id, checkpoint.folder, trusted=Path(source).is_dir())
        if transformer is None and pipeline is not None:
            transformer = pipeline.transformer
        loaded_here = transformer is None or isinstance(transformer, str | Path)
        if loaded_here:
            transformer = load_transformer(
                base if transformer is None else transformer,
                dtype=dtype or DTYPES[config.dtype],
                local_files_only=local_files_only,
            ).to(device or "cpu")
        share = config.tuning != "full" and (share_weights or loaded_here)
        model = build_reward_model(config, transformer, share_weights=share)
        load_tensors(model.tuned_tensors(), checkpoint.tensors, checkpoint.where)
        if loaded_here:
            model.trunk.shared = ()  # nobody else holds these weights
        elif share:
            _check_place(model.trunk, device, dtype)
        if not share and device is not None:
            model.to(device)
        merge = not share_weights and config.tuning == "lora"
        model.freeze(merge=merge, dtype=dtype, as_trained=checkpoint.tensors)
        encoder = PromptEncoder(
            base if pipeline is None else pipeline,
            text_length=config.text_length,
            device=model.trunk.device,
            dtype=model.trunk.dtype,
            local_files_only=local_files_only,
        )
        return cls(
            model,
            encoder=encoder,
            vae=None if pipeline is None else pipeline.vae,
            folder=checkpoint.folder,
            local_files_only=local_files_only,
        )

    def forward(
        self,
        latents: Tensor,
        prompts: Sequence[str] | str | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: float | Tensor | Sequence[float] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The score of each sample, (B,) float32, higher is better, differentiable in the latents.

        Args:
            latents: (B, C, H, W), scaled and clean, on the reward's device; any floating dtype.
            prompts: B strings (each encoded once, then cached); or instead of them
            prompt_embeds, pooled_prompt_embeds: (B, L, D) and (B, P); no text encoder is touched then.
            sigma: noise level in [0, 1]; (B,), one per sample; or a list of levels, the multi-noise ensemble. Default:
                the config's.
            noise: (B, C, H, W) standard normal, or (K, B, C, H, W), one per level; or
            generator: to draw it from, on the generator's device, so that a seed means the same score everywhere.
                With neither, every call draws new noise.

        Raises ValueError or TypeError for input that cannot be scored as meant (see `inputs`), ValueError where the
        backbone overflows (float16 does for huge latents): a score is always a finite number.
        """
        raw = self.raw(latents, prompts, prompt_embeds, pooled_prompt_embeds, sigma, noise, generator)
        return raw * self.config.score_scale + self.config.score_bias

    def raw(
        self,
        latents: Tensor,
        prompts: Sequence[str] | str | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: float | Tensor | Sequence[float] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The head's own number, before the checkpoint's scale and bias; arguments as `forward`."""
        self._check_latents(latents)
        inputs.check_text_choice(prompts, prompt_embeds, pooled_prompt_embeds)
        sigma = inputs.check_sigma(self.config.sigma if sigma is None else sigma, len(latents))
        self._warn_of_statistics(latents)
        embeds = self._embeds(prompts, prompt_embeds, pooled_prompt_embeds, len(latents))
        # drawn last, so that a refused call leaves the generator as it was
        noise = inputs.draw_noise(latents, noise, generator, len(sigma) if isinstance(sigma, tuple) else 1)
        raw = self.model(latents, *embeds, sigma=sigma, noise=noise)
        inputs.check_scores(raw, latents, self.model.trunk.dtype)
        return raw

    def score_noisy(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        prompts: Sequence[str] | str | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """The score (B,) of latents that are noisy already, at their own level: the states of a sampling trajectory.

        Nothing is drawn: `reward.score_noisy(add_noise(x0, noise, sigma), sigma, prompts)` is
        `reward(x0, prompts, sigma=sigma, noise=noise)`. Differentiable in the latents, float32, higher is better.

        Args:
            latents: (B, C, H, W), x_sigma = (1 - sigma) x0 + sigma noise, on the reward's device.
            sigma: the level they are at, in [0, 1], a float or (B,): taken as it is, never snapped to a table.
            prompts, or prompt_embeds with pooled_prompt_embeds: as `forward`.

        Raises as `forward`; ValueError for several levels (latents are at one), and for a reward that was trained on
        clean latents alone (`add_noise` false).
        """
        self._check_latents(latents)
        inputs.check_text_choice(prompts, prompt_embeds, pooled_prompt_embeds)
        sigma = inputs.check_sigma(sigma, len(latents))
        if isinstance(sigma, tuple):
            raise ValueError(f"sigma: got levels {sigma}; noisy latents are at one level each: a float or (B,)")
        if not self.config.add_noise:
            raise ValueError(
                "this reward reads clean latents alone (its config says add_noise: false); score the final latents, "
                "reward(latents, prompts)"
            )
        raw = self.model(
            latents,
            *self._embeds(prompts, prompt_embeds, pooled_prompt_embeds, len(latents)),
            sigma=sigma,
            noise=None,
        )
        inputs.check_scores(raw, latents, self.model.trunk.dtype)
        return raw * self.config.score_scale + self.config.score_bias

    @torch.no_grad()
    def score_images(
        self,
        images: "Tensor | Sequence[Image] | Image",
        prompts: Sequence[str] | str | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: float | Tensor | Sequence[float] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scores (B,) of PIL pictures of one size or of (B, 3, H, W) in [0, 1], encoded with the VAE; no gradient.

        sigma defaults to the config's `image_sigma`, or its `sigma` where that is None; the rest as `forward`. Raises
        ValueError when the VAE's scaling is not the one this reward was trained with.
        """
        vae, pixels = self._vae(), image_tensor(images)
        inputs.check_picture_size(pixels, self.model.trunk, 2 ** (len(vae.config.block_out_channels) - 1))
        latents = encode_images(vae, pixels).to(self.device)
        if sigma is None:
            sigma = self.config.sigma if self.config.image_sigma is None else self.config.image_sigma
        return self(latents, prompts, prompt_embeds, pooled_prompt_embeds, sigma, noise, generator)

    def save_pretrained(self, directory: str | Path, format: str = "dinalrm") -> None:
        """Write the reward, in our layout (`dinalrm`) or DiNa-LRM's (`released`). A relative base_model_id is rewritten
        so that it names the same base model from the new folder.
        """
        if not isinstance(directory, str | Path) or not str(directory):
            raise TypeError(f"directory: got {directory!r}; expected the path of a folder")
        base_model_id = relocated(self.config.base_model_id, self._folder, Path(directory))
        config = dataclasses.replace(self.config, base_model_id=base_model_id)
        save_checkpoint(directory, config, self.model.tuned_tensors(), format=format)

    def enable_gradient_checkpointing(self, use_reentrant: bool = False) -> None:
        """Recompute the backbone's blocks in the backward pass: less memory, about a third more time."""
        self.model.enable_gradient_checkpointing(use_reentrant)

    def disable_gradient_checkpointing(self) -> None:
        self.model.disable_gradient_checkpointing()

    def train(self, mode: bool = True) -> "LatentReward":
        """Stay in evaluation mode: a reward with dropout would not be the same twice."""
        return super().train(False)

    def _check_latents(self, latents: Tensor) -> None:
        """TypeError or ValueError unless the weights are where they were and `latents` can be scored by them."""
        self.model.trunk.check_shared()
        head_device = self.model.head.query_tokens.device
        if head_device != self.device:
            raise ValueError(
                f"the backbone's weights are on {self.device}, the reward's head is on {head_device}: the transformer "
                "was moved after the reward was built on it; move it first, build the reward after"
            )
        inputs.check_latents(latents, self.model.trunk, self.device)
        inputs.check_finite("latents", latents)

    def _embeds(
        self,
        prompts: Sequence[str] | str | None,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
        batch: int,
    ) -> tuple[Tensor, Tensor]:
        """Both kinds of embeddings of a batch: encoded if prompts are given, checked, on the reward's device."""
        if prompts is not None:
            prompt_embeds, pooled_prompt_embeds = self.encoder(inputs.check_prompts(prompts, batch))
        inputs.check_embeds(prompt_embeds, pooled_prompt_embeds, self.model.trunk, batch)
        return prompt_embeds.to(self.device), pooled_prompt_embeds.to(self.device)

    def _vae(self) -> "AutoencoderKL":
        if self._borrowed["vae"] is None:
            base = base_location(self.config.base_model_id, self._folder)
            self._borrowed["vae"] = load_vae(base, device=self.device, local_files_only=self._local_files_only)
        vae = self._borrowed["vae"]
        got = (vae.config.scaling_factor, vae.config.shift_factor or 0.0)
        expected = (self.config.vae_scaling_factor, self.config.vae_shift_factor)
        if max(abs(a - b) for a, b in zip(got, expected, strict=True)) > 1e-6:
            raise ValueError(
                f"the VAE scales latents by (scaling_factor, shift_factor) = {got}, this reward was trained with "
                f"{expected}; use the VAE of its base model {self.config.base_model_id}"
            )
        return vae

    def _warn_of_statistics(self, latents: Tensor) -> None:
        """Warn at most once, and look at the first calls alone."""
        if self._statistics_calls > 0:
            message = inputs.statistics_warning(latents, self.config.vae_scaling_factor)
            self._statistics_calls = 0 if message else self._statistics_calls - 1
            if message:
                warnings.warn(f"{message} (said once)", stacklevel=4)


def _check_pipeline(pipeline: "StableDiffusion3Pipeline") -> None:
    """TypeError unless it is a StableDiffusion3Pipeline: another architecture's parts mean something else."""
    from diffusers import StableDiffusion3Pipeline

    if not isinstance(pipeline, StableDiffusion3Pipeline):
        raise TypeError(f"pipeline: got {type(pipeline).__name__}, expected diffusers' StableDiffusion3Pipeline")


def _check_place(trunk: SD3Trunk, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """ValueError when sharing is asked for at another device or dtype than the transformer's."""
    here = (trunk.device, trunk.dtype)
    wanted = (here[0] if device is None else torch.device(device), here[1] if dtype is None else dtype)
    same_place = wanted[0].type == here[0].type and (
        wanted[0].type == "cpu" or wanted[0].index in (None, here[0].index)  # processes call theirs cpu:0
    )
    if not same_place or wanted[1] != here[1]:
        raise ValueError(
            f"the reward is to share the weights of a transformer on {here[0]} in {here[1]}, but {wanted[0]} in "
            f"{wanted[1]} was asked for; convert the transformer first, leave device and dtype out, or use "
            "share_weights=False"
        )
