"""Settings of the density from which training draws noise levels. This module does not import torch."""

from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train import settings


@dataclass(frozen=True)
class SigmaConfig:
    """Density from which training draws the noise level sigma (`flow.noise.sample_sigma`).

    Args:
        density: name of the density. uniform: on [0, 1], as in the DiNa-LRM paper. logit_normal: sigmoid of a normal
            variable. mode: heavy-tailed density of the SD3 paper. beta: Beta(a, b). constant: always `value`.
        mean: with logit_normal, mean of the normal variable.
        std: with logit_normal, standard deviation of the normal variable.
        scale: with mode, value in [-1, 1.75]: positive values favour the middle of [0, 1], negative values the ends.
        a: with beta, first parameter.
        b: with beta, second parameter.
        value: with constant, the noise level.
    """

    density: Literal["uniform", "logit_normal", "mode", "beta", "constant"] = "uniform"
    mean: float = 0.0
    std: settings.NonNegativeFloat = 1.0
    scale: settings.ModeScale = 1.29
    a: settings.PositiveFloat = 1.0
    b: settings.PositiveFloat = 1.0
    value: settings.ClosedUnitInterval = 0.4

    def __post_init__(self) -> None:
        settings.check_fields(self, "sigma density")

    def parameters(self) -> dict[str, float]:
        """Return the chosen density's parameters by name, as keyword arguments of `flow.noise.sample_sigma`."""
        names = {"logit_normal": ("mean", "std"), "mode": ("scale",), "beta": ("a", "b"), "constant": ("value",)}
        return {name: getattr(self, name) for name in names.get(self.density, ())}
