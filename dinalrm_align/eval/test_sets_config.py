"""The public test sets of text-to-image preferences, the protocols they are scored under, and what others reached.

A protocol turns the scores of pictures and the raters' verdicts into one number; papers that name the same test set
often mean different ones. Every name below is one rule, whatever the set. Torch-free.
"""

from dataclasses import dataclass

from dinalrm_align.train.settings import did_you_mean

PROTOCOLS: dict[str, str] = {
    "pooled": "share of all pairs that raters do not tie in which the preferred picture scores strictly higher; equal "
    "scores are wrong (ImageReward's test.py)",
    "strict": "pooled, as HPSv3's evaluate.py calls it for pairs; on lists, the other reading of HPDv2",
    "diff": "pooled, as VideoAlign and GenAI-Bench's users call accuracy without ties",
    "grouped": "pooled within each list, then the mean over lists (HPSv2's reading of ImageReward)",
    "half-ties": "pooled, but equal scores count one half",
    "hpsv2": "mean over lists of 1 - inversions / pairs: scores become a strict ranking, equal ones in the order of "
    "publication, and pairs that raters tie are right (HPSv2's evaluate.py)",
    "mps": "hpsv2, but equal scores are right (MPS's evaluation)",
    "three-way": "share of all pairs, ties included, whose verdict (first, second, tie) is met; only equal scores are "
    "a tie (UnifiedReward's accuracy with ties)",
    "tau": "three-way, but scores that differ by at most eps are a tie, at the eps that gives most (Deutsch et al., "
    "arXiv 2305.14324); it is chosen on the set itself",
}
"""Name -> rule."""

OF_LISTS = ("hpsv2", "mps")
"""Protocols that need all pairs of every list."""


@dataclass(frozen=True)
class PublicSet:
    """A test set as it is published.

    Args:
        layout: a name in `data.formats.LAYOUTS`.
        protocol: the one its authors, or the paper's table, use.
        files: what lies in its folder.
        how: how to get it.
        hub: dataset repository that "hub" stands for; None: too large, or not in this layout there.
        hub_files: patterns of what is downloaded.
        lists: whether raters ranked whole lists of pictures.
        split: of parquet files.
        folder: of those parquet files, where the repository holds several tasks.
        roots: folders that picture paths may start in, beside the annotations.
    """

    layout: str
    protocol: str
    files: str
    how: str
    hub: str | None = None
    hub_files: tuple[str, ...] = ()
    lists: bool = False
    split: str = ""
    folder: str = ""
    roots: tuple[str, ...] = ("",)


_GENAI = dict(
    layout="genai_bench",
    folder="image_generation",
    protocol="diff",
    how="hf download TIGER-Lab/GenAI-Bench --repo-type dataset --include 'image_generation/*' --local-dir DIR",
    hub="TIGER-Lab/GenAI-Bench",
)

TEST_SETS: dict[str, PublicSet] = {
    "imagereward": PublicSet(
        layout="rankings",
        protocol="pooled",
        files="test.json (or ImageReward_test.json): prompt, generations, ranking; pictures where generations says, or "
        "in test_images/ or images/",
        how="test.json is data/test.json of https://github.com/THUDM/ImageReward (ImageReward_test.json: HPSv2's); its "
        "pictures are those of the test split of the dataset THUDM/ImageRewardDB, unzipped",
        lists=True,
        roots=("", "test_images", "images"),
    ),
    "hpdv2": PublicSet(
        layout="rankings",
        protocol="hpsv2",
        files="test.json: prompt, image_path, rank; pictures in test/",
        how="hf download ymhao/HPDv2 test.json test.tar.gz --repo-type dataset --local-dir DIR, then in DIR: tar -xzf "
        "test.tar.gz",
        hub="ymhao/HPDv2",
        hub_files=("test.json", "test.tar.gz"),
        lists=True,
        roots=("", "test"),
    ),
    "hpdv3": PublicSet(
        layout="hpdv3",
        protocol="strict",
        files="test.json: prompt, path1 (the preferred), path2; pictures where these say, as images/...",
        how="hf download MizzenAI/HPDv3 --repo-type dataset --local-dir DIR (141 GB), then in DIR: cat images.tar.gz.* "
        "| tar -xz",
        roots=("", "images"),
    ),
    "genai_bench": PublicSet(
        files="image_generation/test-*.parquet, or an exported test.json with pictures beside it",
        split="test",
        hub_files=("image_generation/test-*.parquet", "image_generation/test/*.parquet"),
        **_GENAI,
    ),
    "genai_bench_v1": PublicSet(
        files="image_generation/test_v1-*.parquet, or an exported test_v1.json with pictures beside it",
        split="test_v1",
        hub_files=("image_generation/test_v1-*.parquet", "image_generation/test_v1/*.parquet"),
        **_GENAI,
    ),
    "pickapic": PublicSet(
        layout="pickapic",
        protocol="pooled",
        files="data/test_unique-*.parquet: caption, jpg_0, jpg_1, label_0, label_1, has_label",
        how="hf download yuvalkirstain/pickapic_v2 --repo-type dataset --include 'data/test_unique-*' --local-dir DIR",
        hub="yuvalkirstain/pickapic_v2",
        hub_files=("data/test_unique-*.parquet",),
        split="test_unique",
    ),
}
"""Name -> test set. Any other name is a set of the user's own: latents, or a jsonl of pictures."""

Row = tuple[str, dict[str, float]]

PAPER: list[Row] = [
    ("DiNa-LRM, SD3.5-M", dict(imagereward=60.34, hpdv2=82.13, hpdv3=75.04, genai_bench=68.43)),
    ("DiNa-LRM, SD3.5-M, ensemble", dict(imagereward=61.75, hpdv2=84.31, hpdv3=74.86, genai_bench=68.98)),
    ("LRM-SDXL", dict(imagereward=60.35, hpdv2=71.19, hpdv3=53.80, genai_bench=61.58)),
    ("MPS", dict(imagereward=66.37, hpdv2=83.27, hpdv3=64.33, genai_bench=68.08)),
    ("HPSv3", dict(imagereward=67.03, hpdv2=85.36, hpdv3=76.03, genai_bench=70.95)),
    ("UnifiedReward", dict(imagereward=63.82, hpdv2=83.10, hpdv3=71.96, genai_bench=72.38)),
]
"""DiNa-LRM's main table (arXiv 2602.11146), per cent."""

HPSV3: list[Row] = [
    ("HPSv3", dict(imagereward=66.8, pickapic=72.8, hpdv2=85.4, hpdv3=76.9)),
    ("MPS", dict(imagereward=67.5, pickapic=63.1, hpdv2=83.5, hpdv3=64.3)),
    ("HPSv2", dict(imagereward=65.7, pickapic=63.8, hpdv2=83.3, hpdv3=65.3)),
    ("PickScore", dict(imagereward=61.6, pickapic=70.5, hpdv2=79.8, hpdv3=65.6)),
    ("ImageReward", dict(imagereward=65.1, pickapic=61.1, hpdv2=74.0, hpdv3=58.6)),
    ("CLIP ViT-H/14", dict(imagereward=57.1, pickapic=60.8, hpdv2=65.1, hpdv3=48.6)),
]
"""HPSv3's repository, per cent. It measures on protocols of its own: HPSv3 itself differs by up to 0.9 from `PAPER`."""


def protocols_of(name: str) -> list[str]:
    """The protocols that the set of that name can be scored under."""
    lists = name in TEST_SETS and TEST_SETS[name].lists
    return [protocol for protocol in PROTOCOLS if lists or protocol not in OF_LISTS]


def default_protocol(name: str) -> str:
    """The protocol that a set is known by; pooled for a set of the user's own."""
    return TEST_SETS[name].protocol if name in TEST_SETS else "pooled"


def check_protocol(name: str, protocol: str) -> None:
    """ValueError, with the known ones, unless the set of that name can be scored under the protocol."""
    known = protocols_of(name)
    if protocol not in known:
        why = " (it needs lists of pictures that raters ranked whole)" if protocol in PROTOCOLS else ""
        raise ValueError(
            f"protocol of {name}: got {protocol!r}{why}{did_you_mean(protocol, known) or ';'} known: {', '.join(known)}"
        )
