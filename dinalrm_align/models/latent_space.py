"""Which latents a pipeline's transformer reads, from its config alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from diffusers import SD3Transformer2DModel

from dinalrm_align.train.files import reading


@dataclass(frozen=True)
class LatentSpace:
    """Latents (channels, h, w) that a transformer reads: h and w are multiples of `patch`, and at most `max_side`.

    max_side: side of the table of position embeddings, in latents.
    """

    channels: int
    patch: int
    max_side: int

    @classmethod
    def of(cls, source: str | Path) -> Self:
        """Read the config of the transformer of a pipeline, a folder or hub id. Weights are not read."""
        with reading("transformer config", source):
            config = SD3Transformer2DModel.load_config(str(source), subfolder="transformer")
            patch = config["patch_size"]
            return cls(config["in_channels"], patch, patch * config["pos_embed_max_size"])

    def problem(self, shape: Sequence[int]) -> str | None:
        """Return why latents of `shape` (channels, h, w) cannot be read; None if they can."""
        channels, *sides = shape
        expected = f"{self.channels} channels, sides that are multiples of {self.patch} and at most {self.max_side}"
        fits = channels == self.channels and all(0 < side <= self.max_side and side % self.patch == 0 for side in sides)
        return None if fits else f"latents: got {' x '.join(map(str, shape))}; the model reads {expected}"
