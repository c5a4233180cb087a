"""Settings of `python -m dinalrm_align.eval.precision`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.train.settings import ClosedUnitInterval, IntAboveOne, NonNegativeInt, PositiveInt, check_fields


@dataclass
class PrecisionRun:
    """Settings of the comparison of half precision with float32.

    Args:
        model: base model whose transformer the reward uses. shapes, sd35, or the folder or hub id of a
            StableDiffusion3Pipeline.
        reward: folder or hub id of the latent reward; default, the model's own.
        pairs: directory of latent pairs whose first images are scored; default, for the embedded world only, renders of
            held-out captions.
        output: folder of precision.md and precision.json.
        dtypes: compared with float32.
        sigmas: single noise levels.
        ensemble: noise levels joined as tokens; empty leaves out the ensemble.
        latents: number of images.
        batch_size: images per batch.
        seed: of images and noise.
        device: auto uses a CUDA GPU if there is one. float16 is slow on most CPUs.
    """

    model: str = "shapes"
    reward: str | None = None
    pairs: str | None = None
    output: str = "runs/precision"
    dtypes: list[Literal["bfloat16", "float16"]] = field(default_factory=lambda: ["bfloat16", "float16"])
    sigmas: list[ClosedUnitInterval] = field(default_factory=lambda: [0.0, 1e-6, 0.05, 0.4, 0.7, 1.0])
    ensemble: list[ClosedUnitInterval] = field(default_factory=lambda: [0.2, 0.5, 0.7])
    latents: IntAboveOne = 128
    batch_size: PositiveInt = 32
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.levels():
            raise ValueError("sigmas: got none, and no ensemble; expected at least one noise level")
        if not self.dtypes:
            raise ValueError("dtypes: got none; expected at least one")

    def levels(self) -> list[tuple[float, ...]]:
        """Each single level, then the ensemble."""
        return [(sigma,) for sigma in self.sigmas] + ([tuple(self.ensemble)] if self.ensemble else [])
