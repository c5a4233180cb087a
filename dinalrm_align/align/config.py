"""Settings shared by all alignment recipes; that of a recipe derives from `AlignRun`. Torch-free."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.train import settings
from dinalrm_align.train.config import LoopConfig, OptimConfig


@dataclass
class EvaluationConfig:
    """Evaluation on held-out prompts, with the same prompts and noise before, during and after training.

    Args:
        samples: images per evaluation; prompts are used in file order, and repeated if there are fewer.
        batch_size: images sampled at once.
        every: updates between evaluations; the base model and the final policy are always evaluated. 0: only those.
        shown: number of images in the image grids.
        seed: of the noise; separate from the seed of the run, so that runs can be compared image by image.
    """

    samples: settings.IntAboveOne = 192
    batch_size: settings.PositiveInt = 64
    every: settings.NonNegativeInt = 10
    shown: settings.PositiveInt = 16
    seed: settings.NonNegativeInt = 1234

    def __post_init__(self) -> None:
        settings.check_fields(self, "evaluation")
        if self.shown > self.samples:
            raise ValueError(f"evaluation.shown: got {self.shown}; expected at most evaluation.samples, {self.samples}")


@dataclass
class WatchConfig:
    """Detection of reward hacking: at every evaluation, the reward is compared with the gold score (`align.watch`).

    Hacking is reported if, since the evaluation with the best gold score so far, the reward has risen and the gold
    score has fallen, both significantly (one-sided t-tests, paired over captions).

    Args:
        level: significance level of a whole run: the probability of a false alarm if the gold score never falls.
        stop_on_hacking: stop the run at the first alarm and save a checkpoint; otherwise print a warning and go on.
        keep_best: keep the LoRA with the best gold score in lora_best/.
        sigmas: noise levels between which the disagreement of a latent reward's scores is measured; empty: none.
        drift_sigmas: noise levels at which the policy's velocity is compared with the reference's; empty: none.
    """

    level: float = 0.05
    stop_on_hacking: bool = False
    keep_best: bool = True
    sigmas: list[settings.ClosedUnitInterval] = field(default_factory=lambda: [0.1, 0.4, 0.7])
    drift_sigmas: list[settings.ClosedUnitInterval] = field(default_factory=lambda: [0.3, 0.8])

    def __post_init__(self) -> None:
        settings.check_fields(self, "watch")
        if not 0 < self.level < 0.5:
            raise ValueError(f"watch.level: got {self.level}; expected a probability between 0 and 0.5")
        for name in ("sigmas", "drift_sigmas"):
            if len(set(sigmas := getattr(self, name))) < len(sigmas):
                raise ValueError(f"watch.{name}: got {sigmas}; expected each noise level once")
        if len(self.sigmas) == 1:
            raise ValueError(f"watch.sigmas: got {self.sigmas}; expected at least two levels to compare, or none")


@dataclass
class MemoryConfig:
    """Options that save memory or time without changing the method; all are off by default.

    `python recipes/savings.py` measures each. See also gradient_checkpointing and optim.name.

    Args:
        base_quant: quantise the linear layers of the base model's blocks to 8 or 4 bits (bitsandbytes, the extra
            `quant`), for policy and latent reward. With nf4, velocities change by a few percent.
        vae_dtype: dtype of the VAE's weights; bfloat16 halves the memory of decoding and rounds the images.
        decode_slice: images that a pixel reward decodes at a time, again in the backward pass; by default all at once.
        decode_tile: decode large images tile by tile (diffusers' tiling); pixels near the seams change.
        offload: keep unused models off the GPU: the base model while prompts are encoded, the VAE between evaluations.
        compile: apply torch.compile to each block of policy and latent reward; the first update takes minutes.
        attention: CUDA kernel of torch's attention. (diffusers' set_attention_backend does not affect SD3.)
    """

    base_quant: Literal["none", "int8", "nf4"] = "none"
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    decode_slice: settings.PositiveInt | None = None
    decode_tile: bool = False
    offload: bool = False
    compile: bool = False
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"

    def __post_init__(self) -> None:
        settings.check_fields(self, "memory")


@dataclass
class Hpsv3Config:
    """How HPSv3 is loaded if it is part of the reward.

    Args:
        quantization: quantise the linear layers of its blocks to 8 or 4 bits (bitsandbytes, the extra `quant`).
        template: data_collator_qwen.py of the package hpsv3, or a JSON file with its two texts; by default the file
            beside the weights, or else the installed package.
        base: folder or hub id of Qwen2-VL-7B-Instruct, for its config and tokenizer; by default beside the weights.
    """

    quantization: Literal["none", "int8", "nf4"] = "none"
    template: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        settings.check_fields(self, "hpsv3")

    def options(self) -> dict[str, Any]:
        """Settings that differ from the defaults, as arguments of `HPSv3Reward.from_pretrained`."""
        return {name: value for name, value in vars(self).items() if value != vars(Hpsv3Config)[name]}


@dataclass
class AnchorConfig:
    """A second reward of another kind, added at every n-th update to make reward hacking harder (`align.anchor`).

    Args:
        reward: name of the second reward; by default there is none.
        every: updates (GRPO: rollouts) between uses of the anchor; 1: every update.
        weight: weight of the anchor relative to the reward, after both are scaled to the same spread.
    """

    reward: str | None = None
    every: settings.PositiveInt = 4
    weight: settings.PositiveFloat = 1.0

    def __post_init__(self) -> None:
        settings.check_fields(self, "anchor")


@dataclass
class GroupRolloutConfig:
    """Settings that Flow-GRPO and DiffusionNFT share: a rollout of groups of samples, and its reuse for updates.

    Args:
        groups: prompts per rollout and process.
        group_size: samples per prompt, whose scores are compared with each other.
        sample_batch: samples drawn and scored at once; affects memory, not results.
        guidance_scale: of rollout and training; by default the model's own. Up to 1: no guidance.
        reward_draws: noise draws over which a latent reward is averaged; all samples of a group share them.
        reward_sigma: noise level or levels (an ensemble) at which a latent reward scores; by default its own.
        advantage_std: standard deviation that divides the distance of a score from the mean of its group: that of the
            group, or of the whole rollout on all processes (global).
        advantage_floor: added to that standard deviation.
        advantage_clip: largest absolute advantage; for DiffusionNFT that of a sample that is wholly good or bad.
        minibatches: updates per pass over the samples of a rollout.
        epochs: passes over the samples of a rollout.
    """

    groups: settings.PositiveInt = 6
    group_size: settings.IntAboveOne = 8
    sample_batch: settings.PositiveInt = 64
    guidance_scale: settings.NonNegativeFloat | None = 1.0
    reward_draws: settings.PositiveInt = 2
    reward_sigma: list[settings.ClosedUnitInterval] | None = None
    advantage_std: Literal["group", "global"] = "group"
    advantage_floor: settings.PositiveFloat = 1e-4
    advantage_clip: settings.PositiveFloat = 5.0
    minibatches: settings.PositiveInt = 1
    epochs: settings.PositiveInt = 1

    def check(self, section: str) -> None:
        settings.check_fields(self, section)
        settings.check_levels(f"{section}.reward_sigma", self.reward_sigma)


def check_noise_level(section: str, sampler: str, noise_level: float) -> None:
    """ValueError for a noise level above 1 with flow_cps."""
    if sampler == "flow_cps" and noise_level > 1:
        raise ValueError(f"{section}.noise_level: got {noise_level} with flow_cps; expected at most 1")


@dataclass
class PolicyRun:
    """Settings of every recipe that samples a model with a LoRA.

    Args:
        model: auto: Stable Diffusion 3.5 Medium if its weights are found, otherwise the small embedded world; sd35 or
            shapes: that model; or the folder or hub id of a StableDiffusion3Pipeline.
        reward: reward to maximise. dinalrm: the latent reward; pixel: the CLIP-style reward on decoded images;
            pickscore, clipscore, hpsv2, hpsv2.1, hpsv3, imagereward, mps or unifiedreward; oracle: the true score of
            the embedded world; NAME=SOURCE: one of these with weights from elsewhere; the folder or hub id of another
            latent reward; module:function: your own; or a weighted sum, "dinalrm + 0.2*pickscore".
        output_dir: folder of the run; by default a new one under runs/, named after method, model, reward and seed.
        seed: of everything random.
        prompts: text file of prompts, one per line, UTF-8; by default the model's own list of training prompts.
        height: of the images, in pixels; by default the model's own.
        width: of the images, in pixels; by default the model's own.
        device: auto uses a CUDA GPU if there is one.
        dtype: of the frozen weights; auto: the model's own on a GPU and float32 on a CPU. The LoRA is always float32.
        policy: the LoRA.
    """

    model: str = "auto"
    reward: str = "dinalrm"
    output_dir: str | None = None
    seed: settings.NonNegativeInt = 0
    prompts: str | None = None
    height: int | None = None
    width: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    policy: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=16.0))

    def __post_init__(self) -> None:
        settings.check_fields(self)
        settings.check_image_size(self.height, self.width)


@dataclass
class AlignRun(PolicyRun):
    """Settings of every alignment recipe.

    Args:
        gold: reward of held-out images, never trained on; by default PickScore, or the oracle of the embedded world.
        resume: folder of a run (its newest checkpoint is used) or of a checkpoint. Options override its settings.
        eval_prompts: text file of held-out prompts; by default the model's own list.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        profile_every: updates between those whose FLOPs (and, on a CPU, peak memory) are measured, which takes about
            twice as long; 0: never.
        tracker: where to log metrics and images besides metrics.jsonl; WANDB_MODE=offline keeps wandb offline.
        optim: the optimiser, AdamW.
        loop: length of training, checkpoints and weight averaging.
        evaluation: evaluation on held-out prompts.
        watch: detection of reward hacking.
        memory: options that save memory or time.
        hpsv3: how HPSv3 is loaded if it is part of the reward.
    """

    gold: str | None = None
    resume: str | None = None
    eval_prompts: str | None = None
    gradient_checkpointing: bool = True
    profile_every: settings.NonNegativeInt = 25
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4))
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    hpsv3: Hpsv3Config = field(default_factory=Hpsv3Config)
