"""Which pairs are encoded, at which size, in which file: a pure function of the data and the settings. Torch-free."""

import collections
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dinalrm_align.data.buckets import Size, bucket_of_pair, parse_buckets
from dinalrm_align.data.config import FilterConfig, PrepareRun
from dinalrm_align.data.formats.record import ImageRef, Preference

NAMED = 5
"""Of what was left out for one reason, so many are named."""


class Dropped:
    """What was left out and why: counts of pairs by reason, sentences that name the first of each."""

    def __init__(self, on_bad: str) -> None:
        self.on_bad = on_bad
        self.counts: collections.Counter[str] = collections.Counter()
        self.named: dict[str, list[str]] = {}

    def drop(self, reason: str, sentence: str | None = None, pairs: int = 1) -> None:
        """Count pairs that a filter leaves out."""
        self.counts[reason] += pairs
        named = self.named.setdefault(reason, [])
        if sentence is not None and len(named) < NAMED:
            named.append(sentence)

    def bad(self, reason: str, sentence: str, pairs: int = 1) -> None:
        """Count pairs that cannot be had; ValueError with the sentence where those are refused."""
        if self.on_bad == "refuse":
            raise ValueError(f"{sentence}. To leave out such pairs and have them counted: --on_bad skip")
        self.drop(reason, sentence, pairs)


@dataclass(frozen=True, slots=True)
class Group:
    """ImageRefs of one prompt and size that lie side by side, and pairs (chosen, rejected, label), rows of them."""

    prompt: str
    size: Size
    pictures: tuple[int, ...]
    pairs: tuple[tuple[int, int, float], ...]

    def without(self, bad: Iterable[int]) -> "Group | None":
        """The group less the pictures of these numbers, and those in pairs with these alone; None: nothing is left."""
        gone = {row for row, picture in enumerate(self.pictures) if picture in set(bad)}
        if not gone:
            return self
        pairs = [pair for pair in self.pairs if pair[0] not in gone and pair[1] not in gone]
        kept = sorted({row for chosen, rejected, _ in pairs for row in (chosen, rejected)})
        place = {row: number for number, row in enumerate(kept)}
        return None if not pairs else replace(
            self, pictures=tuple(self.pictures[row] for row in kept),
            pairs=tuple((place[chosen], place[rejected], label) for chosen, rejected, label in pairs),
        )  # fmt: skip


def filter_pairs(pairs: Iterable[Preference], config: FilterConfig, dropped: Dropped) -> list[Preference]:
    """The pairs that their votes, confidence and scores let pass."""
    kept = []
    for pair in pairs:
        reason = _objection(pair, config)
        if reason is None:
            kept.append(pair)
        else:
            dropped.drop(reason)
    return kept


def _objection(pair: Preference, config: FilterConfig) -> str | None:
    votes = pair.votes
    if pair.is_tie and config.ties == "drop":
        return "a tie"
    if votes and config.min_vote_share is not None and votes[0] / sum(votes) <= config.min_vote_share:
        return f"share of votes at most {config.min_vote_share:g}"
    if votes and config.unanimous and votes[1] > 0:
        return "votes for the rejected picture"
    if None not in (pair.confidence, config.min_confidence) and pair.confidence < config.min_confidence:
        return f"confidence below {config.min_confidence:g}"
    for name, smallest in (config.max_tie_gaps if pair.is_tie else config.min_gaps).items():
        if name not in pair.scores:
            return f"no score {name}"
        gap = pair.scores[name][0] - pair.scores[name][1]
        if not (abs(gap) < smallest if pair.is_tie else gap > smallest):
            return f"gap of {name}"
    return None


def pictures_of(pairs: Sequence[Preference]) -> list[ImageRef]:
    """Every picture once, in order; its place is its number."""
    return list(dict.fromkeys(itertools.chain.from_iterable((pair.chosen, pair.rejected) for pair in pairs)))


def plan_groups(
    pairs: Sequence[Preference], sizes: dict[ImageRef, tuple[int, Size | str]], run: PrepareRun, dropped: Dropped
) -> list[Group]:
    """The groups to encode. sizes: picture -> its number, and (height, width), or what is wrong with it.

    Latents (pairs with a shape) keep their size; pictures get that of their bucket.
    """
    buckets, kept = parse_buckets(run.buckets), []
    for pair in pairs:
        (_, chosen), (_, rejected) = sizes[pair.chosen], sizes[pair.rejected]
        wrong = next((size for size in (chosen, rejected) if isinstance(size, str)), None)
        if wrong is not None:
            dropped.bad("picture that cannot be read", wrong)
        elif min(chosen[0] * chosen[1], rejected[0] * rejected[1]) < run.filter.min_pixels:
            dropped.drop(f"picture of less than {run.filter.min_pixels} pixels")
        elif pair.shape is not None:
            kept.append((pair, chosen))
        elif (bucket := bucket_of_pair(chosen, rejected, buckets, run.filter.aspect_tolerance)) is None:
            dropped.drop("no bucket of their aspect ratios")
        else:
            kept.append((pair, bucket))
    kept = _limited(kept, run, dropped)
    together: dict[object, list[Preference]] = {}
    for number, (pair, bucket) in enumerate(kept):
        together.setdefault((pair.prompt, bucket) if run.group == "prompt" else (number, bucket), []).append(pair)
    groups = []
    for (_, bucket), members in together.items():
        rows = {picture: row for row, picture in enumerate(pictures_of(members))}
        labelled = tuple((rows[pair.chosen], rows[pair.rejected], _label(pair, run)) for pair in members)
        groups.append(Group(members[0].prompt, bucket, tuple(sizes[picture][0] for picture in rows), labelled))
    return groups


def _limited(kept: list[tuple[Preference, Size]], run: PrepareRun, dropped: Dropped) -> list[tuple[Preference, Size]]:
    """At most `max_pairs_per_prompt` of each prompt, drawn at random."""
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


def _label(pair: Preference, run: PrepareRun) -> float:
    if run.label == "votes" and pair.votes:
        return pair.votes[0] / sum(pair.votes)
    return pair.label


def plan_shards(groups: Sequence[Group], shard_size: int) -> list[list[Group]]:
    """The groups of each file: of one size, in order, `shard_size` pictures or fewer (or one larger group)."""
    by_size: dict[Size, list[Group]] = {}
    for group in groups:
        by_size.setdefault(group.size, []).append(group)
    shards: list[list[Group]] = []
    for size in sorted(by_size):
        held = shard_size + 1  # begin a file
        for group in by_size[size]:
            if held + len(group.pictures) > shard_size:
                shards.append([])
                held = 0
            shards[-1].append(group)
            held += len(group.pictures)
    return shards
