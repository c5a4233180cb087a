"""Settings of the density from which training noise levels are drawn. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train import settings


@dataclass(frozen=True)
class SigmaConfig:
    """Density from which training draws the noise level sigma (`flow.noise.sample_sigma`).

    Args:
        density: uniform on [0, 1], as in the paper; logit_normal, the sigmoid of a normal variable; mode, the
            heavy-tailed density of the SD3 paper; beta; constant.
        mean: mean of the normal variable of logit_normal.
        std: standard deviation of the normal variable of logit_normal.
        scale: parameter of mode, in [-1, 1.75]: above 0 favours the middle of [0, 1], below 0 the ends.
        a: first parameter of beta.
        b: second parameter of beta.
        value: noise level of constant.
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
        """Return the parameters of the density: `sample_sigma(self.density, n, generator=..., **self.parameters())`."""
        names = {"logit_normal": ("mean", "std"), "mode": ("scale",), "beta": ("a", "b"), "constant": ("value",)}
        return {name: getattr(self, name) for name in names.get(self.density, ())}
