"""Training of the embedded world's networks from nothing, stage by stage, each on `loop.fit` and resumable.

vae     L1 + L2 + a light KL, on random quarters of the pictures (convolutions do not mind) and at last on whole ones;
        then the latents' mean and spread become the pipeline's shift and scaling factors.
text    every token of the T5 encoder, the last of each CLIP tower and the pooled embedding tell all that a caption asks
        for: the part that web-scale pretraining plays for SD3's text encoders.
base    rectified flow, v = noise - x0 (SD3, arXiv 2403.03206), from adaLN-zero, with Muon on the blocks' matrices, and an
        auxiliary loss on the third block's picture tokens.
pixel   a CLIP model on decoded pictures, PickScore's likelihood (arXiv 2305.01569).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dinalrm_align.config.shapes import BuildConfig, StageConfig
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.encode import PromptEncoder, decode_latents, encode_images
from dinalrm_align.loop import Hook, adamw, fit
from dinalrm_align.noise import add_noise, timestep_of
from dinalrm_align.pixel.clip import Preprocess
from dinalrm_align.resume import FOLDER as CHECKPOINTS
from dinalrm_align.resume import latest_checkpoint, write_atomically
from dinalrm_align.shapes.oracle import PARTS, oracle_parts, oracle_score
from dinalrm_align.shapes.render import Drawing, coverage, draw_nuisance, lay_out, render
from dinalrm_align.shapes.scene import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, draw_scenes

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LAYOUT_BLOCK = 2
"""Index of the block whose picture tokens the base model's auxiliary loss reads."""
def save_grid(images, prompts, path):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(images) // 16
    g = images[: n * 16].reshape(n, 16, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(n * 64, 1024, 3)
    Image.fromarray((g.numpy() * 255).round().astype("uint8")).resize((2048, n * 128), 0).save(path)


LAYOUT_CELL = 4
"""Side in pixels of the auxiliary loss's cells."""


def pictures(number: int, rng: np.random.Generator) -> tuple[Tensor, list[Scene], list[Drawing]]:
    """Random training captions rendered with ordinary nuisances: (number, 3, 64, 64), their scenes and drawings."""
    scenes = draw_scenes(number, rng)
    drawings = [lay_out(scene, draw_nuisance(rng), rng) for scene in scenes]
    return render(drawings), scenes, drawings


def run_stage(
    name: str,
    stage: StageConfig,
    config: BuildConfig,
    accelerator: Accelerator,
    parameters: dict[str, nn.Parameter],
    batch_at: Callable[[int], Any],
    step: Callable[[Any], tuple[Tensor, Mapping[str, float]]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    hooks: tuple[Hook, ...] = (),
    shown: tuple[str, ...] = ("loss",),
) -> None:
    """`fit` in output_dir/name, from its last checkpoint if there is one; the parameters end at their average."""
    output_dir = Path(config.output_dir) / name
    begun = (output_dir / CHECKPOINTS).is_dir()
    fit(
        stage.loop, stage.optim, parameters=parameters, batch_at=batch_at, step=step, accelerator=accelerator,
        optimizer=optimizer or adamw([{"params": list(parameters.values())}], stage.optim), output_dir=output_dir,
        hooks=hooks, resume=latest_checkpoint(output_dir) if begun else None, shown=shown,
    )  # fmt: skip
    average = load_file(latest_checkpoint(output_dir) / "ema.safetensors")
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(average[key])


def train_vae(pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator) -> None:
    """Train `pipeline.vae` in place and set its scaling and shift factor."""
    vae, stage = pipeline.vae.to(memory_format=torch.channels_last), config.vae
    whole_from = int(0.85 * stage.loop.steps)

    def batch_at(step: int) -> tuple[Tensor, torch.Generator]:
        rng, generator = np.random.default_rng((config.seed + 1, step)), torch.Generator().manual_seed(step)
        if step >= whole_from:
            return pictures(stage.batch_size // 4, rng)[0], generator
        images = pictures(stage.batch_size, rng)[0]
        side = images.shape[-1] // 2
        top, left = 4 * rng.integers(0, side // 4 + 1, 2)
        return images[:, :, top : top + side, left : left + side], generator

    def step(batch: tuple[Tensor, torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        images, generator = batch
        x = (2 * images - 1).to(accelerator.device, memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        squared = F.mse_loss(decoded, x)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(decoded, x) + squared + 2e-4 * kl
        return loss, {"psnr": 10 * math.log10(4 / squared.item()), "kl": kl.item()}

    vae.requires_grad_(True)
    run_stage("vae", stage, config, accelerator, dict(vae.named_parameters()), batch_at, step, shown=("loss", "psnr"))
    vae.requires_grad_(False)
    images = pictures(512, np.random.default_rng((config.seed, 99)))[0]
    z = torch.cat([_encode(vae, chunk) for chunk in images.split(64)])
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Unscaled latents, the posterior's mean."""
    x = (2 * images - 1).to(vae.device, memory_format=torch.channels_last)
    return vae.encode(x).latent_dist.mean.contiguous()


def vae_gate(vae: AutoencoderKL, seed: int) -> dict[str, float]:
    """How much of the oracle's judgement survives the autoencoder: correlation of each part before and after it.

    Half of the pictures belong to another caption, so that faithfulness varies.
    """
    images, scenes, _ = pictures(512, np.random.default_rng((seed, 7)))
    captions = [scene.caption for scene in scenes[:256] + scenes[255:0:-1] + scenes[:1]]
    decoded = torch.cat([decode_latents(vae, encode_images(vae, chunk)) for chunk in images.split(64)])
    before, after = oracle_parts(images, captions), oracle_parts(decoded.cpu(), captions)
    gate = {part: torch.corrcoef(torch.stack([before[part], after[part]]))[0, 1].item() for part in PARTS}
    return {**gate, "psnr": -10 * math.log10(F.mse_loss(decoded.cpu(), images).item())}


def _slots(scene: Scene | None) -> list[int]:
    """What a caption says, one class per slot: number of items; shape, colour, size of each; relation; background."""
    if scene is None:
        return [0] * len(SLOT_CLASSES)
    slots = [len(scene.items)]
    for item in (*scene.items, *[None] * (3 - len(scene.items))):
        values = ((SHAPES, "shape"), (tuple(COLOURS), "colour"), (SIZES, "size"))
        slots += [names.index(vars(item)[kind]) + 1 if item else 0 for names, kind in values]
    slots.append(list(RELATIONS).index(scene.relation) + 1 if scene.relation else 0)
    return [*slots, list(BACKGROUNDS).index(scene.background) + 1]


SLOT_CLASSES = [4, *[len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1] * 3, len(RELATIONS) + 1, len(BACKGROUNDS) + 1]


def train_text(pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator) -> None:
    """Train the three text encoders in place."""
    stage, stack, length = config.text, config.stack, config.stack.text_length
    towers = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = nn.ModuleList([nn.Linear(width, sum(SLOT_CLASSES)) for width in (2 * stack.clip_width,) * 2 + (stack.t5_width,)])
    parts = nn.ModuleList([*towers, heads]).to(accelerator.device)

    def batch_at(step: int) -> list[Scene | None]:
        return [*draw_scenes(stage.batch_size - 1, np.random.default_rng((config.seed + 2, step))), None]

    def step(scenes: list[Scene | None]) -> tuple[Tensor, dict[str, float]]:
        captions = [scene.caption if scene else "" for scene in scenes]
        target = torch.tensor([_slots(scene) for scene in scenes], device=accelerator.device)
        ids = [
            tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            for tokenizer in tokenizers
        ]
        ids = [tensor.to(accelerator.device) for tensor in ids]
        clips = [tower(tokens, output_hidden_states=True) for tower, tokens in zip(towers[:2], ids[:2])]
        pooled = torch.cat([out.text_embeds for out in clips], -1)
        last = torch.cat([out.hidden_states[-2][:, -1] for out in clips], -1)
        every = towers[2](ids[2]).last_hidden_state
        losses = {
            "pooled": _slot_loss(heads[0](pooled), target),
            "clip": _slot_loss(heads[1](last), target),
            "t5": _slot_loss(heads[2](every), target[:, None].expand(-1, length, -1)),
        }
        return sum(losses.values()), {name: loss.item() for name, loss in losses.items()}

    parts.requires_grad_(True)
    run_stage("text", stage, config, accelerator, dict(parts.named_parameters()), batch_at, step)
    parts.requires_grad_(False)


def _slot_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over slots: logits (..., sum of SLOT_CLASSES), target (..., slots)."""
    losses = [
        F.cross_entropy(part.flatten(0, -2), target[..., slot].flatten())
        for slot, part in enumerate(logits.split(SLOT_CLASSES, -1))
    ]
    return sum(losses) / len(losses)


class Together(torch.optim.Optimizer):
    """Several optimisers over separate parameters that step as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def train_base(pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator) -> None:
    """Train `pipeline.transformer` in place on frozen text encoders and latents encoded once."""
    stage, transformer, device = config.base, pipeline.transformer.to(accelerator.device), accelerator.device
    latents, layouts, captions = _cached_pictures(pipeline, config)
    encoder = PromptEncoder(pipeline, text_length=config.stack.text_length, device=device)
    encoder(sorted({*captions, ""}), batch_size=256)
    cells = config.stack.image_size // LAYOUT_CELL
    per_patch = cells * 2 // config.stack.latent_size
    width = config.stack.num_heads * config.stack.head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        layout_head = nn.Linear(width, len(SHAPES) * per_patch**2).to(device)
    _zero_modulation(transformer)
    tapped: dict[str, Tensor] = {}
    transformer.transformer_blocks[LAYOUT_BLOCK].register_forward_hook(
        lambda module, inputs, outputs: tapped.update(picture=outputs[1])
    )

    def batch_at(step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(10**6 * (config.seed + 1) + step)
        rows = torch.randint(len(latents), (stage.batch_size,), generator=generator)
        dropped = torch.rand(stage.batch_size, generator=generator) < 0.1
        embeds, pooled = encoder(["" if drop else captions[row] for row, drop in zip(rows.tolist(), dropped)])
        u = torch.sigmoid(1.2 * torch.randn(stage.batch_size, generator=generator))
        shift = config.stack.scheduler_shift
        noise = torch.randn(stage.batch_size, *latents.shape[1:], generator=generator)
        parts = (latents[rows].float(), layouts[rows].float() / 255, embeds, pooled, shift * u / (1 + (shift - 1) * u), noise)
        return tuple(part.to(device) for part in parts)

    def step(batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        x0, layout, embeds, pooled, sigma, noise = batch
        velocity = transformer(
            hidden_states=add_noise(x0, noise, sigma), timestep=timestep_of(sigma), encoder_hidden_states=embeds,
            pooled_projections=pooled, return_dict=False,
        )[0]  # fmt: skip
        flow = F.mse_loss(velocity, noise - x0)
        wanted = F.pixel_unshuffle(layout, per_patch).flatten(2).transpose(1, 2)
        shape = F.mse_loss(layout_head(tapped["picture"]), wanted)
        return flow + config.layout_weight * shape, {"flow": flow.item(), "layout": shape.item()}

    def evaluate(step: int) -> dict[str, float]:
        images, prompts = sample_held_out(pipeline, encoder, 64, config.seed)
        save_grid(images, prompts, Path(config.output_dir) / "base" / f"grid_{step:06d}.png")
        parts = oracle_parts(images, prompts)
        numbers = {name: value.mean().item() for name, value in parts.items()}
        tqdm.write(f"base, update {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
        return {**numbers, "oracle": oracle_score(images, prompts).mean().item()}

    transformer.requires_grad_(True)
    parameters = {**dict(transformer.named_parameters()), **{f"layout.{n}": p for n, p in layout_head.named_parameters()}}
    matrices = [
        name for name, p in parameters.items() if p.ndim == 2 and name.startswith("transformer_blocks") and "norm" not in name
    ]
    optim = stage.optim
    optimizer = Together(
        torch.optim.Muon(
            [parameters[name] for name in matrices], lr=optim.lr, weight_decay=optim.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        adamw([{"params": [p for name, p in parameters.items() if name not in set(matrices)]}], optim),
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["initial_lr"] = optim.lr
    run_stage(
        "base", stage, config, accelerator, parameters, batch_at, step, optimizer=optimizer,
        hooks=(Hook(500, evaluate, at_start=False),), shown=("flow", "layout"),
    )  # fmt: skip
    transformer.requires_grad_(False)
    transformer.transformer_blocks[LAYOUT_BLOCK]._forward_hooks.clear()


def _zero_modulation(transformer: nn.Module) -> None:
    """Start as DiT does: every block an identity, the output zero."""
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _cached_pictures(pipeline: StableDiffusion3Pipeline, config: BuildConfig) -> tuple[Tensor, Tensor, list[str]]:
    """Scaled latents (N, C, h, w) float16, coverage by each shape in LAYOUT_CELL cells (N, 4, H/4, W/4) uint8, captions."""
    folder = Path(config.output_dir) / "cache"
    if not (folder / "captions.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((config.seed + 3, 0))
        latents, layouts, captions = [], [], []
        for _ in tqdm(range(0, config.cached_pictures, 64), desc="encode pictures", unit=" batches"):
            images, scenes, drawings = pictures(64, rng)
            latents.append(encode_images(pipeline.vae, images).half().cpu())
            layouts.append(torch.stack([_layout(drawing) for drawing in drawings]))
            captions += [scene.caption for scene in scenes]
        save_file({"latents": torch.cat(latents).contiguous(), "layouts": torch.cat(layouts)}, folder / "pictures.safetensors")
        (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    stored = load_file(folder / "pictures.safetensors")
    return stored["latents"], stored["layouts"], json.loads((folder / "captions.json").read_text(encoding="utf-8"))


def _layout(drawing: Drawing) -> Tensor:
    cover = torch.stack([
        sum((torch.from_numpy(coverage(mark)) for mark in drawing.marks if mark.shape == shape), torch.zeros(64, 64))
        for shape in SHAPES
    ])  # fmt: skip
    return (F.avg_pool2d(cover[None].float(), LAYOUT_CELL)[0].clamp(0, 1) * 255).round().byte()


@torch.no_grad()
def sample_held_out(
    pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, number: int, seed: int, *, num_steps: int = 12,
    guidance_scale: float = 3.0,
) -> tuple[Tensor, list[str]]:  # fmt: skip
    """Pictures (number, 3, H, W) of held-out captions at the world's default steps and guidance, and the captions."""
    prompts = [scene.caption for scene in draw_scenes(number, np.random.default_rng((seed, 1234)), held_out=True)]
    embeds, pooled = encoder(prompts)
    empty, empty_pooled = encoder.empty(number)
    size = pipeline.vae.config.sample_size
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
        negative_pooled_prompt_embeds=empty_pooled, height=size, width=size, num_inference_steps=num_steps,
        guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(seed), output_type="latent",
    ).images  # fmt: skip
    return decode_latents(pipeline.vae, latents).cpu(), prompts


def train_pixel(
    pipeline: StableDiffusion3Pipeline, pairs: LatentPairs, config: BuildConfig, accelerator: Accelerator
) -> CLIPModel:
    """A CLIP reward on the decoded pictures of the same preference pairs; its text tower starts from the pipeline's."""
    stage, size = config.pixel, config.stack.image_size
    text = pipeline.text_encoder.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clip = CLIPModel(
            CLIPConfig(
                text_config=text.to_dict(), projection_dim=text.projection_dim, logit_scale_init_value=math.log(10.0),
                vision_config=dict(
                    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                    image_size=size, patch_size=8, hidden_act="gelu",
                ),
            )
        )  # fmt: skip
    clip.text_model.load_state_dict(pipeline.text_encoder.text_model.state_dict())
    clip.text_projection.load_state_dict(pipeline.text_encoder.text_projection.state_dict())
    clip.to(accelerator.device).train()
    preprocess = Preprocess(size, (size, size), CLIP_MEAN, CLIP_STD)

    def batch_at(step: int) -> tuple[PairBatch, Tensor, list[str]]:
        batch = pairs.batch_at(step)
        with torch.no_grad():
            images = decode_latents(pipeline.vae, batch.latents.to(accelerator.device))
        return batch, preprocess(images), pairs.prompts_at(step)

    def step(item: tuple[PairBatch, Tensor, list[str]]) -> tuple[Tensor, dict[str, float]]:
        batch, pixel_values, prompts = item
        tokens = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        text = F.normalize(clip.get_text_features(input_ids=tokens.input_ids.to(accelerator.device)).pooler_output, dim=-1)
        image = F.normalize(clip.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
        scores = clip.logit_scale.exp() * (image * text[batch.group]).sum(-1)
        gap = scores[batch.chosen] - scores[batch.rejected]
        return -F.logsigmoid(gap).mean(), {"accuracy": (gap > 0).float().mean().item()}

    parameters = dict(clip.named_parameters())
    run_stage("pixel", stage, config, accelerator, parameters, batch_at, step, shown=("loss", "accuracy"))
    return clip.requires_grad_(False).eval()


def save_clip_reward(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a folder in PickScore's layout: model, tokenizer, preprocessor_config.json."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = clip.config.vision_config.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }  # fmt: skip
    write_atomically(folder / "preprocessor_config.json", json.dumps(preprocessor, indent=1))
