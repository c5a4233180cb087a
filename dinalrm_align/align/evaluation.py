"""Held-out evaluation of a run, with the same prompts and noise before, during and after training.

Every sample is scored by the training reward (proxy) and by one or more gold rewards that are not trained on. If the
proxy score rises and the gold score does not, the policy exploits the training reward. Each sample keeps its prompt and
noise. Gains are therefore means of paired differences; their standard error is below that of a mean score.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dinalrm_align.align.config import EvaluationConfig
from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.eval.report.intervals import by_caption
from dinalrm_align.eval.report.parts import PREFIX
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.grids import load_strip, save_before_after, save_grid, save_strip
from dinalrm_align.models.images import open_image, to_bytes
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.reward.registry import ImageScorer
from dinalrm_align.train.checkpoints import EVALUATIONS
from dinalrm_align.train.checks import deferred
from dinalrm_align.train.files import write_atomically
from dinalrm_align.train.metrics import track_image
from dinalrm_align.train.progress import progress

Probe = Callable[[Tensor, Conditions, Tensor], Mapping[str, Tensor]]
"""probe(latents (B, C, H, W), conditions, noise (B, C, H, W)) -> measurements by name, each (B,)"""


def standard_error(values: Sequence[float] | np.ndarray, prompts: Sequence[str]) -> float:
    """Return the standard error of the mean of `values`, one per sample, over prompts: samples of a prompt are not
    independent. If all prompts are equal, the standard error is over samples.
    """
    units = by_caption(values, prompts) if len(set(prompts)) > 1 else np.asarray(values)
    return float(units.std(ddof=1) / math.sqrt(len(units)))


def paired_gain(before: Sequence[float], after: Sequence[float], prompts: Sequence[str]) -> tuple[float, float]:
    """Return the mean of after - before, and its `standard_error`. before[i] and after[i] are scores of sample i."""
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return float(differences.mean()), standard_error(differences, prompts)


@dataclass
class HeldOut:
    """A hook for `train.loop.fit` that draws and scores samples of held-out prompts, and writes scores and images.

    Args:
        sampler: draws one sample per row of sampler.conditions, which are the conditions of the evaluation prompts.
        reward: the training reward.
        scorers: gold rewards, which score images, by metric: "gold", which is required, and "gold/NAME".
        decode: a function from latents (B, C, H, W) to images (B, 3, H, W) in [0, 1].
        probes: functions that measure each sample in addition to the rewards, such as `align.watch.drift_probe`.
        equal_calls: make all ranks sample equally many batches; required if the model's weights are sharded.
    """

    sampler: Sampler
    reward: Reward
    scorers: Mapping[str, ImageScorer]
    decode: Callable[[Tensor], Tensor]
    config: EvaluationConfig
    accelerator: Accelerator
    output_dir: Path
    probes: Sequence[Probe] = ()
    equal_calls: bool = False

    def __post_init__(self) -> None:
        first = self._folder / "000000.json"
        if first.exists():
            terms, now = json.loads(first.read_text())["terms"], self._terms()
            changed = [f"{name}: got {now[name]}, expected {terms[name]}" for name in now if now[name] != terms[name]]
            if changed:
                raise ValueError(
                    f"{self.output_dir}: the evaluation differs from that before the first update, so gains would not "
                    f"be paired ({'; '.join(changed)[:300]}): keep these settings, or start a new run"
                )

    @property
    def prompts(self) -> Sequence[str]:
        return self.sampler.conditions.prompts

    def _terms(self) -> dict[str, object]:
        """Return the settings that must be equal for two evaluations to be compared sample by sample."""
        return {
            "samples": len(self.prompts),
            "prompts": list(self.prompts),
            "seed": self.config.seed,
            "shown": self.config.shown,
            "guidance_scale": self.sampler.guidance_scale,
            "sigmas": list(self.sampler.sigmas),
            "latent_shape": list(self.sampler.latent_shape),
        }

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Evaluate the policy after update `step`, with the samples distributed over the ranks.

        Rank 0 writes evaluations/<step>.json (scores per sample), evaluations/<step>.png (one row of sample images)
        and grid_<step>.png (image grid). Returns metrics: for every reward and probe, its mean over samples;
        `gold_gain`, the mean gain of `gold` since step 0; and standard errors of `proxy`, `gold` and `gold_gain`.
        Every further gold reward has the metrics `gold/NAME`, `gold/NAME_gain` and their standard errors. Every part of
        `gold` has `gold_parts/PART` and, unless the evaluation at step 0 is of a version without parts,
        `gold_parts/PART_gain` and `gold_parts/PART_gain_standard_error`.
        """
        size, rank, world = self.config.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        starts = range(0, len(self.prompts), size)
        batches = progress(starts[rank::world], f"evaluation at update {step}")
        mine = [sample for start in batches for sample in self._batch(start)]
        if self.equal_calls and len(starts) % world and rank >= len(starts) % world:
            self._batch(0)
        found = sorted(gather_object(mine), key=lambda sample: sample[0])
        scores = {name: [values[name] for _, values, _ in found] for name in found[0][1]}
        if self.accelerator.is_main_process:
            record = {"step": step, "terms": self._terms(), **scores}
            write_atomically(self._folder / f"{step:06d}.json", json.dumps(record))
            self._save_images(step, np.stack([image for _, _, image in found[: self.config.shown]]), scores)
        self.accelerator.wait_for_everyone()
        row = {name: float(np.mean(values)) for name, values in scores.items()}
        before = self.scores(0)
        for name in ("proxy", *self.scorers):
            row[f"{name}_standard_error"] = standard_error(scores[name], self.prompts)
        for name in (name for name in scores if name.startswith("gold") and name in before):
            gain = paired_gain(before[name], scores[name], self.prompts)
            row[f"{name}_gain"], row[f"{name}_gain_standard_error"] = gain
        return row

    def scores(self, step: int) -> dict[str, list[float]]:
        """Return the evaluation at `step` as a dict: metric ("proxy", "gold", ...) -> one value per sample."""
        found = json.loads((self._folder / f"{step:06d}.json").read_text())
        return {name: values for name, values in found.items() if name not in ("step", "terms")}

    def history(self, step: int) -> dict[int, dict[str, list[float]]]:
        """Return all evaluations at or before `step` as a dict: step of the evaluation -> its result of `scores`."""
        steps = sorted(int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdigit())
        return {at: self.scores(at) for at in steps if at <= step}

    def summarise(self, step: int) -> dict[str, dict[str, float]]:
        """Compare the evaluations at step 0 and at `step`, and write the images of both to before_after.png.

        The result has the keys "gold", "proxy", for further gold rewards "gold/NAME", and for the parts of gold
        "gold_parts/PART". Each holds a dict with the keys "before" and "after" (mean scores), "gain" (after - before)
        and "standard_error" (of the gain, paired and over prompts). If the evaluation at step 0 lacks parts, they are
        left out, with a printed sentence.
        """
        summary: dict[str, dict[str, float]] = {}
        before, after = self.scores(0), self.scores(step)
        if any(name.startswith(PREFIX) for name in after.keys() - before.keys()):
            print("parts of gold have no gain: the evaluation before the first update, of an older version, lacks them")
        further = (name for name in after if name.startswith(("gold/", PREFIX)) and name in before)
        for name in ("gold", "proxy", *further):
            gain, error = paired_gain(before[name], after[name], self.prompts)
            ends = {"before": float(np.mean(before[name])), "after": float(np.mean(after[name]))}
            summary[name] = {**ends, "gain": gain, "standard_error": error}
        shown = self.config.shown
        first, last = (load_strip(self._folder / f"{at:06d}.png", shown) for at in (0, step))
        gold, path = summary["gold"], self.output_dir / "before_after.png"
        title = f"base model | after {step} updates: gold {gold['gain']:+.3f} ± {gold['standard_error']:.3f}"
        save_before_after(first, last, self.prompts[:shown], path, title=title)
        return summary

    @property
    def _folder(self) -> Path:
        return self.output_dir / EVALUATIONS

    def _batch(self, start: int) -> list[tuple[int, dict[str, float], np.ndarray | None]]:
        """Sample and score the batch that starts at index `start`. Return (index, scores, image or None) per sample."""
        indices = range(start, min(start + self.config.batch_size, len(self.prompts)))
        conditions, seed = self.sampler.take(indices), self.config.seed
        noise = self.sampler.noise([seeded_generator(seed, index) for index in indices])
        reward_noise = self.sampler.noise([seeded_generator(seed, index, 1) for index in indices])
        with deferred() as readings:
            latents = self.sampler.sample(conditions, noise)
            found = {"proxy": self.reward(latents, conditions, noise=reward_noise)}
            images = self.decode(latents)
            parts = {}
            for name, scorer in self.scorers.items():
                found[name], parts[name] = scorer.with_parts(images, list(conditions.prompts))
            found |= {f"{PREFIX}{part}": values for part, values in parts["gold"].items()}
            for probe in self.probes:
                found |= probe(latents, conditions, reward_noise)
            values = iter(readings.read([value for column in found.values() for value in column]))
        columns = {name: [next(values) for _ in indices] for name in found}
        shown = to_bytes(images)
        rows = [{name: column[row] for name, column in columns.items()} for row in range(len(indices))]
        return [
            (index, row, image if index < self.config.shown else None)
            for index, row, image in zip(indices, rows, shown, strict=True)
        ]

    def _save_images(self, step: int, images: np.ndarray, scores: dict[str, list[float]]) -> None:
        save_strip(images, self._folder / f"{step:06d}.png")
        captions = [f"{gold:.2f}: {prompt}" for gold, prompt in zip(scores["gold"], self.prompts[: self.config.shown])]
        title = f"update {step}: gold {np.mean(scores['gold']):.3f}, reward {np.mean(scores['proxy']):.3f}"
        grid = self.output_dir / f"grid_{step:06d}.png"
        save_grid(images, captions, grid, title=title)
        if self.accelerator.trackers:
            track_image(self.accelerator, "held_out", open_image(grid), step)
