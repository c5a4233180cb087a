"""Settings of a latent reward: everything that changes a score, as in the checkpoint's `config.json`. Torch-free.

Defaults are the released DiNa-LRM for SD3.5-Medium (arXiv 2602.11146, section 4).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dinalrm_align.train.settings import (
    ClosedUnitInterval,
    HalfOpenUnitInterval,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
    check_integer,
    did_you_mean,
)

FORMAT_VERSION = 2

Levels = ClosedUnitInterval | tuple[ClosedUnitInterval, ...]


@dataclass
class LoraConfig:
    """Low-rank adapters on the eight attention projections of every used block.

    Args:
        rank: inner dimension of each adapter.
        alpha: the update is `alpha / rank * B A`.
        init: initialisation of A (B starts at zero): gaussian with std 1/rank, or kaiming (uniform).
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
        use_proj_in: add a linear layer before every FiLM adapter even where the widths agree (it is always there where
            they differ).
        num_queries: learnable query tokens, averaged at the end.
        num_attn_heads: heads of both query attentions; must divide the width.
        dropout: in the attentions and the feed-forward, in training mode only.
        use_logistic: squash the score to (-2, 2) by a learnable logistic curve.
        film: modulate the layer adapters by the embedded timestep and pooled prompt; without it an adapter is
            h = x + layer_embed, projected.
        value_gates: a gate per token on the values of the first query attention.
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
    """A latent reward. A checkpoint is this config, the tensors of LoRA and head, and the base model named here.

    Args:
        base_model_id: hub id or folder of the diffusion pipeline (or bare transformer) that the reward is built on; an
            id that starts with `./` or `../` is relative to the checkpoint's folder.
        num_layers: transformer blocks that are used (and that carry LoRA).
        visual_taps: blocks whose image stream the head reads, counted from 1; 0 means the embedded tokens.
        text_taps: the same for the text stream; empty: the head reads image tokens alone.
        tuning: which backbone weights the checkpoint holds: lora; none (frozen, only the head was trained); full (the
            backbone's own weights, which cannot be shared).
        lora: read if `tuning` is lora.
        head: architecture of the reward head.
        sigma: default noise level, or several for a multi-noise ensemble.
        image_sigma: default for `score_images`; None: `sigma`.
        ensemble: how several levels are combined: joined as tokens before the head's attention (tokens, the paper's),
            or by averaging their scores (average, the baseline).
        snap_sigma: round every level to the nearest entry of the scheduler table (1000 steps, shift 3), as the released
            code does.
        add_noise: add noise to the latents; False gives the backbone clean latents at timestep 1000 sigma.
        score_scale: score = raw * score_scale + score_bias.
        score_bias: see `score_scale`.
        text_length: T5 tokens per prompt (`max_sequence_length` of the pipeline), at most 512.
        vae_scaling_factor: scaled latents = (z - vae_shift_factor) * vae_scaling_factor.
        vae_shift_factor: see `vae_scaling_factor`.
        dtype: of the backbone if the reward loads it; a shared transformer keeps its own.
        format_version: of this file.
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
            raise ValueError(
                f"format_version: got {self.format_version}; expected {FORMAT_VERSION}, the one this release reads: "
                "update dinalrm_align"
            )

    @property
    def last_tap(self) -> int:
        """Number of blocks that must run."""
        return max((*self.visual_taps, *self.text_taps))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary, the input of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RewardConfig":
        """The inverse of `to_dict`. Raises ValueError for unknown and for missing keys.

        Version 1 had neither `head.film` nor `head.value_gates`; both are set to True, its behaviour.
        """
        if not isinstance(values, dict):
            raise TypeError(f"reward config: got {type(values).__name__}; expected a dictionary")
        values = dict(values)
        if values.get("format_version") == 1 and isinstance(values.get("head"), dict):
            values["head"] = {"film": True, "value_gates": True, **values["head"]}
            values["format_version"] = FORMAT_VERSION
        _check_keys("reward config", values, cls)
        for key, nested in (("lora", LoraConfig), ("head", HeadConfig)):
            _check_keys(f"reward config, section {key!r}", values[key], nested)
            values[key] = nested(**values[key])
        return cls(**values)


def _taps(name: str, taps: tuple[int, ...] | list[int], num_layers: int) -> tuple[int, ...]:
    taps = tuple(taps)
    if list(taps) != sorted(set(taps)) or not all(0 <= tap <= num_layers for tap in taps):
        raise ValueError(
            f"{name}: got {taps}; expected rising block numbers from 0 (the embedded tokens) to "
            f"num_layers = {num_layers}"
        )
    return taps


def _levels(name: str, sigma: Levels | list[float]) -> float | tuple[float, ...]:
    if not isinstance(sigma, list | tuple):
        return float(sigma)
    if not sigma:
        raise ValueError(f"{name}: got {sigma}; expected a noise level in [0, 1], or several")
    return tuple(map(float, sigma))


def _check_keys(where: str, values: dict[str, Any], kind: type) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{where}: got {type(values).__name__} {values!r:.80}; expected a dictionary")
    known = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")
    missing = [key for key in known if key not in values]
    if missing:
        raise ValueError(
            f"{where}: missing {', '.join(missing)}; every key must be present, since each changes a score"
        )
