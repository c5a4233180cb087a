"""Opening preference pairs in any form, and the encoders of a pipeline that encode what is not stored encoded."""

import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import Tensor

from dinalrm_align.data.batches import BatchOrder, PairSource
from dinalrm_align.data.formats import folder_layout
from dinalrm_align.data.image_pairs import ImagePairs
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.mined_pairs import MinedPairs
from dinalrm_align.data.pairs import EncodingFormat, PairManifest
from dinalrm_align.data.released_pairs import ReleasedPairs
from dinalrm_align.data.weight_sample import WeightSample, sample_weights
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.models.vae import encode_images, load_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders of a pipeline."""
MAX_CACHED = 1000
"""Prompts whose embeddings are cached; in a large data set each occurs about once per epoch."""


class Encoders:
    """The VAE and text encoders of a pipeline, loaded when first used.

    source: folder or hub id of a StableDiffusion3Pipeline. text_length: T5 tokens per prompt. dtype: of the text
    encoders; the VAE runs in float32.
    """

    def __init__(self, source: str | Path, *, text_length: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.source, self.device = source, device
        self.encode_prompts = PromptEncoder(
            source, text_length=text_length, device=device, dtype=dtype, max_cached=MAX_CACHED
        )

    @functools.cached_property
    def vae(self) -> "AutoencoderKL":
        return load_vae(self.source, device=self.device)

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> scaled latents (B, C, h, w)."""
        return encode_images(self.vae, images)

    def manifest(self, *, weights: bool = False) -> PairManifest:
        """Describe the pairs that these encoders make. weights: also sample the weights, for pairs to be stored."""
        scaling = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        samples = {name: self.weights(name) for name in ENCODERS} if weights else {}
        return PairManifest(
            *scaling, self.encode_prompts.text_length, {name: found for name, found in samples.items() if found}
        )

    @functools.cache  # noqa: B019  one object per program
    def weights(self, name: str) -> WeightSample | None:
        """A sample of the weights in a folder of ENCODERS; None when they are not on this machine."""
        return sample_weights(self.source, name)


def open_pairs(
    path: str | Path,
    expected: EncodingFormat,
    encoders: Encoders,
    *,
    size: tuple[int, int],
    on_bad: Literal["refuse", "skip"] = "refuse",
    **order: Unpack[BatchOrder],
) -> PairSource:
    """Open the pairs at `path` and check that they match the model that reads them.

    Args:
        path: a jsonl of images; a directory of latents; a folder of mined pairs or one parquet file of them; or a
            folder in the released layout. Pairs that do not record how they were made are assumed to be made by
            `encoders`.
        expected: a reward's config, or a model's `Encoders.manifest()`.
        encoders: encode images and prompts that are not stored encoded.
        size: (height, width) in pixels, of images of a jsonl.
        on_bad: for files of latents that cannot be read.
        order: see `BatchOrder`.

    Raises ValueError for pairs encoded in another format, or with another VAE or text encoder than those of `encoders`;
    warns where the weights are not on this machine. The classes document their own errors.
    """
    path = Path(path)
    layout = {".parquet": "mined", ".jsonl": "jsonl"}.get(path.suffix) or folder_layout(path)
    if layout == "mined":
        pairs = MinedPairs(path, manifest=encoders.manifest() if path.suffix == ".parquet" else None, **order)
    elif layout == "released":
        pairs = ReleasedPairs(
            path, encode_prompts=encoders.encode_prompts, manifest=encoders.manifest(), on_bad=on_bad, **order
        )
    elif layout == "jsonl":
        pairs = ImagePairs(
            path, encode_images=encoders.encode_images, encode_prompts=encoders.encode_prompts,
            manifest=encoders.manifest(), size=size, **order,
        )  # fmt: skip
    else:
        pairs = LatentPairs(path, on_bad=on_bad, **order)
    pairs.manifest.check(expected)
    unknown = pairs.manifest.check_encoders(encoders.weights)
    if unknown:
        warnings.warn(
            f"{path}: cannot check that the model's {', '.join(unknown)} encoded these pairs, since their weights "
            "are not on this machine",
            stacklevel=2,
        )
    return pairs
