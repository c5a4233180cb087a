"""Settings of `recipes/prepare_pairs.py`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.train.settings import ClosedUnitInterval, IntAboveOne, NonNegativeInt, PositiveInt, check_fields


@dataclass
class FilterConfig:
    """Which pairs are kept. Pairs that are left out are counted by reason.

    Args:
        min_pixels: smallest area of an image; the published data has 256 x 256.
        aspect_tolerance: largest difference of log aspect ratio between an image and its bucket.
        min_vote_share: share of the votes for the chosen image that a pair with votes must exceed (released: 0.6).
        unanimous: leave out pairs with votes for the rejected image.
        min_confidence: smallest `confidence` of HPDv3, for pairs that have one.
        max_pairs_per_prompt: number of pairs of each prompt, drawn at random (released: 8); default: all.
        ties: drop pairs that raters found equal, as Diffusion-DPO does, or keep them with label 0.5.
        min_gaps: name of a score -> gap, chosen minus rejected, that a pair must exceed. The consistent filtering of
            LPO: {aesthetic: -0.5, clip: 0, vqa: 0}, with scores from a jsonl.
        max_tie_gaps: name -> absolute gap that a tie must stay below. LPO: {aesthetic: 0.2, clip: 0.03, vqa: 0.07}.
    """

    min_pixels: NonNegativeInt = 65_536
    aspect_tolerance: ClosedUnitInterval = 0.03
    min_vote_share: ClosedUnitInterval | None = None
    unanimous: bool = False
    min_confidence: ClosedUnitInterval | None = None
    max_pairs_per_prompt: PositiveInt | None = None
    ties: Literal["drop", "keep"] = "drop"
    min_gaps: dict[str, float] = field(default_factory=dict)
    max_tie_gaps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "filter")


@dataclass
class PrepareRun:
    """Settings of `python recipes/prepare_pairs.py`.

    Args:
        source: the preference data. hpdv3, hpdv2, rankings: a JSON file; pickapic: a folder of parquet files, or one
            file; jsonl: lines of prompt, chosen, rejected (paths), optionally label, votes or scores; released: a
            folder of part_rank*.parquet, whose latents are kept, so that buckets and images do not apply.
        layout: layout of `source`; auto detects it.
        images: folder that image paths are relative to; default: the folder of `source`.
        output_dir: folder of the encoded pairs. Preparation resumes in a folder that has the same settings.
        model: its VAE and text encoders are used: shapes, sd35, or folder or hub id of a StableDiffusion3Pipeline.
        text_length: T5 tokens per prompt, as in the reward to train; default: the model's.
        buckets: image sizes. published: those of the released data; area:1024: for each aspect ratio the largest size
            within 1024 x 1024 pixels, sides in multiples of 64; or a list, 1024x1024,832x1248 (height x width).
        group: pair: every pair is a group, as the paper trains; prompt: all images of a prompt and size form one group
            with all its pairs, each image encoded once.
        label: hard: 1 for the preferred image; votes: its share of the votes.
        on_bad: refuse: stop at an unreadable image, an invalid record or an encoding that is not finite; skip: leave
            its pairs out and count them by reason.
        filter: which pairs are kept.
        max_pairs: use only the first pairs of the source.
        shard_size: images per file; a stopped preparation resumes with the first missing file.
        prompts_per_shard: prompts per file of text embeddings.
        batch_size: images encoded at once.
        workers: processes per rank that decode and resize images; 0: the rank does it.
        verify: compare the hash of each existing file, not only its size.
        seed: for pairs drawn at random.
        device: auto uses a CUDA GPU if there is one.
        dtype: of the text encoders; auto is the model's on a GPU and float32 on a CPU. The VAE runs in float32.
    """

    source: str | None = None
    layout: Literal["auto", "hpdv3", "hpdv2", "rankings", "pickapic", "jsonl", "released"] = "auto"
    images: str | None = None
    output_dir: str = "runs/pairs"
    model: str = "shapes"
    text_length: PositiveInt | None = None
    buckets: str = "published"
    group: Literal["pair", "prompt"] = "pair"
    label: Literal["hard", "votes"] = "hard"
    on_bad: Literal["refuse", "skip"] = "refuse"
    filter: FilterConfig = field(default_factory=FilterConfig)
    max_pairs: PositiveInt | None = None
    shard_size: IntAboveOne = 1024
    prompts_per_shard: PositiveInt = 256
    batch_size: PositiveInt = 8
    workers: NonNegativeInt = 2
    verify: bool = False
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.source is None:
            raise ValueError("source: got nothing; expected preference data, such as HPDv3/train.json")
