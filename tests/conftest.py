"""Fixtures that several test files share; each is built once per worker from a fixed seed. Treat them as read-only."""

import os
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # for this process and those that tests start

import pytest
import torch
from tiny_reward import make_inputs, shake, tiny_reward_config

torch.set_num_threads(1)  # one thread per pytest-xdist worker

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def official() -> Path:
    """The folder of a tiny checkpoint in the released layout, its transformer, and what the released code computes."""
    return FIXTURES / "official_tiny"


@pytest.fixture(scope="session")
def golden(official):
    """Inputs and outputs of the released code on the official fixture."""
    from safetensors.torch import load_file

    return load_file(official / "golden.safetensors")


@pytest.fixture(scope="session")
def tiny_pipeline():
    """A frozen StableDiffusion3Pipeline with random weights: 16 latent channels, latents of 16 x 16, four blocks."""
    from dinalrm_align.shapes.stack import StackConfig, build_pipeline

    pipeline = build_pipeline(StackConfig.tiny(), seed=0)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False).eval()
    pipeline.text_encoder_3.requires_grad_(False).eval()
    return pipeline


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory, tiny_pipeline) -> Path:
    """A folder with `pipeline/` (the tiny pipeline) and `dinalrm/` (a reward whose base_model_id is ../pipeline)."""
    from dinalrm_align.reward.checkpoint import write_reward
    from dinalrm_align.reward.model import build_reward_model

    world = tmp_path_factory.mktemp("world")
    tiny_pipeline.save_pretrained(world / "pipeline")
    model = build_reward_model(tiny_reward_config(), tiny_pipeline.transformer, seed=1)
    shake(model, seed=2)
    write_reward(world / "dinalrm", model.config, model.tuned_tensors())
    return world


@pytest.fixture(scope="session")
def tiny_reward_dir(tiny_world) -> Path:
    """The tiny reward's folder."""
    return tiny_world / "dinalrm"


@pytest.fixture
def tiny_inputs(tiny_pipeline) -> dict[str, torch.Tensor]:
    """Arguments of a reward or a transformer of the tiny stack: two samples, 16 x 12 latents."""
    return make_inputs(tiny_pipeline.transformer)


@pytest.fixture
def refl_method():
    """A Refl on a stack of two blocks: five random conditions, updates of two."""
    from tiny_align import SHAPE, brightness, make_sampler, reward_of

    from dinalrm_align.align.refl import Refl
    from dinalrm_align.align.refl_config import ReflConfig
    from dinalrm_align.models.text import Conditions

    generator = torch.Generator().manual_seed(1)

    def conditions(count: int) -> Conditions:
        embeds, pooled = torch.randn(count, 5, 32, generator=generator), torch.randn(count, 32, generator=generator)
        return Conditions([f"prompt {index}" for index in range(count)], embeds, pooled)

    sampler = make_sampler(guidance_scale=2.0, conditions=conditions(5), negative=conditions(1), latent_shape=SHAPE)
    return Refl(sampler, reward_of(brightness), ReflConfig(batch_size=2, earliest=0.5, kl_weight=0.0))
