"""What defines a latent reward: everything that changes a score, as it stands in the checkpoint's `config.json`.

Defaults are the released DiNa-LRM for SD3.5-Medium (arXiv 2602.11146, section 4). Torch-free.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dinalrm_align.train.settings import check_fields, check_integer, did_you_mean

FORMAT_VERSION = 2


@dataclass
class LoraConfig:
    """Low-rank adapters on the eight attention projections of every used block.

    Args:
        rank: inner dimension of each adapter.
        alpha: the update is `alpha / rank * B A`.
        init: how A starts (B starts at zero): gaussian with std 1/rank, or kaiming (uniform).
    """

    rank: int = 64
    alpha: float = 128.0
    init: Literal["gaussian", "kaiming"] = "gaussian"

    def __post_init__(self) -> None:
        check_fields(self, "lora")
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"LoRA: got rank {self.rank}, alpha {self.alpha}; both must be positive")


@dataclass
class HeadConfig:
    """Sizes of the reward head.

    Args:
        width: channels inside the head; -1 means the backbone's width.
        use_proj_in: a linear layer before every FiLM adapter even where the widths agree (it is always there where
            they differ).
        num_queries: learnable query tokens, averaged at the end.
        num_attn_heads: heads of both query attentions; must divide the width.
        dropout: in the attentions and the feed-forward, during training only.
        use_logistic: squash the score to (-2, 2) by a learnable logistic curve.
        film: modulate the layer adapters by the embedded timestep and pooled prompt; off, an adapter is
            h = x + layer_embed, projected.
        value_gates: a gate per token on the values of the first query attention.
    """

    width: int = -1
    use_proj_in: bool = False
    num_queries: int = 4
    num_attn_heads: int = 8
    dropout: float = 0.0
    use_logistic: bool = False
    film: bool = True
    value_gates: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "head")
        if self.num_queries < 1 or self.num_attn_heads < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"head: got num_queries {self.num_queries}, num_attn_heads {self.num_attn_heads}, dropout "
                f"{self.dropout}; expected at least 1, at least 1, and [0, 1)"
            )
        if self.width != -1 and (self.width < 4 or self.width % self.num_attn_heads):
            raise ValueError(
                f"head: got width {self.width} with {self.num_attn_heads} attention heads; expected -1 (the backbone's "
                "width) or a multiple of the number of heads"
            )


@dataclass
class RewardConfig:
    """A latent reward, completely: a checkpoint is this, the tensors of LoRA and head, and the base model named here.

    Args:
        base_model_id: hub id or folder of the diffusion pipeline (or bare transformer) the reward reads with; an id
            that starts with `./` or `../` is relative to the folder of the checkpoint.
        num_layers: transformer blocks that are used (and that carry LoRA).
        visual_taps: blocks whose image stream the head reads, counted from 1; 0 means the embedded tokens.
        text_taps: the same for the text stream; none at all means that the head reads the image tokens alone.
        tuning: what the checkpoint holds of the backbone: lora; none (frozen, the head alone was trained); full (the
            backbone's own weights, nothing can be shared).
        lora: read when `tuning` is lora.
        head: sizes of the reward head.
        sigma: default noise level, or several for a multi-noise ensemble; each in [0, 1].
        image_sigma: default for `score_images`; None means `sigma`.
        ensemble: several levels are joined as tokens before the head's attention (tokens, the paper's), or their scores
            are averaged (average, the baseline).
        snap_sigma: round every level to the nearest entry of the scheduler table (1000 steps, shift 3), as the released
            code does.
        add_noise: mix noise into the latents; False shows the backbone clean latents at timestep 1000 sigma.
        score_scale: score = raw * score_scale + score_bias.
        score_bias: see `score_scale`.
        text_length: T5 tokens per prompt (`max_sequence_length` of the pipeline).
        vae_scaling_factor: scaled latents = (z - vae_shift_factor) * vae_scaling_factor.
        vae_shift_factor: see `vae_scaling_factor`.
        dtype: of the backbone when the reward loads it itself; a shared transformer keeps its own.
        format_version: of this file.
    """

    base_model_id: str = "stabilityai/stable-diffusion-3.5-medium"
    num_layers: int = 12
    visual_taps: tuple[int, ...] = (4, 8, 12)
    text_taps: tuple[int, ...] = (4, 8, 12)
    tuning: Literal["lora", "none", "full"] = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    sigma: float | tuple[float, ...] = 0.4
    image_sigma: float | tuple[float, ...] | None = None
    ensemble: Literal["tokens", "average"] = "tokens"
    snap_sigma: bool = False
    add_noise: bool = True
    score_scale: float = 1.0
    score_bias: float = 0.0
    text_length: int = 256
    vae_scaling_factor: float = 1.5305
    vae_shift_factor: float = 0.0609
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("num_layers", self.num_layers)
        if not self.base_model_id.strip():
            raise ValueError(f"base_model_id: got {self.base_model_id!r}; expected a hub id or a folder")
        self.visual_taps = _taps("visual_taps", self.visual_taps, self.num_layers)
        self.text_taps = _taps("text_taps", self.text_taps, self.num_layers)
        if not self.visual_taps:
            raise ValueError("visual_taps: got (); expected at least one block number")
        self.sigma = _levels("sigma", self.sigma)
        if self.image_sigma is not None:
            self.image_sigma = _levels("image_sigma", self.image_sigma)
        check_integer("text_length", self.text_length, low=1, high=512)  # the pipeline's own limit
        if self.score_scale == 0 or self.vae_scaling_factor == 0:
            raise ValueError(
                f"got score_scale {self.score_scale}, vae_scaling_factor {self.vae_scaling_factor}; expected neither 0"
            )
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: got {self.format_version}, this release reads {FORMAT_VERSION}; update dinalrm_align"
            )

    @property
    def last_tap(self) -> int:
        """Blocks that must run: nothing after the last tapped one is read."""
        return max((*self.visual_taps, *self.text_taps))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back to an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RewardConfig":
        """The inverse of `to_dict`. A default may change a score, so ValueError for a missing key as for an unknown.

        Version 1, which had neither `head.film` nor `head.value_gates`, is read as what it meant: both on.
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
            f"{name}: got {taps}; expected block numbers, rising, each from 0 (the embedded tokens) to "
            f"num_layers = {num_layers}"
        )
    return taps


def _levels(name: str, sigma: float | tuple[float, ...] | list[float]) -> float | tuple[float, ...]:
    levels = tuple(sigma) if isinstance(sigma, list | tuple) else (sigma,)
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"{name}: got {sigma}; expected a noise level in [0, 1], or several of them")
    return tuple(map(float, levels)) if isinstance(sigma, list | tuple) else float(sigma)


def _check_keys(where: str, values: dict[str, Any], kind: type) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{where}: got {type(values).__name__} {values!r:.80}; expected a dictionary")
    known = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")
    missing = [key for key in known if key not in values]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; every key must be there, since each changes a score")
