"""Networks of the embedded world (rendered shapes): a small SD3 pipeline of diffusers and transformers classes.

The pipeline has a joint-attention transformer with RMS query-key norm and dual-attention blocks, a KL autoencoder with
16 latent channels, and SD3's three text encoders. The outputs of the two CLIP towers are concatenated on the channel
axis, and the T5 encoder's outputs are appended on the token axis. The tokenizers have one token for each word of
the captions.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dinalrm_align.shapes.config import StackConfig
from dinalrm_align.shapes.scene import caption_words


def clip_tokenizer(words: list[str], length: int) -> CLIPTokenizer:
    """Return a byte-pair tokenizer with one token for each of `words`. Splits other words into pieces or bytes."""
    characters = list(bytes_to_unicode().values())
    vocabulary = characters + [character + "</w>" for character in characters]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length)


def _apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Return the byte-pair tokens of one word, by repeatedly applying the first rule in `merges` that fits."""
    rank = {merge: index for index, merge in enumerate(merges)}
    while True:
        pairs = [(rank.get(pair, len(merges)), index) for index, pair in enumerate(zip(pieces, pieces[1:]))]
        best, index = min(pairs, default=(len(merges), 0))
        if best == len(merges):
            return pieces
        pieces = [*pieces[:index], pieces[index] + pieces[index + 1], *pieces[index + 2 :]]


def t5_tokenizer(words: list[str], length: int) -> T5TokenizerFast:
    """Return a unigram tokenizer with one token for each of `words`. Splits other words into pieces or characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    known = [("\u2581" + word, -1.0) for word in words]
    characters = [("\u2581", -10.0), *((chr(code), -12.0) for code in range(33, 127))]
    return T5TokenizerFast(vocab=special + known + characters, extra_ids=0, model_max_length=length)


def build_pipeline(config: StackConfig, seed: int = 0) -> StableDiffusion3Pipeline:
    """Build a StableDiffusion3Pipeline with the network sizes in `config`, random weights drawn from `seed`, and one
    token for each word of the captions.
    """
    words = caption_words()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first_tokenizer, second_tokenizer = (clip_tokenizer(words, config.text_length) for _ in range(2))
        third_tokenizer = t5_tokenizer(words, config.text_length)
        levels = len(config.vae_channels)
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=config.latent_size, patch_size=2, in_channels=config.latent_channels,
                out_channels=config.latent_channels, num_layers=config.depth, attention_head_dim=config.head_dim,
                num_attention_heads=config.num_heads, joint_attention_dim=config.t5_width,
                caption_projection_dim=config.num_heads * config.head_dim, qk_norm="rms_norm",
                pooled_projection_dim=2 * config.clip_width, pos_embed_max_size=config.pos_embed_max_size,
                dual_attention_layers=config.dual_attention_layers,
            ),
            vae=AutoencoderKL(
                sample_size=config.image_size, block_out_channels=config.vae_channels,
                layers_per_block=config.vae_layers, latent_channels=config.latent_channels,
                norm_num_groups=config.vae_norm_groups, mid_block_add_attention=False,
                down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
                scaling_factor=1.0, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.scheduler_shift),
            text_encoder=_clip_encoder(config, first_tokenizer), tokenizer=first_tokenizer,
            text_encoder_2=_clip_encoder(config, second_tokenizer), tokenizer_2=second_tokenizer,
            text_encoder_3=_t5_encoder(config, third_tokenizer), tokenizer_3=third_tokenizer,
        )  # fmt: skip


def _clip_encoder(config: StackConfig, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    sizes = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=config.clip_width, intermediate_size=4 * config.clip_width,
        projection_dim=config.clip_width, num_hidden_layers=config.clip_layers, num_attention_heads=4,
        max_position_embeddings=config.text_length, hidden_act="gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(sizes).eval()


def _t5_encoder(config: StackConfig, tokenizer: T5TokenizerFast) -> T5EncoderModel:
    sizes = T5Config(
        vocab_size=len(tokenizer), d_model=config.t5_width, d_kv=config.t5_width // 4, d_ff=4 * config.t5_width,
        num_layers=config.t5_layers, num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        relative_attention_num_buckets=16, relative_attention_max_distance=32,
    )  # fmt: skip
    return T5EncoderModel(sizes).eval()
