"""Images to scaled latents and back: scaled latents are (z - shift_factor) * scaling_factor."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from PIL import Image
from torch import Tensor

from dinalrm_align.flow.noise import check_latents
from dinalrm_align.models.hub import HubOptions, check_source, load_model
from dinalrm_align.models.images import image_tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def load_vae(source: str | Path, *, device: torch.device | str, **hub: Unpack[HubOptions]) -> "AutoencoderKL":
    """The frozen float32 VAE of a pipeline folder or hub id."""
    from diffusers import AutoencoderKL

    if Path(source).is_dir() and not (Path(source) / "vae" / "config.json").is_file():
        raise ValueError(f"images need a VAE, and {source} has no vae folder: pass pipeline=..., or score latents")
    check_source("VAE", source)
    vae = load_model(AutoencoderKL, source, subfolder="vae", use_safetensors=True, **hub)
    return vae.requires_grad_(False).eval().to(device)


@torch.no_grad()
def encode_images(vae: "AutoencoderKL", images: Tensor | Sequence[Image.Image] | Image.Image) -> Tensor:
    """PIL images or (B, 3, H, W) in [0, 1] -> scaled latents (B, C, h, w), float32, on the VAE's device.

    Takes the posterior's mean, in the VAE's own dtype even under autocast.
    """
    pixels = image_tensor(images)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = pixels.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"images: got {height} x {width} pixels; expected multiples of {factor}, crop or resize first")
    with torch.autocast(vae.device.type, enabled=False):
        z = vae.encode((2 * pixels - 1).to(vae.device, vae.dtype)).latent_dist.mean
    return (z.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> images (B, 3, H, W), float32 in [0, 1], differentiable (zero where clipped)."""
    check_latents("latents", latents)
    if latents.shape[1] != vae.config.latent_channels:
        raise ValueError(f"latents: got {latents.shape[1]} channels; expected {vae.config.latent_channels}, the VAE's")
    z = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
