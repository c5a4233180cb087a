"""The held-out judgement of a run: the same prompts and noise before, during and after, by the reward and by a gold
score.

The gold score takes no part in training; where the reward rises and gold does not, the reward is being fooled. Because
prompt and noise of a sample stay the same, gains are paired: their standard error is that of the mean difference, far
below that of either mean.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dinalrm_align.align.config import EvaluationConfig
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import Velocity, rollout, seeded_noise
from dinalrm_align.models.grids import load_strip, save_before_after, save_grid, save_strip
from dinalrm_align.models.images import to_bytes
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.tracking import track_image

Judge = Callable[[Tensor, Sequence[str]], Tensor]
"""judge(images (B, 3, H, W) in [0, 1], prompts) -> (B,)"""
Probe = Callable[[Tensor, Conditions, Tensor], Mapping[str, Tensor]]
"""probe(latents (B, C, H, W), conditions, noise (B, C, H, W)) -> name -> (B,), measured with every evaluation."""


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of after less before over the same samples (at least two), and the standard error of that mean."""
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


@dataclass
class HeldOut:
    """A hook for `loop.fit`: samples, judges, and leaves scores, pictures and grids in the run's folder.

    velocity_for: (conditions, guidance_scale) -> a velocity under the present weights. conditions: one per sample, on
    any device. decode: latents -> images (B, 3, H, W) in [0, 1]. reward: as in `align.refl`. gold: judges pictures.
    judges: others beside it, by name; their scores are called gold/NAME. probes: what else to measure of every sample
    (`align.watch`). in_step: let all processes sample equally often, a batch for nothing where one is missing.
    """

    velocity_for: Callable[[Conditions, float], Velocity]
    conditions: Conditions
    sigmas: Sequence[float]
    guidance_scale: float
    latent_shape: tuple[int, int, int]
    decode: Callable[[Tensor], Tensor]
    reward: Callable[..., Tensor]
    gold: Judge
    config: EvaluationConfig
    accelerator: Accelerator
    output_dir: Path
    judges: Mapping[str, Judge] = field(default_factory=dict)
    probes: Sequence[Probe] = ()
    in_step: bool = False

    def __post_init__(self) -> None:
        first = self._folder / "000000.json"
        if first.exists():
            terms, now = json.loads(first.read_text())["terms"], self._terms()
            changed = [f"{name}: got {now[name]}, expected {terms[name]}" for name in now if now[name] != terms[name]]
            if changed:
                raise ValueError(
                    f"{self.output_dir} was judged on other terms before its first update, gains would not be paired "
                    f"({'; '.join(changed)[:300]}); leave these settings as they were, or begin a new run"
                )

    def _terms(self) -> dict[str, object]:
        """What must not change between two evaluations that are compared sample by sample."""
        return {
            "samples": len(self.conditions),
            "prompts": list(self.conditions.prompts),
            "seed": self.config.seed,
            "shown": self.config.shown,
            "guidance_scale": self.guidance_scale,
            "sigmas": list(self.sigmas),
            "latent_shape": list(self.latent_shape),
        }

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Evaluate after update `step`. Every process takes its share; the main one writes

        evaluations/<step>.json (the scores of every sample), evaluations/<step>.png (the shown pictures in a row) and
        grid_<step>.png. Returns means and standard errors of proxy and gold, the gain of gold over step 0, and the mean
        of what other judges and probes found.
        """
        size, rank, world = self.config.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        starts = range(0, len(self.conditions), size)
        mine = [sample for start in starts[rank::world] for sample in self._batch(start)]
        if self.in_step and len(starts) % world and rank >= len(starts) % world:
            self._batch(0)
        judged = gather_object(mine)
        judged.sort(key=lambda sample: sample[0])
        scores = {name: [values[name] for _, values, _ in judged] for name in judged[0][1]}
        if self.accelerator.is_main_process:
            judged_on = {"step": step, "terms": self._terms()}
            write_atomically(self._folder / f"{step:06d}.json", json.dumps({**judged_on, **scores}))
            self._save_pictures(step, np.stack([picture for _, _, picture in judged[: self.config.shown]]), scores)
        self.accelerator.wait_for_everyone()
        row = {name: float(np.mean(values)) for name, values in scores.items()}
        for name in ("proxy", "gold"):
            row[f"{name}_standard_error"] = float(np.std(scores[name], ddof=1) / math.sqrt(len(judged)))
        row["gold_gain"], row["gold_gain_standard_error"] = paired_gain(self.scores(0)["gold"], scores["gold"])
        return row

    def scores(self, step: int) -> dict[str, list[float]]:
        """proxy, gold and what other judges and probes found of every sample, as an evaluation left them."""
        found = json.loads((self._folder / f"{step:06d}.json").read_text())
        return {name: values for name, values in found.items() if name not in ("step", "terms")}

    def history(self, step: int) -> dict[int, dict[str, list[float]]]:
        """The scores of every evaluation up to `step`, by its update."""
        steps = sorted(int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdigit())
        return {at: self.scores(at) for at in steps if at <= step}

    def summarise(self, step: int) -> dict[str, dict[str, float]]:
        """Step 0 against `step`, from what the two evaluations left: writes before_after.png.

        Returns for gold and proxy {"before", "after", "gain", "standard_error" of the paired gain}.
        """
        summary = {}
        before, after = self.scores(0), self.scores(step)
        for name in ("gold", "proxy"):
            gain, error = paired_gain(before[name], after[name])
            ends = {"before": float(np.mean(before[name])), "after": float(np.mean(after[name]))}
            summary[name] = {**ends, "gain": gain, "standard_error": error}
        shown = self.config.shown
        first, last = (load_strip(self._folder / f"{at:06d}.png", shown) for at in (0, step))
        gold, path = summary["gold"], self.output_dir / "before_after.png"
        title = f"base model | after {step} updates: gold {gold['gain']:+.3f} ± {gold['standard_error']:.3f}"
        save_before_after(first, last, self.conditions.prompts[:shown], path, title=title)
        return summary

    @property
    def _folder(self) -> Path:
        return self.output_dir / "evaluations"

    def _batch(self, start: int) -> list[tuple[int, dict[str, float], np.ndarray | None]]:
        """(index, scores by name, picture if it is to be shown) of the samples from `start` on."""
        indices = range(start, min(start + self.config.batch_size, len(self.conditions)))
        device = self.accelerator.device
        conditions = self.conditions.take(indices, device)
        generators = [seeded_generator(self.config.seed, index) for index in indices]
        noise = seeded_noise(self.latent_shape, generators).to(device)
        latents = rollout(self.velocity_for(conditions, self.guidance_scale), noise, self.sigmas)
        reward_noise = seeded_noise(
            self.latent_shape, [seeded_generator(self.config.seed, index, 1) for index in indices]
        ).to(device)
        found = {"proxy": self.reward(latents, prompts=conditions.prompts, noise=reward_noise)}
        images = self.decode(latents)
        for name, judge in {
            "gold": self.gold,
            **{f"gold/{name}": judge for name, judge in self.judges.items()},
        }.items():
            found[name] = judge(images, list(conditions.prompts))
        for probe in self.probes:
            found.update(probe(latents, conditions, reward_noise))
        pictures = to_bytes(images)
        columns = {name: values.tolist() for name, values in found.items()}
        return [
            (
                index,
                {name: values[row] for name, values in columns.items()},
                pictures[row] if index < self.config.shown else None,
            )
            for row, index in enumerate(indices)
        ]

    def _save_pictures(self, step: int, pictures: np.ndarray, scores: dict[str, list[float]]) -> None:
        save_strip(pictures, self._folder / f"{step:06d}.png")
        captions = [
            f"{gold:.2f}: {prompt}"
            for gold, prompt in zip(scores["gold"], self.conditions.prompts[: self.config.shown], strict=False)
        ]
        title = f"update {step}: gold {np.mean(scores['gold']):.3f}, reward {np.mean(scores['proxy']):.3f}"
        grid = self.output_dir / f"grid_{step:06d}.png"
        save_grid(pictures, captions, grid, title=title)
        track_image(self.accelerator, "held_out", grid, step)
