"""Settings that all alignment recipes share. Each recipe's settings class inherits `AlignRun`. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dinalrm_align.models.specs import ModelName
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.reward.names import REWARDS, RewardText, parse_reward
from dinalrm_align.train import settings
from dinalrm_align.train.config import LoopConfig, OptimConfig


@dataclass
class EvaluationConfig:
    """Evaluation on held-out prompts. All evaluations of a run use the same prompts and noise.

    Args:
        samples: images per evaluation. Prompts are used in file order, and repeated if the file has fewer prompts.
        batch_size: images sampled at once.
        every: updates between evaluations; 0: none during training. Initial and final policy are always evaluated.
        shown: number of images in the image grid of each evaluation, at most `samples`.
        seed: seed of the evaluation noise, separate from the training seed: runs with different training seeds can be
            compared image by image.
        guidance_scale: guidance scale of the evaluation; None: the model's own. At most 1: no guidance. Gold, the watch
            for reward hacking, lora_best/ and all images use it.
        num_steps: denoising steps of the evaluation; None: the model's own number.
    """

    MAY_CHANGE: ClassVar = ("batch_size", "every")
    samples: settings.IntAboveOne = 64
    batch_size: settings.PositiveInt = 8
    every: settings.NonNegativeInt = 10
    shown: settings.PositiveInt = 16
    seed: settings.NonNegativeInt = 1234
    guidance_scale: settings.NonNegativeFloat | None = None
    num_steps: settings.PositiveInt | None = None

    def __post_init__(self) -> None:
        settings.check_fields(self, "evaluation")
        self.shown = min(self.shown, self.samples)


@dataclass
class WatchConfig:
    """Detection of reward hacking: at every evaluation, the reward is compared with the gold score (`align.watch`).

    The gold score comes from a second reward that is never trained on. Each evaluation is compared with the earlier
    evaluation that has the best gold score. Hacking is reported if, between the two evaluations, the reward has risen
    and the gold score has fallen, both significantly (one-sided t-tests, paired over captions).

    Args:
        level: significance level. If the gold score never falls, the probability that a run
            raises a false alarm is at most `level`.
        stop_on_hacking: save a checkpoint and stop at the first alarm; otherwise print a warning and go on.
        keep_best: save the LoRA of the evaluation with the best gold score to lora_best/.
        sigmas: at least two noise levels at which a latent reward scores each sample. The metric `level_spread` is
            the disagreement of a sample's scores across levels. Empty: not measured.
        drift_sigmas: noise levels at which the metric `drift` is measured. It is the mean squared difference
            between the velocities of policy and base model. Empty: not measured.
    """

    MAY_CHANGE: ClassVar = ("level", "stop_on_hacking", "keep_best")
    level: settings.OpenHalfInterval = 0.05
    stop_on_hacking: bool = False
    keep_best: bool = True
    sigmas: list[settings.ClosedUnitInterval] = field(default_factory=lambda: [0.1, 0.4, 0.7])
    drift_sigmas: list[settings.ClosedUnitInterval] = field(default_factory=lambda: [0.3, 0.8])

    def __post_init__(self) -> None:
        settings.check_fields(self, "watch")
        for name in ("sigmas", "drift_sigmas"):
            if len(set(sigmas := getattr(self, name))) < len(sigmas):
                raise ValueError(f"watch.{name}: got {sigmas}; expected each noise level once")
        if len(self.sigmas) == 1:
            raise ValueError(f"watch.sigmas: got {self.sigmas}; expected at least two levels to compare, or none")


@dataclass
class MemoryConfig:
    """Options that save memory or time without changing the method; all are off by default.

    `python recipes/savings.py` counts the effect of `base_quant`, `vae_dtype` and `decode_slice`; recipes/README.md
    describes all. Outside this section, `gradient_checkpointing` and `optim.name` save memory too.

    Args:
        base_quant: quantise the linear layers in the base model's transformer blocks to 8 or 4 bits; policy and latent
            reward share these layers. Needs bitsandbytes (the extra `quant`). nf4 changes velocities by a few percent.
        vae_dtype: dtype of the VAE's weights; bfloat16 halves the memory of decoding and rounds pixel values.
        judge_dtype: dtype of the weights of image rewards, in `reward`, `gold` and the anchor; auto: each reward's own,
            bfloat16 for HPSv3 and HPSv3++, float32 for the others. bfloat16 halves their memory; the mean error
            of a score is 0.009 (an earlier `pixel`) to 0.04 (CLIP-H, random weights) standard deviations over images.
        allow_tf32: compute products of float32 matrices on CUDA in TF32, with 10 bits of mantissa; by default torch
            does so in convolutions only. Saves time; emulated, scores are off by 0.0002 to 0.001 of the same.
        decode_slice: images that a pixel reward decodes at once, in the forward and the backward pass; by default all.
        decode_tile: decode large images in tiles (diffusers' VAE tiling); pixels near the seams change.
        offload: keep the VAE off the GPU between evaluations, unless a training reward reads images.
        compile: torch.compile each transformer block of policy and latent reward; the first update and the first
            evaluation take minutes more, and nothing is compiled again after them.
        attention: kernel of torch's scaled_dot_product_attention on CUDA; auto: torch's choice.
    """

    MAY_CHANGE: ClassVar = ("decode_slice", "offload", "compile", "attention")
    base_quant: Literal["none", "int8", "nf4"] = "none"
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    judge_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    allow_tf32: bool = False
    decode_slice: settings.PositiveInt | None = None
    decode_tile: bool = False
    offload: bool = False
    compile: bool = False
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"

    def __post_init__(self) -> None:
        settings.check_fields(self, "memory")


@dataclass
class Hpsv3Config:
    """Options for loading HPSv3 or HPSv3++, used only if the reward contains one of them.

    Args:
        quantization: quantise the linear layers in HPSv3's transformer blocks to 8 or 4 bits; needs bitsandbytes (the
            extra `quant`).
        template: file with the reward's two prompt texts: data_collator_qwen.py of the package hpsv3 (of the released
            code, for HPSv3++), or a JSON file. By default the file beside the weights, or else, for HPSv3, the file of
            the installed package.
        base: folder or hub id of Qwen2-VL-7B-Instruct (for HPSv3++, Qwen3-VL-8B-Instruct), whose config and tokenizer
            the reward uses. By default the folder of the weights if it holds them, otherwise the hub.
        iteration: only for HPSv3++, the RL iteration that its scores are conditioned on: 0 for ranking, 0.3 to 1 in RL.
    """

    quantization: Literal["none", "int8", "nf4"] = "none"
    template: settings.PathText | None = None
    base: settings.Source | None = None
    iteration: settings.ClosedUnitInterval = 0.0

    def __post_init__(self) -> None:
        settings.check_fields(self, "hpsv3")

    def options(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, as keyword arguments of `HPSv3Reward.from_pretrained`."""
        return {name: value for name, value in vars(self).items() if value != vars(Hpsv3Config)[name]}


@dataclass
class AnchorConfig:
    """The anchor, a second reward that is added to the objective at every n-th update to make reward hacking harder.

    Args:
        reward: name of the second reward; by default there is none.
        every: n. The second reward is used at updates (ReFL) or rollouts (GRPO) n, 2n, 3n, ..., counted from 1.
        weight: weight of the second reward relative to the first, after both are scaled to the same standard deviation.
    """

    reward: RewardText | None = None
    every: settings.PositiveInt = 4
    weight: settings.PositiveFloat = 1.0

    def __post_init__(self) -> None:
        settings.check_fields(self, "anchor")


@dataclass
class GroupRolloutConfig:
    """Settings of a rollout and of the updates that train on its samples, shared by Flow-GRPO and DiffusionNFT.

    A rollout samples several prompts. The samples of one prompt are a group, whose scores are compared with each other.

    Args:
        groups: prompts per rollout and process.
        group_size: samples per prompt.
        sample_batch: samples drawn and scored at once; affects memory, not results.
        guidance_scale: guidance scale of rollout and training; None: the model's own. 1 or less: no guidance.
        reward_draws: noise draws over which a latent reward is averaged; all samples of a group share the draws.
        reward_sigma: noise level or levels (an ensemble) at which a latent reward scores; None: the reward's levels.
        advantage_std: standard deviation by which (score - group mean) is divided. group: that of the group's scores.
            global: that of all scores of the rollout, on all processes.
        advantage_floor: constant added to the standard deviation before the division.
        advantage_clip: advantages are clipped to [-advantage_clip, advantage_clip]. DiffusionNFT treats a sample at the
            upper bound as wholly good and a sample at the lower bound as wholly bad.
        minibatches: updates per pass over the samples of a rollout.
        epochs: passes over the samples of a rollout.
    """

    MAY_CHANGE: ClassVar = ("groups", "sample_batch", "advantage_floor", "advantage_clip")
    groups: settings.PositiveInt = 6
    group_size: settings.IntAboveOne = 8
    sample_batch: settings.PositiveInt = 8
    guidance_scale: settings.NonNegativeFloat | None = None
    reward_draws: settings.PositiveInt = 1
    reward_sigma: list[settings.ClosedUnitInterval] | None = None
    advantage_std: Literal["group", "global"] = "group"
    advantage_floor: settings.PositiveFloat = 1e-4
    advantage_clip: settings.PositiveFloat = 5.0
    minibatches: settings.PositiveInt = 1
    epochs: settings.PositiveInt = 1

    def micro_batch(self, steps: int, accumulate: int) -> int:
        """Return the images in a micro-step that trains on `steps` noise levels of each sample; guided ones twice."""
        guided = 2 if self.guidance_scale is None or self.guidance_scale > 1 else 1
        return guided * -(-self.groups * self.group_size * steps // (self.minibatches * accumulate))

    def check(self, section: str) -> None:
        settings.check_fields(self, section)
        settings.check_levels(f"{section}.reward_sigma", self.reward_sigma)


def check_noise_level(section: str, sampler: str, noise_level: float) -> None:
    """Raise ValueError if `noise_level` is above 1 and the sampler is flow_cps."""
    if sampler == "flow_cps" and noise_level > 1:
        raise ValueError(f"{section}.noise_level: got {noise_level} with flow_cps; expected at most 1")


@dataclass
class PolicyConfig(LoraConfig):
    """Settings of the policy's LoRA.

    Args:
        init_from: LoRA to start from: a file or folder written by this package, diffusers or peft, or the hub id of
            such a folder; by default B = 0. policy.rank must be at least its rank. The LoRA keeps its strength,
            whatever policy.alpha is. The evaluation before training uses this LoRA; the velocity KL and the drift are
            still those to the base model.
    """

    init_from: settings.Source | None = None


@dataclass
class PolicyRun:
    """Settings of every recipe that samples from a model with a LoRA.

    Args:
        model: auto: Stable Diffusion 3.5 Medium if its weights are found, else `shapes`. sd35: Stable Diffusion 3.5
            Medium. shapes: the embedded world, a small SD3 model in this package. Or the folder or hub id of a
            StableDiffusion3Pipeline, or a folder with all weights: pipeline/, dinalrm/, pickscore/, clip_h/, hpsv3/ and
            so on.
        reward: reward to maximise. dinalrm: the latent reward. pixel: the CLIP-style reward on decoded images.
            pickscore, clipscore, hpsv2, hpsv2.1, hpsv3, hpsv3pp, imagereward, mps, unifiedreward: published image
            rewards. oracle: the exact score, for model `shapes`. NAME=SOURCE: the named reward with weights from
            SOURCE. Other values: folder or hub id of a latent reward; module:function; weighted sum like
            "dinalrm + 0.2*pickscore".
        output_dir: folder of the run; by default a new one under runs/, named after method, model, reward and seed.
        seed: seed of initialisation, sampling and training.
        prompts: training prompts: a text, .jsonl, .json, .csv or .tsv file, or a data set on the hub, OWNER/NAME or
            OWNER/NAME:SPLIT, with a column prompt or caption; by default the list that belongs to the model.
        height: height of the images in pixels; by default the model's own.
        width: width of the images in pixels; by default the model's own.
        text_length: T5 tokens per prompt that the policy reads, 1 to 512; by default the model's own, 128 for SD3.5. A
            latent reward always reads the number of its own checkpoint.
        device: auto: a CUDA GPU if there is one, otherwise the CPU.
        dtype: dtype of the frozen weights. auto: float32 on a CPU, otherwise the model's own. The LoRA is always
            float32.
        policy: settings of the LoRA.
    """

    MAY_CHANGE: ClassVar = ("output_dir", "prompts", "device")
    model: ModelName = "auto"
    reward: RewardText = "dinalrm"
    output_dir: settings.PathText | None = None
    seed: settings.NonNegativeInt = 0
    prompts: settings.Source | None = None
    height: int | None = None
    width: int | None = None
    text_length: settings.IntFrom1To512 | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    policy: LoraConfig = field(default_factory=lambda: LoraConfig(rank=32, alpha=64.0))

    def __post_init__(self) -> None:
        settings.check_fields(self)
        settings.check_image_size(self.height, self.width)


@dataclass
class AlignRun(PolicyRun):
    """Settings of every alignment recipe.

    Args:
        gold: reward that scores held-out images and is never trained on. By default PickScore, or the reward
            `oracle` for the model `shapes`. A list, --gold "[hpsv3, pickscore]", gives several: the first is the metric
            gold, which the watch for reward hacking and lora_best/ use, and each other one a metric gold/NAME.
        resume: folder of the checkpoint to resume from, or folder of a run to use its newest checkpoint. Options on the
            command line override the saved settings; a setting that makes scores before and after incomparable is
            refused.
        eval_prompts: held-out prompts, given like `prompts`; by default the list that belongs to the model.
        gradient_checkpointing: recompute activations in the backward pass; saves memory, and the part of an update with
            gradient takes about a third longer. auto: policy and latent rewards recompute if their activations would
            take more than half of the free memory; image rewards whose gradient is needed always do.
        profile_every: updates between measurements of FLOPs (on a CPU also of peak memory); 0: no measurements. A
            measured update takes about twice as long.
        tracker: logger of metrics and images, besides the file metrics.jsonl; wandb also gets the settings and, as an
            artifact, the LoRA. WANDB_MODE=offline keeps wandb offline.
        push_to_hub: repository OWNER/NAME on the Hugging Face hub that the LoRA is uploaded to after training, with a
            model card. The login is checked first.
        optim: settings of AdamW and of gradient clipping.
        loop: length of training, checkpoints and weight averaging.
        evaluation: evaluation on held-out prompts.
        watch: detection of reward hacking.
        memory: options that save memory or time.
        hpsv3: options for loading HPSv3 or HPSv3++, in `reward` and in `gold`.
    """

    MAY_CHANGE: ClassVar = (
        "resume", "eval_prompts", "gradient_checkpointing", "profile_every", "tracker", "push_to_hub",
    )  # fmt: skip
    anchor: ClassVar[AnchorConfig | None] = None  # a setting of the methods that support a second reward
    gold: list[RewardText] | RewardText | None = None
    resume: settings.PathText | None = None
    eval_prompts: settings.Source | None = None
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    profile_every: settings.NonNegativeInt = 25
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    push_to_hub: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    hpsv3: Hpsv3Config = field(default_factory=Hpsv3Config)
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(rank=32, alpha=64.0))

    def graph_images(self, num_steps: int) -> tuple[int, int]:
        """Return the images whose activations a micro-step's backward pass needs, of the policy and of a latent reward.

        num_steps: the model's denoising steps. Two velocities of a guided image and each noise level count as images.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement graph_images")

    def reward_options(self, reward: str) -> dict[str, dict[str, Any]]:
        """Return the argument `options` of `load_reward` for the expression `reward`, from `hpsv3` and `memory`."""
        names, dtype = {term.name for term in parse_reward(reward)}, self.memory.judge_dtype
        options = {name: self.hpsv3.options() for name in names & {"hpsv3", "hpsv3pp"}}
        for name in names & REWARDS.keys() - {"dinalrm", "remote", "oracle"}:
            if dtype != "auto":
                options[name] = {**options.get(name, {}), "dtype": dtype}
        return options

    def check_steps(self, num_steps: int) -> None:
        """Raise ValueError if the method's settings do not fit its rollouts. `num_steps`: the model's own number."""


@dataclass
class PushRun:
    """Settings of `recipes/push_to_hub.py`.

    Args:
        run_and_repository: the folder of a run, and the repository OWNER/NAME, which is created if needed.
        lora: folder in the run with the LoRA. lora: that of the last update. lora_best: that with the best gold score.
        private: make a new repository private.
        dry_run: folder that gets the files instead of the hub.
    """

    run_and_repository: list[str] = field(default_factory=list)
    lora: Literal["lora", "lora_best"] = "lora"
    private: bool = False
    dry_run: settings.PathText | None = None

    def __post_init__(self) -> None:
        settings.check_fields(self)
        if len(self.run_and_repository) != 2:
            got = self.run_and_repository or "nothing"
            raise ValueError(f"run_and_repository: got {got}; expected the folder of a run, and OWNER/NAME")
