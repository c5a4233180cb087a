"""Convert records of published data sets of images, such as HPDv3, to `Preference`s. Torch-free.

`formats` describes the layouts. `chosen` is the image that comes first in the record, so `label` is 0 if raters
prefer the other image. Each converter raises KeyError, TypeError or ValueError for an invalid record.
"""

import itertools
from collections.abc import Iterator
from functools import partial

from dinalrm_align.data.formats.record import (
    Preference,
    Row,
    named_scores,
    number,
    optional_number,
    two_images,
    two_numbers,
)
from dinalrm_align.data.formats.rows import table_rows
from dinalrm_align.train.files import InputError

VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
"""GenAI-Bench's vote_type -> label; "both bad" counts as a tie."""
RANKS = ("ranking", "rank")

pickapic_rows = partial(
    table_rows, columns=("caption", "label_0", "has_label"), images=("jpg_0", "jpg_1"), optional=("label_1",)
)
genai_bench_rows = partial(table_rows, columns=("prompt", "vote_type"), images=("left_image", "right_image"))


def hpdv3(row: Row) -> Iterator[Preference]:
    record = row.fields
    yield Preference(
        record["prompt"], record["path1"], record["path2"], votes=two_numbers(record.get("choice_dist"), "choice_dist"),
        confidence=optional_number(record.get("confidence"), "confidence"), group=row.number,
    )  # fmt: skip


def hpdv2(row: Row) -> Iterator[Preference]:
    paths = two_images(row.fields["file_path"], "file_path")
    preferred = two_numbers(row.fields["human_preference"], "human_preference")
    label = _first_preferred(preferred, "human_preference")
    yield Preference(row.fields["prompt"], *paths, label=label, group=row.number)


def rankings(row: Row) -> Iterator[Preference]:
    record = row.fields
    paths = "generations" if "generations" in record else "image_path"
    order = "ranking" if "ranking" in record else "rank"
    images, ranks = record[paths], record[order]
    if not isinstance(images, list) or len(images) < 2:
        raise InputError(f"{paths}: got {images!r:.60}; expected a list of at least 2 images")
    if not isinstance(ranks, list) or len(ranks) != len(images):
        raise InputError(f"{order}: got {ranks!r:.60}; expected a list of {len(images)} ranks, one per image")
    ranks = [number(rank, "rank") for rank in ranks]
    for i, j in itertools.combinations(range(len(ranks)), 2):
        label = 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
        yield Preference(record["prompt"], images[i], images[j], label=label, group=row.number)


def jsonl(row: Row) -> Iterator[Preference]:
    record = row.fields
    yield Preference(
        record["prompt"], record["chosen"], record["rejected"], label=number(record.get("label", 1.0), "label"),
        votes=two_numbers(record.get("votes"), "votes"),
        confidence=optional_number(record.get("confidence"), "confidence"),
        scores=named_scores(record.get("scores")), concept=record.get("concept"), group=row.number,
    )  # fmt: skip


def pickapic(row: Row) -> Iterator[Preference]:
    if not row.fields["has_label"]:
        return
    first = number(row.fields["label_0"], "label_0")
    second = number(row.fields.get("label_1", 1 - first), "label_1")
    label = _first_preferred((first, second), "label_0, label_1")
    yield Preference(row.fields["caption"], row.image("jpg_0"), row.image("jpg_1"), label=label, group=row.number)


def genai_bench(row: Row) -> Iterator[Preference]:
    vote = row.fields["vote_type"]
    if not isinstance(vote, str) or vote not in VOTES:
        raise InputError(f"vote_type: got {vote!r:.40}; known: {', '.join(VOTES)}")
    images = row.image("left_image"), row.image("right_image")
    yield Preference(row.fields["prompt"], *images, label=VOTES[vote], group=row.number)


def _first_preferred(labels: tuple[float, float] | None, name: str) -> float:
    if labels is None or sorted(labels) not in ([0, 1], [0.5, 0.5]):
        raise InputError(f"{name}: got {labels}; expected 1 and 0, or 0.5 twice")
    return labels[0]
