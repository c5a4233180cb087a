"""Settings that all alignment recipes share: what is aligned, to what, on which prompts, how it is judged. Torch-free.

A recipe's own dataclass derives from `AlignRun` and adds its method's section.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.align.memory_config import Hpsv3Config, MemoryConfig
from dinalrm_align.align.watch_config import WatchConfig
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import check_fields


@dataclass
class EvaluationConfig:
    """How progress is judged: the same held-out prompts and noise seeds before, during and after.

    Args:
        samples: pictures per evaluation; prompts are taken in file order, and again from the start if there are fewer.
        batch_size: pictures sampled at once.
        every: updates between two evaluations; there is always one before the first update and one after the last.
        shown: how many of them go into the picture grids.
        seed: of the noise; fixed apart from the run's seed so that runs can be compared picture by picture.
    """

    samples: int = 192
    batch_size: int = 64
    every: int = 10
    shown: int = 16
    seed: int = 1234

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        if self.seed < 0:
            raise ValueError(f"evaluation.seed: got {self.seed}; it must not be negative")
        if self.samples < 2 or self.batch_size < 1 or self.every < 0 or not 1 <= self.shown <= self.samples:
            raise ValueError(
                f"evaluation: got samples {self.samples}, batch_size {self.batch_size}, every {self.every}, shown "
                f"{self.shown}; expected at least 2, at least 1, at least 0, and between 1 and samples"
            )


@dataclass
class AlignRun:
    """What every alignment recipe can be told.

    Args:
        model: what to align. auto: Stable Diffusion 3.5 Medium if its weights are at hand, else the small embedded
            world; sd35 or shapes: that one and no other; or the folder or hub id of a StableDiffusion3Pipeline.
        reward: what to align it to. dinalrm: the latent reward; pixel: the CLIP-style reward, through the VAE's
            decoder; pickscore, clipscore, hpsv2, hpsv2.1, hpsv3, imagereward, mps, unifiedreward; oracle: the embedded
            world's; NAME=SOURCE for its weights from elsewhere; the folder or hub id of another latent reward;
            module:function, your own; or a weighted sum, "dinalrm + 0.2*pickscore".
        gold: the judge of held-out pictures, which is never trained on, by the same names; by default the model's own:
            PickScore, and the oracle in the embedded world.
        output_dir: where the run is kept; by default a new folder under runs/ named after model, reward and seed.
        seed: of everything that is random in training.
        resume: folder of a run (its newest checkpoint is taken, and its settings unless overridden) or of a checkpoint.
        prompts: text file of training prompts, one a line, UTF-8; by default the model's own list.
        eval_prompts: text file of held-out prompts; by default the model's own list.
        height: of the pictures, in pixels; by default the model's.
        width: of the pictures, in pixels; by default the model's.
        device: auto takes a CUDA GPU if there is one.
        dtype: of the frozen weights; auto takes the model's on a GPU and float32 on a CPU. The LoRA is always float32.
        gradient_checkpointing: recompute activations of policy and reward in the backward pass: less memory, about a
            third more time.
        profile_every: updates between two whose FLOPs are counted and, on a CPU, memory watched (they take about twice
            as long); 0: none.
        tracker: where metrics and pictures go besides metrics.jsonl; wandb without a server: WANDB_MODE=offline.
        policy: the LoRA that is trained.
        optim: AdamW.
        loop: how long, how often saved, averaging.
        evaluation: the held-out judgement.
        watch: whether the reward is being fooled, told from the held-out judgement.
        memory: what makes the run smaller or faster.
        hpsv3: how HPSv3 is loaded, where it is in the reward.
    """

    model: str = "auto"
    reward: str = "dinalrm"
    gold: str | None = None
    output_dir: str | None = None
    seed: int = 0
    resume: str | None = None
    prompts: str | None = None
    eval_prompts: str | None = None
    height: int | None = None
    width: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = True
    profile_every: int = 25
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    policy: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=16.0))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    hpsv3: Hpsv3Config = field(default_factory=Hpsv3Config)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seed < 0 or self.profile_every < 0:
            raise ValueError(f"got seed {self.seed}, profile_every {self.profile_every}; neither may be negative")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size < 16 or size % 16):
                raise ValueError(f"{name}: got {size} pixels; expected a positive multiple of 16")
