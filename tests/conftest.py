"""Fixtures that several test files share; each is built once per session from a fixed seed. Treat them as read-only."""

from pathlib import Path

import pytest
import torch

from dinalrm_align.config.reward import HeadConfig, LoraConfig, RewardConfig

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
    from dinalrm_align.checkpoint import save_checkpoint
    from dinalrm_align.model import build_reward_model

    world = tmp_path_factory.mktemp("world")
    tiny_pipeline.save_pretrained(world / "pipeline")
    model = build_reward_model(tiny_reward_config(), tiny_pipeline.transformer, seed=1)
    shake(model, seed=2)
    save_checkpoint(world / "dinalrm", model.config, model.tuned_tensors())
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
    """A Refl on a stack of two blocks: five random conditions, updates of two, no reward yet."""
    from dinalrm_align.align.refl import Refl
    from dinalrm_align.config.refl import ReflConfig
    from dinalrm_align.cost import PhaseMeter
    from dinalrm_align.policy import Conditions, Policy
    from dinalrm_align.sampling import schedule_sigmas
    from dinalrm_align.shapes.stack import StackConfig, build_pipeline

    pipeline = build_pipeline(StackConfig.tiny(depth=2), seed=0)
    generator = torch.Generator().manual_seed(1)

    def conditions(count: int) -> Conditions:
        embeds, pooled = torch.randn(count, 5, 32, generator=generator), torch.randn(count, 32, generator=generator)
        return Conditions([f"prompt {index}" for index in range(count)], embeds, pooled)

    return Refl(
        policy=Policy(pipeline.transformer, LoraConfig(rank=4, alpha=4), seed=0),
        reward=None,
        sigmas=schedule_sigmas(pipeline.scheduler, 4),
        conditions=conditions(5),
        negative=conditions(1),
        latent_shape=(16, 8, 8),
        guidance_scale=2.0,
        config=ReflConfig(batch_size=2, earliest=0.5, kl_weight=0.0),
        meter=PhaseMeter("cpu"),
        seed=3,
    )


def tiny_reward_config(**changes) -> RewardConfig:
    """The config of a reward on the tiny stack; keyword arguments replace fields."""
    values = dict(
        base_model_id="../pipeline", num_layers=3, visual_taps=(1, 3), text_taps=(0, 3), lora=LoraConfig(4, 8),
        head=HeadConfig(), sigma=0.4, score_scale=2.0, score_bias=0.5, text_length=14, vae_scaling_factor=1.0,
        vae_shift_factor=0.0,
    )  # fmt: skip
    return RewardConfig(**(values | changes))


def shake(model: torch.nn.Module, seed: int, scale: float = 0.1) -> None:
    """Add noise to every trainable parameter, so that LoRA and the layers that start at zero matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def make_inputs(transformer, batch: int = 2, height: int = 16, width: int = 12, tokens: int = 9, seed: int = 0):
    """latents, noise, prompt_embeds and pooled_prompt_embeds of the transformer's sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = transformer.config
    shapes = {
        "latents": (batch, sizes.in_channels, height, width),
        "noise": (batch, sizes.in_channels, height, width),
        "prompt_embeds": (batch, tokens, sizes.joint_attention_dim),
        "pooled_prompt_embeds": (batch, sizes.pooled_projection_dim),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
