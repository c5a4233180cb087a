"""The density that training noise levels are drawn from. No torch here."""

from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train.settings import check_fields


@dataclass(frozen=True)
class SigmaConfig:
    """The density the training noise level sigma is drawn from (`noise.sample_sigma`).

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
    std: float = 1.0
    scale: float = 1.29
    a: float = 1.0
    b: float = 1.0
    value: float = 0.4

    def __post_init__(self) -> None:
        check_fields(self, "sigma density")
        if self.std < 0 or self.a <= 0 or self.b <= 0 or not 0 <= self.value <= 1 or not -1 <= self.scale <= 1.75:
            raise ValueError(
                f"sigma density: got std {self.std}, a {self.a}, b {self.b}, value {self.value}, scale {self.scale}; "
                "expected at least 0, more than 0 twice, [0, 1], and [-1, 1.75]"
            )

    def parameters(self) -> dict[str, float]:
        """Keyword arguments for `sample_sigma(self.density, n, generator=..., **self.parameters())`."""
        return {
            "uniform": {},
            "logit_normal": {"mean": self.mean, "std": self.std},
            "mode": {"scale": self.scale},
            "beta": {"a": self.a, "b": self.b},
            "constant": {"value": self.value},
        }[self.density]
