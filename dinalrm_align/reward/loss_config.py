"""Settings of the preference loss (`losses`) and of the noise levels it is trained at (`noise`). Torch-free."""

import math
from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train.settings import check_fields

THURSTONE_PRESETS: dict[str, dict[str, float]] = {
    "paper": {"k": 2.0, "sigma_u": 0.1, "epsilon": 0.0},  # arXiv 2602.11146
    "released": {"k": 2.0, "sigma_u": math.sqrt(0.05), "epsilon": 1e-6},  # the training code: variance 2 sigma^2 + 0.05
}


@dataclass(frozen=True)
class LossConfig:
    """How a pair of raw scores becomes a loss.

    Args:
        likelihood: how a score gap becomes a probability. thurstone: variance grows with the noise level (the paper);
            thurstone_fixed: one variance for all levels; bradley_terry: sigmoid of the gap; bradley_terry_margin:
            sigmoid of the gap less a margin.
        objective: fidelity, 1 - sqrt(p) for a hard label, or nll, -log p; none given, that of the likelihood's source:
            fidelity with Thurstone's (the paper), nll with Bradley-Terry's (the usual -log sigmoid of the gap).
        preset: where k, sigma_u and epsilon come from when they are not given: paper (k 2, sigma_u 0.1, epsilon 0) or
            released (variance 2 sigma^2 + 0.05, epsilon 1e-6).
        k: growth of the rater's variance with the noise level, k sigma^2 + sigma_u^2.
        sigma_u: the rater's standard deviation on a clean picture.
        epsilon: added inside both square roots, that of the variance and that of the fidelity.
        variance: the rater's variance under thurstone_fixed (0.5 in the released code).
        margin: the gap asked for under bradley_terry_margin.
    """

    likelihood: Literal["thurstone", "thurstone_fixed", "bradley_terry", "bradley_terry_margin"] = "thurstone"
    objective: Literal["fidelity", "nll"] | None = None
    preset: Literal["paper", "released"] = "paper"
    k: float | None = None
    sigma_u: float | None = None
    epsilon: float | None = None
    variance: float = 0.5
    margin: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "loss")
        k, sigma_u, epsilon = self.constants()
        if k < 0 or epsilon < 0 or sigma_u <= 0 or self.variance <= 0:
            raise ValueError(
                f"loss: got k={k}, epsilon={epsilon}, sigma_u={sigma_u}, variance={self.variance}; "
                "k and epsilon must not be negative, sigma_u and variance must be positive"
            )

    def settled_objective(self) -> str:
        """The objective, the likelihood's own where none was given."""
        if self.objective is not None:
            return self.objective
        return "nll" if self.likelihood.startswith("bradley_terry") else "fidelity"

    def constants(self) -> tuple[float, float, float]:
        """(k, sigma_u, epsilon), the preset's where none was given."""
        preset = THURSTONE_PRESETS[self.preset]
        return (
            preset["k"] if self.k is None else self.k,
            preset["sigma_u"] if self.sigma_u is None else self.sigma_u,
            preset["epsilon"] if self.epsilon is None else self.epsilon,
        )
