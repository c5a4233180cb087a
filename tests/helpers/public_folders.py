"""Write SD3.5 Medium, DiNa-LRM and PickScore as folders in their public layouts, with random weights.

    python tests/helpers/public_folders.py --folder DIR --size full     21 GB; 11 GB with --t5 false
    python tests/helpers/public_folders.py --folder DIR --size tiny     6 MB, for tests

File names, configs, tensor names, shapes and dtypes are those of the hub repositories. The values are random with the
variance of a usual initialisation, and tokenizers know single characters only. Networks are built on the meta device
and written tensor by tensor, so that building needs little memory. A folder that is complete is not written again.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dinalrm_align.align.savings.config import FULL, Architecture
from dinalrm_align.reward.checkpoint import write_reward
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.shapes.stack import t5_tokenizer

PIPELINE, DINALRM, PICKSCORE = "stable-diffusion-3.5-medium", "DiNa-LRM-SD35M-12layers", "PickScore_v1"
WITHOUT_T5 = "stable-diffusion-3.5-medium-without-t5"
"""The same pipeline without T5: an index of its own, and links to the parts."""
DONE = "complete.json"
CLIP_IDS = 49408
"""Tokens of CLIP's tokenizer; the last two begin and end a text."""
SHARD = 5 * 10**9
"""Largest number of bytes of a T5 file, as in the hub repository."""
POOL = 2**22
"""Random numbers that are drawn; weights are slices of them, because drawing 10 billion would take minutes."""
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything in the folders. clip: text encoders 1 and 2; pixels: side of the images of a run."""

    networks: Architecture
    clip: tuple[Mapping[str, Any], Mapping[str, Any]]
    t5: Mapping[str, Any]
    pixels: int


def _tower(width: int, layers: int, heads: int, act: str) -> dict[str, Any]:
    sizes = dict(hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=layers)
    ends = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)  # as published: 2 stands for "the largest token id"
    return sizes | ends | dict(num_attention_heads=heads, hidden_act=act, vocab_size=CLIP_IDS)


def _tiny() -> Architecture:
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    text, vision = FULL.clip["text_config"], FULL.clip["vision_config"]
    return replace(
        FULL,
        transformer=FULL.transformer | dict(
            sample_size=8, num_layers=4, dual_attention_layers=(0, 1, 2), attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32,
            caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16,
        ),
        reward=replace(FULL.reward, num_layers=3, visual_taps=(1, 2, 3), text_taps=(1, 2, 3)),
        vae=FULL.vae | dict(sample_size=64, block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1),
        clip=dict(
            projection_dim=8, text_config=text | tower, vision_config=vision | tower | dict(image_size=32, patch_size=8)
        ),
    )  # fmt: skip


SIZES = {
    "full": Sizes(
        networks=FULL, clip=(_tower(768, 12, 12, "quick_gelu"), _tower(1280, 32, 20, "gelu")), pixels=256,
        t5=dict(d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, vocab_size=32128),
    ),
    "tiny": Sizes(
        networks=_tiny(), clip=(_tower(16, 1, 2, "quick_gelu"), _tower(16, 1, 2, "gelu")), pixels=64,
        t5=dict(d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4, vocab_size=32128),
    ),
}  # fmt: skip


class RandomWeights:
    """Returns random values for tensors of the meta device; a seed and the order of calls decide them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randn(POOL, generator=self.generator)

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Norms are 1, biases 0, logit_scale 4.6 (ln 100), matrices and kernels have variance 1 / inputs."""
        if not like.is_floating_point():
            return torch.arange(like.numel()).view(like.shape)
        if like.dim() == 0:
            return torch.tensor(4.6, dtype=dtype)
        if like.dim() == 1:
            return torch.full(like.shape, float(name.endswith("weight")), dtype=dtype)
        count = like.numel()
        start = int(torch.randint(POOL, (1,), generator=self.generator))
        drawn = self.pool.roll(-start)[:count].to(dtype) / math.sqrt(like[0].numel())
        return drawn.repeat(-(-count // POOL))[:count].view(like.shape)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, values: RandomWeights) -> None:
    """Write a .safetensors file of random values for tensors of the meta device, one tensor in memory at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        begin, end = end, end + tensor.numel() * kind.itemsize
        header[name] = dict(dtype=DTYPES[kind], shape=list(tensor.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = values(name, tensor, dtype).reshape(-1).contiguous()
            value.view(torch.uint8).numpy().tofile(file)


def write_model(folder: Path, model: nn.Module, stem: str, dtype: torch.dtype, values: RandomWeights) -> None:
    """Write config.json and the weights of a model on the meta device; more than `SHARD` bytes go to several files."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, SD3Transformer2DModel | AutoencoderKL):
        model.save_config(folder)
    else:
        model.config.architectures, model.config.dtype = [type(model).__name__], dtype
        model.config.save_pretrained(folder)
    shards, size = [{}], 0
    for name, tensor in _state(model):
        bytes_ = tensor.numel() * dtype.itemsize
        if size + bytes_ > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = tensor, size + bytes_
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0], dtype, values)
        return
    names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards):
        write_safetensors(folder / file, shard, dtype, values)
    total = sum(tensor.numel() * dtype.itemsize for shard in shards for tensor in shard.values())
    where = {name: file for file, shard in zip(names, shards) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state_dict, tied ones once."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def clip_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer without merges, of the published number of ids: one token for each byte of a text."""
    characters = list(bytes_to_unicode().values())
    known = [*characters, *(character + "</w>" for character in characters)]
    known += [f"unused{index}" for index in range(CLIP_IDS - 2 - len(known))]
    ids = {token: index for index, token in enumerate([*known, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=[], model_max_length=77)


def text_encoders(sizes: Sizes) -> list[nn.Module]:
    """Return the two CLIP text encoders and T5, on the meta device."""
    with torch.device("meta"):
        clips = [CLIPTextModelWithProjection(CLIPTextConfig(**config)) for config in sizes.clip]
        kind = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.1)
        return [*clips, T5EncoderModel(T5Config(**sizes.t5, **kind))]


def write_pipeline(folder: Path, sizes: Sizes, t5: bool, values: RandomWeights) -> None:
    """Write a StableDiffusion3Pipeline; t5: whether with T5, else the index has null for it and its tokenizer."""
    parts = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_3": ("transformers", "T5EncoderModel") if t5 else (None, None),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "tokenizer_3": ("transformers", "T5TokenizerFast") if t5 else (None, None),
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.31.0"}
    (folder / "model_index.json").write_text(json.dumps(index | parts, indent=2))
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        clip_tokenizer().save_pretrained(folder / name)
    networks, half = sizes.networks, torch.float16  # text encoders are published in float16
    with torch.device("meta"):
        transformer, vae = SD3Transformer2DModel(**networks.transformer), AutoencoderKL(**networks.vae)
    *clips, last = text_encoders(sizes)
    stem = "diffusion_pytorch_model"
    write_model(folder / "transformer", transformer, stem, torch.bfloat16, values)
    write_model(folder / "vae", vae, stem, torch.bfloat16, values)
    for name, clip in zip(("text_encoder", "text_encoder_2"), clips):
        write_model(folder / name, clip, "model", half, values)
    if t5:
        t5_tokenizer([], 512).save_pretrained(folder / "tokenizer_3")
        write_model(folder / "text_encoder_3", last, "model", half, values)


def link_without_t5(folder: Path, pipeline: Path) -> None:
    """Write a folder that is the pipeline without T5: links to its parts, and an index that has null for T5."""
    folder.mkdir(exist_ok=True)
    index = json.loads((pipeline / "model_index.json").read_text())
    index |= {"text_encoder_3": (None, None), "tokenizer_3": (None, None)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for part in (name for name, entry in index.items() if isinstance(entry, list)):
        if not (link := folder / part).is_symlink():
            link.symlink_to(os.path.relpath(pipeline / part, folder))


def write_dinalrm(folder: Path, sizes: Sizes, values: RandomWeights) -> None:
    """Write a reward in the released layout; its base model is the pipeline folder beside it."""
    config = replace(sizes.networks.reward, base_model_id=f"../{PIPELINE}")
    with torch.device("meta"):
        model = build_reward_model(config, SD3Transformer2DModel(**sizes.networks.transformer).requires_grad_(False))
    tensors = {name: values(name, tensor, torch.float32) for name, tensor in model.tuned_tensors().items()}
    write_reward(folder, config, tensors, format="released")
    released = json.loads((folder / "config.json").read_text())
    del released["dinalrm_align"]  # the settings of this package
    (folder / "config.json").write_text(json.dumps(released, indent=2))


def write_pickscore(folder: Path, sizes: Sizes, values: RandomWeights) -> None:
    """Write a CLIPModel in float32, with tokenizer and preprocessor beside it."""
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**sizes.networks.clip))
    write_model(folder, model, "model", torch.float32, values)
    side = model.config.vision_config.image_size
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)


def build(folder: Path, size: str, *, t5: bool = True) -> Path:
    """Write the folders into `folder`, unless they are there. Returns `folder`. size: a key of `SIZES`."""
    sizes, facts = SIZES[size], {"size": size, "t5": t5}
    done = folder / DONE
    if done.is_file():
        if (found := json.loads(done.read_text())) != facts:
            raise ValueError(f"{folder}: holds {found}; expected {facts}: choose another folder, or delete it")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_pipeline(folder / PIPELINE, sizes, t5, RandomWeights(0))
    link_without_t5(folder / WITHOUT_T5, folder / PIPELINE)
    write_dinalrm(folder / DINALRM, sizes, RandomWeights(1))
    write_pickscore(folder / PICKSCORE, sizes, RandomWeights(2))
    done.write_text(json.dumps(facts))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--t5", choices=("true", "false"), default="true")
    options = parser.parse_args()
    build(options.folder, options.size, t5=options.t5 == "true")
    total = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(f"{options.folder}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
