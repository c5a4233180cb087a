"""Public test sets of text-to-image preferences, accuracy protocols, and published accuracies. No torch import.

Papers compute accuracy in different ways on the same test set. Here, a protocol is a rule that applies to any test set;
only the protocols in `OF_LISTS` need ranked lists.
"""

from dataclasses import dataclass

from dinalrm_align.train.settings import Source, did_you_mean


class SetLocation(Source):
    """Type of the location of a test set: a folder or file, a hub id, or "hub" for the published repository."""

    words = ("hub",)


PROTOCOLS: dict[str, str] = {
    "pooled": "share of pairs without a tie of raters whose preferred image scores strictly higher; equal scores are "
    "wrong (ImageReward's test.py)",
    "strict": "pooled, as in HPSv3's evaluate.py for pairs; on lists, an alternative for HPDv2",
    "diff": "pooled; the accuracy without ties of VideoAlign and GenAI-Bench",
    "grouped": "pooled within each list, then averaged over lists (HPSv2's protocol for ImageReward)",
    "half-ties": "pooled, but equal scores count one half",
    "hpsv2": "mean over lists of 1 - inversions / pairs: scores become a strict ranking, equal scores in published "
    "order, and pairs that raters tie are correct (HPSv2's evaluate.py)",
    "mps": "hpsv2, but equal scores are correct (MPS's evaluation)",
    "three-way": "share of all pairs, ties included, whose label (first, second, tie) is predicted; only equal scores "
    "predict a tie (UnifiedReward's accuracy with ties)",
    "tau": "three-way, but scores that differ by at most eps predict a tie, at the eps with the highest accuracy on "
    "the set itself (Deutsch et al., arXiv 2305.14324)",
}
OF_LISTS = ("hpsv2", "mps")
"""Protocols for ranked lists only, because they need all pairs of every list."""


@dataclass(frozen=True)
class PublicSet:
    """A public test set: the layout of its files, where to get them, and its default accuracy protocol.

    layout: a name in `data.formats.LAYOUTS`.
    protocol: default accuracy protocol, from the authors of the test set or the DiNa-LRM paper's table.
    files: expected contents of the folder. how: download instructions, which error messages show.
    hub: dataset repository on the hub; None if the repository is too large or has another layout.
    hub_files: patterns of the files to download from the hub.
    split: name of the split in the names of parquet files. folder: folder of the parquet files.
    roots: folders that image paths may be relative to. The folders are relative to the annotation file.

    """

    layout: str
    protocol: str
    files: str
    how: str
    hub: str | None = None
    hub_files: tuple[str, ...] = ()
    split: str = ""
    folder: str = ""
    roots: tuple[str, ...] = ("",)


def _genai_bench(split: str) -> PublicSet:
    return PublicSet(
        layout="genai_bench",
        protocol="diff",
        files=f"image_generation/{split}-*.parquet, or an exported {split}.json with the images beside it",
        how="hf download TIGER-Lab/GenAI-Bench --repo-type dataset --include 'image_generation/*' --local-dir DIR",
        hub="TIGER-Lab/GenAI-Bench",
        hub_files=(f"image_generation/{split}-*.parquet", f"image_generation/{split}/*.parquet"),
        split=split,
        folder="image_generation",
    )


def _hpdv3pp(axis: str) -> PublicSet:
    return PublicSet(
        layout="hpdv3",
        protocol="strict",
        files=f"test/test_{axis}.json: prompt, path1 (the preferred), path2; images at these paths, as images/...",
        how="hf download Junjun2333/HPDv3-PlusPlus --repo-type dataset --local-dir DIR, then in DIR: cat "
        "images.tar.part* | tar -x",
        split=f"test_{axis}",
        folder="test",
        roots=("..", ""),
    )


TEST_SETS: dict[str, PublicSet] = {
    "imagereward": PublicSet(
        layout="rankings",
        protocol="pooled",
        files="test.json (or ImageReward_test.json): prompt, generations, ranking; images at the paths of generations, "
        "or in test_images/ or images/",
        how="test.json is data/test.json of https://github.com/THUDM/ImageReward (ImageReward_test.json: HPSv2's); its "
        "images are those of the test split of the dataset THUDM/ImageRewardDB, unzipped",
        roots=("", "test_images", "images"),
    ),
    "hpdv2": PublicSet(
        layout="rankings",
        protocol="hpsv2",
        files="test.json: prompt, image_path, rank; images in test/",
        how="hf download ymhao/HPDv2 test.json test.tar.gz --repo-type dataset --local-dir DIR, then in DIR: tar -xzf "
        "test.tar.gz",
        hub="ymhao/HPDv2",
        hub_files=("test.json", "test.tar.gz"),
        roots=("", "test"),
    ),
    "hpdv3": PublicSet(
        layout="hpdv3",
        protocol="strict",
        files="test.json: prompt, path1 (the preferred), path2; images at these paths, as images/...",
        how="hf download MizzenAI/HPDv3 --repo-type dataset --local-dir DIR (141 GB), then in DIR: cat images.tar.gz.* "
        "| tar -xz",
        roots=("", "images"),
    ),
    "genai_bench": _genai_bench("test"),
    "genai_bench_v1": _genai_bench("test_v1"),
    "pickapic": PublicSet(
        layout="pickapic",
        protocol="pooled",
        files="data/test_unique-*.parquet: caption, jpg_0, jpg_1, label_0, label_1, has_label",
        how="hf download yuvalkirstain/pickapic_v2 --repo-type dataset --include 'data/test_unique-*' --local-dir DIR",
        hub="yuvalkirstain/pickapic_v2",
        hub_files=("data/test_unique-*.parquet",),
        split="test_unique",
    ),
    "hpdv3pp_aes": _hpdv3pp("aes"),
    "hpdv3pp_tf": _hpdv3pp("tf"),
}
"""Name -> public test set. Any other name is a user's own set of latents, or a jsonl of images."""

Row = tuple[str, dict[str, float]]

PAPER: list[Row] = [
    ("DiNa-LRM, SD3.5-M", dict(imagereward=60.34, hpdv2=82.13, hpdv3=75.04, genai_bench=68.43)),
    ("DiNa-LRM, SD3.5-M, ensemble", dict(imagereward=61.75, hpdv2=84.31, hpdv3=74.86, genai_bench=68.98)),
    ("LRM-SDXL", dict(imagereward=60.35, hpdv2=71.19, hpdv3=53.80, genai_bench=61.58)),
    ("MPS", dict(imagereward=66.37, hpdv2=83.27, hpdv3=64.33, genai_bench=68.08)),
    ("HPSv3", dict(imagereward=67.03, hpdv2=85.36, hpdv3=76.03, genai_bench=70.95)),
    ("UnifiedReward", dict(imagereward=63.82, hpdv2=83.10, hpdv3=71.96, genai_bench=72.38)),
]
"""Rows (reward, name of a set -> accuracy in per cent) of DiNa-LRM's main table (arXiv 2602.11146)."""

HPSV3: list[Row] = [
    ("HPSv3", dict(imagereward=66.8, pickapic=72.8, hpdv2=85.4, hpdv3=76.9)),
    ("MPS", dict(imagereward=67.5, pickapic=63.1, hpdv2=83.5, hpdv3=64.3)),
    ("HPSv2", dict(imagereward=65.7, pickapic=63.8, hpdv2=83.3, hpdv3=65.3)),
    ("PickScore", dict(imagereward=61.6, pickapic=70.5, hpdv2=79.8, hpdv3=65.6)),
    ("ImageReward", dict(imagereward=65.1, pickapic=61.1, hpdv2=74.0, hpdv3=58.6)),
    ("CLIP ViT-H/14", dict(imagereward=57.1, pickapic=60.8, hpdv2=65.1, hpdv3=48.6)),
]
"""The same from HPSv3's repository. Its protocols differ: for HPSv3, values differ from `PAPER` by up to 0.9."""


def protocols_of(name: str) -> list[str]:
    lists = name in TEST_SETS and TEST_SETS[name].layout == "rankings"
    return [protocol for protocol in PROTOCOLS if lists or protocol not in OF_LISTS]


def default_protocol(name: str) -> str:
    """Return the protocol of a public test set, or "pooled" for any other set."""
    return TEST_SETS[name].protocol if name in TEST_SETS else "pooled"


def check_protocol(name: str, protocol: str) -> None:
    known = protocols_of(name)
    if protocol not in known:
        why = " (it needs ranked lists of images)" if protocol in PROTOCOLS else ""
        raise ValueError(
            f"protocol.{name}: got {protocol!r}{why}{did_you_mean(protocol, known) or ';'} known: {', '.join(known)}"
        )


def holds_images(name: str, path: str) -> bool:
    """Return whether the test set `name` at `path` holds images rather than latents."""
    return name in TEST_SETS or path.endswith(".jsonl")
