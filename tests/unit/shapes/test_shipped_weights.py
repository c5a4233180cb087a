"""The shipped weights load like any user's and have the qualities that the README states."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dinalrm_align import LatentReward
from dinalrm_align.models.pipeline import encode_images
from dinalrm_align.models.specs import MODELS, SHAPES_WEIGHTS
from dinalrm_align.reward.pixel.clip import ClipReward
from dinalrm_align.shapes.render import Nuisance, lay_out, render, spoil_scene
from dinalrm_align.shapes.scene import draw_scenes

SPEC = MODELS["shapes"]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusion3Pipeline.from_pretrained(SPEC.pipeline)
    pipeline.transformer.requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def scored_images():
    """48 held-out captions with a faithful image each and one of another colour."""
    import numpy as np

    rng = np.random.default_rng(5)
    scenes = draw_scenes(48, rng, held_out=True)
    good = [lay_out(scene, Nuisance(), rng) for scene in scenes]
    bad = [lay_out(spoil_scene(scene, "colour", rng), Nuisance(), rng) for scene in scenes]
    return [scene.caption for scene in scenes], render(good), render(bad)


def test_no_file_is_missing_or_too_much_and_together_they_are_small():
    size = sum(path.stat().st_size for path in SHAPES_WEIGHTS.rglob("*") if path.is_file())
    assert size < 40e6
    for path in SHAPES_WEIGHTS.rglob("*.json"):
        assert "_name_or_path" not in path.read_text() or json.loads(path.read_text()).get("_name_or_path", "") == ""


def test_the_latent_reward_finds_its_base_model_and_sees_a_wrong_colour(scored_images):
    captions, good, bad = scored_images
    reward = LatentReward.from_pretrained(SPEC.reward)
    scores = [
        reward.score_images(images, captions, generator=torch.Generator().manual_seed(0)) for images in (good, bad)
    ]
    assert (scores[0] > scores[1]).float().mean() > 0.85


def test_the_pixel_reward_sees_a_wrong_colour_through_the_autoencoder(scored_images, pipeline):
    captions, good, bad = scored_images
    reward = ClipReward.from_pretrained(SPEC.pixel, vae=pipeline.vae)
    with torch.no_grad():
        scores = [reward(encode_images(pipeline.vae, images), captions) for images in (good, bad)]
    assert (scores[0] > scores[1]).float().mean() > 0.75
