"""Images for the comparison of precisions: renders of held-out captions, or the first images of latent pairs."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.specs import ModelSpec
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.models.vae import encode_images, load_vae
from dinalrm_align.shapes.render import draw_nuisance, lay_out, render
from dinalrm_align.shapes.scene import draw_scenes


@dataclass(frozen=True)
class Sample:
    """N images: latents and noise (N, C, H, W), prompt_embeds (N, L, D), pooled_prompt_embeds (N, P)."""

    latents: Tensor
    noise: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def __getitem__(self, part: slice) -> "Sample":
        return Sample(**{name: tensor[part] for name, tensor in vars(self).items()})


def heldout_images(spec: ModelSpec, count: int, seed: int) -> Sample:
    """Renders of `count` held-out captions of the embedded world, encoded by its own networks in float32."""
    rng = np.random.default_rng(seed)
    scenes = draw_scenes(count, rng, held_out=True)
    images = render([lay_out(scene, draw_nuisance(rng), rng) for scene in scenes], spec.height)
    latents = encode_images(load_vae(spec.pipeline, device="cpu"), images)
    encoder = PromptEncoder(spec.pipeline, text_length=spec.text_length)
    return Sample(latents, _noise(latents, seed), *encoder([scene.caption for scene in scenes]))


def images_of_pairs(directory: str, count: int, seed: int) -> Sample:
    """The first images of a directory of latent pairs. Raises ValueError when they are fewer or of several sizes."""
    batches, parts = LatentPairs(directory, batch_size=32).in_order(), []
    for index in range(len(batches)):
        parts.append(batches[index])
        if sum(len(part.latents) for part in parts) >= count:
            break
    sizes = {tuple(part.latents.shape[1:]) for part in parts}
    available = sum(len(part.latents) for part in parts)
    if len(sizes) > 1 or available < count:
        raise ValueError(f"{directory}: got {available} images of sizes {sorted(sizes)}; expected {count} of one size")
    columns = {"latents": [part.latents for part in parts]}
    columns |= {
        name: [vars(part.conditions)[name] for part in parts] for name in ("prompt_embeds", "pooled_prompt_embeds")
    }
    joined = {name: torch.cat(tensors)[:count].float() for name, tensors in columns.items()}
    return Sample(noise=_noise(joined["latents"], seed), **joined)


def _noise(latents: Tensor, seed: int) -> Tensor:
    return torch.randn(latents.shape, generator=seeded_generator(seed))
