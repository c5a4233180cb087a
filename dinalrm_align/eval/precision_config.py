"""Settings of `python -m dinalrm_align.eval.precision`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class PrecisionRun:
    """What is compared, and on what.

    Args:
        model: whose transformer the reward reads with. shapes, sd35, or the folder or hub id of a
            StableDiffusion3Pipeline.
        reward: folder or hub id of the latent reward; by default the model's own.
        pairs: a directory of latent pairs whose first pictures are scored; by default the embedded world renders
            pictures of held-out captions.
        output: folder of precision.md and precision.json.
        dtypes: compared with float32.
        sigmas: single noise levels.
        ensemble: noise levels scored together, joined as tokens; none: leave the ensemble out.
        latents: number of pictures.
        batch_size: pictures scored at once.
        seed: of pictures and noise.
        device: auto takes a CUDA GPU if there is one. float16 is slow on most CPUs.
    """

    model: str = "shapes"
    reward: str | None = None
    pairs: str | None = None
    output: str = "runs/precision"
    dtypes: list[Literal["bfloat16", "float16"]] = field(default_factory=lambda: ["bfloat16", "float16"])
    sigmas: list[float] = field(default_factory=lambda: [0.0, 1e-6, 0.05, 0.4, 0.7, 1.0])
    ensemble: list[float] = field(default_factory=lambda: [0.2, 0.5, 0.7])
    latents: int = 128
    batch_size: int = 32
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.latents < 2 or self.batch_size < 1:
            raise ValueError(f"got latents {self.latents}, batch_size {self.batch_size}; at least 2, and at least 1")
        wrong = [sigma for sigma in (*self.sigmas, *self.ensemble) if not 0 <= sigma <= 1]
        if wrong or not self.levels() or not self.dtypes:
            raise ValueError(
                f"got sigmas {self.sigmas}, ensemble {self.ensemble}, dtypes {self.dtypes}; expected noise levels in "
                "[0, 1], at least one, and at least one dtype"
            )

    def levels(self) -> list[tuple[float, ...]]:
        """Each single level, then the ensemble."""
        return [(sigma,) for sigma in self.sigmas] + ([tuple(self.ensemble)] if self.ensemble else [])
