"""Which pairs are encoded, at which size, in which file: a pure function of the data and the settings. Torch-free."""

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dinalrm_align.data.buckets import Size, bucket_of_pair, parse_buckets
from dinalrm_align.data.config import FilterConfig, PrepareRun
from dinalrm_align.data.formats.record import ImageRef, Preference

MAX_NAMED = 5
"""Examples kept per reason."""


class Dropped:
    """Pairs that were left out: counts by reason, and messages about the first of each."""

    def __init__(self, on_bad: str) -> None:
        self.on_bad = on_bad
        self.counts: collections.Counter[str] = collections.Counter()
        self.named: dict[str, list[str]] = {}

    def drop(self, reason: str, message: str | None = None, pairs: int = 1) -> None:
        """Count pairs that a filter leaves out."""
        self.counts[reason] += pairs
        named = self.named.setdefault(reason, [])
        if message is not None and len(named) < MAX_NAMED:
            named.append(message)

    def bad(self, reason: str, message: str, pairs: int = 1) -> None:
        """Count pairs that cannot be used; with on_bad "refuse", raise ValueError instead."""
        if self.on_bad == "refuse":
            raise ValueError(f"{message}. To leave out such pairs and have them counted: --on_bad skip")
        self.drop(reason, message, pairs)


@dataclass(frozen=True, slots=True)
class Group:
    """Images of one prompt and size that are stored side by side.

    images: their numbers in the data set. pairs: (chosen, rejected, label), the first two as rows of `images`.
    """

    prompt: str
    size: Size
    images: tuple[int, ...]
    pairs: tuple[tuple[int, int, float], ...]

    @classmethod
    def of(cls, prompt: str, size: Size, pairs: Iterable[tuple[int, int, float]]) -> "Group":
        """Build a group from pairs that name images by number."""
        pairs = list(pairs)
        rows: dict[int, int] = {}
        for image in itertools.chain.from_iterable(pair[:2] for pair in pairs):
            rows.setdefault(image, len(rows))
        labelled = ((rows[chosen], rows[rejected], label) for chosen, rejected, label in pairs)
        return cls(prompt, size, tuple(rows), tuple(labelled))

    def without(self, bad: Mapping[int, object]) -> "Group | None":
        """The group without these images, and without images left in no pair; None if no pair is left."""
        gone = {row for row, image in enumerate(self.images) if image in bad}
        pairs = [pair for pair in self.pairs if gone.isdisjoint(pair[:2])]
        kept = sorted({row for pair in pairs for row in pair[:2]})
        rows = {row: number for number, row in enumerate(kept)}
        pairs = tuple((rows[chosen], rows[rejected], label) for chosen, rejected, label in pairs)
        return Group(self.prompt, self.size, tuple(self.images[row] for row in kept), pairs) if pairs else None


def filter_pairs(pairs: Iterable[Preference], config: FilterConfig, dropped: Dropped) -> list[Preference]:
    """The pairs that pass the filters of votes, confidence and scores."""
    kept = []
    for pair in pairs:
        reason = _objection(pair, config)
        if reason is None:
            kept.append(pair)
        else:
            dropped.drop(reason)
    return kept


def _objection(pair: Preference, config: FilterConfig) -> str | None:
    """The reason to leave out a pair, or None."""
    votes = pair.votes
    if pair.is_tie and config.ties == "drop":
        return "tie"
    if votes and config.min_vote_share is not None and votes[0] / sum(votes) <= config.min_vote_share:
        return f"share of votes at most {config.min_vote_share:g}"
    if votes and config.unanimous and votes[1] > 0:
        return "votes for the rejected image"
    if None not in (pair.confidence, config.min_confidence) and pair.confidence < config.min_confidence:
        return f"confidence below {config.min_confidence:g}"
    for name, smallest in (config.max_tie_gaps if pair.is_tie else config.min_gaps).items():
        if name not in pair.scores:
            return f"no score {name}"
        gap = pair.scores[name][0] - pair.scores[name][1]
        if not (abs(gap) < smallest if pair.is_tie else gap > smallest):
            return f"gap of {name}"
    return None


def images_of(pairs: Iterable[Preference]) -> list[ImageRef]:
    """Every image once, in order."""
    return list(dict.fromkeys(itertools.chain.from_iterable((pair.chosen, pair.rejected) for pair in pairs)))


def plan_groups(
    pairs: Sequence[Preference], sizes: Mapping[ImageRef, tuple[int, Size | str]], run: PrepareRun, dropped: Dropped
) -> list[Group]:
    """The groups to encode.

    sizes: image -> (its number, its (height, width) or a message why it cannot be read). Images get the size of their
    bucket; latents (pairs with a shape) keep theirs.
    """
    buckets, kept = parse_buckets(run.buckets), []
    for pair in pairs:
        (_, chosen), (_, rejected) = sizes[pair.chosen], sizes[pair.rejected]
        wrong = next((size for size in (chosen, rejected) if isinstance(size, str)), None)
        if wrong is not None:
            dropped.bad("unreadable image", wrong)
        elif min(chosen[0] * chosen[1], rejected[0] * rejected[1]) < run.filter.min_pixels:
            dropped.drop(f"image of less than {run.filter.min_pixels} pixels")
        elif pair.shape is not None:
            kept.append((pair, chosen))
        elif (bucket := bucket_of_pair(chosen, rejected, buckets, run.filter.aspect_tolerance)) is None:
            dropped.drop("no common bucket for the aspect ratios")
        else:
            kept.append((pair, bucket))
    together: dict[object, list[tuple[int, int, float]]] = {}
    for number, (pair, bucket) in enumerate(_limited(kept, run, dropped)):
        key = (pair.prompt, bucket, None if run.group == "prompt" else number)
        label = pair.votes[0] / sum(pair.votes) if run.label == "votes" and pair.votes else pair.label
        together.setdefault(key, []).append((sizes[pair.chosen][0], sizes[pair.rejected][0], label))
    return [Group.of(prompt, bucket, members) for (prompt, bucket, _), members in together.items()]


def _limited(kept: list[tuple[Preference, Size]], run: PrepareRun, dropped: Dropped) -> list[tuple[Preference, Size]]:
    """At most `max_pairs_per_prompt` pairs of each prompt, drawn at random."""
    limit = run.filter.max_pairs_per_prompt
    if limit is None:
        return kept
    by_prompt: dict[str, list[int]] = {}
    for number, (pair, _) in enumerate(kept):
        by_prompt.setdefault(pair.prompt, []).append(number)
    rng, chosen = np.random.default_rng((run.seed, 0)), set()
    for numbers in by_prompt.values():
        over = len(numbers) - limit
        chosen.update(numbers if over <= 0 else rng.choice(numbers, limit, replace=False).tolist())
        if over > 0:
            dropped.drop(f"more than {limit} pairs of a prompt", pairs=over)
    return [pair for number, pair in enumerate(kept) if number in chosen]


def plan_shards(groups: Iterable[Group], shard_size: int) -> list[list[Group]]:
    """The groups of each file: of one size, in order, at most `shard_size` images (or one larger group)."""
    by_size: dict[Size, list[Group]] = {}
    for group in groups:
        by_size.setdefault(group.size, []).append(group)
    shards: list[list[Group]] = []
    for size in sorted(by_size):
        stored = shard_size + 1  # starts a file
        for group in by_size[size]:
            if stored + len(group.images) > shard_size:
                shards.append([])
                stored = 0
            shards[-1].append(group)
            stored += len(group.images)
    return shards
