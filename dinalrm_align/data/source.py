"""From a path to preference pairs: a directory of latents, or a jsonl of pictures that are encoded on the fly."""

from pathlib import Path

import torch

from dinalrm_align.config.reward import RewardConfig
from dinalrm_align.data.image_pairs import ImagePairs
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.encode import PromptEncoder, encode_images, load_vae


def open_pairs(
    path: str | Path,
    reward: RewardConfig,
    *,
    size: tuple[int, int],
    device: torch.device | str,
    batch_size: int,
    seed: int = 0,
    held_out_prompts: int = 0,
) -> LatentPairs | ImagePairs:
    """The pairs at `path`, checked against the config of the reward that is to read them.

    size: (height, width) in pixels of pictures that are encoded on the fly, on `device`, by the VAE and the text
    encoders of `reward.base_model_id`. The rest, and what is raised: see the two classes.
    """
    options = dict(batch_size=batch_size, seed=seed, held_out_prompts=held_out_prompts)
    if Path(path).suffix != ".jsonl":
        pairs = LatentPairs(path, **options)
        pairs.manifest.check(reward)
        return pairs
    vae = load_vae(reward.base_model_id, device=device)
    return ImagePairs(
        path,
        encode_images=lambda images: encode_images(vae, images),
        encode_prompts=PromptEncoder(reward.base_model_id, text_length=reward.text_length, device=device),
        manifest=PairManifest(vae.config.scaling_factor, vae.config.shift_factor, reward.text_length),
        height=size[0],
        width=size[1],
        **options,
    )
