"""The hacking watch: is the reward that a run climbs being fooled?

Every held-out evaluation judges the same captions from the same noise by the reward (proxy) and by a gold score that
takes no part in training. The decision is arithmetic on those numbers, `judge`; `Watch` is the hook for `loop.fit` that
asks it after every evaluation, warns, and keeps the best LoRA. Signs that come before the alarm are measured with every
evaluation by probes (`level_probe`, `drift_probe`) and recorded beside it:

    hacking        1 where the alarm holds, else 0
    divergence     gain of proxy less gain of gold over the base model, each in s.d. of the base model's samples
    level_spread   how far a latent reward's noise levels part: per sample the s.d. over levels of the score, each level
                   standardised by the base model's samples; the mean over samples
    drift          mean square of velocity less the reference's on the held-out latents, as the velocity KL of ReFL
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
from dinalrm_align.train.durable import atomic_folder, discard_folder, write_file
from dinalrm_align.train.files import read_json

Scores = Mapping[str, Sequence[float]]
"""What an evaluation found: name ("proxy", "gold", those of probes) -> a number per sample."""

LEVEL, DRIFT, BEST, NOTE = "proxy@", "drift", "lora_best", "best.json"


@dataclass(frozen=True)
class Verdict:
    """What the evaluation at update `step` says, against the best-gold one so far, at `best_step`.

    proxy_gain, gold_gain: since then, in their own units. p_proxy, p_gold: one-sided, of a rise and of a fall as large
    where there is none. hacking: both are below their levels.
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


def rise(values: np.ndarray) -> float:
    """One-sided p of the mean of values (C,) being as far above 0 as it is where the truth is 0 or below: Student's t
    over captions. Where all are equal there is no doubt: 0 above zero, else 1.
    """
    found = seeds_by_captions(values[None])
    if found.standard_error == 0:
        return 0.0 if found.mean > 0 else 1.0
    return float(stdtr(len(values) - 1, -found.mean / found.standard_error))


def judge(history: Mapping[int, Scores], captions: Sequence[str], level: float, evaluations: int) -> Verdict:
    """Whether the last evaluation of `history` (update -> scores, at least one) is a hacked one.

    captions: one per sample, two different ones at least. level: of a false alarm in a run of `evaluations` evaluations
    after the base model's. Alarm: paired over captions and against the evaluation with the best mean gold so far, the
    reward's rise has p <= level and gold's fall p <= level / pairs, pairs = evaluations (evaluations + 1) / 2: that
    best one was chosen by its gold, and every pair of evaluations may come to be compared, so that the level is shared
    out among them (Bonferroni). It then holds for the whole run, however evaluations depend on each other.
    """
    step = max(history)
    best = best_step(history)
    gains = {
        name: by_caption(np.subtract(history[step][name], history[best][name]), captions) for name in ("proxy", "gold")
    }
    pairs = max(evaluations, len(history) - 1) * (max(evaluations, len(history) - 1) + 1) / 2
    p_proxy, p_gold = rise(gains["proxy"]), rise(-gains["gold"])
    return Verdict(
        step=step, best_step=best, proxy_gain=float(gains["proxy"].mean()), gold_gain=float(gains["gold"].mean()),
        p_proxy=p_proxy, p_gold=p_gold, hacking=step != best and p_proxy <= level and p_gold * pairs <= level,
    )  # fmt: skip


def best_step(history: Mapping[int, Scores]) -> int:
    """The update with the best mean gold, the earliest of equals."""
    return max(sorted(history), key=lambda step: float(np.mean(history[step]["gold"])))


def divergence(before: Scores, after: Scores) -> float:
    """Mean gain of proxy less that of gold, each in s.d. of its scores before."""

    def gain(name: str) -> float:
        return float(np.mean(after[name]) - np.mean(before[name])) / _spread(before[name])

    return gain("proxy") - gain("gold")


def level_spread(before: Scores, after: Scores) -> float | None:
    """How far the reward's noise levels part after, see the module; None when fewer than two were scored both times."""
    names = sorted(name for name in before.keys() & after.keys() if name.startswith(LEVEL))
    if len(names) < 2:
        return None
    table = [(np.asarray(after[name]) - np.mean(before[name])) / _spread(before[name]) for name in names]
    return float(np.std(table, axis=0, ddof=1).mean())


def level_probe(reward: Callable[..., Tensor], sigmas: Sequence[float]) -> Probe:
    """Scores of one noise level each, by a reward that reads levels, on the evaluation's own noise."""

    def probe(latents: Tensor, conditions: Conditions, noise: Tensor) -> dict[str, Tensor]:
        return {
            f"{LEVEL}{sigma}": reward(latents, prompts=conditions.prompts, sigma=sigma, noise=noise) for sigma in sigmas
        }

    return probe


def drift_probe(
    velocity_for: Callable[[Conditions, float], Velocity],
    reference: Callable[[], AbstractContextManager[None]],
    sigmas: Sequence[float],
) -> Probe:
    """Velocity KL to the reference on the evaluation's latents, noised to each of `sigmas`; the mean over them.

    velocity_for: as in `HeldOut`, asked without guidance. reference: within its block that velocity is the reference's
    (`Policy.reference`).
    """

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
    """A hook for `loop.fit`, after `HeldOut` and as often; every process calls it, the main one writes.

    history: update -> scores of all evaluations up to this one (`HeldOut.history`). captions: one per sample.
    evaluations: how many there are to be after the base model's. save_lora: writes the policy's LoRA into a folder.
    say: prints, on the main process.
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
            raise ValueError(
                f"the hacking watch compares over captions: got {len(set(self.captions))}; evaluate on two at least"
            )

    def __call__(self, step: int) -> dict[str, float]:
        """What the evaluation at `step` adds to the metrics: hacking, divergence, and of what was measured
        level_spread.
        """
        history = self.history(step)
        verdict = judge(history, self.captions, self.config.level, self.evaluations)
        if self.config.keep_best and self.is_main_process:
            self._keep_best(history, step)
        if verdict.hacking:
            where = f"; the best LoRA is in {self.output_dir / BEST}" if self.config.keep_best else ""
            self.say(f"\nwarning: update {step}: the reward is being fooled: {verdict}{where}")
        row = {"hacking": float(verdict.hacking), "divergence": divergence(history[0], history[step])}
        spread = level_spread(history[0], history[step])
        return row if spread is None else {**row, "level_spread": spread}

    def stop_when(self, row: Mapping[str, float]) -> str | None:
        """For `loop.fit`: why to stop after an update with this row of metrics, if it is to."""
        if self.config.stop_on_hacking and row.get("hacking"):
            return "the reward was being fooled (watch.stop_on_hacking)"
        return None

    def _keep_best(self, history: Mapping[int, Scores], step: int) -> None:
        """Write lora_best/ if this evaluation is the best; drop one that a run gone back left of its future."""
        folder = self.output_dir / BEST
        noted = read_json(folder / NOTE)["step"] if (folder / NOTE).is_file() else -1
        if best_step(history) == step:
            gold = {"gold": float(np.mean(history[step]["gold"])), "gold_before": float(np.mean(history[0]["gold"]))}
            with atomic_folder(folder) as temporary:
                self.save_lora(temporary)
                write_file(temporary / NOTE, json.dumps({"step": step, **gold}))
        elif noted >= step:
            discard_folder(folder)


def _spread(values: Sequence[float]) -> float:
    """s.d.; 1 where there is none, as of a reward that gives one number to all."""
    return float(np.std(values)) or 1.0
