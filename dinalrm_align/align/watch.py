"""Detection of reward hacking: the reward rises while the quality of the images falls.

Every held-out evaluation samples the same captions from the same noise. The samples are scored by the training reward
(proxy) and by a gold reward that is not trained on. `Watch`, a hook for `train.loop.fit`, compares evaluations by
t-tests (`detect_hacking`), warns of hacking, and keeps the LoRA with the best gold score. `level_probe` and
`drift_probe` measure early signs of hacking. Metrics:

    hacking        1 if hacking was detected, else 0
    divergence     proxy's mean gain over the base model minus gold's mean gain; each gain is divided by the
                   standard deviation of the base model's scores
    level_spread   disagreement of a latent reward's scores across noise levels: the scores at each level are
                   standardised by the base model's scores; the metric is the standard deviation over the levels,
                   averaged over the samples
    drift          mean squared difference of the policy's and the base model's velocities on the held-out latents
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtr
from torch import Tensor

from dinalrm_align.align.config import WatchConfig
from dinalrm_align.align.evaluation import Probe
from dinalrm_align.eval.report.intervals import by_caption, seeds_by_captions
from dinalrm_align.flow.noise import add_noise
from dinalrm_align.flow.sampling import Velocity
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.files import atomic_folder, discard_folder, read_json, write_file

Scores = Mapping[str, Sequence[float]]  # one number per sample, by name ("proxy", "gold", names of probes)
LEVEL, DRIFT, BEST, NOTE = "proxy@", "drift", "lora_best", "best.json"


@dataclass(frozen=True)
class Comparison:
    """Comparison of the latest evaluation with the evaluation that has the best gold score so far.

    Args:
        step, best_step: the update of the latest evaluation, and the update of the evaluation with the best gold score.
        proxy_gain, gold_gain: rise of the mean training reward, and of the mean gold reward, from best_step to step.
        p_proxy, p_gold: one-sided p-values for a rise of the training reward and for a fall of the gold reward.
        hacking: whether both tests are significant.
    """

    step: int
    best_step: int
    proxy_gain: float
    gold_gain: float
    p_proxy: float
    p_gold: float
    hacking: bool

    def __str__(self) -> str:
        return (
            f"since update {self.best_step}, the best so far, the reward rose by {self.proxy_gain:.4g} and gold fell "
            f"by {-self.gold_gain:.4g} (one-sided p {self.p_gold:.1g})"
        )


def p_value_of_rise(values: np.ndarray) -> float:
    """Return the p-value of a one-sided t-test of whether the mean of values (C,) is above 0."""
    estimate = seeds_by_captions(values[None])
    if estimate.standard_error == 0:
        return 0.0 if estimate.mean > 0 else 1.0
    return float(stdtr(len(values) - 1, -estimate.mean / estimate.standard_error))


def detect_hacking(
    history: Mapping[int, Scores], captions: Sequence[str], level: float, evaluations: int
) -> Comparison:
    """Test whether the reward rose and the gold score fell since the evaluation with the best gold score.

    The t-tests are paired by caption. Hacking is detected if the rise of the reward (proxy) has p <= level and the
    fall of gold has p <= level / m. Here m = n (n + 1) / 2 is the number of pairs of n + 1 evaluations. The division
    by m, a Bonferroni correction, bounds the probability of a false alarm in the whole run.

    Args:
        history: nested dict: update -> name of the scores ("proxy", "gold", ...) -> one score per sample.
        captions: caption of each sample; at least two captions must differ.
        evaluations: n, the number of evaluations in the whole run, without the evaluation of the base model.
    """
    step, best = max(history), best_step(history)
    proxy, gold = (by_caption(np.subtract(history[step][n], history[best][n]), captions) for n in ("proxy", "gold"))
    evaluations = max(evaluations, len(history) - 1)
    pairs = evaluations * (evaluations + 1) / 2
    p_proxy, p_gold = p_value_of_rise(proxy), p_value_of_rise(-gold)
    hacking = step != best and p_proxy <= level and p_gold * pairs <= level
    return Comparison(step, best, float(proxy.mean()), float(gold.mean()), p_proxy, p_gold, hacking)


def best_step(history: Mapping[int, Scores]) -> int:
    """Return the update whose evaluation has the best mean gold score. If several are equal, the earliest counts."""
    return max(sorted(history), key=lambda step: float(np.mean(history[step]["gold"])))


def divergence(before: Scores, after: Scores) -> float:
    """Return mean proxy gain - mean gold gain, each divided by the standard deviation of that score in `before`."""

    def gain(name: str) -> float:
        return float(np.mean(after[name]) - np.mean(before[name])) / _spread(before[name])

    return gain("proxy") - gain("gold")


def level_spread(before: Scores, after: Scores) -> float | None:
    """Return the mean disagreement of a latent reward's scores across noise levels; None for fewer than two levels."""
    names = sorted(name for name in before.keys() & after.keys() if name.startswith(LEVEL))
    if len(names) < 2:
        return None
    table = [(np.asarray(after[name]) - np.mean(before[name])) / _spread(before[name]) for name in names]
    return float(np.std(table, axis=0, ddof=1).mean())


def level_probe(reward: Reward, sigmas: Sequence[float]) -> Probe:
    """Return a probe for the evaluation `HeldOut`: a function that scores latents at each noise level in `sigmas`."""

    def probe(latents: Tensor, conditions: Conditions, noise: Tensor) -> dict[str, Tensor]:
        return {f"{LEVEL}{sigma}": reward(latents, conditions, sigma=sigma, noise=noise) for sigma in sigmas}

    return probe


def drift_probe(
    velocity_for: Callable[[Conditions, float], Velocity],
    reference: Callable[[], AbstractContextManager[None]],
    sigmas: Sequence[float],
) -> Probe:
    """Return a probe for the mean squared difference (B,) of policy and reference velocity, averaged over `sigmas`."""

    def probe(latents: Tensor, conditions: Conditions, noise: Tensor) -> dict[str, Tensor]:
        velocity = velocity_for(conditions, 1.0)
        squares = []
        for sigma in sigmas:
            noisy = add_noise(latents, noise, sigma)
            trained = velocity(noisy, sigma)
            with reference():
                squares.append((trained - velocity(noisy, sigma)).square().mean(dim=(1, 2, 3)))
        return {DRIFT: torch.stack(squares).mean(0)}

    return probe


@dataclass
class Watch:
    """Detects reward hacking after each evaluation, prints a warning, and keeps the LoRA with the best gold score.

    An instance is a hook for `train.loop.fit`. Call it on every rank, after each call of the evaluation hook
    `HeldOut`. Only the main rank writes files.

    Args:
        history: a function from an update to the scores of all evaluations up to that update (`HeldOut.history`).
        captions: caption of each evaluation sample; at least two captions must differ.
        evaluations: number of evaluations in the whole run, without the evaluation of the base model.
    """

    history: Callable[[int], Mapping[int, Scores]]
    captions: Sequence[str]
    evaluations: int
    config: WatchConfig
    output_dir: Path
    save_lora: Callable[[Path], None]
    is_main_process: bool = True
    say: Callable[[str], object] = print

    def __post_init__(self) -> None:
        if len(set(self.captions)) < 2:
            raise ValueError(f"captions: got {len(set(self.captions))} different ones; expected at least 2")

    def __call__(self, step: int) -> dict[str, float]:
        """Check the evaluation after update `step` for reward hacking, and return the metrics of the check."""
        history = self.history(step)
        comparison = detect_hacking(history, self.captions, self.config.level, self.evaluations)
        if self.config.keep_best and self.is_main_process:
            self._keep_best(history, step)
        if comparison.hacking:
            where = f"; the best LoRA is in {self.output_dir / BEST}" if self.config.keep_best else ""
            self.say(f"\nwarning: update {step}: the reward is being hacked: {comparison}{where}")
        row = {"hacking": float(comparison.hacking), "divergence": divergence(history[0], history[step])}
        spread = level_spread(history[0], history[step])
        return row if spread is None else {**row, "level_spread": spread}

    def stop_when(self, row: Mapping[str, float]) -> str | None:
        """Return the reason to stop training after an update with the metrics `row`, or None to go on."""
        alarm = self.config.stop_on_hacking and row.get("hacking")
        return "the reward was being hacked (watch.stop_on_hacking)" if alarm else None

    def _keep_best(self, history: Mapping[int, Scores], step: int) -> None:
        """Write lora_best/ if update `step` is the best so far. Otherwise delete it if it is of `step` or later."""
        folder = self.output_dir / BEST
        saved_step = read_json(folder / NOTE)["step"] if (folder / NOTE).is_file() else -1
        if best_step(history) == step:
            gold = {"gold": float(np.mean(history[step]["gold"])), "gold_before": float(np.mean(history[0]["gold"]))}
            with atomic_folder(folder) as temporary:
                self.save_lora(temporary)
                write_file(temporary / NOTE, json.dumps({"step": step, **gold}))
        elif saved_step >= step:
            discard_folder(folder)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation of `values`, or 1 if all values are equal."""
    return float(np.std(values)) or 1.0
