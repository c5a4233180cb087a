"""Train the base model of the embedded world (rendered shapes): a small SD3 transformer from which alignment starts.

The loss is the rectified-flow loss on v = noise - x0 (SD3, arXiv 2403.03206) plus an auxiliary layout loss. For the
layout loss, a linear head on the middle block's image tokens predicts where each shape and each fill is. A share of the
images of a batch have the caption of another image, and only the layout loss. Without them, the head can read the
answer from the caption, and a reward on the features cannot tell if an image fits its caption. Muon trains the weight
matrices of the transformer blocks, and AdamW trains all other parameters.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dinalrm_align.flow.noise import add_noise, logit_normal, shift_sigma, timestep_of, uniform
from dinalrm_align.models.grids import save_grid
from dinalrm_align.models.pipeline import decode_latents, encode_images
from dinalrm_align.models.specs import MODELS
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.shapes.build import random_images, run_stage
from dinalrm_align.shapes.config import FILLS, BuildConfig, StageConfig
from dinalrm_align.shapes.generators import prompt_encoder, sample_latents
from dinalrm_align.shapes.oracle import oracle_score
from dinalrm_align.shapes.render import SIZE, Drawing, coverage
from dinalrm_align.shapes.scene import SHAPES, draw_scenes
from dinalrm_align.train.files import atomically, write_atomically
from dinalrm_align.train.loop import Closures, Hook
from dinalrm_align.train.state import adamw

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
LAYOUT_MAPS = (*SHAPES, "solid", *FILLS)
CELLS = 2  # the layout loss predicts CELLS x CELLS cells per image token (a patch of 2 x 2 latents)


class Muon(torch.optim.Muon):
    """torch.optim.Muon with Newton-Schulz iterations in float32, for all matrices of one shape at once. Many CPUs
    compute in bfloat16, which torch.optim.Muon uses, more slowly than the whole forward and backward pass in float32.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads = torch.stack([p.grad for p in params])
                buffers = torch.stack([self.state[p]["momentum_buffer"] for p in params])
                buffers.lerp_(grads, 1 - group["momentum"])
                updates = grads.lerp(buffers, group["momentum"]) if group["nesterov"] else buffers
                updates = orthogonal(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                for p, buffer, update in zip(params, buffers, updates):
                    self.state[p]["momentum_buffer"].copy_(buffer)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * group["lr"] * max(shape) ** 0.5)  # the RMS of AdamW's updates


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return matrices (N, R, C) with singular values near 1, by the quintic Newton-Schulz iteration of Muon."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Together(torch.optim.Optimizer):
    """Optimiser that combines several optimisers of disjoint parameters and keeps their states in one state dict."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]


def train_base(
    pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator, name: str = "base"
) -> None:
    """Train `pipeline.transformer` in place on cached latents. Text encoders and autoencoder are frozen. `name`: field
    of `config` with the settings of this training, and its folder in `config.output_dir`; "base" or "outsider".
    """
    stage: StageConfig = getattr(config, name)
    optim, device, seed = stage.optim, accelerator.device, config.seed + (name != "base")
    transformer = pipeline.transformer.to(device)
    latents, layouts, captions = _cached_images(pipeline, config)
    encoder = PromptEncoder(pipeline, text_length=config.stack.text_length, device=device)
    encoder(sorted({*captions, ""}), batch_size=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout_head = nn.Linear(transformer.inner_dim, len(LAYOUT_MAPS) * CELLS**2).to(device)
    for path, module in transformer.named_modules():  # adaLN-zero: blocks start as the identity
        if path.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or path == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    tapped: dict[str, Tensor] = {}
    tap = transformer.transformer_blocks[config.stack.depth // 2 - 1].register_forward_hook(
        lambda module, inputs, outputs: tapped.update(image=outputs[1])
    )

    def batch_at(step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(10**6 * (seed + 1) + step)
        rows = torch.randint(len(latents), (stage.batch_size,), generator=generator)
        dropped = torch.rand(stage.batch_size, generator=generator) < 0.1
        mismatched = torch.arange(stage.batch_size) < int(config.mismatched_share * stage.batch_size)
        named = torch.where(mismatched, rows.roll(1), rows)
        embeds, pooled = encoder(["" if drop else captions[row] for row, drop in zip(named.tolist(), dropped)])
        sigma = shift_sigma(logit_normal(stage.batch_size, generator=generator, std=1.2), config.stack.scheduler_shift)
        sigma = torch.where(mismatched, uniform(stage.batch_size, generator=generator), sigma)
        noise = torch.randn(stage.batch_size, *latents.shape[1:], generator=generator)
        parts = latents[rows].float(), layouts[rows].float() / 255, embeds, pooled, sigma, noise, mismatched
        return tuple(part.to(device) for part in parts)

    def step(batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        x0, layout, embeds, pooled, sigma, noise, mismatched = batch
        velocity = transformer(
            hidden_states=add_noise(x0, noise, sigma), timestep=timestep_of(sigma), encoder_hidden_states=embeds,
            pooled_projections=pooled, return_dict=False,
        )[0]  # fmt: skip
        flow = F.mse_loss(velocity[~mismatched], (noise - x0)[~mismatched])
        wanted = F.pixel_unshuffle(layout, CELLS).flatten(2).transpose(1, 2)
        layout = F.binary_cross_entropy_with_logits(layout_head(tapped["image"]), wanted)
        return flow + config.layout_weight * layout, {"flow": flow.item(), "layout": layout.item()}

    def evaluate(step: int) -> dict[str, float]:
        images, prompts, numbers = _judged(pipeline, encoder, config, MODELS["shapes"].guidance_scale)
        save_grid(images, prompts, Path(config.output_dir) / name / f"grid_{step:06d}.png")
        parts = ", ".join(f"{part} {value:.3f}" for part, value in numbers.items())
        tqdm.write(f"{name}, update {step}: {parts}")
        return numbers

    transformer.requires_grad_(True)
    parameters = dict(transformer.named_parameters())
    parameters |= {f"layout.{key}": p for key, p in layout_head.named_parameters()}
    matrices, others = [], []
    for key, p in parameters.items():
        matrix = p.ndim == 2 and key.startswith("transformer_blocks") and "norm" not in key
        (matrices if matrix else others).append(p)
    muon = Muon(matrices, lr=optim.lr, weight_decay=optim.weight_decay, adjust_lr_fn="match_rms_adamw")
    optimizer = Together(muon, adamw([{"params": others}], optim))
    for group in optimizer.param_groups:
        group["initial_lr"] = optim.lr
    run_stage(
        name, config, accelerator, parameters, Closures(batch_at, step), optimizer=optimizer,
        hooks=(Hook(500, evaluate, at_start=False),), shown=("flow", "layout"),
    )  # fmt: skip
    transformer.requires_grad_(False)
    tap.remove()


def scores_by_guidance(pipeline: StableDiffusion3Pipeline, config: BuildConfig) -> dict[str, float]:
    """Return mean oracle score and faithfulness of samples for 192 held-out captions, at each guidance in GUIDANCE."""
    encoder, found = prompt_encoder(pipeline), {}
    for guidance in GUIDANCE:
        numbers = _judged(pipeline, encoder, config, guidance, 192)[2]
        found |= {f"{part} at {guidance:g}": numbers[part] for part in ("oracle", "faithfulness")}
    return found


@torch.no_grad()
def _judged(
    pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, config: BuildConfig, guidance: float, number: int = 64
) -> tuple[Tensor, list[str], dict[str, float]]:
    """Sample images for held-out captions. Returns images, captions, and means of the oracle's score and its parts."""
    parts: dict[str, Tensor] = {}
    drawn = draw_scenes(number, np.random.default_rng((config.seed, 1234)), held_out=True)
    prompts = [scene.caption for scene in drawn]
    settings = dict(steps=MODELS["shapes"].num_steps, guidance=guidance, seed=config.seed)
    images = decode_latents(pipeline.vae, sample_latents(pipeline, encoder, prompts, **settings)).cpu()
    score = oracle_score(images, prompts, parts)
    numbers = {part.rpartition("/")[2]: value.mean().item() for part, value in parts.items()}
    return images, prompts, {**numbers, "oracle": score.mean().item()}


@torch.no_grad()
def _cached_images(pipeline: StableDiffusion3Pipeline, config: BuildConfig) -> tuple[Tensor, Tensor, list[str]]:
    """Return latents (N, C, h, w), uint8 layouts (N, 9, h, w) and captions of N images. They are cached on disk."""
    folder = Path(config.output_dir) / "cache"
    if not (folder / "images.safetensors").exists():  # written last
        rng = np.random.default_rng((config.seed + 3, 0))
        latents, layouts, captions = [], [], []
        for _ in tqdm(range(0, config.cached_images, 64), desc="encode images", unit=" batches"):
            images, scenes, drawings = random_images(64, rng, config.stack.image_size)
            latents.append(encode_images(pipeline.vae, images).half().cpu())
            layouts.append(torch.stack([_layout(drawing, config.stack.latent_size) for drawing in drawings]))
            captions += [scene.caption for scene in scenes]
        tensors = {"latents": torch.cat(latents).contiguous(), "layouts": torch.cat(layouts)}
        write_atomically(folder / "captions.json", json.dumps(captions))
        with atomically(folder / "images.safetensors") as temporary:
            save_file(tensors, temporary)
    stored = load_file(folder / "images.safetensors")
    return stored["latents"], stored["layouts"], json.loads((folder / "captions.json").read_text(encoding="utf-8"))


def _layout(drawing: Drawing, cells: int) -> Tensor:
    """Return how much of each grid cell each of LAYOUT_MAPS covers, as uint8 (9, cells, cells). 255: all of it."""
    cover = torch.zeros(len(LAYOUT_MAPS), SIZE, SIZE)
    for mark in drawing.marks:
        cover[[LAYOUT_MAPS.index(mark.shape), LAYOUT_MAPS.index(mark.fill)]] += torch.from_numpy(coverage(mark))
    return (F.adaptive_avg_pool2d(cover, cells).clamp(0, 1) * 255).round().byte()
