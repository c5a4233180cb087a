"""Settings of the encoding of preference pairs, `recipes/prepare_pairs.py`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.train.settings import check_fields, check_integer, check_number


@dataclass
class FilterConfig:
    """Which pairs are kept. Every pair that is left out is counted under its reason.

    Args:
        min_pixels: area of the smaller picture; the published data has 256 x 256.
        aspect_tolerance: largest difference of the logarithms of two aspect ratios, a picture's and its bucket's.
        min_vote_share: votes for the chosen picture among all; kept is what has more (the released filter: 0.6). Pairs
            without votes are kept.
        unanimous: keep only pairs without a vote for the rejected picture. Pairs without votes are kept.
        min_confidence: smallest `confidence` of HPDv3; pairs without one are kept.
        max_pairs_per_prompt: so many pairs of each prompt, drawn at random (released: 8); none given, all.
        ties: what becomes of pairs that raters found equal. drop: as Diffusion-DPO does; keep: with the label 0.5.
        min_gaps: name of a score -> the smallest gap, chosen less rejected, that a pair must exceed. The consistent
            filtering of LPO: {aesthetic: -0.5, clip: 0, vqa: 0}. A jsonl carries such scores.
        max_tie_gaps: the same of ties: the gap must be smaller either way. LPO's: {aesthetic: 0.2, clip: 0.03,
            vqa: 0.07}.
    """

    min_pixels: int = 65_536
    aspect_tolerance: float = 0.03
    min_vote_share: float | None = None
    unanimous: bool = False
    min_confidence: float | None = None
    max_pairs_per_prompt: int | None = None
    ties: Literal["drop", "keep"] = "drop"
    min_gaps: dict[str, float] = field(default_factory=dict)
    max_tie_gaps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "filter")
        check_integer("filter.min_pixels", self.min_pixels)
        check_number("filter.aspect_tolerance", self.aspect_tolerance, low=0.0, high=1.0)
        for name in ("min_vote_share", "min_confidence"):
            if vars(self)[name] is not None:
                check_number(f"filter.{name}", vars(self)[name], low=0.0, high=1.0)
        if self.max_pairs_per_prompt is not None:
            check_integer("filter.max_pairs_per_prompt", self.max_pairs_per_prompt, low=1)


@dataclass
class PrepareRun:
    """Everything `python recipes/prepare_pairs.py` can be told.

    Args:
        source: the preference data. hpdv3, hpdv2: its train.json; pickapic: a folder of parquet files, or one of them;
            jsonl: lines of prompt, chosen, rejected (paths), and if wanted label, votes or scores; released: a folder
            of part_rank*.parquet, latents that are kept as they are, for which buckets and images mean nothing.
        layout: how `source` is written. auto tells it from the file.
        images: folder that the paths of pictures are relative to; by default that of `source`.
        output_dir: where the encoded pairs go. A folder that was begun with the same settings is gone on with.
        model: whose VAE and text encoders encode. shapes, sd35, or the folder or hub id of a StableDiffusion3Pipeline.
        text_length: T5 tokens per prompt; by default the model's. The reward that is trained must say the same.
        buckets: picture sizes. published: the thirteen of the released data; area:1024: the largest size of each aspect
            ratio within 1024 x 1024 pixels, sides multiples of 64; or a list, 1024x1024,832x1248 (height x width).
        group: pair: every pair is a group of two pictures, as the paper trains; prompt: all pictures of a prompt and
            size are one group with all its pairs, each stored and encoded once.
        label: hard: the preferred picture is preferred, 1; votes: with the share of votes that it got.
        on_bad: what to do about a picture that cannot be read, a record that cannot be meant, an encoding that is not
            finite. refuse: end with its name; skip: leave its pairs out, and say how many and why.
        filter: which pairs are kept.
        max_pairs: take only the first of the source.
        shard_size: pictures per file; a stopped preparation goes on with the first file that is not there.
        prompts_per_shard: prompts per file of text embeddings.
        batch_size: pictures encoded at once.
        workers: processes that decode and resize pictures, for each process that encodes; 0: none besides it.
        verify: compare the hash of every file that is there already, not only its size.
        seed: of what is drawn at random.
        device: auto takes a CUDA GPU if there is one.
        dtype: of the text encoders; auto takes the model's on a GPU and float32 on a CPU. The VAE is float32.
    """

    source: str | None = None
    layout: Literal["auto", "hpdv3", "hpdv2", "rankings", "pickapic", "jsonl", "released"] = "auto"
    images: str | None = None
    output_dir: str = "runs/pairs"
    model: str = "shapes"
    text_length: int | None = None
    buckets: str = "published"
    group: Literal["pair", "prompt"] = "pair"
    label: Literal["hard", "votes"] = "hard"
    on_bad: Literal["refuse", "skip"] = "refuse"
    filter: FilterConfig = field(default_factory=FilterConfig)
    max_pairs: int | None = None
    shard_size: int = 1024
    prompts_per_shard: int = 256
    batch_size: int = 8
    workers: int = 2
    verify: bool = False
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        for name, low in dict(shard_size=2, prompts_per_shard=1, batch_size=1, workers=0, seed=0).items():
            check_integer(name, vars(self)[name], low=low)
        for name in ("max_pairs", "text_length"):
            if vars(self)[name] is not None:
                check_integer(name, vars(self)[name], low=1)
        if self.source is None:
            raise ValueError("source: got nothing; expected preference data, as HPDv3/train.json")
