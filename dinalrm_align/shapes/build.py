"""Train the autoencoder, text encoders and CLIP reward of the embedded world (rendered shapes) from scratch.

Each `train_*` function trains networks in place or returns a trained network. It resumes an interrupted training from
its last checkpoint. The program `recipes/build_shapes.py` calls the functions in order and saves the weights.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.models.pipeline import decode_latents, encode_images
from dinalrm_align.models.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from dinalrm_align.shapes.config import FILLS, SIZES, BuildConfig, StageConfig
from dinalrm_align.shapes.oracle import PARTS, oracle_parts
from dinalrm_align.shapes.render import Drawing, draw_nuisance, lay_out, render
from dinalrm_align.shapes.scene import BACKGROUNDS, COLOURS, MAX_COUNT, RELATIONS, SHAPES, Scene, draw_scenes
from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.files import write_atomically
from dinalrm_align.train.loop import Closures, RunFolder, fit
from dinalrm_align.train.state import RunState


def random_images(number: int, rng: np.random.Generator, size: int) -> tuple[Tensor, list[Scene], list[Drawing]]:
    """Render images of random training captions. Returns images (number, 3, size, size), scenes and drawings."""
    drawn = draw_scenes(number, rng)
    drawings = [lay_out(scene, draw_nuisance(rng), rng) for scene in drawn]
    return render(drawings, size), drawn, drawings


def run_stage(
    name: str, config: BuildConfig, accelerator: Accelerator, parameters: dict[str, nn.Parameter],
    closures: Closures, *, optimizer: torch.optim.Optimizer | None = None, **options: Any,
) -> None:  # fmt: skip
    """Train `parameters` with the training loop `fit`. The run folder is output_dir/name. If it holds checkpoints,
    training resumes from the newest one. At the end, `parameters` are set to their moving average. If ema_decay is 0,
    they keep their last values. `options`: further arguments of `fit`.
    """
    stage: StageConfig = getattr(config, name)
    folder = Path(config.output_dir) / name
    run = RunFolder(folder, checkpoint=latest_checkpoint(folder), resume_command="the same command again")
    state = RunState.initial(parameters, stage.loop, stage.optim, optimizer=optimizer)
    fit(stage.loop, stage.optim, state, closures, accelerator=accelerator, run=run, **options)
    kind = "ema" if stage.loop.ema_decay > 0 else "weights"
    average = load_file(latest_checkpoint(folder) / f"{kind}.safetensors")
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(average[key])


def train_vae(pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator) -> None:
    """Train `pipeline.vae` in place with an L1 + L2 loss and a weak KL term. The first 85 % of the updates use random
    crops half as wide and high as the image. The remaining updates use whole images. At the end, shift_factor is set to
    the mean of the latents, and scaling_factor to the inverse of the latents' standard deviation.
    """
    vae, stage = pipeline.vae.to(memory_format=torch.channels_last), config.vae
    size = config.stack.image_size
    whole_from = int(0.85 * stage.loop.steps)

    def batch_at(step: int) -> tuple[Tensor, torch.Generator]:
        rng, generator = np.random.default_rng((config.seed + 1, step)), torch.Generator().manual_seed(step)
        if step >= whole_from:
            return random_images(max(1, stage.batch_size // 4), rng, size)[0], generator
        images = random_images(stage.batch_size, rng, size)[0]
        side = size // 2
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
    parameters = dict(vae.named_parameters())
    run_stage("vae", config, accelerator, parameters, Closures(batch_at, step), shown=("loss", "psnr"))
    vae.requires_grad_(False)
    images = 2 * random_images(512, np.random.default_rng((config.seed, 99)), size)[0] - 1
    chunks = [chunk.to(vae.device, memory_format=torch.channels_last) for chunk in images.split(64)]
    with torch.no_grad():
        z = torch.cat([vae.encode(chunk).latent_dist.mean.contiguous() for chunk in chunks])
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())


def vae_gate(vae: AutoencoderKL, seed: int, number: int = 512) -> dict[str, float]:
    """Measure on `number` images how well the autoencoder preserves the oracle's score. Returns a dict. For
    each component of the score, named in PARTS, it holds the correlation of its values on original and decoded
    images. "psnr" is the PSNR in dB. Half of the images are scored with another image's caption, to vary faithfulness.
    """
    images, drawn, _ = random_images(number, np.random.default_rng((seed, 7)), vae.config.sample_size)
    captions = [scene.caption for scene in drawn[: number // 2] + drawn[number // 2 - 1 :: -1]]
    decoded = torch.cat([decode_latents(vae, encode_images(vae, chunk)) for chunk in images.split(64)])
    before, after = (oracle_parts(pixels, captions) for pixels in (images, decoded.cpu()))
    gate = {part: torch.corrcoef(torch.stack([before[part], after[part]]))[0, 1].item() for part in PARTS}
    return {**gate, "psnr": -10 * math.log10(F.mse_loss(decoded.cpu(), images).item())}


ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "fill": ("solid", *FILLS)}
"""Attribute of an object -> its values."""


def _slot_classes() -> list[int]:
    """Return the number of classes of each caption attribute of `_slots`."""
    of_item = [len(names) + 1 for names in ATTRIBUTES.values()]
    return [MAX_COUNT + 1, *of_item * 3, len(RELATIONS) + 1, len(BACKGROUNDS) + 1]


def _slots(scene: Scene | None) -> list[int]:
    """Return the class index of each caption attribute, in this order: number of items, then the ATTRIBUTES of the
    first three items, then relation, then background. Class 0 means that the attribute is absent. Pass None
    for the empty caption.
    """
    if scene is None:
        return [0] * len(_slot_classes())
    slots = [len(scene.items)]
    for item in (*scene.items, None, None)[:3]:
        slots += [names.index(vars(item)[kind]) + 1 if item else 0 for kind, names in ATTRIBUTES.items()]
    slots.append(list(RELATIONS).index(scene.relation) + 1 if scene.relation else 0)
    return [*slots, list(BACKGROUNDS).index(scene.background) + 1]


def train_text(pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator) -> None:
    """Train the three text encoders in place so that linear heads can predict the attributes of a caption. One head
    reads every T5 token, one reads the last token of both CLIP towers, and one reads the pooled embedding. This
    training replaces the web-scale pretraining of SD3's text encoders.
    """
    stack, length = config.stack, config.stack.text_length
    classes = _slot_classes()
    towers = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3]
    widths = (2 * stack.clip_width, 2 * stack.clip_width, stack.t5_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = nn.ModuleList([nn.Linear(width, sum(classes)) for width in widths])
    parts = nn.ModuleList([*towers, heads]).to(accelerator.device)

    def batch_at(step: int) -> list[Scene | None]:
        rng = np.random.default_rng((config.seed + 2, step))
        return [*draw_scenes(config.text.batch_size - 1, rng), None]

    def step(batch: list[Scene | None]) -> tuple[Tensor, dict[str, float]]:
        captions = [scene.caption if scene else "" for scene in batch]
        target = torch.tensor([_slots(scene) for scene in batch], device=accelerator.device)
        options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = [tokenizer(captions, **options).input_ids.to(accelerator.device) for tokenizer in tokenizers]
        clips = [tower(tokens, output_hidden_states=True) for tower, tokens in zip(towers[:2], ids[:2])]
        pooled = torch.cat([out.text_embeds for out in clips], -1)
        last = torch.cat([out.hidden_states[-2][:, -1] for out in clips], -1)
        every = towers[2](ids[2]).last_hidden_state
        losses = {"pooled": _slot_loss(heads[0](pooled), target, classes)}
        losses["clip"] = _slot_loss(heads[1](last), target, classes)
        losses["t5"] = _slot_loss(heads[2](every), target[:, None].expand(-1, length, -1), classes)
        return sum(losses.values()), {name: loss.item() for name, loss in losses.items()}

    parts.requires_grad_(True)
    run_stage("text", config, accelerator, dict(parts.named_parameters()), Closures(batch_at, step))
    parts.requires_grad_(False)


def _slot_loss(logits: Tensor, target: Tensor, classes: list[int]) -> Tensor:
    """Return the mean cross-entropy over attributes. `logits`: (..., sum(classes)). `target`: as in `_slots`."""
    parts, targets = logits.split(classes, -1), target.unbind(-1)
    losses = [F.cross_entropy(part.flatten(0, -2), wanted.flatten()) for part, wanted in zip(parts, targets)]
    return sum(losses) / len(losses)


def train_clip(pipeline: StableDiffusion3Pipeline, config: BuildConfig, accelerator: Accelerator) -> CLIPModel:
    """Train a CLIP model on renders and their captions with CLIP's contrastive loss (arXiv 2103.00020). It takes the
    place of the web-scale CLIP that PickScore starts from. The text tower starts from `pipeline.text_encoder`.
    """
    size, text = config.stack.image_size, pipeline.text_encoder.config.to_dict()
    text.pop("_name_or_path", None)
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, patch_size=8)
    vision |= dict(image_size=size, hidden_act="gelu")
    scale = dict(projection_dim=text["projection_dim"], logit_scale_init_value=math.log(10.0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, **scale))
    clip.text_model.load_state_dict(pipeline.text_encoder.text_model.state_dict())
    clip.text_projection.load_state_dict(pipeline.text_encoder.text_projection.state_dict())
    clip.to(accelerator.device).train()
    preprocess = Preprocess(size, (size, size), CLIP_MEAN, CLIP_STD)

    def batch_at(step: int) -> tuple[Tensor, list[str]]:
        images, scenes, _ = random_images(config.clip.batch_size, np.random.default_rng((config.seed + 4, step)), size)
        return preprocess(images.to(accelerator.device)), [scene.caption for scene in scenes]

    def step(batch: tuple[Tensor, list[str]]) -> tuple[Tensor, dict[str, float]]:
        image, text = _clip_features(clip, pipeline.tokenizer, *batch)
        logits, own = clip.logit_scale.exp() * image @ text.T, torch.arange(len(image), device=image.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return loss, {"accuracy": (logits.argmax(1) == own).float().mean().item()}

    parameters = dict(clip.named_parameters())
    run_stage("clip", config, accelerator, parameters, Closures(batch_at, step), shown=("loss", "accuracy"))
    return clip


def train_pixel(
    clip: CLIPModel, pipeline: StableDiffusion3Pipeline, pairs: LatentPairs, config: BuildConfig,
    accelerator: Accelerator,
) -> CLIPModel:  # fmt: skip
    """Train a CLIP model in place as a reward, with PickScore's pairwise likelihood (arXiv 2305.01569), on images
    decoded from the latents of `pairs`. Returns it, frozen and in eval mode.
    """
    size = config.stack.image_size
    preprocess = Preprocess(size, (size, size), CLIP_MEAN, CLIP_STD)
    clip.train()

    def batch_at(step: int) -> tuple[PairBatch, Tensor]:
        batch = pairs.batch_at(step).to(accelerator.device)
        with torch.no_grad():
            return batch, preprocess(decode_latents(pipeline.vae, batch.latents))

    def step(item: tuple[PairBatch, Tensor]) -> tuple[Tensor, dict[str, float]]:
        batch, pixel_values = item
        image, text = _clip_features(clip, pipeline.tokenizer, pixel_values, list(batch.group_prompts))
        scores = clip.logit_scale.exp() * (image * text[batch.group]).sum(-1)
        gap = scores[batch.chosen] - scores[batch.rejected]
        log_p, log_q = F.logsigmoid(gap), F.logsigmoid(-gap)
        return -(batch.label * log_p + (1 - batch.label) * log_q).mean(), {"accuracy": (gap > 0).float().mean().item()}

    parameters = dict(clip.named_parameters())
    run_stage("pixel", config, accelerator, parameters, Closures(batch_at, step), shown=("loss", "accuracy"))
    return clip.requires_grad_(False).eval()


def _clip_features(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pixel_values: Tensor, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Return normalised embeddings of images and of captions, (images, D) and (captions, D)."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = clip.get_text_features(input_ids=ids.to(pixel_values.device)).pooler_output
    image = clip.get_image_features(pixel_values=pixel_values).pooler_output
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def save_clip_reward(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save the CLIP model, the tokenizer and preprocessor_config.json to `folder`, in PickScore's file layout."""
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
