"""Preference pairs of the embedded world, in the format of all pre-encoded pairs.

Training pairs come from lists of images of one training caption: renders with and without a spoiled concept, and
samples of the base model. A simulated rater compares two images by the oracle's score plus Gaussian noise (Thurstone),
so labels of similar images are noisy. Evaluation pairs have held-out captions: held-out pairs are made like training
pairs; concept pairs are two renders that differ in one concept, labelled without noise; shifted pairs are concept pairs
with damaged images.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dinalrm_align.data.latent_pairs import LatentPairsWriter
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.models.images import to_bytes
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.models.vae import decode_latents, encode_images
from dinalrm_align.shapes.config import CONCEPTS, PairsConfig
from dinalrm_align.shapes.oracle import oracle_score
from dinalrm_align.shapes.render import Drawing, concepts_of, draw_nuisance, lay_out, lay_out_spoiled, render
from dinalrm_align.shapes.scene import Scene, draw_scenes
from dinalrm_align.train.files import write_atomically

CHUNK = 32
"""Groups encoded or sampled at once."""
GRAIN, JPEG = 0.06, 20
"""Damage of shifted pairs: standard deviation of the grain, at an image range of 1, and JPEG quality."""


def write_training_pairs(directory: str | Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig) -> None:
    """Write `config.groups` lists of training captions for `LatentPairs`. Raises FileExistsError if they exist."""
    _write_lists(directory, pipeline, config, held_out=False)


def write_heldout_pairs(directory: str | Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig) -> None:
    """Write `config.heldout_groups` lists of held-out captions, made and labelled like the training pairs."""
    _write_lists(directory, pipeline, config, held_out=True)


def _write_lists(
    directory: str | Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig, *, held_out: bool
) -> None:
    rng = _list_rng(config, held_out)
    encoder = _prompt_encoder(pipeline)
    with LatentPairsWriter(directory, _manifest(pipeline, encoder)) as writer:
        for scenes, latents, images in _lists(pipeline, config, rng, held_out=held_out):
            latents = encode_images(pipeline.vae, images) if latents is None else latents
            lists = latents.view(len(scenes), config.pictures, *latents.shape[1:])
            embeds, pooled = encoder([scene.caption for scene in scenes])
            for row, (scene, pairs) in enumerate(zip(scenes, _label(scenes, images, config, rng))):
                chosen, rejected = zip(*pairs)
                writer.add(
                    scene.caption, lists[row].half(), prompt_embeds=embeds[row], pooled_prompt_embeds=pooled[row],
                    chosen=chosen, rejected=rejected,
                )  # fmt: skip


def render_hpdv3(
    directory: str | Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig, *, held_out: bool = False
) -> None:
    """Write pairs as images in HPDv3's layout: train.json, and PNG files in images/.

    Captions, images and labels are those of `write_training_pairs` (held_out: `write_heldout_pairs`) with the same
    settings, at 8 bits per channel. Raises FileExistsError if they exist.
    """
    directory = Path(directory)
    if (directory / "train.json").exists():
        raise FileExistsError(f"{directory} already holds a data set; write to another directory")
    (directory / "images").mkdir(parents=True, exist_ok=True)
    rng, records, number = _list_rng(config, held_out), [], 0
    for scenes, _, images in _lists(pipeline, config, rng, held_out=held_out):
        names = [f"images/{number + row:06d}.png" for row in range(len(images))]
        number += len(images)
        for name, image in zip(names, to_bytes(images)):
            Image.fromarray(image).save(directory / name)
        for row, (scene, pairs) in enumerate(zip(scenes, _label(scenes, images, config, rng))):
            own = names[row * config.pictures : (row + 1) * config.pictures]
            about = {"prompt": scene.caption, "confidence": None, "choice_dist": None, "model1": "shapes"}
            records += [about | {"path1": own[c], "path2": own[r], "model2": "shapes"} for c, r in pairs]
    write_atomically(directory / "train.json", json.dumps(records, indent=0))


def _list_rng(config: PairsConfig, held_out: bool) -> np.random.Generator:
    return np.random.default_rng((config.seed, 2 if held_out else 0))


def _lists(
    pipeline: StableDiffusion3Pipeline, config: PairsConfig, rng: np.random.Generator, *, held_out: bool
) -> Iterator[tuple[list[Scene], Tensor | None, Tensor]]:
    """Scenes, latents (None for renders) and images (scenes * config.pictures, 3, H, W)."""
    encoder = _prompt_encoder(pipeline)
    groups = config.heldout_groups if held_out else config.groups
    sampled = round(groups * config.sampled_share)
    chunks = [(size, True) for size in _chunks(sampled)] + [(size, False) for size in _chunks(groups - sampled)]
    for size, by_base in tqdm(chunks, desc="preference pairs", unit=f" {CHUNK} captions"):
        scenes = draw_scenes(size, rng, held_out=held_out)
        if by_base:
            latents = _sample(pipeline, encoder, scenes, config.pictures, rng)
            yield scenes, latents, decode_latents(pipeline.vae, latents)
        else:
            drawings = [draw for scene in scenes for draw in _draw_list(scene, config, rng)]
            yield scenes, None, render(drawings, pipeline.vae.config.sample_size)


def _label(
    scenes: list[Scene], images: Tensor, config: PairsConfig, rng: np.random.Generator
) -> Iterator[list[tuple[int, int]]]:
    """The pairs (chosen, rejected) of each list."""
    captions = [scene.caption for scene in scenes for _ in range(config.pictures)]
    for scores in oracle_score(images, captions).view(len(scenes), config.pictures):
        yield _compare(scores.numpy(), config.rater_noise, rng)


def write_concept_pairs(directory: str | Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig) -> None:
    """Write `config.per_concept` pairs per concept, with held-out captions; the oracle's better image is chosen."""
    _write_concepts(directory, pipeline, config.per_concept, np.random.default_rng((config.seed, 1)))


def write_shifted_pairs(directory: str | Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig) -> None:
    """Write `config.per_shifted` pairs per concept, both images with grain and JPEG artefacts that training lacks.

    Labels are those of the undamaged images. The counterpart of a test set from another source than training's.
    """
    rng = np.random.default_rng((config.seed, 3))
    _write_concepts(directory, pipeline, config.per_shifted, rng, lambda images: _damage(images, rng))


def _write_concepts(
    directory: str | Path, pipeline: StableDiffusion3Pipeline, number: int, rng: np.random.Generator,
    change: Callable[[Tensor], Tensor] = lambda images: images,
) -> None:  # fmt: skip
    encoder = _prompt_encoder(pipeline)
    with LatentPairsWriter(directory, _manifest(pipeline, encoder)) as writer:
        for concept in tqdm(CONCEPTS, desc="concept pairs", unit=" concepts"):
            pairs = list(itertools.islice(_concept_pairs(concept, rng, pipeline.vae.config.sample_size), number))
            captions = [caption for caption, _ in pairs]
            embeds, pooled = encoder(captions)
            images = change(torch.cat([image for _, image in pairs]))
            latents = torch.cat([encode_images(pipeline.vae, chunk) for chunk in images.split(2 * CHUNK)]).half()
            for row, caption in enumerate(captions):
                writer.add(
                    caption, latents[2 * row : 2 * row + 2], prompt_embeds=embeds[row],
                    pooled_prompt_embeds=pooled[row], concepts=[concept],
                )  # fmt: skip


def _damage(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] with grain of standard deviation GRAIN, then JPEG-compressed with quality JPEG."""
    grainy = to_bytes(images + torch.from_numpy(GRAIN * rng.standard_normal(images.shape)).float())
    damaged = []
    for image in grainy:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=JPEG)
        damaged.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(damaged).permute(0, 3, 1, 2).float() / 255


WRITERS = {
    "train": write_training_pairs,
    "heldout": write_heldout_pairs,
    "shifted": write_shifted_pairs,
    "concepts": write_concept_pairs,
}
HELD_OUT_KINDS = ("heldout", "shifted", "concepts")
"""Kinds of pairs for evaluating rewards."""


def ensure_pairs(kind: str, directory: Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig) -> Path:
    """Write the pairs of a kind of WRITERS unless they exist; return their directory."""
    if not (directory / "index.json").exists():
        WRITERS[kind](directory, pipeline, config)
    return directory


def ensure_training_pairs(folder: Path, source: str, config: PairsConfig) -> None:
    """Write pairs to train on, folder/train, and to evaluate on, folder/concepts, unless they exist.

    source: pipeline folder or hub id of the embedded world.
    """
    pipeline = load_pipeline(source, dtype=torch.float32)
    for kind in ("train", "concepts"):
        ensure_pairs(kind, folder / kind, pipeline, config)


def _chunks(groups: int) -> list[int]:
    return [min(CHUNK, groups - start) for start in range(0, groups, CHUNK)]


def _concept_pairs(concept: str, rng: np.random.Generator, size: int) -> Iterator[tuple[str, Tensor]]:
    """Captions with images (2, 3, size, size), the oracle's better one first."""
    while True:
        scene = draw_scenes(1, rng, held_out=True)[0]
        if concept not in concepts_of(scene):
            continue
        nuisance = draw_nuisance(rng)
        good, bad = lay_out(scene, nuisance, rng), lay_out_spoiled(scene, nuisance, concept, rng)
        images = render([good, bad], size)
        scores = oracle_score(images, [scene.caption] * 2)
        if scores[0] > scores[1]:  # spoiling can leave no difference, for instance at the image's edge
            yield scene.caption, images


def _draw_list(scene: Scene, config: PairsConfig, rng: np.random.Generator) -> list[Drawing]:
    """Layouts of one scene: the first faithful, most others with one spoiled concept."""
    nuisance = draw_nuisance(rng)
    drawings = [lay_out(scene, nuisance, rng)]
    concepts = concepts_of(scene)
    weights = np.array([config.emphasis.get(concept, 1.0) for concept in concepts])
    while len(drawings) < config.pictures:
        concept = str(rng.choice(concepts, p=weights / weights.sum()))
        if rng.random() < config.faithful_share:
            drawings.append(lay_out(scene, draw_nuisance(rng), rng))
        else:
            drawings.append(lay_out_spoiled(scene, nuisance, concept, rng))
    return drawings


def _compare(scores: np.ndarray, noise: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """All pairs (chosen, rejected) of a list, each labelled once by scores with fresh Gaussian errors."""
    pairs = []
    for i, j in itertools.combinations(range(len(scores)), 2):
        first = scores[i] + noise * rng.standard_normal() > scores[j] + noise * rng.standard_normal()
        pairs.append((i, j) if first else (j, i))
    return pairs


def _sample(pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, scenes: list[Scene], count: int, rng) -> Tensor:
    """Scaled latents (len(scenes) * count, C, H, W) of the base model, at a random guidance and step count."""
    embeds, pooled = encoder([scene.caption for scene in scenes])
    empty, empty_pooled = encoder([""])
    number = len(scenes) * count
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=embeds.repeat_interleave(count, 0),
        pooled_prompt_embeds=pooled.repeat_interleave(count, 0),
        negative_prompt_embeds=empty.expand(number, -1, -1),
        negative_pooled_prompt_embeds=empty_pooled.expand(number, -1),
        height=pipeline.vae.config.sample_size, width=pipeline.vae.config.sample_size,
        num_inference_steps=int(rng.integers(6, 16)), guidance_scale=float(rng.uniform(1.0, 5.0)),
        generator=torch.Generator().manual_seed(int(rng.integers(2**31))), output_type="latent",
    ).images  # fmt: skip


def _prompt_encoder(pipeline: StableDiffusion3Pipeline) -> PromptEncoder:
    return PromptEncoder(pipeline, text_length=pipeline.tokenizer_3.model_max_length)


def _manifest(pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder) -> PairManifest:
    vae = pipeline.vae.config
    return PairManifest(vae.scaling_factor, vae.shift_factor or 0.0, encoder.text_length)
