"""Settings of the preference loss (`reward.losses`). Torch-free."""

import math
from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train.settings import NonNegativeFloat, PositiveFloat, check_fields

THURSTONE_PRESETS: dict[str, dict[str, float]] = {
    "paper": {"k": 2.0, "sigma_u": 0.1, "epsilon": 0.0},  # arXiv 2602.11146
    "released": {"k": 2.0, "sigma_u": math.sqrt(0.05), "epsilon": 1e-6},  # the training code: variance 2 sigma^2 + 0.05
}


@dataclass(frozen=True)
class LossConfig:
    """The loss of a pair of raw scores.

    Args:
        likelihood: maps a score difference to a probability. thurstone: variance grows with the noise level (the
            paper); thurstone_fixed: one variance for all levels; bradley_terry: sigmoid of the difference;
            bradley_terry_margin: sigmoid of the difference minus a margin.
        objective: fidelity, 1 - sqrt(p) for a hard label, or nll, -log p; default: fidelity with Thurstone (the paper),
            nll with Bradley-Terry (the usual -log sigmoid of the difference).
        preset: defaults of k, sigma_u and epsilon: paper (k 2, sigma_u 0.1, epsilon 0) or released (variance
            2 sigma^2 + 0.05, epsilon 1e-6).
        k: growth of the rater's variance with the noise level, k sigma^2 + sigma_u^2.
        sigma_u: the rater's standard deviation for clean images.
        epsilon: added inside both square roots, that of the variance and that of the fidelity.
        variance: the rater's variance with thurstone_fixed (0.5 in the released code).
        margin: of bradley_terry_margin.
    """

    likelihood: Literal["thurstone", "thurstone_fixed", "bradley_terry", "bradley_terry_margin"] = "thurstone"
    objective: Literal["fidelity", "nll"] | None = None
    preset: Literal["paper", "released"] = "paper"
    k: NonNegativeFloat | None = None
    sigma_u: PositiveFloat | None = None
    epsilon: NonNegativeFloat | None = None
    variance: PositiveFloat = 0.5
    margin: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "loss")

    def resolved_objective(self) -> str:
        """`objective`, or the likelihood's default."""
        if self.objective is not None:
            return self.objective
        return "nll" if self.likelihood.startswith("bradley_terry") else "fidelity"

    def constants(self) -> tuple[float, float, float]:
        """(k, sigma_u, epsilon), with the preset's defaults."""
        preset = THURSTONE_PRESETS[self.preset]
        return (
            preset["k"] if self.k is None else self.k,
            preset["sigma_u"] if self.sigma_u is None else self.sigma_u,
            preset["epsilon"] if self.epsilon is None else self.epsilon,
        )
