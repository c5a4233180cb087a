"""Preference pairs of the embedded world (rendered shapes), labelled from the scores of its oracle.

The images of a caption are made by several `generators`, and simulated `raters` compare them. For evaluation by
concept, a pair consists of two renders that differ in one concept, and the oracle's scores are compared without noise.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dinalrm_align.data.latent_pairs import LatentPairsWriter
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.models.images import image_tensor, open_image, to_bytes
from dinalrm_align.models.pipeline import encode_images, load_pipeline
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.shapes.config import CONCEPTS, PairsConfig
from dinalrm_align.shapes.generators import (
    BLOCK,
    STREAMS,
    check_outside,
    identities,
    make_lists,
    makers_of,
    prompt_encoder,
)
from dinalrm_align.shapes.oracle import oracle_score
from dinalrm_align.shapes.raters import rate_lists
from dinalrm_align.shapes.render import concepts_of, draw_nuisance, lay_out, lay_out_spoiled, render
from dinalrm_align.shapes.scene import draw_scenes
from dinalrm_align.train.digest import fingerprint
from dinalrm_align.train.files import begin_or_resume, write_atomically

MADE_WITH = "made_with.json"
GRAIN, JPEG = 0.06, 20
"""Damage to images of "shifted" pairs: standard deviation of Gaussian grain (pixels in [0, 1]), and JPEG quality."""


def write_pairs(kind: str, directory: str | Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig) -> None:
    """Make preference pairs of one kind and write them to `directory`, in the format that `LatentPairs` reads.

    Kinds of pairs:

    - "train": every two images of a caption, for `config.groups` training captions, labelled by noisy raters.
    - "heldout": lists by `config.generators` alone, for `config.heldout_groups` held-out captions.
    - "outside": the same as "heldout", but with images of the generators in `config.outside`.
    - "concepts": `config.per_concept` pairs for each concept (colour, blur, ...). The two images differ in the concept,
      and the image with the higher oracle score is chosen.
    - "shifted": `config.per_shifted` pairs for each concept, made as for "concepts". After labelling, grain and
      JPEG artefacts are added to the images, to test accuracy out of distribution. No training image has them.

    Raises FileExistsError if `directory` already holds pairs.
    """
    encoder, vae = prompt_encoder(pipeline), pipeline.vae.config
    manifest = PairManifest(vae.scaling_factor, vae.shift_factor or 0.0, encoder.text_length)
    kinds = dict.fromkeys(STREAMS, _encoded_lists) | dict.fromkeys(("concepts", "shifted"), _encoded_concepts)
    if kind == "outside" and not config.outside:
        raise ValueError("pairs.outside: got no generators; expected at least one, for a test set out of family")
    with LatentPairsWriter(directory, manifest) as writer:
        for captions, latents, labels in kinds[kind](kind, pipeline, encoder, config):
            embeds, pooled = encoder(captions)
            for row, (caption, label) in enumerate(zip(captions, labels)):
                text = dict(prompt_embeds=embeds[row], pooled_prompt_embeds=pooled[row])
                writer.add(caption, latents[row].half(), **text, **label)


def ensure_pairs(kind: str, directory: Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig) -> Path:
    """Write preference pairs of kind `kind` to `directory` unless `directory` holds pairs. Returns `directory`.

    Raises ValueError if `directory` holds pairs of other settings, or of another pipeline, and as `check_outside`.
    """
    if config.outside and kind in STREAMS:
        check_outside(config, pipeline)
    makers = identities(makers_of(kind, config), pipeline)
    terms = {"kind": kind, "transformer": fingerprint(pipeline.transformer), "autoencoder": fingerprint(pipeline.vae)}
    settings = {**terms, **dataclasses.asdict(dataclasses.replace(config, outside={})), "generators": makers}
    if kind != "train" or not config.own_share:
        del settings["own_share"]  # these pairs do not depend on it
    if not (directory / "index.json").exists():
        write_atomically(directory / MADE_WITH, json.dumps(settings, indent=1))  # first: no pairs are without it
        write_pairs(kind, directory, pipeline, config)
    elif (directory / MADE_WITH).exists():  # pairs of the user's own have none
        begin_or_resume(directory, MADE_WITH, settings)
    return directory


def ensure_training_pairs(folder: Path, source: str, config: PairsConfig) -> None:
    """Write preference pairs of the kinds "train" and "concepts" to folder/train and folder/concepts. A subfolder that
    already holds pairs is left unchanged. `source`: folder or hub id of the pipeline.
    """
    pipeline = load_pipeline(source, dtype=torch.float32)
    for kind in ("train", "concepts"):
        ensure_pairs(kind, folder / kind, pipeline, config)


def labelled_lists(
    kind: str, pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, config: PairsConfig
) -> Iterator[tuple[list[str], Tensor, Tensor, list[list[tuple[int, int, float]]]]]:
    """For up to BLOCK captions at a time, yield captions, latents, images and labels. Each caption has `config.images`
    consecutive images. Its labels are triples (chosen, rejected, label) with the indices of two images."""
    for scenes, latents, images, rngs in make_lists(kind, pipeline, encoder, config):
        yield [scene.caption for scene in scenes], latents, images, rate_lists(images, scenes, config, rngs)


def _encoded_lists(
    kind: str, pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, config: PairsConfig
) -> Iterator[tuple[list[str], Tensor, list[dict]]]:
    """Yield captions, latents (captions, images, C, h, w), and labels (arguments for `LatentPairsWriter.add`)."""
    for captions, latents, _, pairs in labelled_lists(kind, pipeline, encoder, config):
        labels = [dict(zip(("chosen", "rejected", "label"), zip(*own))) for own in pairs]
        yield captions, latents.unflatten(0, (len(captions), -1)), labels


def _encoded_concepts(
    kind: str, pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, config: PairsConfig
) -> Iterator[tuple[list[str], Tensor, list[dict]]]:
    """For one concept at a time, yield captions, latents (captions, 2, C, h, w; chosen images first) and labels."""
    stream, number = (3, config.per_shifted) if kind == "shifted" else (1, config.per_concept)
    rng, size = np.random.default_rng((config.seed, stream)), pipeline.vae.config.sample_size
    for concept in tqdm(CONCEPTS, desc="concept pairs", unit=" concepts"):
        captions, images = zip(*itertools.islice(_concept_pairs(concept, rng, size), number))
        images = torch.cat(images)
        images = _damage(images, rng) if kind == "shifted" else images
        latents = torch.cat([encode_images(pipeline.vae, chunk) for chunk in images.split(2 * BLOCK)])
        yield list(captions), latents.unflatten(0, (-1, 2)), [dict(concepts=[concept])] * number


def _damage(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Add Gaussian grain (standard deviation GRAIN) and JPEG artefacts to images (N, 3, H, W) in [0, 1]."""
    damaged = []
    for image in to_bytes(images + torch.from_numpy(GRAIN * rng.standard_normal(images.shape)).float()):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=JPEG)
        damaged.append(open_image(file.getvalue()))
    return image_tensor(damaged)


def _concept_pairs(concept: str, rng: np.random.Generator, size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield captions, each with two renders (2, 3, size, size). The second gets `concept` wrong and scores lower."""
    while True:
        scene = draw_scenes(1, rng, held_out=True)[0]
        if concept not in concepts_of(scene):
            continue
        nuisance = draw_nuisance(rng)
        good = lay_out(scene, nuisance, rng)
        bad = lay_out_spoiled(scene, nuisance, [concept], rng)
        images = render([good, bad], size)
        scores = oracle_score(images, [scene.caption] * 2)
        if scores[0] > scores[1]:  # spoiling can leave no difference, for instance at the image's edge
            yield scene.caption, images
