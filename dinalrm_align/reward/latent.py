"""LatentReward: a frozen reward model that scores latents for prompts, differentiable in the latents.

    reward = LatentReward.from_pretrained("liuhuohuo/DiNa-LRM-SD35M-12layers", pipeline=pipeline)
    score = reward(latents, prompts)            # (B,) float32, higher is better; gradients reach the latents

score = raw * score_scale + score_bias, where raw is the head's output (arXiv 2602.11146). The checkpoint's config sets
`score_scale` and `score_bias`.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinalrm_align.models.images import image_tensor
from dinalrm_align.models.pipeline import encode_images, load_transformer, load_vae
from dinalrm_align.models.text import Conditions, PromptEncoder, prompts_of
from dinalrm_align.models.weights import load_tensors
from dinalrm_align.reward import inputs
from dinalrm_align.reward.backbones.sd3 import SD3Trunk
from dinalrm_align.reward.card import model_card
from dinalrm_align.reward.checkpoint import base_location, read_checkpoint, relocated, write_reward
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.model import RewardModel, build_reward_model
from dinalrm_align.reward.protocol import RewardModule, Sigma, Text
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import write_atomically

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel
    from PIL.Image import Image

STATISTICS_CALLS = 10
"""Number of first calls that check the statistics of their latents. The check synchronises with the device."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SD3_PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
"""Pipelines that have SD3's transformer, text encoders and VAE."""


class LatentReward(RewardModule):
    """A frozen reward model that scores scaled latents. Load a reward with `from_pretrained`.

    No parameter requires a gradient, and the module stays in evaluation mode. Gradients flow to the latents. Text
    encoders and VAE are not submodules: they are taken from a pipeline, or loaded on first use.

    A score depends only on the sample's own latent, prompt, sigma and noise. The rest of the batch changes the score by
    rounding only: in float32, by less than 2e-5 of the scores' standard deviation. Repeated calls on one CPU return
    bit-identical scores. Noise drawn from a generator depends on the sample's index in the batch. Pass `noise` to get
    the same scores with another batch order or batch size.
    """

    name = "dinalrm"
    reads_noise = True

    def __init__(
        self,
        model: RewardModel,
        *,
        encoder: PromptEncoder,
        vae: "AutoencoderKL | None" = None,
        folder: Path = Path(),
        local_files_only: bool = False,
    ) -> None:
        """Create a reward from components that are already loaded. Most callers use `from_pretrained` instead.

        Args:
            model: reward model on which `RewardModel.freeze` has been called.
            encoder: encodes prompts that are passed as strings.
            vae: encodes images for `score_images`; default: the base model's VAE, loaded on first use.
            folder: folder of the checkpoint. A relative base_model_id is resolved from `folder`.
            local_files_only: never contact the hub.
        """
        super().__init__()
        self.model = model
        self.encoder = encoder
        self._borrowed = {"vae": vae}  # in a dict, so that it is not a submodule
        self._folder = folder
        self._local_files_only = local_files_only
        self._statistics_calls = STATISTICS_CALLS
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
    def noise_parts(self) -> "tuple[LatentReward, ...]":
        return (self,)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        transformer: "SD3Transformer2DModel | str | Path | None" = None,
        pipeline: "DiffusionPipeline | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        share_weights: bool = True,
        local_files_only: bool = False,
        **hub: Any,
    ) -> "LatentReward":
        """Load a reward from a checkpoint in this package's layout or in DiNa-LRM's released layout.

        Args:
            source: hub id or folder of the checkpoint.
            transformer: frozen SD3Transformer2DModel to share weights with, or the hub id or folder of a
                transformer to load. Default: the pipeline's transformer, or else the checkpoint's base model.
            pipeline: StableDiffusion3Pipeline, or its img2img or inpaint variant. The reward uses the pipeline's text
                encoders, VAE and (by default) transformer.
            device, dtype: the backbone's device and dtype. Default: the given transformer's. If this call loads the
                transformer: CPU and the config's dtype. With shared weights, both must equal the transformer's.
            share_weights: True: use the weights of the given transformer. False: use a private copy, with the LoRA
                merged in.
            local_files_only: never contact the hub.
            hub: `revision`, `token`, `cache_dir` and `subfolder` of `source`, as in huggingface_hub.

        Raises ValueError if tensors of the checkpoint are missing, unexpected or misshapen, if the base model does
        not fit the checkpoint, or if the weights to share are not frozen.
        """
        if isinstance(dtype, str) and dtype in DTYPES:
            dtype = DTYPES[dtype]
        if dtype is not None and dtype not in DTYPES.values():
            raise ValueError(f"dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
        device = None if device is None else available_device(device)
        if pipeline is not None:
            _check_pipeline(pipeline)
        checkpoint = read_checkpoint(source, local_files_only=local_files_only, **hub)
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
            model.trunk.share(())  # the reward is the only owner of these weights
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
        prompts: Text | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: Sigma | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return scores (B,), float32, higher is better, differentiable in the latents.

        Args:
            latents: (B, C, H, W), scaled and clean, on the reward's device; any floating dtype.
            prompts: B strings (each is encoded once, then cached) or Conditions. Pass prompts or both embeddings.
            prompt_embeds, pooled_prompt_embeds: embeddings from the pipeline's `encode_prompt`, (B, L, D) and (B, P).
            sigma: noise level in [0, 1]: a float, a tensor (B,) with one level per sample, or a list of K levels
                (multi-noise ensemble). Default: the config's.
            noise: standard normal noise: (B, C, H, W), or (K, B, C, H, W) with one draw per level. Default: drawn here.
            generator: draws the noise on the generator's device, so a CPU generator gives the same noise on every
                device. Default: torch's global RNG.

        Raises ValueError or TypeError for invalid arguments (see `reward.inputs`), and ValueError if a score is not
        finite, for instance if float16 overflows on huge latents.
        """
        inputs.check_text_choice(prompts, prompt_embeds, pooled_prompt_embeds)
        if prompts is None:
            self._check_latents(latents)
            inputs.check_embeds(prompt_embeds, pooled_prompt_embeds, self.backbone, len(latents))
            prompts = Conditions([""] * len(latents), prompt_embeds, pooled_prompt_embeds)
        return self._scaled(self.raw(latents, prompts, sigma=sigma, noise=noise, generator=generator))

    def raw(
        self,
        latents: Tensor,
        prompts: Text,
        *,
        sigma: Sigma | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the head's output (B,), before `score_scale` and `score_bias`. Arguments and errors: see `forward`."""
        self._check_latents(latents)
        sigma = inputs.check_sigma(self.config.sigma if sigma is None else sigma, len(latents))
        self._warn_of_statistics(latents)
        embeds = self._embeds(prompts, len(latents))
        # drawn last, so that a refused call does not advance the generator
        noise = inputs.draw_noise(latents, noise, generator, len(sigma) if isinstance(sigma, tuple) else 1)
        return self._checked(self.model(latents, *embeds, sigma=sigma, noise=noise), latents)

    def score_noisy(self, latents: Tensor, sigma: float | Tensor, prompts: Text) -> Tensor:
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
        self._check_latents(latents)
        sigma = inputs.check_sigma(sigma, len(latents))
        if isinstance(sigma, tuple):
            raise ValueError(f"sigma: got levels {sigma}; expected one level per sample, a float or (B,)")
        if not self.config.add_noise:
            raise ValueError(
                "this reward reads clean latents only (its config says add_noise: false); score the final latents, "
                "reward(latents, prompts)"
            )
        raw = self.model(latents, *self._embeds(prompts, len(latents)), sigma=sigma, noise=None)
        return self._scaled(self._checked(raw, latents))

    @torch.no_grad()
    def score_images(
        self,
        images: "Tensor | Sequence[Image] | Image",
        prompts: Text,
        *,
        sigma: Sigma | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Encode images with the VAE and return the scores (B,), float32, without gradient.

        Args:
            images: PIL images of one size, or (B, 3, H, W) in [0, 1].
            sigma: noise level, as in `forward`. Default: the config's `image_sigma`, or the config's `sigma` if
                `image_sigma` is None.

        prompts, noise, generator: as in `forward`. Raises ValueError if the VAE's scaling differs from the config's.
        """
        vae, pixels = self._vae(), image_tensor(images)
        inputs.check_images_fit(pixels, self.backbone, 2 ** (len(vae.config.block_out_channels) - 1))
        latents = encode_images(vae, pixels).to(self.device)
        if sigma is None:
            sigma = self.config.sigma if self.config.image_sigma is None else self.config.image_sigma
        return self(latents, prompts, sigma=sigma, noise=noise, generator=generator)

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
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, format)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))

    def enable_gradient_checkpointing(self, use_reentrant: bool = False) -> None:
        """Recompute the backbone's blocks in the backward pass. This saves memory and takes about a third more time."""
        self.backbone.enable_gradient_checkpointing(use_reentrant)

    def disable_gradient_checkpointing(self) -> None:
        self.backbone.disable_gradient_checkpointing()

    def replace_shared(self, made: Mapping[int, Tensor]) -> None:
        """Record new tensors as the weights shared with the transformer. made: {id(old tensor): new tensor}."""
        self.backbone.share(made[id(tensor)] for tensor in self.backbone.shared)

    def _scaled(self, raw: Tensor) -> Tensor:
        return raw * self.config.score_scale + self.config.score_bias

    def _checked(self, raw: Tensor, latents: Tensor) -> Tensor:
        inputs.check_scores(raw, latents, self.backbone.dtype)
        return raw

    def _check_latents(self, latents: Tensor) -> None:
        """Raise unless backbone and head are on one device, shared weights are frozen, and `latents` is valid."""
        self.backbone.check_shared()
        head_device = self.model.head.query_tokens.device
        if head_device != self.device:
            raise ValueError(
                f"the backbone's weights are on {self.device}, the reward's head is on {head_device}: the transformer "
                "was moved after the reward was built on it; move it first, build the reward after"
            )
        inputs.check_latents_fit(latents, self.backbone, self.device)
        inputs.check_finite("latents", latents)

    def _embeds(self, prompts: Text, batch: int) -> tuple[Tensor, Tensor]:
        """Encode `prompts` if needed. Return checked (prompt_embeds, pooled_prompt_embeds) on the reward's device."""
        if isinstance(prompts, Conditions):
            embeds, pooled = prompts.for_length(self.config.text_length)
        else:
            embeds, pooled = self.encoder(prompts_of(prompts, batch))
        inputs.check_embeds(embeds, pooled, self.backbone, batch)
        return embeds.to(self.device), pooled.to(self.device)

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
        """Warn, at most once, if the latents look unscaled or collapsed. Only the reward's first calls are checked."""
        if self._statistics_calls > 0:
            message = inputs.statistics_warning(latents, self.config.vae_scaling_factor)
            self._statistics_calls = 0 if message else self._statistics_calls - 1
            if message:
                warnings.warn(f"{message} (shown once)", stacklevel=4)


def _check_pipeline(pipeline: "DiffusionPipeline") -> None:
    """Raise TypeError unless `pipeline` is an SD3 pipeline."""
    if type(pipeline).__name__ not in SD3_PIPELINES:
        raise TypeError(f"pipeline: got {type(pipeline).__name__}; expected one of {', '.join(SD3_PIPELINES)}")


def _check_place(trunk: SD3Trunk, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError if a given `device` or `dtype` differs from that of `trunk`, whose weights are shared."""
    here = (trunk.device, trunk.dtype)
    wanted = (here[0] if device is None else torch.device(device), here[1] if dtype is None else dtype)
    same_place = wanted[0].type == here[0].type and (
        wanted[0].type == "cpu" or wanted[0].index in (None, here[0].index)  # multi-process runs name it cpu:0
    )
    if not same_place or wanted[1] != here[1]:
        raise ValueError(
            f"the reward is to share the weights of a transformer on {here[0]} in {here[1]}, but {wanted[0]} in "
            f"{wanted[1]} was asked for; convert the transformer first, leave device and dtype out, or use "
            "share_weights=False"
        )
