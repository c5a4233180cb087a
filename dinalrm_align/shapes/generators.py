"""Generators of the embedded world: who makes the images of a list of preference pairs, and with which settings.

A list belongs to one caption; most lists have images of different generators. All draws of a list are keyed by the
caption's index, except the sampler's settings: lists come in blocks of BLOCK captions, and the images at one position
of a block's lists share guidance and number of steps, to be sampled together. A list therefore does not depend on how
many follow (up to rounding), and an interrupted data set starts again identically.
"""

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from dinalrm_align.models.pipeline import decode_latents, encode_images, load_pipeline, load_transformer
from dinalrm_align.models.text import PromptEncoder, text_encoders
from dinalrm_align.models.weights import load_tensors, read_tensors
from dinalrm_align.shapes.config import OWN_SAMPLES, Generator, MakerWeights, PairsConfig
from dinalrm_align.shapes.render import concepts_of, draw_nuisance, lay_out, lay_out_spoiled, render
from dinalrm_align.shapes.scene import Scene, draw_scenes
from dinalrm_align.train.digest import fingerprint
from dinalrm_align.train.files import reading

BLOCK = 32
"""Number of captions whose images are encoded or sampled at once."""
STREAMS = {"train": 4, "heldout": 5, "outside": 5}
"""Kind of lists -> stream of their random draws: "outside" has the captions of "heldout"."""
FILES, RANGES = ("model", "checkpoint", "lora"), ("guidance_scale", "num_steps")
MAKERS = "makers"
"""Folder beside that of the pipeline, with weights that `Generator` can name."""
LAYOUT = "layout."  # prefix of the layout head's tensors in checkpoints of the base model

Lists = Iterator[tuple[list[Scene], Tensor, Tensor, list[np.random.Generator]]]
"""For up to BLOCK captions at a time: scenes; latents and images of all lists, list by list; and for each list the
random numbers that label it."""


@dataclass(frozen=True)
class ListPlan:
    """One list before its images are made: names of the images' generators, and seeds of their noise."""

    scene: Scene
    names: list[str]
    seeds: list[int]
    rng: np.random.Generator


def makers_of(kind: str, config: PairsConfig) -> dict[str, Generator]:
    """Return the generators of lists of `kind`, without those of easy lists. Pairs that are not lists have none."""
    own, mixed = OWN_SAMPLES if config.own_share else {}, config.generators if config.own_share < 1 else {}
    return {"train": mixed | own, "heldout": config.generators, "outside": config.outside}.get(kind, {})


def plan_list(index: int, kind: str, generators: dict[str, Generator], config: PairsConfig) -> ListPlan:
    """Draw the caption of list number `index`, and who makes each of its images. A generator of share p of the weights
    makes p * config.images images of a list on average, rounded up or down (systematic sampling).
    """
    rng = np.random.default_rng((config.seed, STREAMS[kind], index))
    scene = draw_scenes(1, rng, held_out=kind != "train")[0]
    order = rng.permutation(sorted(generators)).tolist()
    order.sort(key=lambda name: generators[name].render is not None)  # the numbers of samples and renders vary least
    ends = np.cumsum([generators[name].weight for name in order])
    points = (np.arange(config.images) + rng.random()) * (ends[-1] / config.images)
    chosen = [order[row] for row in np.searchsorted(ends, points, side="right").clip(max=len(order) - 1)]
    seeds = rng.integers(2**31, size=config.images).tolist()
    return ListPlan(scene, rng.permutation(chosen).tolist(), seeds, rng)


def sampler_settings(block: int, kind: str, config: PairsConfig) -> np.ndarray:
    """Return settings (images, 2) in [0, 1) of a block: by position, number of steps and guidance in their ranges."""
    return np.random.default_rng((config.seed, STREAMS[kind], block, 1)).random((config.images, 2))


def settings_of(block: int, kind: str, config: PairsConfig) -> PairsConfig:
    """Return the settings of a block of lists: evenly spread blocks of training lists are easy, or own samples."""
    easy, plain = int(config.easy_share * (block + 1)), replace(config, own_share=0.0)
    if kind == "train" and easy > int(config.easy_share * block):
        return config.easy()
    own = int(config.own_share * (block - easy + 1)) > int(config.own_share * (block - easy))  # among those not easy
    return replace(plain, generators=OWN_SAMPLES) if kind == "train" and own else plain


def make_lists(kind: str, pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, config: PairsConfig) -> Lists:
    """Make the lists of `kind`. `encoder`: encodes prompts for `pipeline`."""
    makers, given = makers_of(kind, config), config
    pipelines = open_generators(makers, pipeline)
    encoders = {name: prompt_encoder(own) if makers[name].model else encoder for name, own in pipelines.items()}
    total = config.groups if kind == "train" else config.heldout_groups
    for start in tqdm(range(0, total, BLOCK), desc="preference pairs", unit=f" {BLOCK} captions"):
        config = settings_of(start // BLOCK, kind, given)
        generators = makers_of(kind, config)
        plans = [plan_list(i, kind, generators, config) for i in range(start, min(start + BLOCK, total))]
        samples, drawings = defaultdict(list), {}
        for number, plan in enumerate(plans):
            nuisance = draw_nuisance(plan.rng)
            for position, (name, seed) in enumerate(zip(plan.names, plan.seeds)):
                row, generator = number * config.images + position, generators[name]
                if generator.render is None:
                    samples[name, position].append((row, plan.scene.caption, seed))
                elif generator.render == "spoiled":
                    concepts = draw_concepts(plan.scene, generator.flaws, config, plan.rng)
                    drawings[row] = lay_out_spoiled(plan.scene, nuisance, concepts, plan.rng)
                else:
                    scene = plan.scene if generator.render == "faithful" else draw_scenes(1, plan.rng)[0]
                    drawings[row] = lay_out(scene, draw_nuisance(plan.rng), plan.rng)
        settings, made = sampler_settings(start // BLOCK, kind, config), {}
        for (name, position), parts in samples.items():
            own, (rows, captions, seeds) = pipelines[name], zip(*parts)
            options = generators[name].at(*settings[position])
            latents = sample_latents(own, encoders[name], list(captions), seed=list(seeds), **options)
            images = decode_latents(own.vae, latents)
            latents = latents if own.vae is pipeline.vae else encode_images(pipeline.vae, images)
            made |= zip(rows, zip(latents.cpu(), images.cpu()))
        if drawings:
            images = render([*drawings.values()], pipeline.vae.config.sample_size)
            made |= zip(drawings, zip(encode_images(pipeline.vae, images).cpu(), images))
        latents, images = map(torch.stack, zip(*(made[row] for row in range(len(made)))))
        yield [plan.scene for plan in plans], latents, images, [plan.rng for plan in plans]


def open_generators(
    generators: dict[str, Generator], pipeline: StableDiffusion3Pipeline
) -> dict[str, StableDiffusion3Pipeline]:
    """Return the pipeline of each generator that samples, with the weights of its checkpoint, and its LoRA merged.

    Raises OSError or ValueError if a file cannot be read or does not fit, or if a LoRA changes nothing.
    """
    opened = {}
    for name, generator in generators.items():
        if generator.render is not None:
            continue
        own = pipeline if generator.model is None else load_pipeline(generator.model, dtype=torch.float32)
        own = type(own)(**own.components).to(pipeline.device)
        side, expected = own.vae.config.sample_size, pipeline.vae.config.sample_size
        if side != expected:
            raise ValueError(f"generator {name}: got images of side {side} from {generator.model}; expected {expected}")
        if fingerprint(own.vae) == fingerprint(pipeline.vae):
            own.register_modules(vae=pipeline.vae)  # its latents need not be decoded and encoded
        checkpoint, lora = (_locate(text, pipeline) for text in (generator.checkpoint, generator.lora))
        if checkpoint and checkpoint.is_dir():
            transformer = load_transformer(checkpoint, dtype=torch.float32)
            own.register_modules(transformer=transformer.to(pipeline.device))
        elif checkpoint or lora:
            own.register_modules(transformer=copy.deepcopy(own.transformer))
        if checkpoint and not checkpoint.is_dir():
            load_checkpoint(own.transformer, checkpoint)
        if lora:
            before = fingerprint(own.transformer)
            with reading("LoRA", lora):
                own.transformer.load_lora_adapter(lora, use_safetensors=True)
                own.transformer.fuse_lora()
                own.transformer.unload_lora()
            if fingerprint(own.transformer) == before:
                raise ValueError(f"generator {name}: the LoRA in {lora} does not change the transformer")
        opened[name] = own
    return opened


def _locate(weights: str | None, pipeline: StableDiffusion3Pipeline) -> Path | None:
    """Return the path of a generator's weights. Raises FileNotFoundError if those of a name do not exist."""
    if weights not in MakerWeights.words:
        return Path(weights) if weights else None
    path = Path(pipeline.name_or_path or ".").parent / MAKERS / weights
    if not path.exists():
        raise FileNotFoundError(
            f"generator weights {weights}: got no {path}; expected a folder: recipes/build_shapes.py "
            "makes it, or pass other pairs.generators and pairs.outside"
        )
    return path


def load_checkpoint(transformer: nn.Module, path: Path) -> None:
    """Set the weights of a transformer to those of a checkpoint of the base's training."""
    tensors = {key: tensor for key, tensor in read_tensors(path).items() if not key.startswith(LAYOUT)}
    load_tensors(dict(transformer.named_parameters()), tensors, path)


def identities(generators: dict[str, Generator], pipeline: StableDiffusion3Pipeline) -> dict[str, dict[str, Any]]:
    """Return the settings of each generator, with a digest of all weights that it reads in place of their paths."""
    opened, found = open_generators(generators, pipeline), {}
    for name, generator in generators.items():
        found[name] = {key: value for key, value in vars(generator).items() if key not in FILES}
        if name in opened:
            parts = nn.ModuleList([opened[name].transformer, opened[name].vae, *text_encoders(opened[name])])
            found[name] |= {"weights": fingerprint(parts)}
    return found


def check_outside(config: PairsConfig, pipeline: StableDiffusion3Pipeline) -> None:
    """Raise ValueError if a generator of `config.outside` occurs in training: renders of the same kind, or samples of
    the same weights within overlapping ranges of guidance and steps.
    """
    training = identities(makers_of("train", config), pipeline)
    easy = config.easy().generators if config.easy_share else {}
    training |= {f"easy {name}": maker for name, maker in identities(easy, pipeline).items()}
    pairs = itertools.product(identities(config.outside, pipeline).items(), training.items())
    for (name, outside), (other, known) in pairs:
        apart = any(outside[key] != known[key] for key in ("render", "weights") if key in known)
        for key in RANGES if outside["render"] is None else ():
            apart |= max(outside[key][0], known[key][0]) > min(outside[key][1], known[key][1])
        if not apart:
            raise ValueError(
                f"pairs.outside.{name}: got a generator that occurs in training, as {other!r}; expected other weights, "
                "or guidance or steps outside its ranges"
            )


def prompt_encoder(pipeline: StableDiffusion3Pipeline) -> PromptEncoder:
    """Return an encoder of prompts with as many T5 tokens as the pipeline's tokenizer allows."""
    return PromptEncoder(pipeline, text_length=pipeline.tokenizer_3.model_max_length)


def draw_concepts(scene: Scene, number: int, config: PairsConfig, rng: np.random.Generator) -> list[str]:
    """Draw what a render gets wrong, by the weights in `config.emphasis`: `number` concepts, or all that there are."""
    left, drawn = list(concepts_of(scene)), []
    while left and len(drawn) < number:
        weights = np.array([config.emphasis.get(concept, 1.0) for concept in left])
        drawn.append(left.pop(rng.choice(len(left), p=weights / weights.sum())))
    return drawn


def sample_latents(
    pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, prompts: list[str], *, steps: int, guidance: float,
    seed: int | list[int],
) -> Tensor:  # fmt: skip
    """Sample latents (B, C, h, w) for B prompts with the pipeline, scaled as the transformer expects them. `seed`: of
    the initial noise, one for all prompts or one for each.
    """
    (embeds, pooled), (empty, empty_pooled) = encoder(prompts), encoder.empty(len(prompts))
    size = pipeline.vae.config.sample_size
    noise = [torch.Generator().manual_seed(each) for each in (seed if isinstance(seed, list) else [seed])]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
        negative_pooled_prompt_embeds=empty_pooled, height=size, width=size, num_inference_steps=steps,
        guidance_scale=guidance, generator=noise if isinstance(seed, list) else noise[0], output_type="latent",
    ).images  # fmt: skip
