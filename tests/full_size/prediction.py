"""Predict the memory of a run's process on a CPU: what `align/savings` counts, and the models that are loaded with it.

Resident memory is private memory (activations, LoRA, moments, weights whose dtype was converted) and mapped files:
weights whose file has the dtype of the run are not copied but mapped, and their pages are read when they are used. The
peak is that of the largest phase:

    loading     the transformer is built: its table of positions is computed in float64, and copied once
    T5          T5 is loaded: its files are mapped until all of it is converted
    text        the CLIP text encoders are loaded after T5, in the same way; then all of them encode
    evaluation  held-out samples: guided steps, then decoding by the VAE in float32
    training    one update, without gradient checkpointing
    export      the averaged weights of a reward are written, while the last weights and gradients are kept
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from public_folders import SIZES, WITHOUT_T5, Sizes, text_encoders
from recipe_rows import Row, Scale
from torch import nn
from transformers import CLIPConfig, CLIPModel

from dinalrm_align.align.savings.config import Architecture, Case
from dinalrm_align.align.savings.cost import Cost, FakeFloats, count
from dinalrm_align.align.savings.workloads import replace_tensors
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.train.cost import LiveStorage

FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of a phase. private: the process's own; mapped: pages of files that were read."""

    private: float
    mapped: float = 0.0

    @property
    def resident(self) -> float:
        return self.private + self.mapped

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.private + other.private, self.mapped + other.mapped)


def bytes_of(modules: Iterable[nn.Module], each: int) -> int:
    """Return the bytes of all parameters and buffers with `each` bytes a number."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() for tensor in tensors.values()) * each


class Weights:
    """Sizes in bytes of the models of a run, from networks on the meta device. Text encoders are float16 on disk."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        networks, each = sizes.networks, dtype.itemsize
        with torch.device("meta"):
            transformer = SD3Transformer2DModel(**networks.transformer).requires_grad_(False)
            self.vae = bytes_of([AutoencoderKL(**networks.vae)], FLOAT32)
            self.clip_h = bytes_of([CLIPModel(CLIPConfig(**networks.clip))], FLOAT32)
            reward = build_reward_model(networks.reward, transformer)
        self.transformer = bytes_of([transformer], each)
        self.positions = 2 * 8 * transformer.pos_embed.pos_embed.numel()
        self.trunk = bytes_of([transformer.pos_embed, *transformer.transformer_blocks[: networks.reward.num_layers]], 2)
        *clips, t5 = text_encoders(sizes)
        self.clips, self.t5 = bytes_of(clips, each), bytes_of([t5], each)
        self.largest_clip = bytes_of(clips[1:], each)
        self.reward = sum(tensor.numel() for tensor in reward.tuned_tensors().values()) * FLOAT32


def reward_gradient(networks: Architecture, images: int, pixels: int, dtype: torch.dtype) -> int:
    """Return the peak bytes of activations and gradients of one training step of a reward, counted without weights."""
    fake = FakeFloats()
    with torch.device("meta"):
        transformer = nn.Module.to(SD3Transformer2DModel(**networks.transformer), dtype).requires_grad_(False)
        model = build_reward_model(networks.reward, transformer)
    replace_tensors([model], fake.empty_like)
    config, side = networks.transformer, pixels // networks.vae_factor
    counter = LiveStorage()
    with fake.active(), torch.autocast("cpu", dtype):
        latents, noise = torch.randn(2, images, config["in_channels"], side, side)
        text = torch.randn(images, networks.clip_tokens + networks.reward.text_length, config["joint_attention_dim"])
        pooled = torch.randn(images, config["pooled_projection_dim"])
        with counter:
            model.train()(latents, text, pooled, 0.5, noise).sum().backward()
    return counter.peak


def predict(row: Row, scale: Scale, size: str, baseline: Memory) -> dict[str, Memory]:
    """Return the memory of each phase of a row. baseline: the row's process on tiny weights."""
    sizes, networks = SIZES[size], SIZES[size].networks
    weights = Weights(sizes, getattr(torch, scale.dtype))
    shape = Case(size=scale.pixels, dtype=scale.dtype, vae_dtype="float32").kept.but

    def counted(work: str, **options: object) -> Cost:
        return count(shape(work=work, **options), networks)

    t5 = 0 if scale.pipeline == WITHOUT_T5 else weights.t5
    text = {"T5": Memory(t5, t5), "text": Memory(weights.clips + t5, weights.largest_clip)}

    def loaded(before: Memory) -> dict[str, Memory]:
        return {phase: before + memory for phase, memory in text.items() if memory.private}

    if row.recipe == "score_images":
        return {"scoring": baseline + Memory(0, weights.clip_h)}
    if row.recipe == "prepare_pairs":
        encoded = counted("vae_encode", batch=2).activations
        return loaded(baseline) | {"images": baseline + Memory(weights.vae + encoded)}
    loading = {"loading": baseline + Memory(weights.positions)}
    if row.recipe == "train_reward":  # the blocks that a reward leaves out are in the same mapped file
        gradient = reward_gradient(networks, 2 * scale.batch, scale.pixels, getattr(torch, scale.dtype))
        kept = 4 * weights.reward  # the weights, their average and two moments
        export = 5 * weights.reward  # gradients, last weights, a copy of the average, its bytes twice
        return loading | {
            "training": baseline + Memory(kept + gradient, weights.transformer),
            "export": baseline + Memory(kept + export, weights.transformer),
        }
    reward = baseline + Memory(weights.reward + weights.vae, weights.trunk)
    if row.recipe == "evaluate_reward":
        scored = counted("score", batch=2, levels=2).activations
        return loading | loaded(reward) | {"scoring": reward + Memory(scored)}
    gold = Memory(0, weights.clip_h if row.recipe != "mine_pairs" else 0)
    phases = {
        "loading": baseline + gold + Memory(weights.positions),
        **loaded(baseline + gold),
    }
    phases["text"] += Memory(weights.vae)  # loaded before the text is encoded
    forward = counted("policy_forward", batch=4)
    lora = forward.weights - weights.transformer
    base = baseline + gold + Memory(weights.vae, weights.transformer)
    if row.recipe == "mine_pairs":  # text encoders stay, for the next file of prompts
        kept = weights.clips + t5 + weights.reward + lora
        return phases | {"rollout": base + Memory(kept + forward.activations)}
    work = {"refl_sd35": "refl", "grpo_sd35": "grpo"}.get(row.recipe, "policy_gradient")
    options = dict(reward="pickscore" if "PickScore" in row.name else "dinalrm", batch=row.samples(scale))
    update = counted(work, **options)
    own = weights.reward * (options["reward"] == "dinalrm") + 2 * lora  # trained and averaged LoRA
    evaluated = max(forward.activations, counted("vae_decode", batch=2).activations)
    return phases | {
        "evaluation": base + Memory(own + update.state + evaluated),
        "training": base + Memory(own + update.state + update.activations),
    }
