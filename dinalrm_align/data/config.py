"""Settings of `recipes/prepare_pairs.py`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.train.settings import ClosedUnitInterval, IntAboveOne, NonNegativeInt, PositiveInt, check_fields


@dataclass
class FilterConfig:
    """Conditions that a pair must meet to be kept. Pairs that are left out are counted by reason.

    Args:
        min_pixels: smallest area of an image, in pixels; the default is 256 x 256, as in the published data.
        aspect_tolerance: largest difference between the log aspect ratios of an image and the size it is resized to.
        min_vote_share: keep pairs with votes if the chosen image has more than this share (released data: 0.6).
        unanimous: leave out pairs with votes for the rejected image.
        min_confidence: smallest `confidence` of HPDv3, for pairs that have one.
        max_pairs_per_prompt: largest number of pairs per prompt, drawn at random (released data: 8); default: all.
        ties: drop: leave out pairs that raters found equal, as Diffusion-DPO does; keep: keep them, with label 0.5.
        min_gaps: name of a score -> bound. A pair is kept if score(chosen) - score(rejected) is above the bound.
            LPO's consistent filtering: {aesthetic: -0.5, clip: 0, vqa: 0}, with scores from a jsonl.
        max_tie_gaps: name of a score -> bound. A tie is kept if its scores differ by less than the bound. LPO:
            {aesthetic: 0.2, clip: 0.03, vqa: 0.07}.
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
        source: preference data, required. A JSON file for the layouts hpdv3, hpdv2 and rankings; a parquet file or a
            folder of them for pickapic; a file with one {prompt, chosen, rejected} per line for jsonl, with image
            paths and optional label, votes or scores; a folder of part_rank*.parquet for released, whose latents are
            stored at their size, so that `buckets` and `images` are not used.
        layout: layout of `source`; auto detects it.
        images: folder that image paths are relative to; default: the folder of `source`.
        output_dir: folder for the encoded pairs. A stopped preparation resumes there if the settings are the same.
        model: shapes, sd35, or folder or hub id of a StableDiffusion3Pipeline; its VAE and text encoders are used.
        text_length: T5 tokens per prompt, as in the reward to train; default: the model's.
        buckets: sizes that images are resized to. published: the sizes of the released data; area:1024: for each
            aspect ratio the largest size within 1024 x 1024 pixels, with sides in multiples of 64; or a list such as
            1024x1024,832x1248 (height x width).
        group: pair: store every pair separately, as the paper trains; prompt: store all images of a prompt and size
            together with all their pairs, and encode each image once.
        label: target probability that the chosen image is preferred. hard: 1; votes: its share of the votes.
        on_bad: refuse: stop at an unreadable image, an invalid record, or NaN or infinite latents or embeddings; skip:
            leave out their pairs and count them by reason.
        filter: conditions that a pair must meet to be kept.
        max_pairs: read only this many pairs, from the start of `source`.
        shard_size: images per file of latents; a stopped preparation resumes with the first missing file.
        prompts_per_shard: prompts per file of text embeddings.
        batch_size: images per forward of the VAE.
        workers: processes per rank that decode and resize images; 0: the rank itself does it.
        verify: when resuming, check the hash of each existing file, not only its size.
        seed: seed of the draw for filter.max_pairs_per_prompt.
        device: auto uses a CUDA GPU if there is one.
        dtype: dtype of the text encoders; auto is the model's on a GPU and float32 on a CPU. The VAE uses float32.
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
