"""Open preference pairs in any layout, and encode images and prompts with a pipeline's VAE and text encoders."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor

from dinalrm_align.data.batches import BatchOrder, PairSource
from dinalrm_align.data.formats import folder_layout
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.mined_pairs import MinedPairs
from dinalrm_align.data.pairs import EncodeImages, EncodePrompts, EncodingFormat, PairBatch, PairManifest, WeightSample
from dinalrm_align.data.released_pairs import ReleasedPairs
from dinalrm_align.data.workers import attempt
from dinalrm_align.models.images import image_size, image_tensor, open_image
from dinalrm_align.models.latent_space import LatentSpace
from dinalrm_align.models.pipeline import encode_images, load_vae, vae_scaling
from dinalrm_align.models.text import Conditions, PromptEncoder
from dinalrm_align.models.weights import fetch
from dinalrm_align.train.files import file_digest, reading

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Subfolders of a pipeline that hold its encoders."""
VALUES = 16
"""Number of tensors from which a `WeightSample` takes one value each."""


class Encoders:
    """VAE in float32 and text encoders in `dtype`, loaded on first use. source: folder or hub id of the pipeline."""

    def __init__(self, source: str | Path, *, text_length: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.source, self.device = source, device
        place = dict(device=device, dtype=dtype)
        self.encode_prompts = PromptEncoder(source, text_length=text_length, max_cached=1000, **place)

    @functools.cached_property
    def latent_space(self) -> LatentSpace:
        """Latents that the pipeline's transformer reads."""
        return LatentSpace.of(self.source)

    @functools.cached_property
    def vae(self) -> "AutoencoderKL":
        return load_vae(self.source, device=self.device)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] into scaled latents (B, C, h, w)."""
        return encode_images(self.vae, images)

    def manifest(self, *, weights: bool = False) -> PairManifest:
        """Return the manifest of pairs encoded by `self`. weights: whether to add each encoder's `WeightSample`."""
        samples = {name: found for name in (ENCODERS if weights else ()) if (found := self.weights(name))}
        return PairManifest(*vae_scaling(self.source), self.encode_prompts.text_length, samples)

    @functools.cache  # noqa: B019  one object per program
    def weights(self, name: str) -> WeightSample | None:
        """Return a `WeightSample` of the encoder `name`, such as "vae". The sample is computed once."""
        return sample_weights(self.source, name)


def open_pairs(
    path: str | Path,
    expected: EncodingFormat,
    encoders: Encoders,
    *,
    size: tuple[int, int],
    **order: Unpack[BatchOrder],
) -> PairSource:
    """Open the pairs at `path` and check that they were encoded for the model that reads them, and fit its transformer.

    Args:
        path: a jsonl of images; a directory of latents; a folder of mined pairs or one parquet file of them; or a
            folder in the released layout (part_rank*.parquet).
        expected: encoding settings of the model, either a reward's config or `Encoders.manifest()`.
        encoders: used for images and prompts that are not stored in encoded form. Stored latents without a record of
            how they were encoded are assumed to come from `encoders`.
        size: (height, width) in pixels to which images of a jsonl are resized and cropped.

    Raises ValueError if the settings, VAE or text encoders that encoded the pairs differ from the model's, or if the
    model does not read latents of their shape.
    Warns if the model's weights are not on this machine, because the VAE and text encoders cannot be compared.
    """
    path, order["space"] = Path(path), encoders.latent_space
    layout = {".parquet": "mined", ".jsonl": "jsonl"}.get(path.suffix) or folder_layout(path)
    if layout == "mined":
        pairs = MinedPairs(path, manifest=encoders.manifest() if path.suffix == ".parquet" else None, **order)
    elif layout in ("released", "jsonl"):
        given = dict(encode_prompts=encoders.encode_prompts, manifest=encoders.manifest(), **order)
        if layout == "released":
            pairs = ReleasedPairs(path, **given)
        else:
            pairs = ImagePairs(path, encode_images=encoders.encode_images, size=size, **given)
    else:
        pairs = LatentPairs(path, **order)
    pairs.manifest.check(expected)
    pairs.check_latents()
    unknown = pairs.manifest.check_encoders(encoders.weights)
    if unknown:
        warnings.warn(
            f"{path}: cannot check that the model's {', '.join(unknown)} made these pairs: no weights on this machine",
            stacklevel=2,
        )
    return pairs


class ImagePairs(PairSource):
    """`PairSource` that reads image paths from a jsonl, and encodes the images during training.

    Paths are relative to the folder of the jsonl. manifest: encoding settings of `encode_images` and `encode_prompts`.
    size: (height, width) in pixels to which images are resized and cropped.
    Raises ValueError for an invalid record or image and FileNotFoundError for a missing image.
    """

    reads_files_only = False

    def __init__(
        self,
        path: str | Path,
        *,
        encode_images: EncodeImages,
        encode_prompts: EncodePrompts,
        manifest: PairManifest,
        size: tuple[int, int],
        **order: Unpack[BatchOrder],
    ) -> None:
        super().__init__(**order)
        self.manifest, self.size, self._path = manifest, size, Path(path)
        self._encode_images, self._encode_prompts = encode_images, encode_prompts
        pairs = self._find_pairs(self._path, "jsonl")
        images = dict.fromkeys(image for pair in pairs for image in (pair.chosen, pair.rejected))
        bad = {image: problem for image in images if isinstance(problem := self._size(image), str)}
        self._pairs = [pair for pair in pairs if bad.keys().isdisjoint((pair.chosen, pair.rejected))]
        if bad:
            message = f"{path}: {len(bad)} images cannot be read: {'; '.join(list(bad.values())[:3])}"
            self.dropped.bad("unreadable image", message, len(pairs) - len(self._pairs))
            warnings.warn(message, stacklevel=3)
        self._arrange([pair.prompt for pair in self._pairs])

    def _size(self, image: str) -> tuple[int, int] | str:
        file = self._path.parent / image
        if not file.is_file() and self.dropped.on_bad == "refuse":
            raise FileNotFoundError(f"{self._path}: image {file} does not exist")
        return attempt(image_size, file)

    def digest(self) -> str:
        return file_digest(self._path)[:16]

    def _where(self, unit: int) -> str:
        return f"{self._path}, {self._pairs[unit].chosen}"

    def _load(self, unit: int) -> list[Tensor]:
        pair = self._pairs[unit]
        return [
            torch.stack([load_image(self._path.parent / image, *self.size) for image in (pair.chosen, pair.rejected)])
        ]

    @torch.no_grad()
    def _collate(self, units: np.ndarray, items: Sequence[Sequence[Tensor]]) -> PairBatch:
        pairs, pixels = [self._pairs[unit] for unit in units], torch.stack([images for (images,) in items], dim=1)
        prompts, concepts = [pair.prompt for pair in pairs], [pair.concept for pair in pairs]
        return PairBatch.plain(
            *self._encode_images(pixels.flatten(0, 1)).chunk(2),
            Conditions(prompts, *self._encode_prompts(prompts)),
            label=[pair.label for pair in pairs],
            concepts=None if None in concepts else tuple(concepts),
        )


def load_image(path: Path, height: int, width: int) -> Tensor:
    """Read an image, resize it to cover (height, width) and crop the centre. Return (3, height, width) in [0, 1]."""
    fitted = ImageOps.fit(open_image(path), (width, height), method=Image.Resampling.LANCZOS)
    return image_tensor(fitted)[0]


def sample_weights(source: str | Path, folder: str) -> WeightSample | None:
    """Return a `WeightSample` of the subfolder `folder` of a pipeline; None if the weights are not on this machine.

    The tensors with two or more dimensions are sorted by name, and up to 16 (VALUES) evenly spaced ones are chosen.
    The sample holds the first element of each chosen tensor. Variants such as model.fp16.safetensors are ignored.
    source: folder or hub id of the pipeline. Raises ValueError for an invalid safetensors file.
    """
    try:
        root = fetch(source, ["*"], subfolder=folder, local_files_only=True)
    except (FileNotFoundError, ValueError):
        return None
    names: dict[str, Path] = {}
    for file in sorted(root.glob("*.safetensors")):
        if "." in file.stem:
            continue
        with reading("safetensors file", file), safe_open(file, framework="pt") as tensors:
            names |= {name: file for name in tensors.keys() if len(tensors.get_slice(name).get_shape()) >= 2}
    if not names:
        return None
    ordered, values = sorted(names), []
    for name in sorted({ordered[index * len(ordered) // VALUES] for index in range(VALUES)}):
        with reading("safetensors file", names[name]), safe_open(names[name], framework="pt") as tensors:
            values.append(round(float(tensors.get_slice(name)[:1].flatten()[0]), 8))
    return WeightSample(str(source), len(names), values)
