"""LRM (arXiv 2502.01051): a reward of noisy latents of Stable Diffusion 1.5 or XL, at DDPM timesteps.

    reward = load_reward("lrm-sd15=/data/LRM/lrm_sd15")
    reward.score_timestep(latents, 401, prompts)     # latents of SD1.5 in the middle of sampling
    reward.score_images(images, prompts)             # encoded by SD1.5's VAE
    load_reward("lrm-sdxl", pipeline=sd3_pipeline)   # latents of SD3: decoded, resized, encoded by SDXL's VAE

Weights: folders or files of hub id casiatao/LRM. Code MIT; for the weights see the model card. Layout of a folder:
unet/, text_encoder/, for SDXL text_encoder_2/, and state_dict.pt with the projections and logit_scale. An LRM for SDXL
may also be one file that holds all tensors. The tokenizers and the VAE are those of the base model, and for one file
the configs too. Score: exp(logit_scale) cos; logit_scale begins at ln(1 / 0.07) in training. `reward.lrm_model` has the
arithmetic.

LRM was trained with the noise of timesteps 1, 51, ..., 951, and its authors validate at timestep 1. Clean latents are
scored as they are, at timestep 1: the noise of this timestep has a standard deviation of 0.04. LPO scores the output of
the step at timestep t at timestep t, too. Images are squeezed to the square of the training, with antialiased
bilinear interpolation as by PIL, and encoded as the posterior mean. LRM-XL was trained with the VAE
madebyollin/sdxl-vae-fp16-fix, a float16 version of SDXL's.
"""

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Unpack

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from dinalrm_align.flow.noise import check_latents
from dinalrm_align.models.pipeline import encode_images, load_vae
from dinalrm_align.models.text import prompts_of
from dinalrm_align.models.weights import HubOptions, beside
from dinalrm_align.reward.inputs import as_batch, check_finite
from dinalrm_align.reward.lrm_model import FAMILIES, LrmModel, load_lrm
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.protocol import Latents, Noise, Text, finite_scores, scoring
from dinalrm_align.train.device import available_device, to_device

SOURCE = "casiatao/LRM"
CLEAN = 1
"""Timestep at which clean latents and images are scored by default."""
_LOADING = threading.Lock()
"""Held while a VAE is loaded, so that threads load one."""


class LrmReward(PixelReward):
    """A frozen LRM. Load one with `from_pretrained`.

    Its own latents are scored directly. Latents of another model are decoded with the VAE of that model, `vae`, and
    encoded with LRM's own. The VAE of LRM is loaded for the first image. Gradients reach latents and images.
    """

    def __init__(
        self, model: LrmModel, *, family: str, base: str | Path, timestep: int = CLEAN, vae: AutoencoderKL | None = None
    ) -> None:
        """family: in FAMILIES. base: folder or hub id that has LRM's VAE. timestep: of clean latents and images."""
        super().__init__(vae)
        self.model, self.family, self.timestep = model, FAMILIES[family], timestep
        self.name = f"lrm-{family}"
        self._base, self._hub = base, HubOptions()
        self._own: dict[str, AutoencoderKL] = {}  # a dict: no submodule
        self.eval()

    @classmethod
    @torch.inference_mode(False)  # weights loaded in inference mode would not allow gradients
    def from_pretrained(
        cls,
        source: str | Path = SOURCE,
        *,
        family: str,
        base: str | Path | None = None,
        subfolder: str | None = None,
        timestep: int = CLEAN,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub: Unpack[HubOptions],
    ) -> "LrmReward":
        """Load an LRM. The arguments not listed here, and the errors, are documented in `reward.pixel`.

        Args:
            family: base model of the LRM, sd15 or sdxl.
            base: folder or hub id of the base model. Default: the folder of the weights if it also has a folder
                tokenizer, else SD1.5 or SDXL on the hub.
            subfolder: folder in `source`; default: lrm_sd15 or lrm_sdxl, as LPO's settings name them. It is not needed
                if `source` is the folder itself, or a file.
            timestep: DDPM timestep at which clean latents and images are scored, 0 to 999.
        """
        if family not in FAMILIES:
            raise ValueError(f"family: got {family!r}; expected {' or '.join(FAMILIES)}")
        base = base or beside(source, "tokenizer/tokenizer_config.json") or FAMILIES[family].base
        options = dict(subfolder=subfolder, device=available_device(device or "cpu"), dtype=dtype or torch.float32)
        model = load_lrm(source, family, base, **options, **hub)
        reward = cls(model, family=family, base=base, timestep=_checked(timestep), vae=vae)
        reward._hub = HubOptions(**{name: value for name, value in hub.items() if name != "revision"})
        return reward

    @scoring
    def forward(self, latents: Latents, prompts: Text, **noise: Unpack[Noise]) -> Tensor:
        """Return scores (B,), float32, of scaled clean latents for B prompts, differentiable in the latents.

        latents: (B, 4, h, w) of LRM's base model; with the `vae` of another model, of that one. `noise` is ignored. In
        a sum of rewards that has a VAE, latents are decoded for all image rewards, and LRM encodes the images.
        """
        if self.has_vae and not self._is_own(self.vae):
            return super().forward(latents, prompts)
        return self.score_timestep(latents, self.timestep, prompts)

    @scoring
    def score_timestep(self, latents: Latents, timestep: int | Tensor, prompts: Text) -> Tensor:
        """Return scores (B,), float32, of scaled latents (B, 4, h, w) of LRM's base model, differentiable in them.

        timestep: DDPM timestep from 0 to 999 of the noise in the latents, sqrt(abar_t) x0 + sqrt(1 - abar_t) noise: an
        integer, or a tensor (B,). No noise is added. Scores of different timesteps are not comparable.
        Raises TypeError or ValueError for invalid input, such as latents with other than 4 channels.
        """
        self.check_onloaded()
        latents = as_batch("latents", latents, self.device)
        check_latents("latents", latents)
        if latents.shape[1] != 4 or latents.numel() == 0:
            raise ValueError(
                f"latents: got shape {tuple(latents.shape)}; {self.name} reads {self.family.latents}, at least one; "
                "for those of another model pass its VAE, vae=... or pipeline=..., or score images"
            )
        if latents.device != self.device:
            raise ValueError(f"latents are on {latents.device}, the reward is on {self.device}: move one of them")
        check_finite("latents", latents)
        prompts, timesteps = prompts_of(prompts, len(latents)), _timesteps(timestep, len(latents), self.device)
        return finite_scores(self.model(latents, timesteps, prompts), len(latents), self.name)

    def score_noisy(self, latents: Tensor, sigma: float | Tensor, prompts: Text) -> NoReturn:
        """Raise TypeError: LRM reads DDPM timesteps, not sigma. See `score_timestep`."""
        raise TypeError(
            f"{self.name} does not score latents at a flow-matching sigma: it reads {self.family.latents}, with DDPM "
            "noise of an integer timestep; call score_timestep(latents, timestep, prompts)"
        )

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        size = (self.model.side, self.model.side)
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        latents = encode_images(self.encoder, images, differentiable=True).to(self.device)
        return self.model(latents, _timesteps(self.timestep, len(latents), self.device), prompts)

    @property
    def encoder(self) -> AutoencoderKL:
        """The VAE of LRM's base model, frozen, in float32: the given `vae` if it is one, else loaded at first use."""
        if self.has_vae and self._is_own(self.vae):
            return self.vae
        with _LOADING, torch.inference_mode(False):
            if "vae" not in self._own:
                vae = load_vae(self._base, device=self.device, **self._hub)
                if not self._is_own(vae):
                    scales = f"scaling_factor {vae.config.scaling_factor} and shift_factor {vae.config.shift_factor}"
                    got = f"the VAE of {str(self._base)!r} has {vae.config.latent_channels} channels with {scales}"
                    raise ValueError(f"base: {got}; expected the VAE for {self.family.latents}")
                if self._recompute:
                    vae.enable_gradient_checkpointing()
                self._own["vae"] = vae
        return self._own["vae"]

    def _is_own(self, vae: AutoencoderKL) -> bool:
        same = math.isclose(vae.config.scaling_factor, self.family.scaling_factor, rel_tol=1e-4)
        return same and vae.config.latent_channels == 4 and not vae.config.shift_factor

    def _set_recompute(self, recompute: bool) -> None:
        super()._set_recompute(recompute)
        for part in (self.model.unet, *self._own.values()):
            part.enable_gradient_checkpointing() if recompute else part.disable_gradient_checkpointing()

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        for vae in self._own.values():
            vae.to(device)


def _timesteps(timestep: Any, batch: int, device: torch.device) -> Tensor:
    """Return `timestep`, an integer or a tensor (B,) of integers, as (B,) on `device`. Raises unless from 0 to 999."""
    if isinstance(timestep, Tensor):
        if timestep.shape not in ((), (batch,)) or timestep.is_floating_point() or timestep.is_meta:
            got = f"{timestep.dtype} {tuple(timestep.shape)} on {timestep.device}"
            raise ValueError(f"timestep: got {got}; expected an integer from 0 to 999, or integers ({batch},)")
        timestep = timestep.expand(batch).tolist()
    values = timestep if isinstance(timestep, list) else [timestep] * batch
    return to_device(torch.tensor([_checked(value) for value in values]), device)


def _checked(timestep: Any) -> int:
    expected = "a DDPM timestep, an integer from 0 to 999"
    if isinstance(timestep, bool) or not isinstance(timestep, int):
        raise TypeError(f"timestep: got {type(timestep).__name__} {timestep!r:.40}; expected {expected}")
    if not 0 <= timestep <= 999:
        raise ValueError(f"timestep: got {timestep}; expected {expected}")
    return timestep
