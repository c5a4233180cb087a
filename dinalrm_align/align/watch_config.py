"""Settings of the hacking watch (`align.watch`). Torch-free."""

from dataclasses import dataclass, field

from dinalrm_align.train.settings import check_fields


@dataclass
class WatchConfig:
    """Whether the reward that is climbed is being fooled, judged at every held-out evaluation by a gold score.

    The alarm: against the evaluation with the best gold so far, the reward rose and gold fell, both significantly
    (one-sided, paired over captions).

    Args:
        level: how often a run may raise a false alarm: the largest share of runs that do where gold never falls.
        stop_on_hacking: end the run at the first alarm, saved as at Ctrl-C; otherwise it warns and goes on.
        keep_best: keep the LoRA of the best gold evaluation in lora_best/, with its update and score.
        sigmas: noise levels at which a latent reward scores the held-out latents besides its own reading, to see how
            far the levels part; empty: not looked at.
        drift_sigmas: noise levels at which the policy's velocity is held against the reference's on the held-out
            latents; empty: not looked at.
    """

    level: float = 0.05
    stop_on_hacking: bool = False
    keep_best: bool = True
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.4, 0.7])
    drift_sigmas: list[float] = field(default_factory=lambda: [0.3, 0.8])

    def __post_init__(self) -> None:
        check_fields(self, "watch")
        if not 0 < self.level < 0.5:
            raise ValueError(f"watch.level: got {self.level}; expected a probability between 0 and 0.5")
        for name, sigmas in (("sigmas", self.sigmas), ("drift_sigmas", self.drift_sigmas)):
            if not all(0 <= sigma <= 1 for sigma in sigmas) or len(set(sigmas)) < len(sigmas):
                raise ValueError(f"watch.{name}: got {sigmas}; expected noise levels in [0, 1], each once")
        if len(self.sigmas) == 1:
            raise ValueError(f"watch.sigmas: got {self.sigmas}; one level cannot part from others: give two, or none")
