"""Settings and configurations of the cost report `recipes/savings.py`, and the published sizes of the networks.

This module does not import torch. Sizes are those in each model's config.json: Stable Diffusion 3.5 Medium
(stabilityai/stable-diffusion-3.5-medium), DiNa-LRM
(liuhuohuo/DiNa-LRM-SD35M-12layers, the first 12 blocks of SD3.5 Medium), PickScore's CLIP ViT-H/14
(yuvalkirstain/PickScore_v1) and HPSv3's Qwen2-VL-7B (MizzenAI/HPSv3 on Qwen/Qwen2-VL-7B-Instruct).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dinalrm_align.reward.config import LoraConfig, RewardConfig
from dinalrm_align.train import settings


@dataclass
class SavingsRun:
    """Settings of `recipes/savings.py`, which counts memory and FLOPs.

    Args:
        size: height and width of the images in pixels, a multiple of 16 from 64 to 6144.
        batch: number of samples in an update, and in each call of the reward.
        text_length: number of T5 tokens per prompt, 1 to 512, in addition to CLIP's 77 tokens.
        levels: number of noise levels sigma at which the latent reward scores each sample, 1 to 8.
        economies: for each memory-saving option, also count the cost of a ReFL update without its rollout.
        workers: number of processes that count in parallel; each process uses one core and about 1 GB.
        measure: also run the configurations on the CUDA GPU, with random weights; int8 is skipped.
        warmup: number of unmeasured runs of each configuration, if measure is set.
        repeats: number of measured runs of each configuration, if measure is set; the median time is reported.
        output_dir: folder for savings.md, savings.json and savings.png.
    """

    size: settings.IntFrom64To6144 = 1024
    batch: settings.PositiveInt = 1
    text_length: settings.IntFrom1To512 = 128
    levels: settings.IntFrom1To8 = 1
    economies: bool = True
    workers: settings.PositiveInt = 2
    measure: bool = False
    warmup: settings.NonNegativeInt = 2
    repeats: settings.PositiveInt = 5
    output_dir: settings.PathText = "runs/savings"

    def __post_init__(self) -> None:
        settings.check_fields(self)
        if self.size % 16:
            raise ValueError(f"size: got {self.size} pixels; expected a multiple of 16 from 64 to 6144")

    @property
    def base(self) -> "Case":
        return Case(size=self.size, batch=self.batch, text_length=self.text_length, levels=self.levels)


REWARDS = ("dinalrm", "pickscore", "hpsv3")
ROLLOUT_STEPS = (30, 39)
"""Smallest and largest number of guided steps before ReFL's gradient step (recipes/refl_sd35.yaml)."""
WORK = {
    "score": "score latents, no gradient",
    "gradient": "score latents, gradient to the latents",
    "refl": "gradient part of one ReFL update, without the rollout: a policy step with gradient, the frozen reference, "
    "the reward's gradient, AdamW",
    "grpo": "one Flow-GRPO update: two rollout steps, scores, one trained step with its reference, AdamW",
    "policy_forward": "one policy step, no gradient",
    "policy_gradient": "one policy step, gradient to the LoRA",
    "vae_decode": "VAE decoder, no gradient",
    "vae_gradient": "VAE decoder, gradient to latents",
    "vae_encode": "VAE encoder, no gradient",
    "pixels": "score images, no gradient",
    "pixels_gradient": "score images, gradient to the images",
}


@dataclass(frozen=True)
class Case:
    """One configuration whose cost is counted: a reward, a workload, and memory options.

    Args:
        reward: dinalrm scores latents; pickscore and hpsv3 score decoded images.
        work: name of the workload, a key of `WORK`.
        size, batch, text_length, levels: as in the recipe's settings `SavingsRun`.
        policy_checkpointing: recompute the policy's blocks in the backward pass (gradient checkpointing).
        reward_checkpointing: recompute the blocks of the reward and of the VAE decoder in the backward pass.
        merged: give the latent reward its own copy of SD3.5's blocks, with the reward's LoRA merged into the copy. By
            default the latent reward shares the policy's blocks.
        base_quant: quantisation of the linear layers in SD3.5's transformer blocks.
        reward_quant: quantisation of the linear layers in HPSv3's blocks.
        decode_slice: number of images that the VAE decodes at a time; None for the whole batch.
    """

    reward: Literal["dinalrm", "pickscore", "hpsv3"] = "dinalrm"
    work: str = "refl"
    size: int = 1024
    batch: int = 1
    text_length: int = 128
    policy_checkpointing: bool = True
    reward_checkpointing: bool = True
    merged: bool = False
    levels: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    vae_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    base_quant: Literal["none", "int8", "nf4"] = "none"
    reward_quant: Literal["none", "int8", "nf4"] = "none"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    decode_slice: int | None = None

    def but(self, **changes: object) -> "Case":
        return dataclasses.replace(self, **changes)

    @property
    def kept(self) -> "Case":
        """This configuration without gradient checkpointing: all activations are stored."""
        return self.but(policy_checkpointing=False, reward_checkpointing=False)

    @property
    def pixel(self) -> bool:
        return self.reward != "dinalrm"

    @property
    def trains(self) -> bool:
        return self.work in ("refl", "grpo")


def parts(base: Case) -> list[Case]:
    """Return configurations that each run one network (policy, VAE or reward), without gradient checkpointing."""
    plain = base.kept
    works = ("policy_forward", "policy_gradient", "vae_encode", "vae_decode", "vae_gradient", "score", "gradient")
    pixel = [plain.but(reward=reward, work=work) for reward in REWARDS[1:] for work in ("pixels", "pixels_gradient")]
    return [plain.but(work=work) for work in works] + pixel


def scenarios(base: Case) -> list[Case]:
    """Return configurations of every reward with each of the workloads "score", "gradient", "refl" and "grpo".

    "gradient" and "refl" are included twice: once without gradient checkpointing and once with it.
    """
    both = [(work, case) for work in ("gradient", "refl") for case in (base.kept, base)]
    variants = [("score", base), *both, ("grpo", base)]
    return [case.but(reward=reward, work=work) for work, case in variants for reward in REWARDS]


def economies(base: Case) -> dict[str, Case]:
    """Return {row name: configuration} for the table of memory options. Every row is a ReFL update, without rollout.

    Rows of the latent reward come first, rows of HPSv3 second. The first row of each reward has the default options.
    """
    refl, hpsv3, more = base.but(work="refl"), base.but(work="refl", reward="hpsv3"), 4 * base.batch
    return {
        "as above, latent reward": refl,
        "without recomputing the policy (--gradient_checkpointing false)": refl.but(policy_checkpointing=False),
        "--memory.base_quant int8": refl.but(base_quant="int8"),
        "--memory.base_quant nf4": refl.but(base_quant="nf4"),
        "--optim.name adamw8bit": refl.but(optimizer="adamw8bit"),
        "reward with a private copy, LoRA merged": refl.but(merged=True),
        f"batch {more}": refl.but(batch=more),
        "as above, HPSv3": hpsv3,
        "HPSv3, VAE in float32 (the recipes' default)": hpsv3.but(vae_dtype="float32"),
        "HPSv3, --hpsv3.quantization nf4, --memory.base_quant nf4": hpsv3.but(base_quant="nf4", reward_quant="nf4"),
        f"HPSv3, batch {more}, --memory.decode_slice 1": hpsv3.but(batch=more, decode_slice=1),
    }


def rollout_step(base: Case) -> Case:
    """Return one guided step of a rollout: a forward of the conditional and the unconditional half in one batch."""
    return base.kept.but(work="policy_forward", batch=2 * base.batch)


def all_cases(run: SavingsRun) -> list[Case]:
    """Return each of the report's configurations once. Slow configurations come first, to balance the workers."""
    base = run.base
    found = [*scenarios(base), *parts(base), rollout_step(base), *(economies(base).values() if run.economies else [])]
    return sorted(dict.fromkeys(found), key=lambda case: (not case.trains, case.batch == base.batch))


@dataclass(frozen=True)
class Architecture:
    """Constructor arguments and sizes of the networks in an alignment run.

    Args:
        transformer, vae, clip, qwen: keyword arguments of each network's diffusers class or transformers config.
        reward: config of the latent reward.
        policy: config of the policy's LoRA.
        qwen_tokens: number of tokens in an HPSv3 prompt, image tokens included.
        qwen_pixels: number of pixels in the resized image of an HPSv3 prompt.
        clip_tokens: number of CLIP text tokens, which precede the T5 tokens.
        vae_factor: downsampling factor of the VAE.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    reward: RewardConfig
    policy: LoraConfig
    clip: Mapping[str, Any]
    qwen: Mapping[str, Any]
    qwen_tokens: int = 800
    qwen_pixels: int = 256 * 28 * 28
    clip_tokens: int = 77
    vae_factor: int = 8


FULL = Architecture(
    transformer=dict(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    ),
    vae=dict(
        sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        norm_num_groups=32, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    ),
    reward=RewardConfig(),
    policy=LoraConfig(rank=32, alpha=32.0),
    clip=dict(
        projection_dim=1024,
        vision_config=dict(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
            patch_size=14, hidden_act="gelu", projection_dim=1024,
        ),
        text_config=dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=49408,
            max_position_embeddings=77, hidden_act="gelu", projection_dim=1024, bos_token_id=49406,
            eos_token_id=49407,
        ),
    ),
    qwen=dict(  # HPSv3's vocabulary is Qwen2-VL's plus the reward token, which is last
        text_config=dict(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=151658, max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
        ),
        vision_config=dict(
            depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, mlp_ratio=4, in_channels=3, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2,
        ),
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
    ),
)  # fmt: skip
