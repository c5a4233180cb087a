"""Settings of the mining of preference pairs, `recipes/mine_pairs.py`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.train.settings import check_fields


@dataclass
class MineConfig:
    """Which samples are drawn of each prompt, and which of them become pairs.

    Args:
        candidates: samples per prompt.
        pairs_per_prompt: the best with the worst, then the second best with the second worst, and so on; at most half
            the candidates.
        min_gap: smallest difference of scores; pairs below it are left out. In the reward's own units.
        num_steps: denoising steps of a sample; none given, as many as the model samples with.
        guidance_scale: of sampling; none given, the model's own.
        reward_sigma: noise level the reward reads at, several for its multi-noise ensemble; none given, the reward's
            own.
        batch_size: pictures sampled and scored at once.
        prompts_per_shard: prompts whose pairs go into one file; a stopped mining goes on with the first file that is
            not there.
        dtype: of the latents and embeddings in the files.
        negative: keep the empty prompt's embeddings in every row, for trainers with guidance in the loss.
    """

    candidates: int = 8
    pairs_per_prompt: int = 1
    min_gap: float = 0.0
    num_steps: int | None = None
    guidance_scale: float | None = None
    reward_sigma: list[float] | None = None
    batch_size: int = 32
    prompts_per_shard: int = 16
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    negative: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "mine")
        if self.candidates < 2 or not 1 <= self.pairs_per_prompt <= self.candidates // 2:
            raise ValueError(
                f"mine: got candidates {self.candidates}, pairs_per_prompt {self.pairs_per_prompt}; expected at "
                "least 2 candidates, and pairs of at most half of them"
            )
        if self.batch_size < 1 or self.prompts_per_shard < 1 or (self.num_steps is not None and self.num_steps < 1):
            raise ValueError(
                f"mine: got batch_size {self.batch_size}, prompts_per_shard {self.prompts_per_shard}, num_steps "
                f"{self.num_steps}; each must be at least 1"
            )
        if self.min_gap < 0 or (self.guidance_scale is not None and self.guidance_scale < 0):
            raise ValueError(
                f"mine: got min_gap {self.min_gap}, guidance_scale {self.guidance_scale}; neither may be negative"
            )
        if self.reward_sigma is not None and not (self.reward_sigma and all(0 <= s <= 1 for s in self.reward_sigma)):
            raise ValueError(f"mine.reward_sigma: got {self.reward_sigma}; expected one level or more, all in [0, 1]")


@dataclass
class MineRun:
    """Everything `python recipes/mine_pairs.py` can be told.

    Args:
        model: whose samples are ranked. auto: Stable Diffusion 3.5 Medium if its weights are at hand, else the small
            embedded world; sd35 or shapes: that one and no other; or the folder or hub id of a
            StableDiffusion3Pipeline.
        lora: folder of a LoRA that a run of this project left (run/lora), put on the model before it samples; policy
            must say its rank and alpha.
        reward: what ranks them. dinalrm: the model's own latent reward; or the folder or hub id of another.
        output_dir: where the pairs go; by default a folder under runs/ named after model, reward and seed. Pairs that
            are there already, of the same settings, are gone on with.
        seed: of the samples' noise and of the reward's.
        prompts: text file of prompts, one a line, UTF-8; by default the model's own list.
        max_prompts: take the first of them only.
        height: of the pictures, in pixels; by default the model's.
        width: of the pictures, in pixels; by default the model's.
        device: auto takes a CUDA GPU if there is one.
        dtype: of the weights; auto takes the model's on a GPU and float32 on a CPU.
        policy: the shape of `lora`.
        mine: which pairs.
    """

    model: str = "auto"
    lora: str | None = None
    reward: str = "dinalrm"
    output_dir: str | None = None
    seed: int = 0
    prompts: str | None = None
    max_prompts: int | None = None
    height: int | None = None
    width: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    policy: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=16.0))
    mine: MineConfig = field(default_factory=MineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seed < 0 or (self.max_prompts is not None and self.max_prompts < 1):
            raise ValueError(
                f"got seed {self.seed}, max_prompts {self.max_prompts}; expected at least 0, and at least 1"
            )
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size < 16 or size % 16):
                raise ValueError(f"{name}: got {size} pixels; expected a positive multiple of 16")
