"""Raw scores of all images of a test set at several noise levels, stored in one file.

Accuracy, calibration, averaged ensembles and the variance over noise draws are computed from the stored scores, so the
reward scores each image only once per noise level. `Pieces` stores partial results, so a killed evaluation resumes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.reward.backbones import Taps
from dinalrm_align.reward.model import RewardModel
from dinalrm_align.train.files import write_atomically

PAIR_COLUMNS = ("chosen", "rejected", "label", "caption")
STORED_NAMES = ("prompts", "images")
Level = tuple[float, ...]
"""One sigma, or several for an ensemble: the head reads the tokens of all of them and returns one score."""
Score = Callable[[PairBatch, Level, Tensor], Tensor]
"""Function (batch of M images, K sigmas, noise (M, C, H, W) or (K, M, C, H, W)) -> (M,) raw scores."""
ScoreLevels = Callable[[PairBatch, Sequence["NoiseLevels"], Mapping[int, Tensor]], Sequence[Tensor]]
"""Function (batch of M images, noise levels, draw -> noise (M, C, H, W)) -> raw scores (M,) at each noise level."""
Piece = tuple[dict[str, np.ndarray], dict[str, object]]
"""Partial results of an evaluation: arrays, and JSON-serialisable metadata."""


def level_name(level: Level) -> str:
    """Format the noise levels of one score: "0.4" for one sigma, "0.2+0.5+0.7" for an ensemble of sigmas."""
    return "+".join(f"{sigma:g}" for sigma in level)


@dataclass(frozen=True, order=True)
class NoiseLevels:
    """Noise levels of one score: one or several sigmas. `draws`: for each sigma, the index of its noise draw."""

    sigmas: Level
    draws: tuple[int, ...]

    @classmethod
    def at(cls, *sigmas: float, draw: int = 0) -> NoiseLevels:
        """Return the `NoiseLevels` of one sigma, or of an ensemble of several. All sigmas use the noise draw `draw`."""
        return cls(sigmas, (draw,) * len(sigmas))

    @property
    def name(self) -> str:
        """Key of the scores: "0.4", "0.2+0.5+0.7", "0.4+0.4@1,2" (noise draws 1 and 2), or "score" without sigmas."""
        if not self.sigmas:
            return "score"
        return level_name(self.sigmas) + ("@" + ",".join(map(str, self.draws)) if any(self.draws) else "")


NO_NOISE = NoiseLevels((), ())  # for a reward that is not evaluated at chosen noise levels


@dataclass(frozen=True)
class PairScores:
    """Scores of M images, and the N pairs of images that raters compared.

    Args:
        scores: `NoiseLevels.name` -> (M,) float32, raw scores.
        chosen, rejected: (N,) int64, indices of the two images of each pair.
        label: (N,) float32, probability that a rater prefers the `chosen` image.
        caption: (N,) int64, index of the caption of each pair. Without stored prompts, each group of images has its own
            index. Pairs of one caption are not independent.
        concept: for each pair, the name of what its two images differ in; None if unknown.
        group: (N,) int64, index of the ranked list that contains the pair; None if raters did not rank lists.
        prompts: text of each caption; None if not stored.
        images: names of the M images; None if the images have no names.
    """

    scores: dict[str, np.ndarray]
    chosen: np.ndarray
    rejected: np.ndarray
    label: np.ndarray
    caption: np.ndarray
    concept: tuple[str, ...] | None = None
    group: np.ndarray | None = None
    prompts: tuple[str, ...] | None = None
    images: tuple[str, ...] | None = None

    @property
    def size(self) -> str:
        return f"{len(self.label)} pairs of {len(np.unique(self.caption))} captions"

    def score(self, *names: str) -> np.ndarray:
        """Return the mean score over the noise levels `names`, (M,) float64. Raises ValueError for unknown names."""
        absent = [name for name in names if name not in self.scores]
        if absent or not names:
            raise ValueError(f"noise level: got {', '.join(absent)!r}; expected one of {', '.join(self.scores)}")
        return np.mean([self.scores[name] for name in names], axis=0, dtype=np.float64)

    def gap(self, *names: str) -> np.ndarray:
        """Return the score of the chosen image minus the score of the rejected image for each pair, (N,)."""
        score = self.score(*names)
        return score[self.chosen] - score[self.rejected]

    def correct(self, *names: str) -> np.ndarray:
        """Return correctness (N,): 1 if the preferred image scores strictly higher, 0 if not, NaN if raters tie."""
        preferred = np.sign(self.label - 0.5)
        return np.where(preferred == 0, np.nan, self.gap(*names) * preferred > 0)

    def accuracy(self, *names: str) -> float:
        """Return the share of correctly ordered pairs among the pairs that raters do not tie."""
        return float(np.nanmean(self.correct(*names)))

    def subset(self, kept: np.ndarray) -> PairScores:
        """Return a copy with only the pairs where `kept`, (N,) bool, is True. The scores of all images remain."""
        columns = {name: vars(self)[name][kept] for name in PAIR_COLUMNS}
        group = None if self.group is None else self.group[kept]
        concept = None if self.concept is None else tuple(compress(self.concept, kept))
        return replace(self, **columns, group=group, concept=concept)

    def same_pairs(self, other: PairScores) -> bool:
        """Return whether `self` and `other` have the same pairs of the same prompts, in the same order."""
        return self.prompts == other.prompts and all(
            np.array_equal(vars(self)[name], vars(other)[name]) for name in PAIR_COLUMNS
        )


def level_by_level(score: Score) -> ScoreLevels:
    """Return a function that calls `score` once for each noise level, with the noise stacked, (K, M, C, H, W)."""

    def score_levels(batch: PairBatch, levels: Sequence[NoiseLevels], noise: Mapping[int, Tensor]) -> list[Tensor]:
        empty = batch.latents.new_empty(0, *batch.latents.shape)
        drawn = ([noise[draw] for draw in level.draws] for level in levels)
        return [score(batch, at.sigmas, torch.stack(own) if own else empty) for at, own in zip(levels, drawn)]

    return score_levels


def shared_features(model: RewardModel) -> ScoreLevels:
    """Return a function that scores batches with a latent reward, on the CPU.

    Noise levels that have a sigma and a noise draw in common, such as 0.2 and the ensemble 0.2 + 0.5 + 0.7, share one
    pass through the backbone. Its features are kept until the last noise level that reads them is scored.
    """

    def score_levels(batch: PairBatch, levels: Sequence[NoiseLevels], noise: Mapping[int, Tensor]) -> list[Tensor]:
        device = model.trunk.device
        latents, text = batch.latents.to(device), batch.conditions.to(device)
        embeds = text.prompt_embeds, text.pooled_prompt_embeds
        read = [list(zip(level.sigmas, level.draws, strict=True)) for level in levels]
        last = {key: index for index, keys in enumerate(read) for key in keys}
        kept: dict[tuple[float, int], Taps] = {}
        scores = []
        for index, keys in enumerate(read):
            for sigma, draw in (key for key in keys if key not in kept):
                (kept[sigma, draw],) = model.features(latents, *embeds, sigma, noise[draw].to(device))
            scores.append(model.score([kept[key] for key in keys]).to("cpu"))
            kept = {key: taps for key, taps in kept.items() if last[key] > index}
        return scores

    return score_levels


@torch.no_grad()
def score_pairs(
    score: ScoreLevels,
    batches: Sequence[PairBatch],
    levels: Iterable[NoiseLevels],
    *,
    seed: int,
    title: str,
    pieces: Pieces | None = None,
) -> PairScores:
    """Score all images of `batches` at all noise levels. Raises ValueError for a NaN or infinite score.

    The noise is seeded by (seed, batch index, draw), so all rewards see the same noise. Batches whose scores are stored
    in `pieces` are not scored again.
    """
    levels = list(dict.fromkeys(levels))
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    captions: dict[str, int] = {}
    concepts, images, has_prompts = [], 0, True
    for index in tqdm(range(len(batches)), desc=title, unit=" batches", dynamic_ncols=True):
        take = partial(_score_batch, score, batches, index, levels, seed, title)
        arrays, metadata = take() if pieces is None else pieces.get(index, take)
        has_prompts &= metadata["prompts"] is not None
        prompts = metadata["prompts"] or [f"group {number} of batch {index}" for number in range(metadata["groups"])]
        caption_of_group = np.array([captions.setdefault(prompt, len(captions)) for prompt in prompts])
        arrays["caption"] = caption_of_group[arrays.pop("pair_group")]
        for name, values in arrays.items():
            columns[name].append(values + images if name in ("chosen", "rejected") else values)
        concepts += metadata["concepts"] or ()
        images += len(arrays["scores"][0])
    scores = dict(zip((level.name for level in levels), np.concatenate(columns.pop("scores"), axis=1), strict=True))
    pairs = {name: np.concatenate(parts) for name, parts in columns.items()}
    if concepts and len(concepts) != len(pairs["chosen"]):
        raise ValueError(
            f"{title}: concepts: got {len(concepts)}; expected one for each of {len(pairs['chosen'])} pairs"
        )
    prompts = tuple(captions) if has_prompts else None
    return PairScores(scores, **pairs, concept=tuple(concepts) or None, prompts=prompts)


def _score_batch(
    score: ScoreLevels, batches: Sequence[PairBatch], index: int, levels: Sequence[NoiseLevels], seed: int, title: str
) -> Piece:
    """Score one batch. Returns a dict of arrays (the scores (levels, M) and the pairs), and a dict of metadata."""
    batch = batches[index]
    numbers = {draw for level in levels for draw in level.draws}
    noise = {draw: batch.draw_noise(seeded_generator(seed, index, draw)) for draw in numbers}
    scores = [found.float().cpu().numpy() for found in score(batch, levels, noise)]
    for level, found in zip(levels, scores, strict=True):
        check_finite_scores(found, level.name, title)
    chosen = batch.chosen.cpu()
    arrays = {
        "scores": np.stack(scores), "chosen": chosen.numpy(), "rejected": batch.rejected.cpu().numpy(),
        "label": batch.label.float().cpu().numpy(), "pair_group": batch.group.cpu()[chosen].numpy(),
    }  # fmt: skip
    prompts, concepts = (None if names is None else list(names) for names in (batch.group_prompts, batch.concepts))
    return arrays, {"prompts": prompts, "concepts": concepts, "groups": batch.num_groups}


def check_finite_scores(scores: np.ndarray, level: str, title: str) -> None:
    if not np.isfinite(scores).all():
        raise ValueError(f"{title}: scores at {level} are NaN or infinite; check the weights and the images")


def save_scores(scores: PairScores, path: Path, terms: Mapping[str, object]) -> None:
    """Write scores to a safetensors file, atomically. `terms`: JSON-serialisable settings that the scores depend on."""
    concepts = sorted(set(scores.concept or ()))
    arrays = {"scores": np.stack(list(scores.scores.values()))} | {name: vars(scores)[name] for name in PAIR_COLUMNS}
    if scores.concept is not None:
        arrays["concept"] = np.array([concepts.index(name) for name in scores.concept])
    if scores.group is not None:
        arrays["group"] = scores.group
    names = {name: vars(scores)[name] for name in STORED_NAMES if vars(scores)[name] is not None}
    _write_arrays(path, arrays, {"readings": list(scores.scores), "concepts": concepts, "terms": terms, **names})


def load_scores(path: Path, terms: Mapping[str, object]) -> PairScores:
    """Read a file that `save_scores` wrote. Raises ValueError if it is damaged or its settings differ from `terms`."""
    columns, metadata = _read_arrays(path)
    _check_terms(path, metadata["terms"], terms)
    scores = dict(zip(metadata["readings"], columns.pop("scores"), strict=True))
    numbers = columns.pop("concept", None)
    concept = None if numbers is None else tuple(metadata["concepts"][number] for number in numbers)
    names = {name: tuple(metadata[name]) for name in STORED_NAMES if name in metadata}
    return PairScores(scores, **columns, concept=concept, **names)


class Pieces:
    """Folder of an evaluation's partial results. Raises ValueError if its stored settings differ from `terms`."""

    def __init__(self, folder: Path, terms: Mapping[str, object]) -> None:
        self.folder, stored = folder, folder / "terms.json"
        if stored.exists():
            _check_terms(folder, json.loads(stored.read_text(encoding="utf-8")), terms)
        else:
            write_atomically(stored, json.dumps(terms, indent=1) + "\n")

    def get(self, number: int, take: Callable[[], Piece]) -> Piece:
        """Return partial result `number`. If it is not stored yet, compute it with `take` and store it."""
        path = self.folder / f"{number:06d}.safetensors"
        if path.exists():
            arrays, metadata = _read_arrays(path)
            return arrays, metadata["words"]
        piece = take()
        _write_arrays(path, piece[0], {"words": piece[1]})
        return piece


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, object]) -> None:
    text = {name: json.dumps(value) for name, value in metadata.items()}
    write_atomically(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=text))


def _read_arrays(path: Path) -> Piece:
    try:
        with safe_open(path, framework="np") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to score again") from error


def _check_terms(path: Path, stored: object, terms: Mapping[str, object]) -> None:
    expected = json.loads(json.dumps(terms))
    if stored != expected:
        how = "choose another output_dir, or delete it to score again"
        raise ValueError(f"{path}: got scores taken with {stored}; expected {expected}: {how}")
