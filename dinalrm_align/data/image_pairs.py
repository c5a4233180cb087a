"""Preference pairs in a jsonl of image paths (`formats`: jsonl), encoded while training.

Paths are relative to the file. Each image is scaled to cover height x width (LANCZOS) and cropped at the centre.
"""

from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dinalrm_align.data.batches import BatchOrder, PairSource
from dinalrm_align.data.formats import read_preferences
from dinalrm_align.data.pairs import EncodeImages, EncodePrompts, PairBatch, PairManifest
from dinalrm_align.models.images import image_tensor, open_image
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.files import file_digest


class ImagePairs(PairSource):
    """A PairSource over a jsonl of image paths.

    manifest describes the output of the encoders; size is (height, width) of every image, in pixels. Raises ValueError
    for an invalid record, FileNotFoundError for a missing image.
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
        self._pairs = list(read_preferences(self._path, "jsonl", strict=False))
        if not self._pairs:
            raise ValueError(f"{path} holds no pairs")
        for image in dict.fromkeys(image for pair in self._pairs for image in (pair.chosen, pair.rejected)):
            if not (self._path.parent / image).is_file():
                raise FileNotFoundError(f"{path}: image {self._path.parent / image} does not exist")
        self._arrange([pair.prompt for pair in self._pairs])

    def digest(self) -> str:
        return file_digest(self._path)[:16]

    @torch.no_grad()
    def _read(self, units: np.ndarray) -> PairBatch:
        pairs = [self._pairs[unit] for unit in units]
        images = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        pixels = torch.stack([load_image(self._path.parent / image, *self.size) for image in images])
        prompts, concepts = [pair.prompt for pair in pairs], [pair.concept for pair in pairs]
        return PairBatch.plain(
            *self._encode_images(pixels).chunk(2),
            Conditions(prompts, *self._encode_prompts(prompts)),
            label=[pair.label for pair in pairs],
            concepts=None if None in concepts else tuple(concepts),
        )


def load_image(path: Path, height: int, width: int) -> Tensor:
    """Read an image, upright, scaled to cover (height, width) and centre-cropped: (3, height, width) in [0, 1]."""
    fitted = ImageOps.fit(open_image(path), (width, height), method=Image.Resampling.LANCZOS)
    return image_tensor(fitted)[0]
