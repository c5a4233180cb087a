"""What rewards say of a fixed set of pairs: the raw score of every picture, taken in several ways, kept in a file.

Accuracy, calibration, ensembles by averaging and the spread over noise draws are all worked out of such files, so that
a reward is run once and its numbers can be looked at in ways that nobody had thought of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.noise import seeded_generator

PAIR_COLUMNS = ("chosen", "rejected", "label", "caption")


@dataclass(frozen=True, order=True)
class Reading:
    """One way to take a score: at each of `sigmas`, all joined as tokens, with the noise draw of that number."""

    sigmas: tuple[float, ...]
    draws: tuple[int, ...]

    @classmethod
    def at(cls, *sigmas: float, draw: int = 0) -> Reading:
        """One level, or an ensemble of several, with one draw of noise."""
        return cls(sigmas, (draw,) * len(sigmas))

    @property
    def name(self) -> str:
        """ "0.4", "0.2+0.5+0.7", and "0.4+0.4@1,2" for draws other than number 0."""
        levels = "+".join(f"{sigma:g}" for sigma in self.sigmas)
        return levels + ("@" + ",".join(map(str, self.draws)) if any(self.draws) else "")


@dataclass(frozen=True)
class Judged:
    """Scores of the pictures of a set of pairs.

    Args:
        scores: reading's name -> (M,) float32, raw scores.
        chosen, rejected: (N,) int64, rows of the pictures of each pair.
        label: (N,) float32, the probability that a rater prefers `chosen`.
        caption: (N,) int64, number of the caption that the pair belongs to (of its group, where prompts are not kept);
            pairs of one caption are not independent.
        concept: (N,) names of what the pairs differ in; None where nobody knows.
    """

    scores: dict[str, np.ndarray]
    chosen: np.ndarray
    rejected: np.ndarray
    label: np.ndarray
    caption: np.ndarray
    concept: tuple[str, ...] | None = None

    @property
    def size(self) -> str:
        """ "900 pairs of 870 captions"."""
        return f"{len(self.label)} pairs of {len(np.unique(self.caption))} captions"

    def score(self, *names: str) -> np.ndarray:
        """(M,) raw scores, the mean over the named readings; ValueError for one that was not taken."""
        absent = [name for name in names if name not in self.scores]
        if absent or not names:
            raise ValueError(f"no reading {', '.join(absent)!r} here; taken were: {', '.join(self.scores)}")
        return np.mean([self.scores[name] for name in names], axis=0, dtype=np.float64)

    def gap(self, *names: str) -> np.ndarray:
        """(N,): score of the chosen picture less that of the rejected one."""
        score = self.score(*names)
        return score[self.chosen] - score[self.rejected]

    def correct(self, *names: str) -> np.ndarray:
        """(N,): 1 where the preferred picture scores strictly higher, else 0; NaN where raters tie."""
        preferred = np.sign(self.label - 0.5)
        return np.where(preferred == 0, np.nan, self.gap(*names) * preferred > 0)

    def same_pairs(self, other: Judged) -> bool:
        """Whether both judge the same pairs, in the same order."""
        ours, theirs = vars(self), vars(other)
        return all(np.array_equal(ours[name], theirs[name]) for name in PAIR_COLUMNS)


Score = Callable[[PairBatch, tuple[float, ...], Tensor], Tensor]
"""(batch of M pictures, K sigmas, noise (K, M, C, H, W)) -> (M,) raw scores, all sigmas joined."""


@torch.no_grad()
def judge(score: Score, batches: Sequence[PairBatch], readings: Iterable[Reading], *, seed: int, title: str) -> Judged:
    """Score all pictures of `batches` in every way asked for; a progress bar is called `title`.

    Noise draw number d of a batch depends on (seed, its index, d) alone, so that rewards are compared on equal noise.
    Raises ValueError when a score is not finite.
    """
    readings = list(dict.fromkeys(readings))
    scores: dict[str, list[Tensor]] = {reading.name: [] for reading in readings}
    columns: dict[str, list[Tensor]] = {"chosen": [], "rejected": [], "label": [], "caption": []}
    concepts: list[str] = []
    captions: dict[str, int] = {}
    pictures = 0
    for index in tqdm(range(len(batches)), desc=title, unit=" batches", dynamic_ncols=True):
        batch = batches[index]
        numbers = {draw for reading in readings for draw in reading.draws}
        noise = {draw: batch.draw_noise(seeded_generator(seed, index, draw)) for draw in numbers}
        for reading in readings:
            drawn = torch.stack([noise[draw] for draw in reading.draws])
            scores[reading.name].append(score(batch, reading.sigmas, drawn).float().cpu())
        columns["chosen"].append(batch.chosen.cpu() + pictures)
        columns["rejected"].append(batch.rejected.cpu() + pictures)
        columns["label"].append(batch.label.float().cpu())
        prompts = batch.prompts or [f"group {number} of batch {index}" for number in range(batch.num_groups)]
        of_group = torch.tensor([captions.setdefault(prompt, len(captions)) for prompt in prompts])
        columns["caption"].append(of_group[batch.group.cpu()[batch.chosen.cpu()]])
        concepts += batch.concepts or ()
        pictures += len(batch.latents)
    taken = {name: torch.cat(parts).numpy() for name, parts in scores.items()}
    broken = [name for name, values in taken.items() if not np.isfinite(values).all()]
    if broken:
        raise ValueError(f"{title}: scores at {', '.join(broken)} are NaN or infinite; look at weights and latents")
    pairs = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    if concepts and len(concepts) != len(pairs["chosen"]):
        raise ValueError(f"{title}: {len(concepts)} of {len(pairs['chosen'])} pairs name a concept, not all")
    return Judged(taken, **pairs, concept=tuple(concepts) or None)


def save_judged(judged: Judged, path: Path, terms: dict[str, object]) -> None:
    """Write one safetensors file, under a temporary name at first. terms: JSON-ready; `load_judged` compares them."""
    names = sorted(set(judged.concept or ()))
    tensors = {"scores": torch.from_numpy(np.stack(list(judged.scores.values())))}
    tensors |= {name: torch.from_numpy(vars(judged)[name]) for name in PAIR_COLUMNS}
    if judged.concept is not None:
        tensors["concept"] = torch.tensor([names.index(name) for name in judged.concept])
    about = {"readings": list(judged.scores), "concepts": names, "terms": terms}
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata={name: json.dumps(value) for name, value in about.items()})
    os.replace(temporary, path)


def load_judged(path: Path, terms: dict[str, object]) -> Judged:
    """Read what `save_judged` wrote; ValueError when the file is damaged or was written on other terms."""
    try:
        with safe_open(path, framework="np") as file:
            about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            columns = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the reward is judged again") from error
    if about["terms"] != json.loads(json.dumps(terms)):
        raise ValueError(
            f"{path} was judged on other terms: got {terms}, expected {about['terms']}; choose another output_dir, or "
            "delete it and the reward is judged again"
        )
    scores = dict(zip(about["readings"], columns.pop("scores"), strict=True))
    concept = columns.pop("concept", None)
    names = None if concept is None else tuple(about["concepts"][number] for number in concept)
    return Judged(scores, **columns, concept=names)
