"""The autoencoder: L1 + L2 + a weak KL term, on random quarters of the images and finally on whole ones.

The latents' mean and standard deviation become the pipeline's shift and scaling factors.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor

from dinalrm_align.models.vae import decode_latents, encode_images
from dinalrm_align.shapes.build.stage import random_images, run_stage
from dinalrm_align.shapes.config import BuildConfig
from dinalrm_align.shapes.oracle import PARTS, oracle_parts


def train_vae(pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator) -> None:
    """Train `pipeline.vae` in place and set its scaling and shift factor."""
    vae, stage = pipeline.vae.to(memory_format=torch.channels_last), config.vae
    size = config.stack.image_size
    whole_from = int(0.85 * stage.loop.steps)

    def batch_at(step: int) -> tuple[Tensor, torch.Generator]:
        rng, generator = np.random.default_rng((config.seed + 1, step)), torch.Generator().manual_seed(step)
        if step >= whole_from:
            return random_images(max(1, stage.batch_size // 4), rng, size)[0], generator
        images = random_images(stage.batch_size, rng, size)[0]
        side = size // 2
        top, left = 4 * rng.integers(0, side // 4 + 1, 2)
        return images[:, :, top : top + side, left : left + side], generator

    def step(batch: tuple[Tensor, torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        images, generator = batch
        x = (2 * images - 1).to(accelerator.device, memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        squared = F.mse_loss(decoded, x)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(decoded, x) + squared + 2e-4 * kl
        return loss, {"psnr": 10 * math.log10(4 / squared.item()), "kl": kl.item()}

    vae.requires_grad_(True)
    run_stage("vae", stage, config, accelerator, dict(vae.named_parameters()), batch_at, step, shown=("loss", "psnr"))
    vae.requires_grad_(False)
    images = random_images(512, np.random.default_rng((config.seed, 99)), size)[0]
    z = torch.cat([_encode(vae, chunk) for chunk in images.split(64)])
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Unscaled latents, the posterior's mean."""
    x = (2 * images - 1).to(vae.device, memory_format=torch.channels_last)
    return vae.encode(x).latent_dist.mean.contiguous()


def vae_gate(vae: AutoencoderKL, seed: int, number: int = 512) -> dict[str, float]:
    """Correlation of each part of the oracle's score before and after the autoencoder, and the PSNR.

    Half of the images are scored with another caption, so that faithfulness varies.
    """
    images, scenes, _ = random_images(number, np.random.default_rng((seed, 7)), vae.config.sample_size)
    captions = [scene.caption for scene in scenes[: number // 2] + scenes[number // 2 - 1 :: -1]]
    decoded = torch.cat([decode_latents(vae, encode_images(vae, chunk)) for chunk in images.split(64)])
    before, after = oracle_parts(images, captions), oracle_parts(decoded.cpu(), captions)
    gate = {part: torch.corrcoef(torch.stack([before[part], after[part]]))[0, 1].item() for part in PARTS}
    return {**gate, "psnr": -10 * math.log10(F.mse_loss(decoded.cpu(), images).item())}
