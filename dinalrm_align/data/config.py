"""Settings of `recipes/prepare_pairs.py`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.models.specs import ModelName
from dinalrm_align.train import settings


@dataclass
class FilterConfig:
    """Conditions that a pair must meet to be kept. The number of pairs left out is reported for each reason.

    Args:
        min_pixels: smallest allowed area of an image, in pixels; the default is 256 x 256, as in the published data.
        aspect_tolerance: largest change of an image's log aspect ratio that resizing may cause.
        min_vote_share: keep a pair with votes only if `chosen` has more than this share of votes (released data: 0.6).
        unanimous: leave out pairs in which a rater voted for the rejected image.
        min_confidence: smallest allowed `confidence`, a field of HPDv3. Pairs without this field are kept.
        max_pairs_per_prompt: keep at most this many pairs per prompt, drawn at random (released data: 8); default: all.
        ties: `drop` leaves out pairs that raters found equal, as Diffusion-DPO does; `keep` gives them the label 0.5.
        min_gaps: a bound for each score name. A pair that is not a tie is kept only if, for each named score,
            score(chosen) - score(rejected) is above the bound. `source` must be a jsonl with these scores. LPO's
            consistent filtering is {aesthetic: -0.5, clip: 0, vqa: 0}.
        max_tie_gaps: a bound for each score name. A tie is kept only if, for each named score,
            |score(chosen) - score(rejected)| is below the bound. LPO uses {aesthetic: 0.2, clip: 0.03, vqa: 0.07}.
    """

    min_pixels: settings.NonNegativeInt = 65_536
    aspect_tolerance: settings.ClosedUnitInterval = 0.03
    min_vote_share: settings.ClosedUnitInterval | None = None
    unanimous: bool = False
    min_confidence: settings.ClosedUnitInterval | None = None
    max_pairs_per_prompt: settings.PositiveInt | None = None
    ties: Literal["drop", "keep"] = "drop"
    min_gaps: dict[str, float] = field(default_factory=dict)
    max_tie_gaps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings.check_fields(self, "filter")


@dataclass
class PrepareRun:
    """Settings of `python recipes/prepare_pairs.py`.

    Args:
        source: preference data. Layouts `hpdv3`, `hpdv2` and `rankings` are JSON files. `pickapic` is a parquet file
            or a folder of them. `jsonl` has one {prompt, chosen, rejected} per line: chosen and rejected are
            image paths; label, votes and scores are optional. `released` is a folder of part_rank*.parquet. Its
            latents keep their size, so `buckets` and `images` are ignored. `source` must be set.
        layout: layout of `source`; `auto` detects it.
        images: folder that image paths are relative to; default: `source`, or its parent folder if `source` is a file.
        output_dir: folder for the encoded pairs. To resume a stopped run, run again with the same settings.
        model: pipeline whose VAE and text encoders are used: `shapes`, `sd35`, or the folder or hub id of a
            StableDiffusion3Pipeline.
        text_length: T5 tokens per prompt, 1 to 512; must equal the reward's text_length; default: that of `model`, 128
            for SD3.5, as released rewards read.
        buckets: sizes that images are resized to. `published` means the 13 sizes of DiNa-LRM's data. `area:1024` means
            sizes with an area of at most 1024^2 and sides that are multiples of 64 (`plan.by_area`). A list
            such as 1024x1024,832x1248 names the sizes as height x width.
        group: `pair` stores every pair separately, as in the paper; `prompt` stores one group for each prompt and
            image size, which holds every image once, together with all pairs of these images.
        label: target probability that the chosen image is preferred. `hard` is 0.5 for a tie and 1
            otherwise, unless a jsonl states the label. `votes` is the chosen image's share of the votes.
        on_bad: `refuse` stops at an unreadable image, an invalid record, or latents or embeddings that are not
            finite; `skip` leaves out the affected pairs and counts them by reason.
        filter: conditions that a pair must meet to be kept.
        max_pairs: number of pairs to read, from the start of `source`; default: all.
        shard_size: images per file of latents. A resumed preparation writes only the missing files.
        prompts_per_shard: prompts per file of text embeddings.
        batch_size: images per forward pass of the VAE.
        workers: processes per rank that decode and resize images; 0 decodes and resizes in the rank's own process.
        verify: on resuming, check the hash of each existing file; by default, only the size is checked.
        seed: seed of the random choice of pairs for filter.max_pairs_per_prompt.
        device: `auto` uses a CUDA GPU if there is one.
        dtype: dtype of the text encoders; `auto`: the model's dtype on a GPU, float32 on a CPU. The VAE uses float32.
    """

    source: settings.PathText | None = None
    layout: Literal["auto", "hpdv3", "hpdv2", "rankings", "pickapic", "jsonl", "released"] = "auto"
    images: settings.PathText | None = None
    output_dir: settings.PathText = "runs/pairs"
    model: ModelName = "shapes"
    text_length: settings.IntFrom1To512 | None = None
    buckets: str = "published"
    group: Literal["pair", "prompt"] = "pair"
    label: Literal["hard", "votes"] = "hard"
    on_bad: Literal["refuse", "skip"] = "refuse"
    filter: FilterConfig = field(default_factory=FilterConfig)
    max_pairs: settings.PositiveInt | None = None
    shard_size: settings.IntAboveOne = 1024
    prompts_per_shard: settings.PositiveInt = 256
    batch_size: settings.PositiveInt = 8
    workers: settings.NonNegativeInt = 2
    verify: bool = False
    seed: settings.NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        settings.check_fields(self)
        if self.source is None:
            raise ValueError("source: got nothing; expected preference data, such as HPDv3/train.json")
