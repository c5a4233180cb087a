"""Settings of the embedded world (rendered shapes): networks, preference pairs and training. Does not import torch."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from dinalrm_align.models.specs import MODELS
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import (
    ClosedUnitInterval,
    HalfOpenUnitInterval,
    IntAboveOne,
    IntFrom3To512,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    check_fields,
    did_you_mean,
)

FAITHFULNESS = ("shape", "colour", "size", "relation", "count", "background", "fill")
AESTHETICS = ("blur", "contrast", "placement")
CONCEPTS = FAITHFULNESS + AESTHETICS
"""What an image can get wrong: the content of its caption (FAITHFULNESS) or its quality (AESTHETICS)."""
SIZES = ("small", "medium", "large")
FILLS = ("striped", "dotted", "checked", "outlined")
"""How an object can be filled, besides solid."""


@dataclass
class StackConfig:
    """Network sizes. The shipped weights have the default sizes: 64 x 64 images, 16 x 16 latents and 64 image tokens.

    Args:
        image_size: side of the images in pixels; must be a multiple of 64 (the oracle scores images at 64 x 64).
        vae_channels: autoencoder channels at each resolution; n resolutions downsample by 2 ** (n - 1).
        vae_layers: residual blocks of the autoencoder at each resolution.
        vae_norm_groups: groups of the autoencoder's GroupNorm layers; must divide every value of vae_channels.
        latent_channels: channels of the latents.
        depth: number of joint-attention blocks of the transformer.
        head_dim: channels of each attention head; must be even.
        num_heads: number of attention heads; the transformer's width is num_heads * head_dim.
        dual_attention_layers: indices of the transformer blocks that have a second, image-only attention.
        pos_embed_max_size: largest image side that the position embedding supports, in image tokens.
        clip_width: width of each CLIP tower; must be a multiple of 4, and t5_width must be twice clip_width.
        clip_layers: number of layers of each CLIP tower.
        t5_width: width of the T5 encoder.
        t5_layers: number of layers of the T5 encoder.
        text_length: tokens per prompt in every tokenizer (the pipeline's `max_sequence_length`), 3 to 512.
        scheduler_shift: timestep shift of the flow-matching schedule.
    """

    image_size: int = 64
    vae_channels: tuple[PositiveInt, ...] = (16, 32, 64)
    vae_layers: PositiveInt = 1
    vae_norm_groups: PositiveInt = 8
    latent_channels: PositiveInt = 16
    depth: IntAboveOne = 6
    head_dim: PositiveInt = 32
    num_heads: PositiveInt = 4
    dual_attention_layers: tuple[NonNegativeInt, ...] = (0, 1)
    pos_embed_max_size: PositiveInt = 24
    clip_width: PositiveInt = 64
    clip_layers: PositiveInt = 2
    t5_width: PositiveInt = 128
    t5_layers: PositiveInt = 2
    text_length: IntFrom3To512 = 16
    scheduler_shift: PositiveFloat = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "stack")
        groups, side = self.vae_norm_groups, self.latent_size
        rules = [
            ("image_size", self.image_size >= 64 and self.image_size % 64 == 0, "a multiple of 64"),
            ("vae_channels", self.vae_channels and not any(width % groups for width in self.vae_channels),
             f"at least one width, each a multiple of vae_norm_groups, {groups}"),
            ("dual_attention_layers", all(block < self.depth for block in self.dual_attention_layers),
             f"blocks from 0 to depth - 1, {self.depth - 1}"),
            ("head_dim", self.head_dim % 2 == 0, "an even number"),
            ("clip_width", self.clip_width % 4 == 0, "a multiple of 4"),
            ("t5_width", self.t5_width == 2 * self.clip_width, f"twice clip_width, {2 * self.clip_width}"),
            ("vae_channels", side % 2 == 0, f"as many widths as leave latents of an even side, not {side}"),
            ("pos_embed_max_size", side <= 2 * self.pos_embed_max_size,
             f"at least {side // 2}, for latents of side {side} in patches of 2"),
        ]  # fmt: skip
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"stack.{name}: got {getattr(self, name)}; expected {expected}")

    @classmethod
    def tiny(cls, **overrides) -> "StackConfig":
        """Return a config of small networks, for tests. `overrides`: fields to change."""
        sizes = dict(vae_channels=(8, 8, 8), vae_norm_groups=4, depth=4, head_dim=8, num_heads=2)
        return cls(**(sizes | dict(clip_width=16, t5_width=32, t5_layers=1) | overrides))

    @property
    def latent_size(self) -> int:
        return self.image_size // 2 ** (len(self.vae_channels) - 1)


class MakerWeights(PathText):
    """Type of a field that holds a path, or the name of weights in the folder `makers` beside the pipeline's."""

    words: ClassVar[tuple[str, ...]] = ("half", "outsider", "aligned", "over_aligned")

    @classmethod
    def absolute(cls, text: str) -> str:
        return text if text in cls.words else super().absolute(text)


@dataclass
class Generator:
    """Who makes images of a list of preference pairs: a model with ranges of sampler settings, or the renderer.

    Args:
        render: faithful, spoiled (flawed) or unrelated (another caption's) renders; null: samples of a model.
        flaws: number of concepts that are wrong in a spoiled render.
        weight: relative frequency of the generator's images.
        model: folder of a pipeline, such as OUTPUT_DIR/weights/pipeline of another build; null: that of the pairs.
        checkpoint: weights of the transformer at a stage of its training, a file such as
            OUTPUT_DIR/base/checkpoints/step_000500/ema.safetensors, or the folder of another transformer; or a name:
            half (the base after half of its training) or outsider (another width and seed).
        lora: folder of a LoRA, such as RUN/lora of an alignment run; it is merged into the transformer. Or a name:
            aligned or over_aligned (by ReFL).
        guidance_scale: lowest and highest guidance.
        num_steps: lowest and highest number of denoising steps.
    """

    render: Literal["faithful", "spoiled", "unrelated"] | None = None
    weight: PositiveFloat = 1.0
    flaws: PositiveInt = 1
    model: PathText | None = None
    checkpoint: MakerWeights | None = None
    lora: MakerWeights | None = None
    guidance_scale: tuple[NonNegativeFloat, NonNegativeFloat] = (1.0, 5.0)
    num_steps: tuple[PositiveInt, PositiveInt] = (4, 20)

    def __post_init__(self) -> None:
        check_fields(self, "generator")
        for name in ("guidance_scale", "num_steps"):
            low, high = vars(self)[name]
            if low > high:
                raise ValueError(f"generator.{name}: got {[low, high]}; expected [lowest, highest]")
        if self.render is not None and (self.model or self.checkpoint or self.lora):
            raise ValueError(f"generator.render: got {self.render} with weights; expected null, for samples of a model")

    def at(self, steps: float, guidance: float) -> dict[str, float]:
        """Return number of steps and guidance at two fractions, in [0, 1), of their ranges."""
        (low, high), (weak, strong) = self.num_steps, self.guidance_scale
        return {"steps": low + int(steps * (high - low + 1)), "guidance": float(weak + guidance * (strong - weak))}


def default_generators() -> dict[str, Generator]:
    """Return the makers of lists: the base, the base after half of its training, two policies, and the renderer."""
    return {
        "base": Generator(weight=10.0, guidance_scale=(2.0, 4.0), num_steps=(6, 12)),
        "half": Generator(checkpoint="half"),
        "aligned": Generator(lora="aligned"),
        "over_aligned": Generator(lora="over_aligned"),
        "faithful": Generator("faithful"),
        "spoiled": Generator("spoiled", weight=2.0),
    }


_SPEC = MODELS["shapes"]
OWN_SAMPLES = {"own samples": Generator(guidance_scale=(_SPEC.guidance_scale,) * 2, num_steps=(_SPEC.num_steps,) * 2)}
SCOUT_EMPHASIS = {"shape": 3.0, "fill": 3.0, "size": 2.0, "count": 2.0}  # what a reward learns late


def scout_generators() -> dict[str, Generator]:
    """Return the makers of the scout's lists: renders with no flaw, one and three flaws, and of another caption."""
    return {
        "faithful": Generator("faithful"),
        "spoiled": Generator("spoiled", weight=2.0),
        "worse": Generator("spoiled", weight=0.5, flaws=3),
        "unrelated": Generator("unrelated", weight=0.5),
    }


@dataclass
class PairsConfig:
    """Number of preference pairs, and how the images of a pair are made.

    Args:
        groups: number of training captions, each with several images.
        images: number of images for each caption; every two images of a caption form a pair.
        emphasis: relative frequency of each concept (shape, blur, ...) in wrong renders; 1 for concepts not listed.
        rater_noise: standard deviation of the noise that a simulated rater adds to an image's oracle score.
        noise_per_object: share by which each object of the caption after the first raises that noise.
        noise_of_flaws: share by which flaws raise the noise of an image whose aesthetics are 0; linear in between.
        raters: number of raters who compare the images of a list. A pair's label is the share of them who prefer the
            chosen image; it is 0.5 or more.
        rater_spread: standard deviation of the extra weight that each rater gives to faithfulness, sharpness, contrast
            and centring; every list has new raters.
        tie_gap: a rater to whom two scores, with noise, differ by less prefers neither, and counts as half a vote.
        generators: makers of a list's images, by name. Each makes its share, by weight, of the images of every list
            that is neither easy nor of own samples. Default: those of `default_generators`.
        easy_share: share of the training lists that are easy to order: renders, by the makers of `scout_generators`.
            A reward that is trained on other lists alone forgets what it learned from renders.
        own_share: share of the other training lists with samples of the base alone, at its default guidance and steps.
        outside: makers of the images of a test set out of family, which must not occur in training.
        per_concept: number of evaluation pairs for each concept; their captions are held out from training.
        per_shifted: number of out-of-distribution pairs for each concept; their images have grain and JPEG artefacts.
        heldout_groups: number of captions of the held-out lists by `generators`, and of those by `outside`.
        seed: seed of all random draws.
    """

    groups: PositiveInt = 6400
    images: IntAboveOne = 4
    emphasis: dict[str, PositiveFloat] = field(default_factory=lambda: {"shape": 3.0, "blur": 1.5})
    rater_noise: NonNegativeFloat = 0.1
    noise_per_object: NonNegativeFloat = 0.25
    noise_of_flaws: NonNegativeFloat = 1.0
    raters: PositiveInt = 9
    rater_spread: NonNegativeFloat = 0.2
    tie_gap: NonNegativeFloat = 0.05
    generators: dict[str, Generator] = field(default_factory=default_generators)
    easy_share: HalfOpenUnitInterval = 0.375  # with it, half of all images are samples
    own_share: ClosedUnitInterval = 0.0
    outside: dict[str, Generator] = field(default_factory=lambda: {"outsider": Generator(checkpoint="outsider")})
    per_concept: PositiveInt = 100
    per_shifted: PositiveInt = 40
    heldout_groups: NonNegativeInt = 400
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields(self, "pairs")
        for concept in self.emphasis:
            if concept not in CONCEPTS:
                hint = did_you_mean(concept, CONCEPTS) or ";"
                raise ValueError(f"pairs.emphasis: unknown concept {concept!r}{hint} known: {', '.join(CONCEPTS)}")
        if not self.generators:
            raise ValueError("pairs.generators: got none; expected at least one")
        if self.own_share and (taken := self.generators.keys() & OWN_SAMPLES.keys()):
            raise ValueError(f"pairs.generators: got {taken}; expected another name: own_share has makers of that name")

    @property
    def held_out_kinds(self) -> list[str]:
        """Kinds of pairs (see `pairs.write_pairs`) that serve the evaluation of rewards."""
        return ["heldout", *["outside"] * bool(self.outside), "shifted", "concepts"]

    def easy(self) -> "PairsConfig":
        """Return the settings of easy lists alone: renders, by the makers of `scout_generators`."""
        renders = dict(generators=scout_generators(), emphasis=SCOUT_EMPHASIS, easy_share=0.0, own_share=0.0)
        return replace(self, outside={}, **renders)


@dataclass
class StageConfig:
    """Settings for training one part of the embedded world: autoencoder, text encoders, base model or CLIP reward.

    Args:
        batch_size: images or captions per update.
        loop: number of updates, moving average of the weights, and checkpoints.
        optim: learning rate and its schedule.
    """

    batch_size: PositiveInt
    loop: LoopConfig
    optim: OptimConfig

    def __post_init__(self) -> None:
        check_fields(self, "stage")


def _stage(
    batch: int, steps: int, lr: float, *, ema: float = 0.999, decay: float = 1.0, warmup: int = 100, keep: int = 1
) -> StageConfig:
    loop = LoopConfig(steps=steps, ema_decay=ema, checkpoint_every=500, keep_last=keep)
    schedule = dict(schedule="cosine", decay_share=decay, warmup_steps=warmup)
    return StageConfig(batch, loop, OptimConfig(lr=lr, weight_decay=0.01, beta2=0.98, **schedule))


@dataclass
class ScoutConfig:
    """Settings of a first latent reward, and of two policies that maximise it and whose samples occur in the pairs.

    Args:
        groups: number of captions of its training pairs, which are renders.
        reward_updates: number of updates of the reward.
        aligned_updates: number of ReFL updates of the aligned policy, with the recipe's default settings.
        over_aligned_updates: the same for the over-aligned policy, without a KL penalty.
    """

    groups: PositiveInt = 6400
    reward_updates: PositiveInt = 600
    aligned_updates: PositiveInt = 30
    over_aligned_updates: PositiveInt = 24

    def __post_init__(self) -> None:
        check_fields(self, "scout")


@dataclass
class BuildConfig:
    """Settings for training the embedded world from scratch: autoencoder, text encoders, base model and rewards.

    Args:
        output_dir: working folder, from which interrupted training resumes; finished weights go to output_dir/weights.
        seed: seed of all random draws.
        device: cpu or cuda.
        stack: sizes of the networks.
        pairs: preference pairs for training and evaluating rewards.
        vae: training of the autoencoder, first on crops half as wide and high as the image, then on whole images.
        text: training of the three text encoders, which learn to predict a caption's objects, relation and background.
        base: training of the text-to-image transformer.
        outsider: training of another transformer. Its samples form the test set out of family.
        outsider_heads: number of attention heads of that transformer; its width is outsider_heads * stack.head_dim.
        scout: a first latent reward, and the policies that maximise it.
        reward_updates: number of updates of the latent reward.
        clip: training of a CLIP model on renders and their captions, from which the CLIP reward starts.
        pixel: training of the CLIP reward, on images decoded from the latent reward's preference pairs.
        cached_images: number of images that the base model is trained on; they are rendered and encoded once.
        layout_weight: weight of the layout loss, for which the base model's middle block predicts where each shape and
            fill is (like REPA, arXiv 2410.06940, but the targets are rendered maps, not an encoder's features).
        mismatched_share: share of the base model's images that have the caption of another image, and only that loss.
    """

    MAY_CHANGE: ClassVar = ("output_dir", "device")
    output_dir: PathText = "runs/shapes_world"
    seed: NonNegativeInt = 0
    device: Literal["cpu", "cuda"] = "cpu"
    stack: StackConfig = field(default_factory=StackConfig)
    pairs: PairsConfig = field(default_factory=lambda: PairsConfig(groups=12_800, easy_share=0.1875, own_share=0.6))
    vae: StageConfig = field(default_factory=lambda: _stage(64, 2400, 2e-3, decay=0.5))
    text: StageConfig = field(default_factory=lambda: _stage(128, 600, 2e-3, warmup=50))
    base: StageConfig = field(default_factory=lambda: _stage(64, 4000, 2e-3, ema=0.9985, decay=0.6, warmup=200, keep=8))
    outsider: StageConfig = field(default_factory=lambda: _stage(64, 800, 2e-3, ema=0.995, decay=0.6))
    outsider_heads: PositiveInt = 3
    scout: ScoutConfig = field(default_factory=ScoutConfig)
    reward_updates: PositiveInt = 2400
    clip: StageConfig = field(default_factory=lambda: _stage(96, 700, 1e-3))
    pixel: StageConfig = field(default_factory=lambda: _stage(48, 1600, 3e-4))
    cached_images: PositiveInt = 40_000
    layout_weight: NonNegativeFloat = 10.0
    mismatched_share: HalfOpenUnitInterval = 0.3

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pixel.batch_size < self.pairs.images:
            expected = f"at least pairs.images, {self.pairs.images}, because a list is not split"
            raise ValueError(f"pixel.batch_size: got {self.pixel.batch_size}; expected {expected}")
        if self.stack.text_length < 16:
            expected = "at least 16, for the longest captions"
            raise ValueError(f"stack.text_length: got {self.stack.text_length}; expected {expected}")
