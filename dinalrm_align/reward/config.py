"""Settings of a latent reward, of the preference loss and of reward training. This module does not import torch.

Defaults follow DiNa-LRM for SD3.5-Medium (arXiv 2602.11146, section 4).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.models.specs import ModelName
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train import settings
from dinalrm_align.train.config import LoopConfig, OptimConfig

FORMAT_VERSION = 2
THURSTONE_PRESETS: dict[str, dict[str, float]] = {
    "paper": {"k": 2.0, "sigma_u": 0.1, "epsilon": 0.0},  # arXiv 2602.11146
    "released": {"k": 2.0, "sigma_u": math.sqrt(0.05), "epsilon": 1e-6},  # the training code: variance 2 sigma^2 + 0.05
}

Levels = settings.ClosedUnitInterval | tuple[settings.ClosedUnitInterval, ...]


@dataclass
class LoraConfig:
    """Settings of the LoRA on the image and text attention projections of every transformer block that the reward uses.

    Args:
        rank: rank of each adapter.
        alpha: scale of each adapter: the weight update is alpha / rank * B A.
        init: initialisation of the matrix A: gaussian (std 1/rank) or kaiming (uniform). The matrix B starts at zero.
    """

    rank: settings.PositiveInt = 64
    alpha: settings.PositiveFloat = 128.0
    init: Literal["gaussian", "kaiming"] = "gaussian"

    def __post_init__(self) -> None:
        settings.check_fields(self, "lora")


@dataclass
class HeadConfig:
    """Architecture of the reward head.

    Args:
        width: number of channels inside the head; -1: the backbone's width.
        use_proj_in: always apply a linear layer before FiLM; False: only if head and backbone differ in width.
        num_queries: number of learnable query tokens. The score is the mean over the query tokens.
        num_attn_heads: number of attention heads; must divide the head's width.
        dropout: dropout rate of the head's attention and feed-forward layers in training.
        use_logistic: map the raw score to (-2, 2) by a logistic curve with learnable shift and scale.
        film: scale and shift each layer's tokens by values predicted from the timestep and the pooled prompt.
        value_gates: in the first attention layer, multiply each token's value by a gate predicted from the token.
    """

    width: int = -1
    use_proj_in: bool = False
    num_queries: settings.PositiveInt = 4
    num_attn_heads: settings.PositiveInt = 8
    dropout: settings.HalfOpenUnitInterval = 0.0
    use_logistic: bool = False
    film: bool = True
    value_gates: bool = True

    def __post_init__(self) -> None:
        settings.check_fields(self, "head")
        if self.width != -1 and (self.width < 4 or self.width % self.num_attn_heads):
            raise ValueError(
                f"head.width: got {self.width} with {self.num_attn_heads} attention heads; expected -1 (the "
                "backbone's width) or a multiple of the number of heads, at least 4"
            )


@dataclass
class RewardConfig:
    """Settings of a latent reward, stored in `config.json` of its checkpoint. The base model is loaded separately.

    Args:
        base_model_id: hub id or folder of the base pipeline or transformer. A path that starts with ./ or ../ is
            relative to the checkpoint's folder.
        num_layers: number of transformer blocks to use, from the first one. Each gets a LoRA if `tuning` is lora.
        visual_taps: blocks whose output image tokens the head reads, counted from 1; 0: the first block's input.
        text_taps: blocks whose output text tokens the head reads, counted from 1; empty: the head reads no text tokens.
        tuning: backbone weights to train and store: lora, none (only the head is trained) or full (all weights).
        lora: settings of the LoRA; unused unless `tuning` is lora.
        head: architecture of the reward head.
        sigma: default noise level, or a list of levels for a multi-noise ensemble.
        image_sigma: default noise level of `score_images`; None: same as `sigma`.
        ensemble: how an ensemble combines noise levels: tokens (the head attends to the tokens of all levels, as in the
            paper) or average (mean of the scores at each level).
        snap_sigma: round noise levels to the nearest of 1000 scheduler sigmas (shift 3), as the released code does.
        add_noise: add noise to the latents; False: the backbone reads clean latents, with timestep 1000 sigma.
        score_scale: factor in score = raw * score_scale + score_bias, where raw is the head's output.
        score_bias: constant in score = raw * score_scale + score_bias.
        text_length: number of T5 tokens per prompt, at most 512 (`max_sequence_length` of the pipeline). The released
            DiNa-LRM was trained with 128.
        vae_scaling_factor: factor in scaled latents = (z - vae_shift_factor) * vae_scaling_factor, for VAE latents z.
        vae_shift_factor: shift in scaled latents = (z - vae_shift_factor) * vae_scaling_factor.
        dtype: dtype in which the backbone is loaded; stored: that of the base model's files. A backbone with shared
            weights keeps the transformer's dtype.
        format_version: version of the config.json format.
    """

    base_model_id: str = "stabilityai/stable-diffusion-3.5-medium"
    num_layers: settings.NonNegativeInt = 12
    visual_taps: tuple[int, ...] = (4, 8, 12)
    text_taps: tuple[int, ...] = (4, 8, 12)
    tuning: Literal["lora", "none", "full"] = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    sigma: Levels = 0.4
    image_sigma: Levels | None = None
    ensemble: Literal["tokens", "average"] = "tokens"
    snap_sigma: bool = False
    add_noise: bool = True
    score_scale: float = 1.0
    score_bias: float = 0.0
    text_length: settings.IntFrom1To512 = 128
    vae_scaling_factor: float = 1.5305
    vae_shift_factor: float = 0.0609
    dtype: Literal["float32", "bfloat16", "float16", "stored"] = "float32"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        settings.check_fields(self)
        if not self.base_model_id.strip():
            raise ValueError(f"base_model_id: got {self.base_model_id!r}; expected a hub id or a folder")
        self.visual_taps = _taps("visual_taps", self.visual_taps, self.num_layers)
        self.text_taps = _taps("text_taps", self.text_taps, self.num_layers)
        if not self.visual_taps:
            raise ValueError("visual_taps: got (); expected at least one block number")
        self.sigma = _levels("sigma", self.sigma)
        self.image_sigma = None if self.image_sigma is None else _levels("image_sigma", self.image_sigma)
        for name in ("score_scale", "vae_scaling_factor"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: got 0; expected a number other than 0")
        if self.format_version != FORMAT_VERSION:
            got = f"got {self.format_version}; expected {FORMAT_VERSION}, the one this release reads"
            raise ValueError(f"format_version: {got}: update dinalrm_align")

    @property
    def last_tap(self) -> int:
        """Number of the last block whose tokens the head reads, counted from 1. Later blocks do not run."""
        return max((*self.visual_taps, *self.text_taps))

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a JSON-serialisable dict, to be read by `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RewardConfig":
        """Return the config stored in a dict from `to_dict`. Raises ValueError for unknown or missing keys.

        A dict of format version 1 has no `head.film` and `head.value_gates`. Both are set to True, since version 1
        always used FiLM and value gates.
        """
        if not isinstance(values, dict):
            raise TypeError(f"reward config: got {type(values).__name__}; expected a dictionary")
        values = dict(values)
        if values.get("format_version") == 1 and isinstance(values.get("head"), dict):
            head = {"film": True, "value_gates": True, **values["head"]}
            values |= {"head": head, "format_version": FORMAT_VERSION}
        _check_keys("reward config", values, cls)
        for key, nested in (("lora", LoraConfig), ("head", HeadConfig)):
            _check_keys(f"reward config, section {key!r}", values[key], nested)
            values[key] = nested(**values[key])
        return cls(**values)


def _taps(name: str, taps: tuple[int, ...] | list[int], num_layers: int) -> tuple[int, ...]:
    taps = tuple(taps)
    if list(taps) != sorted(set(taps)) or not all(0 <= tap <= num_layers for tap in taps):
        expected = f"rising block numbers from 0 (the embedded tokens) to num_layers = {num_layers}"
        raise ValueError(f"{name}: got {taps}; expected {expected}")
    return taps


def _levels(name: str, sigma: Levels | list[float]) -> float | tuple[float, ...]:
    if not isinstance(sigma, list | tuple):
        return float(sigma)
    settings.check_levels(name, sigma)
    return tuple(map(float, sigma))


def _check_keys(where: str, values: dict[str, Any], kind: type) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{where}: got {type(values).__name__} {values!r:.80}; expected a dictionary")
    known = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r}{settings.did_you_mean(key, known)} (known: {', '.join(known)})"
            )
    if missing := [key for key in known if key not in values]:
        raise ValueError(f"{where}: missing {', '.join(missing)}; every key must be present, since it changes a score")


@dataclass(frozen=True)
class LossConfig:
    """Settings of the preference loss on the raw scores of a pair (see `reward.losses`).

    Args:
        likelihood: function from score difference to preference probability. thurstone: Gaussian rater noise whose
            variance grows with the noise level (paper). thurstone_fixed: Gaussian rater noise of constant variance.
            bradley_terry: sigmoid. bradley_terry_margin: sigmoid of the difference minus `margin`.
        objective: fidelity (1 - sqrt(p) for a hard label) or nll (-log p), where p is the preference probability.
            Default: fidelity for thurstone and thurstone_fixed (paper), nll for the Bradley-Terry likelihoods.
        preset: default values of (k, sigma_u, epsilon). `paper` means (2, 0.1, 0). `released` means
            (2, sqrt(0.05), 1e-6), as in the public code.
        k: factor in the rater's variance k sigma^2 + sigma_u^2, where sigma is the noise level. Default: the preset's.
        sigma_u: standard deviation of the rater's noise on clean images. Default: the preset's.
        epsilon: constant under the square root, in the Thurstone likelihood and in fidelity. Default: the preset's.
        variance: rater's variance for thurstone_fixed (0.5 in the released code).
        margin: constant that bradley_terry_margin subtracts from the score difference.
    """

    likelihood: Literal["thurstone", "thurstone_fixed", "bradley_terry", "bradley_terry_margin"] = "thurstone"
    objective: Literal["fidelity", "nll"] | None = None
    preset: Literal["paper", "released"] = "paper"
    k: settings.NonNegativeFloat | None = None
    sigma_u: settings.PositiveFloat | None = None
    epsilon: settings.NonNegativeFloat | None = None
    variance: settings.PositiveFloat = 0.5
    margin: float = 1.0

    def __post_init__(self) -> None:
        settings.check_fields(self, "loss")

    def resolved_objective(self) -> str:
        """Return `objective`. None is replaced by nll for the Bradley-Terry likelihoods and by fidelity otherwise."""
        return self.objective or ("nll" if self.likelihood.startswith("bradley_terry") else "fidelity")

    def constants(self) -> tuple[float, float, float]:
        """Return (k, sigma_u, epsilon). Each field that is None takes the preset's value."""
        given = {"k": self.k, "sigma_u": self.sigma_u, "epsilon": self.epsilon}
        preset = THURSTONE_PRESETS[self.preset]
        return tuple(preset[name] if value is None else value for name, value in given.items())


@dataclass
class AccuracyConfig:
    """Settings of the evaluation, which measures the reward's accuracy on held-out pairs at several noise levels.

    Args:
        sigmas: noise levels to evaluate one by one.
        ensemble: noise levels to evaluate together, as a multi-noise ensemble; empty: no ensemble.
        every: number of updates between evaluations; 0: only at the end. The final reward is always evaluated.
        seed: seed of the noise on the latents. Every evaluation uses the same noise.
    """

    MAY_CHANGE: ClassVar = ("every",)
    sigmas: list[settings.ClosedUnitInterval] = field(default_factory=lambda: [level / 10 for level in range(10)])
    ensemble: list[settings.ClosedUnitInterval] = field(default_factory=lambda: [0.2, 0.5, 0.7])
    every: settings.NonNegativeInt = 250
    seed: settings.NonNegativeInt = 1234

    def __post_init__(self) -> None:
        settings.check_fields(self, "accuracy")
        settings.check_levels("accuracy.sigmas", self.sigmas)

    def levels(self) -> list[tuple[float, ...]]:
        """Return distinct tuples of noise levels: (sigma,) for each of `sigmas`, then `ensemble` if it is not empty."""
        levels = [(sigma,) for sigma in self.sigmas] + [tuple(self.ensemble)]
        return [level for level in dict.fromkeys(levels) if level]


@dataclass
class TrainRewardRun:
    """Settings of `recipes/train_reward.py`.

    Args:
        model: base model: `shapes` (the embedded world, a small SD3 model in this package), `sd35`, or a folder or hub
            id of a StableDiffusion3Pipeline.
        pairs: preference pairs to train on: a folder of encoded latents (from recipes/prepare_pairs.py or in the
            released layout) or a jsonl file that lists images (see `data.source`). Default: generated pairs
            (see `shapes_pairs`).
        validation_pairs: pairs for evaluation only, in the same formats as `pairs`. Default: see `held_out_prompts`.
        held_out_prompts: number of prompts in `pairs` to keep for evaluation if `validation_pairs` is not set.
        output_dir: folder of the run; its subfolder reward/ gets the trained reward. Default: a new folder in runs/.
        init_from: reward whose LoRA and head training starts from, a folder or hub id; default: newly initialised ones.
        seed: seed of the initial weights, the data order, the noise and the noise levels.
        resume: folder of a checkpoint to resume, or of a run whose newest checkpoint is resumed. Options given on the
            command line override the stored settings.
        device: device to train on; auto: a CUDA GPU if there is one, else the CPU.
        dtype: dtype of the frozen base weights; auto: the model's own on a GPU, float32 on a CPU. LoRA and head are
            always float32. On a GPU the forward pass uses bfloat16 autocast unless `dtype` is float32.
        tracker: where to log in addition to metrics.jsonl. wandb also gets the settings and, as an artifact, the
            reward. wandb works offline with WANDB_MODE=offline.
        push_to_hub: repository OWNER/NAME on the Hugging Face hub that the reward is uploaded to after training, with a
            model card. The login is checked first.
        batch_size: number of prompts per micro-batch on each process. A micro-batch has all images of each prompt (a
            pair or a ranked list).
        on_bad: action on files, images and records of pairs that cannot be read: refuse (exit) or skip (warn, and leave
            out the pairs).
        prefetch: number of batches to read ahead, for pairs that are stored as encoded latents.
        height: height in pixels of images that are encoded during training; default: 1024 for SD3.5, as the released
            reward was trained, else the model's own.
        width: width in pixels of images that are encoded during training; default: as for height.
        gradient_checkpointing: recompute the backbone's activations in the backward pass.
        reward: settings of the reward. base_model_id and the VAE's scaling are always set from `model`.
        loss: settings of the preference loss.
        train_sigma: distribution of noise levels in training. All images of a prompt get the same level.
        optim: settings of AdamW. optim.lr is the peak learning rate of the head.
        lora_lr: peak learning rate of the LoRA; default: same as the head.
        loop: settings of training length, checkpoints and weight averaging.
        accuracy: settings of the evaluation on held-out pairs.
        shapes_pairs: settings of the synthetic pairs of shapes that are generated if `pairs` is not set.
    """

    MAY_CHANGE: ClassVar = (
        "pairs", "validation_pairs", "output_dir", "resume", "device", "tracker", "batch_size", "on_bad", "prefetch",
        "gradient_checkpointing", "lora_lr", "push_to_hub",
    )  # fmt: skip
    model: ModelName = "shapes"
    pairs: settings.PathText | None = None
    validation_pairs: settings.PathText | None = None
    held_out_prompts: settings.PositiveInt = 200
    init_from: settings.Source | None = None
    output_dir: settings.PathText | None = None
    seed: settings.NonNegativeInt = 0
    resume: settings.PathText | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    push_to_hub: str | None = None
    batch_size: settings.PositiveInt = 4
    on_bad: Literal["refuse", "skip"] = "refuse"
    prefetch: settings.NonNegativeInt = 4
    height: int | None = None
    width: int | None = None
    gradient_checkpointing: bool = False
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train_sigma: SigmaConfig = field(default_factory=SigmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora_lr: settings.NonNegativeFloat | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    accuracy: AccuracyConfig = field(default_factory=AccuracyConfig)
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        settings.check_fields(self)
        settings.check_image_size(self.height, self.width)
        if self.reward.tuning == "full":
            raise ValueError("reward.tuning: got full; expected lora or none: this recipe trains LoRA and head")
