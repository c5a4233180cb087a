"""Settings of the embedded world: sizes of its networks, and how they are trained from nothing. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import check_fields, check_integer, did_you_mean

FAITHFULNESS = ("shape", "colour", "size", "relation", "count", "background")
AESTHETICS = ("blur", "contrast", "placement")
CONCEPTS = FAITHFULNESS + AESTHETICS
"""What a picture can get wrong: what its caption says, and how well it is made."""


@dataclass
class StackConfig:
    """Sizes of the stack; by default the shipped weights': 64 x 64 pictures, 16 x 16 latents, 64 image tokens.

    Args:
        image_size: side of the pictures, a multiple of 64, at which the oracle judges.
        vae_channels: autoencoder widths per resolution; their number less one is log2 of the downsampling factor.
        vae_layers: residual blocks per resolution.
        vae_norm_groups: groups of the autoencoder's group norms.
        latent_channels: channels of the latents.
        depth: joint-attention blocks.
        head_dim: width of an attention head.
        num_heads: attention heads; the transformer's width is num_heads * head_dim.
        dual_attention_layers: blocks with a second, image-only attention.
        pos_embed_max_size: largest latent side, in patches of 2.
        clip_width: width of each CLIP tower; two of them make t5_width.
        clip_layers: layers of each CLIP tower.
        t5_width: width of the T5 encoder.
        t5_layers: layers of the T5 encoder.
        text_length: tokens per prompt of each tokenizer (`max_sequence_length` of the pipeline).
        scheduler_shift: shift of the flow-matching schedule.
    """

    image_size: int = 64
    vae_channels: tuple[int, ...] = (16, 32, 64)
    vae_layers: int = 1
    vae_norm_groups: int = 8
    latent_channels: int = 16
    depth: int = 6
    head_dim: int = 32
    num_heads: int = 4
    dual_attention_layers: tuple[int, ...] = (0, 1)
    pos_embed_max_size: int = 24
    clip_width: int = 64
    clip_layers: int = 2
    t5_width: int = 128
    t5_layers: int = 2
    text_length: int = 14
    scheduler_shift: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "stack")
        for name in ("vae_layers", "vae_norm_groups", "latent_channels", "depth", "head_dim", "num_heads", "clip_width",
                     "clip_layers", "t5_width", "t5_layers", "pos_embed_max_size"):  # fmt: skip
            check_integer(f"stack.{name}", vars(self)[name], low=1, high=65536)
        check_integer("stack.text_length", self.text_length, low=3, high=512)
        if not self.vae_channels or any(width < 1 or width % self.vae_norm_groups for width in self.vae_channels):
            raise ValueError(
                f"stack.vae_channels: got {self.vae_channels}; expected at least one width, each a multiple of "
                f"vae_norm_groups, {self.vae_norm_groups}"
            )
        if any(not 0 <= block < self.depth for block in self.dual_attention_layers) or self.scheduler_shift <= 0:
            raise ValueError(
                f"stack: got dual_attention_layers {self.dual_attention_layers} of depth {self.depth}, scheduler_shift "
                f"{self.scheduler_shift}; expected blocks from 0 to depth - 1, and a shift above 0"
            )
        if self.clip_width % 4 or self.head_dim % 2:
            raise ValueError(
                f"stack: got clip_width {self.clip_width}, head_dim {self.head_dim}; expected multiples of 4 and of 2"
            )
        if 2 * self.clip_width != self.t5_width:
            raise ValueError(f"two CLIP towers make the T5 width: got clip_width {self.clip_width}, t5 {self.t5_width}")
        if self.image_size < 64 or self.image_size % 64 or self.depth < 2 or self.latent_size % 2:
            raise ValueError(
                f"stack: got image_size {self.image_size}, depth {self.depth}, latents of side {self.latent_size}; "
                "expected a multiple of 64, at least 2, and an even side"
            )
        if self.latent_size > 2 * self.pos_embed_max_size:
            raise ValueError(
                f"stack.pos_embed_max_size: got {self.pos_embed_max_size} patches of 2, latents have a side of "
                f"{self.latent_size}; expected at least {self.latent_size // 2}"
            )

    @classmethod
    def tiny(cls, **overrides) -> StackConfig:
        """A few tens of thousands of parameters, for tests."""
        sizes = dict(
            vae_channels=(8, 8, 8), vae_norm_groups=4, depth=4, head_dim=8, num_heads=2, dual_attention_layers=(0, 1),
            clip_width=16, clip_layers=2, t5_width=32, t5_layers=1,
        )  # fmt: skip
        return cls(**{**sizes, **overrides})

    @property
    def latent_size(self) -> int:
        return self.image_size // 2 ** (len(self.vae_channels) - 1)


@dataclass
class PairsConfig:
    """How many preference pairs of which kind.

    Args:
        groups: captions, each with a list of pictures.
        pictures: pictures a caption; all their pairs are compared.
        emphasis: how often a concept is spoiled, relative to 1 for those not named: shape is the hardest to tell.
        sampled_share: share of the groups whose pictures are the base model's own samples.
        faithful_share: share of the rendered pictures, beside the first of each list, in which no concept is spoiled.
        rater_noise: standard deviation of a rater's error, in points of the oracle's score.
        per_concept: held-out pairs of each concept, for measuring.
        per_shifted: the same of damaged pictures, a test set unlike the training pairs.
        heldout_groups: held-out captions with lists made and judged as in training, for measuring.
        seed: of everything.
    """

    groups: int = 6000
    pictures: int = 4
    emphasis: dict[str, float] = field(default_factory=lambda: {"shape": 3.0, "blur": 1.5})
    sampled_share: float = 0.1
    faithful_share: float = 0.2
    rater_noise: float = 0.1
    per_concept: int = 100
    per_shifted: int = 40
    heldout_groups: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "pairs")
        for name, low in dict(groups=1, pictures=2, per_concept=1, heldout_groups=0, seed=0).items():
            check_integer(f"pairs.{name}", vars(self)[name], low=low)
        for concept, weight in self.emphasis.items():
            if concept not in CONCEPTS:
                raise ValueError(
                    f"pairs.emphasis: unknown concept {concept!r}{did_you_mean(concept, CONCEPTS) or ';'} known: "
                    f"{', '.join(CONCEPTS)}"
                )
            if weight <= 0:
                raise ValueError(f"pairs.emphasis.{concept}: got {weight}; expected more than 0")
        if not 0 <= self.sampled_share <= 1 or not 0 <= self.faithful_share <= 1 or self.rater_noise < 0:
            raise ValueError(
                f"pairs: got sampled_share {self.sampled_share}, faithful_share {self.faithful_share}, rater_noise "
                f"{self.rater_noise}; expected shares in [0, 1], and at least 0"
            )


@dataclass
class StageConfig:
    """One stage of the build.

    Args:
        batch_size: pictures or captions per update.
        loop: number of updates, averaging, checkpoints.
        optim: learning rate and its schedule.
    """

    batch_size: int
    loop: LoopConfig
    optim: OptimConfig

    def __post_init__(self) -> None:
        check_fields(self, "stage")
        check_integer("stage.batch_size", self.batch_size, low=1)


def _stage(
    batch: int, steps: int, lr: float, *, ema: float = 0.999, decay: float = 1.0, warmup: int = 100
) -> StageConfig:
    return StageConfig(
        batch,
        LoopConfig(steps=steps, ema_decay=ema, checkpoint_every=500, keep_last=1),
        OptimConfig(lr=lr, weight_decay=0.01, beta2=0.98, schedule="cosine", decay_share=decay, warmup_steps=warmup),
    )


@dataclass
class BuildConfig:
    """Training of the embedded world from nothing: autoencoder, text encoders, base model, pixel reward.

    Args:
        output_dir: where the stages work; run again, each goes on where it stopped. The finished weights are in
            output_dir/weights.
        seed: of everything.
        device: cpu or cuda.
        stack: sizes of the networks.
        pairs: preference pairs for the rewards.
        vae: autoencoder, on random quarters of the pictures and at last on whole ones.
        text: the three text encoders, to tell a caption's objects, relation and background.
        base: the text-to-image transformer.
        pixel: the CLIP-style reward on decoded pictures, trained on the same pairs as the latent one.
        cached_pictures: pictures encoded once for the base model.
        layout_weight: weight of the auxiliary loss that has the base model tell, half way, where each shape is
            (representation alignment, arXiv 2410.06940, with the renderer's maps in place of an encoder's features).
    """

    output_dir: str = "runs/shapes_world"
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    stack: StackConfig = field(default_factory=StackConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    vae: StageConfig = field(default_factory=lambda: _stage(64, 2400, 2e-3, decay=0.5))
    text: StageConfig = field(default_factory=lambda: _stage(128, 600, 2e-3, warmup=50))
    base: StageConfig = field(default_factory=lambda: _stage(64, 2600, 2e-3, ema=0.9985, decay=0.6, warmup=200))
    pixel: StageConfig = field(default_factory=lambda: _stage(48, 800, 5e-4))
    cached_pictures: int = 40_000
    layout_weight: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("seed", self.seed)
        check_integer("cached_pictures", self.cached_pictures, low=1)
        if self.layout_weight < 0:
            raise ValueError(f"layout_weight: got {self.layout_weight}; expected at least 0")
        if self.pixel.batch_size < self.pairs.pictures:
            raise ValueError(
                f"pixel.batch_size: got {self.pixel.batch_size} pictures; expected at least pairs.pictures, "
                f"{self.pairs.pictures}: a list is not split"
            )
