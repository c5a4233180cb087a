"""Plan which pairs to encode, at which image size and into which file. The plan depends only on the data and settings.

A bucket is a target image size. An image fits a bucket if their log aspect ratios differ by at most a tolerance. Each
image is resized, without cropping, to the fitting bucket with the nearest log area. The published training data of
DiNa-LRM used the 13 sizes in PUBLISHED and a tolerance of 0.03. Torch-free.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dinalrm_align.data.config import FilterConfig, PrepareRun
from dinalrm_align.data.formats.record import Dropped, ImageRef, Preference

Size = tuple[int, int]
"""(height, width) in pixels."""

PUBLISHED: tuple[Size, ...] = (
    (256, 256), (512, 512), (1024, 1024), (1248, 832), (1344, 896), (832, 1248), (896, 1344), (1024, 768), (768, 1024),
    (1472, 832), (832, 1472), (1152, 832), (832, 1152),
)  # fmt: skip
MULTIPLE = 16
"""Every side of a bucket is a multiple of this: the VAE's downsampling (8) times the transformer's patch size (2)."""
STEP, MAX_ASPECT = 64, 2.0
"""Limits of `by_area`: sides are multiples of STEP, and the longer is at most MAX_ASPECT times the shorter."""
SAME_ASPECT = 0.05
"""Two images with different buckets can form a pair if their aspect ratios differ by less than this fraction."""


def parse_buckets(text: str) -> tuple[Size, ...]:
    """Return the sizes that `text` names: published, area:SIDE (see `by_area`) or HEIGHTxWIDTH,HEIGHTxWIDTH,..."""
    if text == "published":
        return PUBLISHED
    if match := re.fullmatch(r"area:(\d{1,5})", text):
        return by_area(int(match[1]))
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", word)
        if not match:
            raise ValueError(f"buckets: got {text!r:.80}; expected published, area:1024, or sizes as 1024x768,768x1024")
        size = int(match[1]), int(match[2])
        if min(size) < MULTIPLE or size[0] % MULTIPLE or size[1] % MULTIPLE:
            raise ValueError(f"buckets: got {word.strip()}; expected sides that are positive multiples of {MULTIPLE}")
        if size in sizes:
            raise ValueError(f"buckets: got {text!r:.80}; expected each size once")
        sizes.append(size)
    return tuple(sizes)


def by_area(side: int) -> tuple[Size, ...]:
    """Return image sizes of area at most side^2: a square, and rectangles in portrait and landscape orientation.

    All sides are multiples of 64. The longer side of a rectangle is at most twice as long as the shorter side.
    """
    if side < STEP or side % STEP:
        raise ValueError(f"buckets: got area:{side}; expected a positive multiple of {STEP}")
    sizes = {(side, side)}
    for short in range(STEP, side, STEP):
        long = side * side // short // STEP * STEP
        if long <= MAX_ASPECT * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size], tolerance: float) -> Size | None:
    fitting = [b for b in buckets if abs(_log_aspect(b) - _log_aspect(size)) <= tolerance]
    return min(fitting, key=lambda b: (abs(_log_area(b) - _log_area(size)), b), default=None)


def bucket_of_pair(one: Size, other: Size, buckets: Sequence[Size], tolerance: float) -> Size | None:
    """Return the size in `buckets` that both images of a pair are resized to; None if no size suits both images.

    Images with different buckets can still form a pair if their aspect ratios differ by less than 5% (SAME_ASPECT).
    Both images are then resized to the bucket of the smaller image.
    """
    found = [nearest_bucket(size, buckets, tolerance) for size in (one, other)]
    differ = abs(math.exp(_log_aspect(one) - _log_aspect(other)) - 1) >= SAME_ASPECT
    if None in found or (found[0] != found[1] and differ):
        return None
    return min(zip(map(_log_area, (one, other)), found))[1]


def _log_aspect(size: Size) -> float:
    return math.log(size[1] / size[0])


def _log_area(size: Size) -> float:
    return math.log(size[0] * size[1])


@dataclass(frozen=True, slots=True)
class Group:
    """Images of one prompt and one size, stored in adjacent rows, and the pairs that the images form.

    images: indices of the images in the data set's list of images. pairs: (chosen, rejected, label) of each pair, where
    chosen and rejected are positions in the tuple `images`.
    """

    prompt: str
    size: Size
    images: tuple[int, ...]
    pairs: tuple[tuple[int, int, float], ...]

    @classmethod
    def of(cls, prompt: str, size: Size, pairs: Sequence[tuple[int, int, float]]) -> "Group":
        """Build a group from pairs (chosen, rejected, label), where chosen and rejected index the data set's images."""
        images = tuple(dict.fromkeys(image for pair in pairs for image in pair[:2]))
        rows = {image: row for row, image in enumerate(images)}
        labelled = ((rows[chosen], rows[rejected], label) for chosen, rejected, label in pairs)
        return cls(prompt, size, images, tuple(labelled))

    def without(self, bad: Mapping[int, object]) -> "Group | None":
        """Return a new group of all pairs that have no image in `bad`; None if there is no such pair."""
        gone = {row for row, image in enumerate(self.images) if image in bad}
        pairs = [pair for pair in self.pairs if gone.isdisjoint(pair[:2])]
        kept = sorted({row for pair in pairs for row in pair[:2]})
        rows = {row: number for number, row in enumerate(kept)}
        pairs = tuple((rows[chosen], rows[rejected], label) for chosen, rejected, label in pairs)
        return Group(self.prompt, self.size, tuple(self.images[row] for row in kept), pairs) if pairs else None


def filter_pairs(pairs: Iterable[Preference], config: FilterConfig, dropped: Dropped) -> list[Preference]:
    """Return the pairs that pass the filters for ties, votes, confidence and scores. Count the rest in `dropped`."""
    pairs = list(pairs)
    reasons = [_objection(pair, config) for pair in pairs]
    for reason in filter(None, reasons):
        dropped.drop(reason)
    return [pair for pair, reason in zip(pairs, reasons, strict=True) if reason is None]


def _objection(pair: Preference, config: FilterConfig) -> str | None:
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


def plan_groups(
    pairs: Sequence[Preference], sizes: Mapping[ImageRef, tuple[int, Size | str]], run: PrepareRun, dropped: Dropped
) -> list[Group]:
    """Return the groups of images to encode, each with the size that its images are resized to.

    Stored latents are not resized. sizes: maps each image to its index and its (height, width) in pixels. For an
    unreadable image, an error message replaces (height, width).
    """
    buckets, kept = parse_buckets(run.buckets), []
    for pair in pairs:
        (_, chosen), (_, rejected) = sizes[pair.chosen], sizes[pair.rejected]
        if isinstance(chosen, str) or isinstance(rejected, str):
            dropped.bad("unreadable image", chosen if isinstance(chosen, str) else rejected)
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
    limit = run.filter.max_pairs_per_prompt
    if limit is None:
        return kept
    by_prompt: dict[str, list[int]] = {}
    for number, (pair, _) in enumerate(kept):
        by_prompt.setdefault(pair.prompt, []).append(number)
    rng, chosen = np.random.default_rng((run.seed, 0)), set()
    for numbers in by_prompt.values():
        if len(numbers) > limit:
            dropped.drop(f"more than {limit} pairs of a prompt", pairs=len(numbers) - limit)
            numbers = rng.choice(numbers, limit, replace=False).tolist()
        chosen.update(numbers)
    return [pair for number, pair in enumerate(kept) if number in chosen]


def plan_shards(groups: Iterable[Group], shard_size: int) -> list[list[Group]]:
    """Assign groups to files of one image size and at most `shard_size` images; larger groups get their own file."""
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
