"""Settings of a latent reward, of the preference loss and of reward training. Imports no torch.

Defaults follow DiNa-LRM for SD3.5-Medium (arXiv 2602.11146, section 4).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import (
    ClosedUnitInterval,
    HalfOpenUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
    check_image_size,
    check_integer,
    check_levels,
    did_you_mean,
)

FORMAT_VERSION = 2
THURSTONE_PRESETS: dict[str, dict[str, float]] = {
    "paper": {"k": 2.0, "sigma_u": 0.1, "epsilon": 0.0},  # arXiv 2602.11146
    "released": {"k": 2.0, "sigma_u": math.sqrt(0.05), "epsilon": 1e-6},  # the training code: variance 2 sigma^2 + 0.05
}

Levels = ClosedUnitInterval | tuple[ClosedUnitInterval, ...]


@dataclass
class LoraConfig:
    """Low-rank adapters on the image and text attention projections of every used block.

    Args:
        rank: inner dimension of each adapter.
        alpha: the weight update is alpha / rank * B A.
        init: initialisation of A: gaussian with std 1/rank, or kaiming (uniform). B starts at zero.
    """

    rank: PositiveInt = 64
    alpha: PositiveFloat = 128.0
    init: Literal["gaussian", "kaiming"] = "gaussian"

    def __post_init__(self) -> None:
        check_fields(self, "lora")


@dataclass
class HeadConfig:
    """Architecture of the reward head.

    Args:
        width: channels inside the head; -1: the backbone's width.
        use_proj_in: put a linear layer before every FiLM adapter; False: only if head and backbone differ in width.
        num_queries: number of learnable query tokens. The score is the mean of their outputs.
        num_attn_heads: attention heads in both query attentions; must divide the width.
        dropout: dropout rate of attention and feed-forward layers in training.
        use_logistic: map the raw score to (-2, 2) by a logistic curve with learnable parameters.
        film: modulate the tokens of each layer by the embedded timestep and pooled prompt.
        value_gates: scale the values in the first query attention by a learned gate per token.
    """

    width: int = -1
    use_proj_in: bool = False
    num_queries: PositiveInt = 4
    num_attn_heads: PositiveInt = 8
    dropout: HalfOpenUnitInterval = 0.0
    use_logistic: bool = False
    film: bool = True
    value_gates: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "head")
        if self.width != -1 and (self.width < 4 or self.width % self.num_attn_heads):
            raise ValueError(
                f"head.width: got {self.width} with {self.num_attn_heads} attention heads; expected -1 (the "
                "backbone's width) or a multiple of the number of heads, at least 4"
            )


@dataclass
class RewardConfig:
    """A latent reward, as stored in `config.json` of its checkpoint. The base model is named here, not stored.

    Args:
        base_model_id: hub id or folder of pipeline or transformer; ./ and ../ are relative to the checkpoint's folder.
        num_layers: number of transformer blocks to use, from the first one. LoRA is added to all of them.
        visual_taps: blocks whose output image tokens the head reads, counted from 1; 0: the input of the first block.
        text_taps: same for the text tokens; empty: the head reads image tokens only.
        tuning: backbone weights in the checkpoint: lora; none (only the head is trained); full (all of them).
        lora: settings of the LoRA if `tuning` is lora.
        head: architecture of the reward head.
        sigma: default noise level, or a list of levels for a multi-noise ensemble.
        image_sigma: default noise level of `score_images`; None: same as `sigma`.
        ensemble: combine levels by tokens (the head attends to the tokens of all levels; paper) or average (of scores).
        snap_sigma: round noise levels to the scheduler's table (1000 steps, shift 3), as the released code does.
        add_noise: add noise to the latents; False: the backbone reads clean latents at timestep 1000 sigma.
        score_scale: score = raw * score_scale + score_bias, where raw is the head's output.
        score_bias: see `score_scale`.
        text_length: T5 tokens per prompt (`max_sequence_length` of the pipeline), at most 512.
        vae_scaling_factor: scaled latents = (z - vae_shift_factor) * vae_scaling_factor, where z is the VAE's latent.
        vae_shift_factor: see `vae_scaling_factor`.
        dtype: dtype in which the reward loads its backbone; a backbone shared with a transformer keeps its dtype.
        format_version: version of this config's format.
    """

    base_model_id: str = "stabilityai/stable-diffusion-3.5-medium"
    num_layers: NonNegativeInt = 12
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
    text_length: PositiveInt = 256
    vae_scaling_factor: float = 1.5305
    vae_shift_factor: float = 0.0609
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.base_model_id.strip():
            raise ValueError(f"base_model_id: got {self.base_model_id!r}; expected a hub id or a folder")
        self.visual_taps = _taps("visual_taps", self.visual_taps, self.num_layers)
        self.text_taps = _taps("text_taps", self.text_taps, self.num_layers)
        if not self.visual_taps:
            raise ValueError("visual_taps: got (); expected at least one block number")
        self.sigma = _levels("sigma", self.sigma)
        self.image_sigma = None if self.image_sigma is None else _levels("image_sigma", self.image_sigma)
        check_integer("text_length", self.text_length, high=512)  # the pipeline's own limit
        for name in ("score_scale", "vae_scaling_factor"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: got 0; expected a number other than 0")
        if self.format_version != FORMAT_VERSION:
            got = f"got {self.format_version}; expected {FORMAT_VERSION}, the one this release reads"
            raise ValueError(f"format_version: {got}: update dinalrm_align")

    @property
    def last_tap(self) -> int:
        """Number of the last block whose tokens the head reads. Later blocks do not run."""
        return max((*self.visual_taps, *self.text_taps))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary that `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RewardConfig":
        """Return the config stored in a dictionary of `to_dict`. Raises ValueError for unknown or missing keys.

        Format version 1 lacks `head.film` and `head.value_gates`. Both are set to True, which is how it behaved.
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
    check_levels(name, sigma)
    return tuple(map(float, sigma))


def _check_keys(where: str, values: dict[str, Any], kind: type) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{where}: got {type(values).__name__} {values!r:.80}; expected a dictionary")
    known = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")
    if missing := [key for key in known if key not in values]:
        raise ValueError(f"{where}: missing {', '.join(missing)}; every key must be present, since it changes a score")


@dataclass(frozen=True)
class LossConfig:
    """Preference loss of a pair of raw scores (see `reward.losses`).

    Args:
        likelihood: maps a score difference to a preference probability. thurstone: Gaussian rater noise whose
            variance grows with the noise level (paper); thurstone_fixed: constant variance; bradley_terry: sigmoid;
            bradley_terry_margin: sigmoid of the difference minus `margin`.
        objective: fidelity (1 - sqrt(p) for a hard label) or nll (-log p). Default: fidelity with Thurstone (paper),
            nll with Bradley-Terry.
        preset: defaults of k, sigma_u, epsilon: paper (2, 0.1, 0) or released (2, sqrt(0.05), 1e-6; the public code).
        k: the rater's variance at noise level sigma is k sigma^2 + sigma_u^2.
        sigma_u: standard deviation of the rater on clean images.
        epsilon: constant added under the square roots of the Thurstone likelihood and of the fidelity.
        variance: rater's variance with thurstone_fixed (0.5 in the released code).
        margin: subtracted from the score difference with bradley_terry_margin.
    """

    likelihood: Literal["thurstone", "thurstone_fixed", "bradley_terry", "bradley_terry_margin"] = "thurstone"
    objective: Literal["fidelity", "nll"] | None = None
    preset: Literal["paper", "released"] = "paper"
    k: NonNegativeFloat | None = None
    sigma_u: PositiveFloat | None = None
    epsilon: NonNegativeFloat | None = None
    variance: PositiveFloat = 0.5
    margin: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "loss")

    def resolved_objective(self) -> str:
        """Return `objective`, or the default for the likelihood if it is None."""
        return self.objective or ("nll" if self.likelihood.startswith("bradley_terry") else "fidelity")

    def constants(self) -> tuple[float, float, float]:
        """Return (k, sigma_u, epsilon). Values that are None come from the preset."""
        given = {"k": self.k, "sigma_u": self.sigma_u, "epsilon": self.epsilon}
        preset = THURSTONE_PRESETS[self.preset]
        return tuple(preset[name] if value is None else value for name, value in given.items())


@dataclass
class AccuracyConfig:
    """Evaluation on held-out pairs: accuracy of the reward at several noise levels, with the same noise every time.

    Args:
        sigmas: noise levels that are evaluated one by one.
        ensemble: noise levels that are evaluated together, as a multi-noise ensemble; empty: no ensemble.
        every: updates between evaluations; 0: only at the end. The final reward is always evaluated.
        seed: seed of the noise.
    """

    sigmas: list[ClosedUnitInterval] = field(default_factory=lambda: [level / 10 for level in range(10)])
    ensemble: list[ClosedUnitInterval] = field(default_factory=lambda: [0.2, 0.5, 0.7])
    every: NonNegativeInt = 250
    seed: NonNegativeInt = 1234

    def __post_init__(self) -> None:
        check_fields(self, "accuracy")
        check_levels("accuracy.sigmas", self.sigmas)

    def levels(self) -> list[tuple[float, ...]]:
        """Return the levels to evaluate, without duplicates: (sigma,) for each of `sigmas`, and the ensemble."""
        levels = [(sigma,) for sigma in self.sigmas] + [tuple(self.ensemble)]
        return [level for level in dict.fromkeys(levels) if level]


@dataclass
class TrainRewardRun:
    """Settings of `recipes/train_reward.py`.

    Args:
        model: model of the backbone: shapes (embedded world), sd35, or folder or hub id of a StableDiffusion3Pipeline.
        pairs: preference pairs: a folder of encoded latents (from recipes/prepare_pairs.py or in the released layout)
            or a jsonl file that lists images (`data.source`). Default: pairs generated in the embedded world.
        validation_pairs: pairs for evaluation only, in the same formats; default: see held_out_prompts.
        held_out_prompts: number of prompts in `pairs` to keep for evaluation if validation_pairs is not set.
        output_dir: folder of the run; the trained reward goes to reward/ in it. Default: a new folder in runs/.
        seed: seed of the initial weights, the data order, the noise and the noise levels.
        resume: run folder (the newest checkpoint is used) or checkpoint folder. Options override its settings.
        device: auto uses a CUDA GPU if there is one.
        dtype: dtype of the frozen base weights; auto: the model's own on a GPU, float32 on a CPU. LoRA and head are
            float32. On a GPU the forward pass uses bfloat16 autocast unless this is float32.
        tracker: where to log in addition to metrics.jsonl; wandb works offline with WANDB_MODE=offline.
        batch_size: prompts per micro-batch on each process, each with all its images (a pair or a ranked list).
        on_bad: on unreadable files of latents: refuse (exit and list them) or skip (warn and drop their pairs).
        prefetch: batches of encoded pairs to read ahead.
        height: height in pixels of images that are encoded during training; default: the model's own.
        width: width in pixels of images that are encoded during training; default: the model's own.
        gradient_checkpointing: recompute the backbone's activations in the backward pass.
        reward: settings of the reward. base_model_id and the VAE's scaling are set from the model.
        loss: settings of the preference loss.
        train_sigma: distribution of training noise levels. One level is drawn per prompt and used for all its images.
        optim: settings of AdamW; lr is the learning rate of the head.
        lora_lr: peak learning rate of the LoRA; default: same as the head.
        loop: length of training, checkpoints and weight averaging.
        accuracy: evaluation on held-out pairs.
        shapes_pairs: settings of the embedded world's pairs that are generated if `pairs` is not set.
    """

    model: str = "shapes"
    pairs: str | None = None
    validation_pairs: str | None = None
    held_out_prompts: PositiveInt = 200
    output_dir: str | None = None
    seed: NonNegativeInt = 0
    resume: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    batch_size: PositiveInt = 4
    on_bad: Literal["refuse", "skip"] = "refuse"
    prefetch: NonNegativeInt = 4
    height: int | None = None
    width: int | None = None
    gradient_checkpointing: bool = False
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train_sigma: SigmaConfig = field(default_factory=SigmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora_lr: NonNegativeFloat | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    accuracy: AccuracyConfig = field(default_factory=AccuracyConfig)
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_image_size(self.height, self.width)
        if self.reward.tuning == "full":
            raise ValueError("reward.tuning: got full; expected lora or none: this recipe trains LoRA and head")
