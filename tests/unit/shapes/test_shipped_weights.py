"""The weights that the package ships: they load as any user's would, and are what the README says they are."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dinalrm_align import LatentReward
from dinalrm_align.models.specs import MODELS, SHAPES_WEIGHTS
from dinalrm_align.models.vae import encode_images
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
def judged():
    """48 held-out captions with a faithful picture each and one of another colour."""
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


def test_the_latent_reward_finds_its_base_model_by_itself_and_sees_a_wrong_colour(judged):
    captions, good, bad = judged
    reward = LatentReward.from_pretrained(SPEC.reward)
    scores = [
        reward.score_images(pictures, captions, generator=torch.Generator().manual_seed(0)) for pictures in (good, bad)
    ]
    assert (scores[0] > scores[1]).float().mean() > 0.85


def test_the_pixel_reward_sees_a_wrong_colour_through_the_autoencoder(judged, pipeline):
    captions, good, bad = judged
    reward = ClipReward.from_pretrained(SPEC.pixel, vae=pipeline.vae)
    with torch.no_grad():
        scores = [reward(encode_images(pipeline.vae, pictures), captions) for pictures in (good, bad)]
    assert (scores[0] > scores[1]).float().mean() > 0.75
