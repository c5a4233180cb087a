"""LatentReward: a frozen reward model that scores latents for prompts, differentiable in the latents.

    reward = LatentReward.from_pretrained("liuhuohuo/DiNa-LRM-SD35M-12layers", pipeline=pipeline)
    score = reward(latents, prompts)            # (B,) float32, higher is better; gradients reach the latents

score = raw * score_scale + score_bias, where raw is the head's output (arXiv 2602.11146). The checkpoint's config sets
`score_scale` and `score_bias`.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinalrm_align.models.images import Images, image_tensor
from dinalrm_align.models.pipeline import encode_images, load_vae
from dinalrm_align.models.text import Conditions, PromptEncoder, prompts_of
from dinalrm_align.models.weights import loading
from dinalrm_align.reward import inputs
from dinalrm_align.reward.backbones.sd3 import SD3Trunk
from dinalrm_align.reward.card import model_card
from dinalrm_align.reward.checkpoint import base_location, relocated, write_reward
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.loading import check_place, check_vae, load_parts
from dinalrm_align.reward.model import RewardModel
from dinalrm_align.reward.origin import Origin, absolute
from dinalrm_align.reward.protocol import Latents, RewardModule, Seeds, Sigma, Text, scoring
from dinalrm_align.train.checks import check
from dinalrm_align.train.device import available_device, to_device
from dinalrm_align.train.files import write_atomically
from dinalrm_align.train.hub import upload

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel

STATISTICS_CALLS = 10  # number of first calls that check the statistics of their latents


class LatentReward(RewardModule):
    """A frozen reward model that scores scaled latents. Load a reward with `from_pretrained`.

    No parameter requires a gradient, and the module stays in evaluation mode. Gradients flow to the latents. Text
    encoders and VAE are not submodules: they are taken from a pipeline, or loaded on first use.

    A score depends only on the sample's own latent, prompt, sigma and noise. The rest of the batch changes the score by
    rounding only: in float32, by less than 2e-5 of the scores' standard deviation. Repeated calls on one CPU return
    bit-identical scores. Autocast around a call changes no score, and a call never uses the global RNG.

    Which noise a sample gets: `noise` or `seeds` if passed (the noise of a seed is the same in every batch); with a
    `generator`, noise that depends on the sample's index in the batch; by default, the noise of seed 0 for every
    sample. Samples that share their noise compare best: with noise of their own, the scores of a group vary from noise
    alone, in an earlier embedded world by a standard deviation of 0.22 against 0.51 between samples. Compare scores of
    equal sigma only.

    A pickled reward holds its source and arguments, no tensors; the process that unpickles it loads the weights. What
    was set after loading, such as gradient checkpointing, is not kept.
    """

    name = "dinalrm"
    reads_noise = True

    def __init__(
        self,
        model: RewardModel,
        *,
        encoder: PromptEncoder,
        vae: "AutoencoderKL | None" = None,
        base: str | None = None,
        folder: Path = Path(),
        local_files_only: bool = False,
    ) -> None:
        """Create a reward from components that are already loaded. Most callers use `from_pretrained` instead.

        Args:
            model: reward model on which `RewardModel.freeze` has been called.
            encoder: encodes prompts that are passed as strings.
            vae: encodes images for `score_images`; default: the VAE of `base`, loaded on first use.
            base: hub id or folder of the pipeline that has the VAE; default: the config's base model.
            folder: folder of the checkpoint. A relative base_model_id is resolved from `folder`.
            local_files_only: never contact the hub.
        """
        super().__init__()
        self.model = model
        self.encoder = encoder
        self._borrowed = {"vae": vae}  # in a dict, so that it is not a submodule
        self._owns_vae = vae is None
        self._base = base
        self._folder = folder
        self._local_files_only = local_files_only
        self._statistics_calls = STATISTICS_CALLS
        self._length_warned = False
        self.eval()

    @property
    def config(self) -> RewardConfig:
        return self.model.config

    @property
    def backbone(self) -> SD3Trunk:
        """The first blocks of a diffusion transformer, which read the latents."""
        return self.model.trunk

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def sigmas(self) -> tuple[Sigma, Sigma]:
        return self.config.sigma, self.config.sigma if self.config.image_sigma is None else self.config.image_sigma

    @property
    def noise_parts(self) -> "tuple[LatentReward, ...]":
        return (self,)

    @classmethod
    @loading()
    def from_pretrained(
        cls,
        source: str | Path,
        transformer: "SD3Transformer2DModel | str | Path | None" = None,
        pipeline: "DiffusionPipeline | str | Path | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        share_weights: bool = True,
        *,
        sigma: Sigma | None = None,
        text_length: int | None = None,
        **hub: Any,
    ) -> "LatentReward":
        """Load a reward from a checkpoint in this package's layout or in DiNa-LRM's released layout.

        Args:
            source: hub id or folder of the checkpoint.
            transformer: frozen SD3Transformer2DModel to share weights with, or the hub id or folder of a
                transformer to load. Default: the pipeline's transformer, or else the checkpoint's base model.
            pipeline: StableDiffusion3Pipeline, or its img2img or inpaint variant. The reward uses the pipeline's text
                encoders, VAE and (by default) transformer. A hub id or folder: these parts are loaded from there, text
                encoders and VAE on first use.
            device, dtype: the backbone's device and dtype. Default: the given transformer's. If this call loads the
                transformer: CPU and the config's dtype. With shared weights, both must equal the transformer's.
            share_weights: True: use the weights of the given transformer. False: use a private copy, with the LoRA
                merged in.
            sigma: default noise level of latents and of images, in place of the two in the checkpoint's config.
            text_length: T5 tokens per prompt, 1 to 512, in place of the number in the checkpoint's config.
            hub: `local_files_only`, `revision`, `token`, `cache_dir` and `subfolder`, as in huggingface_hub.

        Raises ValueError if tensors of the checkpoint are missing, unexpected or misshapen, if the base model does
        not fit the checkpoint, or if the weights to share are not frozen.
        """
        source, transformer, pipeline = (absolute(given) for given in (source, transformer, pipeline))
        options = dict(transformer=transformer, pipeline=pipeline, device=device, dtype=dtype, sigma=sigma, **hub)
        options |= dict(share_weights=share_weights, text_length=text_length)
        parts, loaded_dtype, fingerprint = load_parts(source, **options)
        reward = cls(**parts)
        reward.loaded_by(Origin(cls.from_pretrained, source, options | {"dtype": loaded_dtype}, fingerprint))
        return reward

    @scoring
    def forward(
        self,
        latents: Latents,
        prompts: Text | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: Sigma | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        seeds: Seeds | None = None,
    ) -> Tensor:
        """Return scores (B,), float32, higher is better, differentiable in the latents.

        Args:
            latents: (B, C, H, W), scaled and clean, on the reward's device; any floating dtype. Also a list of
                (C, H, W), one (C, H, W) for B = 1, and NumPy arrays, which are copied to the device.
            prompts: B strings (each is encoded once, then cached) or Conditions. Pass prompts or both embeddings.
            prompt_embeds, pooled_prompt_embeds: embeddings from the pipeline's `encode_prompt`, (B, L, D) and (B, P).
            sigma: noise level in [0, 1]: a float, a tensor (B,) with one level per sample, or a list of K levels
                (multi-noise ensemble). Default: the config's.
            noise: standard normal noise: (B, C, H, W), or (K, B, C, H, W) with one draw per level.
            generator: draws the noise on the generator's device, so a CPU generator gives the same noise on every
                device.
            seeds: B integers from 0 to 2**32 - 1; seed s draws the noise of its sample with
                torch.Generator().manual_seed(s). Default without noise, generator and seeds: seed 0 for every sample.

        Raises ValueError or TypeError for invalid arguments (see `reward.inputs`), and ValueError if a score is not
        finite, for instance if float16 overflows on huge latents.
        """
        inputs.check_text_choice(prompts, prompt_embeds, pooled_prompt_embeds)
        if prompts is None:
            latents = self._batch(latents)
            inputs.check_embeds(prompt_embeds, pooled_prompt_embeds, self.backbone, len(latents))
            prompts = Conditions([""] * len(latents), prompt_embeds, pooled_prompt_embeds)
        return self._scaled(self.raw(latents, prompts, sigma=sigma, noise=noise, generator=generator, seeds=seeds))

    @scoring
    def raw(
        self,
        latents: Latents,
        prompts: Text,
        *,
        sigma: Sigma | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        seeds: Seeds | None = None,
    ) -> Tensor:
        """Return the head's output (B,), before `score_scale` and `score_bias`. Arguments and errors: see `forward`."""
        latents = self._batch(latents)
        sigma = inputs.check_sigma(self.config.sigma if sigma is None else sigma, len(latents))
        self._warn_of_statistics(latents)
        embeds = self._embeds(prompts, len(latents))
        # drawn last, so that a refused call does not advance the generator
        noise = inputs.draw_noise(latents, noise, generator, seeds, len(sigma) if isinstance(sigma, tuple) else 1)
        return self._run(latents, embeds, sigma, noise)

    @scoring
    def score_noisy(self, latents: Latents, sigma: float | Tensor, prompts: Text) -> Tensor:
        """Return scores (B,), float32, of latents that already contain noise, such as states of a sampling trajectory.

        No noise is added. `reward.score_noisy(add_noise(x0, noise, sigma), sigma, prompts)` equals `reward(x0, prompts,
        sigma=sigma, noise=noise)` unless the config sets `snap_sigma`. Higher scores are better. Gradients reach the
        latents.

        Args:
            latents: x_sigma = (1 - sigma) x0 + sigma noise, (B, C, H, W), on the reward's device.
            sigma: noise level in [0, 1] of the latents, a float or (B,). Never rounded, even with `snap_sigma`.
            prompts: B strings, or Conditions.

        Raises the errors of `forward`. Also raises ValueError for a list of levels, or if the reward was trained on
        clean latents only (`add_noise` is False in the config).
        """
        latents = self._batch(latents)
        sigma = inputs.check_sigma(sigma, len(latents))
        if isinstance(sigma, tuple):
            raise ValueError(f"sigma: got levels {sigma}; expected one level per sample, a float or (B,)")
        if not self.config.add_noise:
            raise ValueError(
                "this reward reads clean latents only (its config says add_noise: false); score the final latents, "
                "reward(latents, prompts)"
            )
        return self._scaled(self._run(latents, self._embeds(prompts, len(latents)), sigma, None))

    @scoring
    def score_images(
        self,
        images: Images,
        prompts: Text,
        *,
        sigma: Sigma | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        seeds: Seeds | None = None,
        differentiable: bool = False,
    ) -> Tensor:
        """Encode images with the VAE (the mean of its distribution) and return the scores (B,), float32.

        Args:
            images: as for `models.images.image_tensor`, which turns PIL images upright.
            sigma: noise level, as in `forward`. Default: the config's `image_sigma`, or the config's `sigma` if
                `image_sigma` is None.
            differentiable: whether gradients reach images that are a tensor. The VAE is then frozen in place.

        prompts, noise, generator, seeds: as in `forward`. Raises ValueError if the VAE's scaling differs from the
        config's.
        """
        self.check_onloaded()
        vae, pixels = self._vae(), image_tensor(images)
        inputs.check_images_fit(pixels, self.backbone, 2 ** (len(vae.config.block_out_channels) - 1))
        sigma = self.sigmas[1] if sigma is None else sigma
        if differentiable:
            vae.requires_grad_(False)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            latents = encode_images(vae, pixels, differentiable=differentiable).to(self.device)
            return self(latents, prompts, sigma=sigma, noise=noise, generator=generator, seeds=seeds)

    def save_pretrained(self, directory: str | Path, format: str = "dinalrm") -> None:
        """Write a checkpoint and a model card. format: `dinalrm` (this package's layout) or `released` (DiNa-LRM's).

        A relative base_model_id is rewritten to be relative to `directory`. An existing README.md is not overwritten.
        """
        if not isinstance(directory, str | Path) or not str(directory):
            raise TypeError(f"directory: got {directory!r}; expected the path of a folder")
        base_model_id = relocated(self.config.base_model_id, self._folder, Path(directory))
        config = dataclasses.replace(self.config, base_model_id=base_model_id)
        write_reward(directory, config, self.model.tuned_tensors(), format=format)
        if not (card := Path(directory) / "README.md").exists():
            write_atomically(card, model_card(config))

    def push_to_hub(self, repo_id: str, *, format: str = "dinalrm", private: bool | None = None, **options: Any) -> str:
        """Upload the output of `save_pretrained` to a hub repository (created if needed). Return the commit's URL.

        options: `token`, and arguments of `HfApi.upload_folder` in huggingface_hub, such as `commit_message`.
        """

        def write(folder: Path, repo_id: str) -> None:
            self.save_pretrained(folder, format)
            write_atomically(folder / "README.md", model_card(self.config, repo_id))

        return upload(repo_id, write, private=private, **options)

    def enable_gradient_checkpointing(self, use_reentrant: bool = False) -> None:
        """Recompute the backbone's blocks in the backward pass. This saves memory and takes about a third more time."""
        self.backbone.enable_gradient_checkpointing(use_reentrant)

    def disable_gradient_checkpointing(self) -> None:
        self.backbone.disable_gradient_checkpointing()

    def _scaled(self, raw: Tensor) -> Tensor:
        return raw * self.config.score_scale + self.config.score_bias

    def _run(self, latents: Tensor, embeds: tuple[Tensor, Tensor], sigma: Sigma, noise: Tensor | None) -> Tensor:
        raw = self.model(latents, *embeds, sigma=sigma, noise=noise)
        inputs.check_scores(raw, latents, self.backbone.dtype)
        return raw

    def onload(self, device: torch.device | str | None = None) -> None:
        if self.backbone.shared and device is not None:
            check_place(self.backbone, available_device(device), None)
        super().onload(device)

    def _move(self, device: torch.device) -> None:
        if not self.backbone.shared:
            self.to(device)
        else:
            self.model.head.to(device)
            for weight in self.backbone.lora_parameters().values():
                weight.data = weight.data.to(device)
        self.encoder.to(device)
        if self._owns_vae and self._borrowed["vae"] is not None:
            self._borrowed["vae"].to(device)

    def __reduce_ex__(self, protocol: int) -> Any:
        if self.origin is None:
            raise TypeError(
                "this reward was built from parts and cannot be pickled; save it with save_pretrained, and pickle "
                "LatentReward.from_pretrained(folder)"
            )
        return super().__reduce_ex__(protocol)

    def _dtypes(self) -> dict[str, torch.dtype]:
        return dict(trunk=self.backbone.dtype, head=self.model.head.query_tokens.dtype)

    def _batch(self, latents: Latents) -> Tensor:
        """Return `latents` as (B, C, H, W). Raise unless they are valid and the weights are ready to score them."""
        self.check_onloaded()
        latents = inputs.as_batch("latents", latents, self.device)
        self.backbone.check_shared()
        head_device = self.model.head.query_tokens.device
        if head_device != self.device:
            raise ValueError(
                f"the backbone's weights are on {self.device}, the reward's head is on {head_device}: the transformer "
                "was moved after the reward was built on it; move it first, build the reward after"
            )
        inputs.check_latents_fit(latents, self.backbone, self.device)
        inputs.check_finite("latents", latents)
        return latents

    def _embeds(self, prompts: Text, batch: int) -> tuple[Tensor, Tensor]:
        """Encode `prompts` if needed. Return checked (prompt_embeds, pooled_prompt_embeds) on the reward's device."""
        given = isinstance(prompts, Conditions)
        if given:
            embeds, pooled = prompts.for_length(self.config.text_length)
        else:
            embeds, pooled = self.encoder(prompts_of(prompts, batch))
        inputs.check_embeds(embeds, pooled, self.backbone, batch)
        if given and not self._length_warned:
            message = inputs.length_warning(embeds.shape[1], self.encoder.clip_tokens, self.config.text_length)
            self._length_warned = message is not None
            if message:
                warnings.warn(f"{message} (shown once)", stacklevel=4)
        return to_device(embeds, self.device), to_device(pooled, self.device)

    def _vae(self) -> "AutoencoderKL":
        if self._borrowed["vae"] is None:
            with loading():  # one thread loads the VAE, and the others wait for it
                if self._borrowed["vae"] is None:
                    base = self._base or base_location(self.config.base_model_id, self._folder)
                    self._borrowed["vae"] = load_vae(base, device=self.device, local_files_only=self._local_files_only)
        vae = self._borrowed["vae"]
        check_vae(vae, self.config)
        return vae

    def _warn_of_statistics(self, latents: Tensor) -> None:
        """Warn, at most once, if the latents look unscaled or collapsed. Only the reward's first calls are checked."""

        def judge(measured: list[float]) -> None:
            message = inputs.statistics_warning(measured, self.config.vae_scaling_factor)
            if message and self._statistics_calls >= 0:
                self._statistics_calls = -1  # later messages of deferred checks are not shown
                warnings.warn(f"{message} (shown once)", stacklevel=6)

        if self._statistics_calls > 0:
            self._statistics_calls -= 1
            check(inputs.statistics(latents), judge)
