"""Settings of the density that training noise levels are drawn from. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train import settings


@dataclass(frozen=True)
class SigmaConfig:
    """The density of the training noise level sigma (`flow.noise.sample_sigma`).

    Args:
        density: uniform on [0, 1] (the paper); logit_normal, sigmoid of a normal; mode, the SD3 paper's heavy-tailed
            density; beta; constant.
        mean: of logit_normal, before the sigmoid.
        std: of logit_normal, before the sigmoid.
        scale: of mode, in [-1, 1.75].
        a: of beta.
        b: of beta.
        value: of constant.
    """

    density: Literal["uniform", "logit_normal", "mode", "beta", "constant"] = "uniform"
    mean: float = 0.0
    std: settings.NonNegativeFloat = 1.0
    scale: float = 1.29
    a: settings.PositiveFloat = 1.0
    b: settings.PositiveFloat = 1.0
    value: settings.ClosedUnitInterval = 0.4

    def __post_init__(self) -> None:
        settings.check_fields(self, "sigma density")
        settings.check_number("sigma density.scale", self.scale, low=-1, high=1.75)

    def parameters(self) -> dict[str, float]:
        """Keyword arguments for `sample_sigma(self.density, n, generator=..., **self.parameters())`."""
        names = {"logit_normal": ("mean", "std"), "mode": ("scale",), "beta": ("a", "b"), "constant": ("value",)}
        return {name: getattr(self, name) for name in names.get(self.density, ())}
