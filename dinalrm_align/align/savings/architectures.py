"""The published sizes of the networks that `recipes/savings.py` weighs, as their config.json states them. Torch-free.

An `Architecture` is all that an alignment run is made of; `FULL` is the released one: Stable Diffusion 3.5 Medium
(stabilityai/stable-diffusion-3.5-medium), DiNa-LRM on its first 12 blocks (liuhuohuo/DiNa-LRM-SD35M-12layers),
PickScore's CLIP ViT-H/14 (yuvalkirstain/PickScore_v1) and HPSv3's Qwen2-VL-7B (MizzenAI/HPSv3 over
Qwen/Qwen2-VL-7B-Instruct).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dinalrm_align.reward.config import LoraConfig, RewardConfig

SD35_MEDIUM: dict[str, Any] = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip

SD35_VAE: dict[str, Any] = dict(
    sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
    norm_num_groups=32, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip

CLIP_VIT_H: dict[str, Any] = dict(
    projection_dim=1024,
    vision_config=dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
        patch_size=14, hidden_act="gelu", projection_dim=1024,
    ),
    text_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=49408,
        max_position_embeddings=77, hidden_act="gelu", projection_dim=1024, bos_token_id=49406, eos_token_id=49407,
    ),
)  # fmt: skip

QWEN2_VL_7B: dict[str, Any] = dict(
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
)  # fmt: skip
"""With HPSv3's vocabulary: Qwen2-VL's tokenizer and the reward token, its last."""

TEXT_ENCODER_PARAMETERS = {"CLIP-L": 123_650_304, "CLIP-G": 694_659_840, "T5-XXL": 4_762_310_656}
"""Of SD3.5's three text encoders, which are let go once the prompts are encoded."""


@dataclass(frozen=True)
class Architecture:
    """Constructor arguments of the networks of an alignment run.

    transformer: of SD3Transformer2DModel. vae: of AutoencoderKL. reward: of the latent reward. policy: the trained
    LoRA. clip: of CLIPConfig. qwen: of Qwen2VLConfig, and `qwen_tokens`, the length of its chat about a picture of
    `qwen_pixels` pixels. clip_tokens: of the text's CLIP part, before T5's.
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
    vae_factor: int = field(default=8)


FULL = Architecture(
    transformer=SD35_MEDIUM,
    vae=SD35_VAE,
    reward=RewardConfig(),
    policy=LoraConfig(rank=32, alpha=32.0),
    clip=CLIP_VIT_H,
    qwen=QWEN2_VL_7B,
)
