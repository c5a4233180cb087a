"""What rewards say of a fixed set of pairs: the raw score of every picture, taken in several ways, kept in a file.

Accuracy, calibration, ensembles by averaging and the spread over noise draws are all worked out of such files, so that
a reward is run once and its numbers can be looked at in ways that nobody had thought of.
"""

from __future__ import annotations

import json
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
from dinalrm_align.eval.pieces import Pieces
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.train.durable import atomically

PAIR_COLUMNS = ("chosen", "rejected", "label", "caption")
NAMES = ("prompts", "pictures")


@dataclass(frozen=True, order=True)
class NoiseLevels:
    """One way to take a score: at each of `sigmas`, all joined as tokens, with the noise draw of that number."""

    sigmas: tuple[float, ...]
    draws: tuple[int, ...]

    @classmethod
    def at(cls, *sigmas: float, draw: int = 0) -> NoiseLevels:
        """One level, or an ensemble of several, with one draw of noise."""
        return cls(sigmas, (draw,) * len(sigmas))

    @property
    def name(self) -> str:
        """ "0.4", "0.2+0.5+0.7", and "0.4+0.4@1,2" for draws other than number 0; "score" where nothing is drawn."""
        if not self.sigmas:
            return "score"
        levels = "+".join(f"{sigma:g}" for sigma in self.sigmas)
        return levels + ("@" + ",".join(map(str, self.draws)) if any(self.draws) else "")


@dataclass(frozen=True)
class PairScores:
    """Scores of the pictures of a set of pairs.

    Args:
        scores: reading's name -> (M,) float32, raw scores.
        chosen, rejected: (N,) int64, rows of the pictures of each pair.
        label: (N,) float32, the probability that a rater prefers `chosen`.
        caption: (N,) int64, number of the caption that the pair belongs to (of its group, where prompts are not kept);
            pairs of one caption are not independent.
        concept: (N,) names of what the pairs differ in; None where nobody knows.
        group: (N,) int64, number of the list that the pair is of, where raters ranked lists; None elsewhere.
        prompts: (C,) text of the captions by number; None where it is not kept.
        pictures: (M,) names of the pictures, as their set calls them; None where they have none.
    """

    scores: dict[str, np.ndarray]
    chosen: np.ndarray
    rejected: np.ndarray
    label: np.ndarray
    caption: np.ndarray
    concept: tuple[str, ...] | None = None
    group: np.ndarray | None = None
    prompts: tuple[str, ...] | None = None
    pictures: tuple[str, ...] | None = None

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

    def same_pairs(self, other: PairScores) -> bool:
        """Whether both judge the same pairs, in the same order."""
        ours, theirs = vars(self), vars(other)
        return all(np.array_equal(ours[name], theirs[name]) for name in PAIR_COLUMNS)


Score = Callable[[PairBatch, tuple[float, ...], Tensor], Tensor]
"""(batch of M pictures, K sigmas, noise (K, M, C, H, W)) -> (M,) raw scores, all sigmas joined."""


NO_NOISE = NoiseLevels((), ())
"""The one way to read a reward that draws no noise."""


@torch.no_grad()
def score_pairs(
    score: Score,
    batches: Sequence[PairBatch],
    readings: Iterable[NoiseLevels],
    *,
    seed: int,
    title: str,
    pieces: Pieces | None = None,
) -> PairScores:
    """Score all pictures of `batches` in every way asked for; a progress bar is called `title`.

    Noise draw number d of a batch depends on (seed, its index, d) alone, so that rewards are compared on equal noise.
    pieces: where batches are kept as they come; one that is there is not judged again.
    Raises ValueError when a score is not finite.
    """
    readings = list(dict.fromkeys(readings))
    columns: dict[str, list[np.ndarray]] = {}
    concepts: list[str] = []
    captions: dict[str, int] = {}
    pictures, named = 0, True
    for index in tqdm(range(len(batches)), desc=title, unit=" batches", dynamic_ncols=True):
        kept = None if pieces is None else pieces.load(index)
        if kept is None:
            kept = _judge_batch(score, batches[index], readings, seed, index)
            _check_finite(kept[0], readings, title)
            if pieces is not None:
                pieces.save(index, *kept)
        arrays, words = kept
        named &= words["prompts"] is not None
        prompts = words["prompts"] or [f"group {number} of batch {index}" for number in range(words["groups"])]
        of_group = np.array([captions.setdefault(prompt, len(captions)) for prompt in prompts])
        shifted = {name: arrays.pop(name) + pictures for name in ("chosen", "rejected")}
        caption = of_group[arrays.pop("pair_group")]
        for name, values in {**arrays, **shifted, "caption": caption}.items():
            columns.setdefault(name, []).append(values)
        concepts += words["concepts"] or ()
        pictures += len(arrays["scores"][0])
    scores = np.concatenate(columns.pop("scores"), axis=1)
    pairs = {name: np.concatenate(parts) for name, parts in columns.items()}
    if concepts and len(concepts) != len(pairs["chosen"]):
        raise ValueError(f"{title}: {len(concepts)} of {len(pairs['chosen'])} pairs name a concept, not all")
    taken = {reading.name: row for reading, row in zip(readings, scores, strict=True)}
    return PairScores(taken, **pairs, concept=tuple(concepts) or None, prompts=tuple(captions) if named else None)


def _judge_batch(
    score: Score, batch: PairBatch, readings: Sequence[NoiseLevels], seed: int, index: int
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """scores (R, M) and the columns of the pairs, rows counted from 0; and what is not a number."""
    numbers = {draw for reading in readings for draw in reading.draws}
    noise = {draw: batch.draw_noise(seeded_generator(seed, index, draw)) for draw in numbers}
    scores = []
    for reading in readings:
        drawn = [noise[draw] for draw in reading.draws]
        given = torch.stack(drawn) if drawn else batch.latents.new_empty(0, *batch.latents.shape)
        scores.append(score(batch, reading.sigmas, given).float().cpu().numpy())
    chosen, group = batch.chosen.cpu(), batch.group.cpu()
    arrays = {
        "scores": np.stack(scores), "chosen": chosen.numpy(), "rejected": batch.rejected.cpu().numpy(),
        "label": batch.label.float().cpu().numpy(), "pair_group": group[chosen].numpy(),
    }  # fmt: skip
    words = {"prompts": batch.group_prompts, "concepts": batch.concepts, "groups": batch.num_groups}
    return arrays, {name: list(value) if isinstance(value, tuple) else value for name, value in words.items()}


def _check_finite(arrays: dict[str, np.ndarray], readings: Sequence[NoiseLevels], title: str) -> None:
    rows = zip(readings, arrays["scores"], strict=True)
    broken = [reading.name for reading, row in rows if not np.isfinite(row).all()]
    if broken:
        raise ValueError(f"{title}: scores at {', '.join(broken)} are NaN or infinite; look at weights and latents")


def save_scores(judged: PairScores, path: Path, terms: dict[str, object]) -> None:
    """Write one safetensors file, atomically. terms: JSON-ready; `load_scores` compares them."""
    names = sorted(set(judged.concept or ()))
    tensors = {"scores": torch.from_numpy(np.stack(list(judged.scores.values())))}
    tensors |= {name: torch.from_numpy(vars(judged)[name]) for name in PAIR_COLUMNS}
    if judged.concept is not None:
        tensors["concept"] = torch.tensor([names.index(name) for name in judged.concept])
    if judged.group is not None:
        tensors["group"] = torch.from_numpy(judged.group)
    about = {"readings": list(judged.scores), "concepts": names, "terms": terms}
    about |= {name: vars(judged)[name] for name in NAMES if vars(judged)[name] is not None}
    with atomically(path) as temporary:
        save_file(tensors, temporary, metadata={name: json.dumps(value) for name, value in about.items()})


def load_scores(path: Path, terms: dict[str, object]) -> PairScores:
    """Read what `save_scores` wrote; ValueError when the file is damaged or was written on other terms."""
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
    texts = {name: tuple(about[name]) for name in NAMES if name in about}
    return PairScores(scores, **columns, concept=names, **texts)
