"""Settings of ReFL, reward feedback learning, and of its recipe `recipes/refl_sd35.py`. Torch-free.

The defaults suit the embedded world on two CPU cores; `recipes/refl_sd35.yaml` holds what the paper's SD3.5-Medium run
does differently, and is read beneath the user's own settings whenever the model is one of that kind.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.config.check import check_fields
from dinalrm_align.config.loop import LoopConfig, OptimConfig
from dinalrm_align.config.reward import LoraConfig


@dataclass
class ReflConfig:
    """One ReFL update: a rollout without gradient to a late step, gradient steps, the reward of the estimated picture.

    Args:
        batch_size: pictures per micro-batch and process; an update takes batch_size x loop.accumulate x processes.
        num_steps: denoising steps of the training rollout; none given, as many as the model samples with.
        guidance_scale: of the rollout without gradient; none given, the model's own.
        guided_gradient: use guidance in the gradient steps too; otherwise they see the prompt alone.
        grad_steps: how many steps carry the gradient: 1 is ReFL (and DRaFT-1), K is DRaFT-K.
        earliest: the first gradient step is drawn, anew for every micro-batch, from the last part of the rollout: from
            step round(earliest x num_steps) up to the last that leaves room for grad_steps. 1: always the last.
        loss: linear, mean(target - score), or relu, which lets go of pictures whose score is above the target.
        target: see loss; under linear it shifts the loss and nothing else.
        kl_weight: of the velocity KL, the mean square of velocity less the reference's at the gradient steps. It holds
            the policy near its frozen self; with 0 it is measured and has no effect.
        pretrain_weight: of a flow-matching loss on pictures, as ReFL's pretraining loss; 0 turns it off.
        pretrain_pictures: folder of NAME.png (or .jpg, .webp) beside NAME.txt, its caption, for that loss; none
            given, the base model's own samples are used.
        pretrain_samples: how many of the base model's samples to make for it.
        reward_sigma: noise level the reward reads at, several for its multi-noise ensemble; none given, the reward's
            own.
        reward_sigma_range: draw a level per picture and update, uniformly from this range, instead: a policy can then
            not settle on what fools one level. A pixel reward reads clean pictures and ignores both.
        gradient_checkpointing: recompute activations of policy and reward in the backward pass: less memory, about a
            third more time.
    """

    batch_size: int = 16
    num_steps: int | None = None
    guidance_scale: float | None = None
    guided_gradient: bool = False
    grad_steps: int = 1
    earliest: float = 0.5
    loss: Literal["linear", "relu"] = "linear"
    target: float = 2.0
    kl_weight: float = 4.0
    pretrain_weight: float = 0.0
    pretrain_pictures: str | None = None
    pretrain_samples: int = 64
    reward_sigma: list[float] | None = None
    reward_sigma_range: tuple[float, float] | None = None
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "refl")
        if self.batch_size < 1 or self.grad_steps < 1 or self.pretrain_samples < 1:
            raise ValueError(
                f"refl: got batch_size {self.batch_size}, grad_steps {self.grad_steps}, pretrain_samples "
                f"{self.pretrain_samples}; each must be at least 1"
            )
        if self.num_steps is not None and self.num_steps < self.grad_steps:
            raise ValueError(f"refl: got grad_steps {self.grad_steps} of num_steps {self.num_steps}; take at most all")
        if not 0 <= self.earliest <= 1 or self.kl_weight < 0 or self.pretrain_weight < 0:
            raise ValueError(
                f"refl: got earliest {self.earliest}, kl_weight {self.kl_weight}, pretrain_weight "
                f"{self.pretrain_weight}; expected [0, 1], and weights of at least 0"
            )
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"refl.guidance_scale: got {self.guidance_scale}; expected at least 0 (1 and less: none)")
        if self.reward_sigma is not None and not (self.reward_sigma and all(0 <= s <= 1 for s in self.reward_sigma)):
            raise ValueError(f"refl.reward_sigma: got {self.reward_sigma}; expected one level or more, all in [0, 1]")
        if self.reward_sigma is not None and self.reward_sigma_range is not None:
            raise ValueError("refl: got both reward_sigma and reward_sigma_range; give one of them")
        low, high = self.reward_sigma_range or (0, 1)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"refl: got reward_sigma_range {self.reward_sigma_range}; expected 0 <= low <= high <= 1")


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
class ReflRun:
    """Everything `python recipes/refl_sd35.py` can be told.

    Args:
        model: what to align. auto: Stable Diffusion 3.5 Medium if its weights are at hand, else the small embedded
            world; sd35 or shapes: that one and no other; or the folder or hub id of a StableDiffusion3Pipeline.
        reward: what to align it to. dinalrm: the latent reward; pixel: the CLIP-style reward, through the VAE's
            decoder; or the folder or hub id of another latent reward.
        output_dir: where the run is kept; by default a new folder under runs/ named after model, reward and seed.
        seed: of everything that is random in training.
        resume: folder of a run (its newest checkpoint is taken, and its settings unless overridden) or of a checkpoint.
        prompts: text file of training prompts, one a line, UTF-8; by default the model's own list.
        eval_prompts: text file of held-out prompts; by default the model's own list.
        height: of the pictures, in pixels; by default the model's.
        width: of the pictures, in pixels; by default the model's.
        device: auto takes a CUDA GPU if there is one.
        dtype: of the frozen weights; auto takes the model's on a GPU and float32 on a CPU. The LoRA is always float32.
        profile_every: updates between two whose FLOPs are counted and, on a CPU, memory watched (they take about twice
            as long); 0: none.
        tracker: where metrics and pictures go besides metrics.jsonl; wandb without a server: WANDB_MODE=offline.
        policy: the LoRA that is trained.
        refl: one update.
        optim: AdamW.
        loop: how long, how often saved, averaging.
        evaluation: the held-out judgement.
    """

    model: str = "auto"
    reward: str = "dinalrm"
    output_dir: str | None = None
    seed: int = 0
    resume: str | None = None
    prompts: str | None = None
    eval_prompts: str | None = None
    height: int | None = None
    width: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    profile_every: int = 25
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    policy: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=16.0))
    refl: ReflConfig = field(default_factory=ReflConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=30))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seed < 0 or self.profile_every < 0:
            raise ValueError(f"got seed {self.seed}, profile_every {self.profile_every}; neither may be negative")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size < 16 or size % 16):
                raise ValueError(f"{name}: got {size} pixels; expected a positive multiple of 16")
