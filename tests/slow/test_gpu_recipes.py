"""Every recipe on the fake GPU in bfloat16: no tensor on the wrong device, no more host waits than the table allows.

The tiny world is random, so nothing is said about values. `python tests/host_waits.py` prints the waits by place.
"""

import json
import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from fake_gpu import FakeGpu
from fastapi.testclient import TestClient
from gpu_runs import DPO, GRPO, LPO, NFT, ON_GPU, REFL, WAITS, World, no_figures, waits_of_an_update
from malformed_requests import compute, own
from paths import FIXTURES, ROOT, load_recipe
from PIL import Image

from dinalrm_align import LatentReward, load_reward
from dinalrm_align.models.specs import resolve_model
from dinalrm_align.models.text import Conditions, PromptEncoder
from dinalrm_align.serve.app import create_app
from dinalrm_align.serve.config import ServeConfig
from dinalrm_align.serve.metrics import Metrics
from dinalrm_align.serve.pool import load_rewards

TABLE = json.loads((FIXTURES / "host_waits.json").read_text())
PROMPT = "a small red circle on white"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.make(tmp_path_factory.mktemp("gpu_world"))


@pytest.fixture(autouse=True)
def quick():
    with no_figures():
        yield


@pytest.fixture
def gpu():
    """A GPU on which the test must leave no fault."""
    gpu = FakeGpu()
    yield gpu
    assert gpu.uploads and not gpu.faults, gpu.report()


def test_the_table_has_every_recipe():
    assert TABLE.keys() == WAITS.keys()


@pytest.mark.parametrize("name", WAITS)
def test_an_update_waits_for_the_gpu_no_more_often_than_the_table_says(world, name):
    gpu, waits, uploads = waits_of_an_update(world, name)
    assert not gpu.faults, gpu.report()
    counted = {"waits": waits.total(), "uploads": uploads.total()}
    more = {kind: (counted[kind], TABLE[name][kind]) for kind in counted if counted[kind] > TABLE[name][kind]}
    assert not more, f"(got, allowed) {more}; by place: python tests/host_waits.py '{name}'"


RUNS = {
    "a sum with an anchor": ("refl_sd35", [*REFL, "--reward=dinalrm + 0.2*pixel", "--anchor.reward=pixel",
                                           "--anchor.every=2", "--gradient_checkpointing=false"]),
    "draft_lv": ("refl_sd35", [*REFL, "--refl.variant=draft_lv", "--memory.offload=true"]),
    "drtune": ("refl_sd35", [*REFL, "--refl.variant=drtune", "--refl.grad_steps=2", "--refl.guided_gradient=true"]),
    "direct_align": ("refl_sd35", [*REFL, "--refl.variant=direct_align", "--refl.earliest=0.1"]),
    "pretraining": ("refl_sd35", [*REFL, "--refl.pretrain_weight=0.5", "--refl.pretrain_samples=2",
                                  "--refl.reward_sigma_range=[0.1,0.6]", "--refl.sample_batch=2",
                                  "--loop.accumulate=2"]),
    "slices": ("refl_sd35", ["--refl.num_steps=2", "--refl.batch_size=2", "--reward=pixel", "--memory.decode_slice=1",
                             "--memory.vae_dtype=bfloat16", "--memory.decode_tile=true", "--memory.offload=true"]),
    "evaluations and float32": ("refl_sd35", [*REFL, "--dtype=float32", "--evaluation.every=1", "--loop.ema_decay=0.5",
                                              "--evaluation.guidance_scale=2", "--gold=[pixel,dinalrm]",
                                              "--profile_every=1", "--loop.checkpoint_every=1"]),
    "grpo, a window of all steps, flow_sde": ("grpo_sd35", [*GRPO, "--grpo.window=all", "--grpo.window_range=null",
                                                            "--grpo.sampler=flow_sde", "--grpo.guard=true",
                                                            "--grpo.kl_beta=0", "--grpo.shared_start=false"]),
    "grpo, parts": ("grpo_sd35", [*GRPO, "--reward=dinalrm + 0.2*pixel", "--grpo.advantage_of=gdpo",
                                  "--anchor.reward=pixel", "--anchor.every=1"]),
    "nft, global": ("nft_sd35", [*NFT, "--nft.advantage_std=global", "--nft.keep_equal=true", "--nft.kl_beta=0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_other_settings(world, gpu, name):
    recipe, options = RUNS[name]
    world.align(recipe, *options, gpu=gpu)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("refl_sd35", [*REFL, "--loop.ema_decay=0.5"]),
        ("dpo_sd35", DPO),
        ("grpo_sd35", [*GRPO, "--grpo.minibatches=2"]),
        ("lpo_sd35", [*LPO, "--lpo.minibatches=2"]),
        ("nft_sd35", [*NFT, "--nft.minibatches=2"]),
    ],
)
def test_a_resumed_run(world, gpu, recipe, options):
    """After one update, which is in the middle of a rollout of GRPO, LPO and NFT."""
    folder = world.align(recipe, *options, "--loop.steps=1", gpu=gpu)
    with gpu:
        load_recipe(recipe).main([f"--resume={folder}", "--loop.steps=2"])


def test_a_run_from_a_lora(world, gpu):
    first = world.align("refl_sd35", *REFL, "--loop.steps=1", gpu=gpu)
    world.align("refl_sd35", *REFL, f"--policy.init_from={first / 'lora'}", "--loop.steps=1", gpu=gpu)


def test_offline_dpo_on_mined_pairs(world, gpu):
    pairs = world.output("pairs")
    with gpu:
        load_recipe("mine_pairs").main(
            [world.model, world.prompts[0], *ON_GPU, f"--output_dir={pairs}", "--policy.rank=2", "--mine.candidates=2",
             "--mine.num_steps=1"]
        )  # fmt: skip
    offline = ["--dpo.mode=offline", f"--pairs={pairs}", "--dpo.batch_size=1"]
    world.align("dpo_sd35", *offline, gpu=gpu)


def test_a_reward_of_ones_own_data(world, gpu):
    """prepare_pairs, train_reward, its resume, evaluate_reward, and ReFL on the new reward."""
    folder, lines = world.output("data"), []
    folder.mkdir(parents=True)
    for number, colour in enumerate(("red", "blue", "green", "white")):
        for side in ("chosen", "rejected"):
            Image.new("RGB", (64, 64), colour if side == "chosen" else "black").save(folder / f"{number}_{side}.png")
        names = {side: f"{number}_{side}.png" for side in ("chosen", "rejected")}
        lines.append(json.dumps({"prompt": f"a small {colour} circle on gray", **names}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    trained = [
        world.model, f"--pairs={folder / 'latents'}", f"--output_dir={folder / 'run'}", *ON_GPU, "--batch_size=1",
        "--held_out_prompts=1", "--loop.accumulate=2", "--reward.num_layers=2", "--reward.visual_taps=[1,2]",
        "--reward.text_taps=[1,2]", "--reward.lora.rank=2", "--reward.head.dropout=0.1", "--accuracy.sigmas=[0.3]",
        "--accuracy.ensemble=[]",
    ]  # fmt: skip
    programs = {
        "prepare_pairs": [
            world.model, f"--source={folder / 'pairs.jsonl'}", f"--output_dir={folder / 'latents'}", *ON_GPU,
            "--buckets=64x64", "--filter.min_pixels=0", "--workers=0",
        ],
        "train_reward": [*trained, "--loop.steps=1"],
        "train_reward, resumed": [f"--resume={folder / 'run'}", "--loop.steps=2"],
        "evaluate_reward": [
            world.model, f"--reward={folder / 'run' / 'reward'}", f"--test_sets={{mine: {folder / 'pairs.jsonl'}}}",
            f"--output_dir={folder / 'evaluation'}", "--device=cuda", "--sigmas=[0.1,0.4]", "--ensembles=[[0.1,0.4]]",
            "--calibrated_at=[0.4]",
        ],
        "score_images": [
            PROMPT, str(folder / "0_chosen.png"), world.model, "--reward=dinalrm + 0.2*pixel", "--device=cuda",
        ],
    }  # fmt: skip
    for name, words in programs.items():
        with gpu:
            load_recipe(name.split(",")[0]).main(words)
    world.align("refl_sd35", *REFL, f"--reward={folder / 'run' / 'reward'}", "--loop.steps=1", gpu=gpu)


def test_the_loop_of_the_readme(world, gpu):
    """The README's code as it is, but with the tiny world's weights, the pipeline on the GPU, and latents there."""
    section = (ROOT / "README.md").read_text().split("## A reward in your own loop")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    for ours, here in (
        ('"dinalrm_align/shapes/weights"', repr(str(world.folder))),
        ('/pipeline")', '/pipeline").to("cuda", torch.bfloat16)'),
        ("requires_grad=True)", 'device="cuda", requires_grad=True)'),
    ):
        assert ours in code
        code = code.replace(ours, here)
    with gpu:
        names: dict = {}
        exec(code, names)
        assert names["latents"].grad.device == names["score"].device == torch.device("cuda", 0)
        assert names["latents"].grad.abs().sum() > 0


def test_the_example_of_a_custom_loop(world, gpu):
    code = (ROOT / "examples" / "custom_loop.py").read_text()
    for ours, here in (
        ("Path(dinalrm_align.__file__).parent / \"shapes\" / \"weights\"", f"Path({str(world.folder)!r})"),
        ('weights / "pipeline")', 'weights / "pipeline").to("cuda", torch.bfloat16)'),
        ("generator=generator)\n    velocity", 'generator=generator).to("cuda", torch.bfloat16)\n    velocity'),
        ("1000.0)", '1000.0, device="cuda")'),
    ):  # fmt: skip
        assert ours in code
        code = code.replace(ours, here)
    with gpu:
        exec(code, {})


@pytest.mark.parametrize("home", ["alone", "shared"])
def test_a_latent_reward_scores_latents_and_images(world, gpu, home):
    with gpu:
        if home == "alone":
            reward = LatentReward.from_pretrained(world.folder / "dinalrm", device="cuda")
        else:
            pipeline = StableDiffusion3Pipeline.from_pretrained(world.folder / "pipeline").to("cuda", torch.bfloat16)
            pipeline.transformer.requires_grad_(False)
            reward = LatentReward.from_pretrained(world.folder / "dinalrm", pipeline=pipeline)
        latents = torch.randn(2, 16, 8, 8, device="cuda", requires_grad=True)
        for options in ({}, {"seeds": [1, 2]}, {"sigma": (0.2, 0.5)}, {"sigma": torch.full((2,), 0.3, device="cuda")},
                        {"generator": torch.Generator("cuda")}, {"generator": torch.Generator()}):  # fmt: skip
            reward(latents, [PROMPT, "a blue square"], **options).sum().backward()
        assert latents.grad.is_cuda
        images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
        assert reward.score_images(images, [PROMPT, PROMPT]).is_cuda
        reward.offload()
        reward.onload("cuda")
        assert reward(latents, [PROMPT, PROMPT]).is_cuda


def test_prompts_are_encoded_on_the_cpu_for_a_transformer_on_the_gpu(world, gpu):
    with gpu:
        pipeline = StableDiffusion3Pipeline.from_pretrained(world.folder / "pipeline")
        pipeline.transformer.to("cuda")
        encoder = PromptEncoder(pipeline, text_length=16, device="cuda")
        embeds, pooled = encoder([PROMPT])
        assert embeds.is_cuda and pooled.is_cuda
        assert Conditions.encode(encoder, [PROMPT]).to("cuda").prompt_embeds.is_cuda


def test_the_server_scores(world, gpu):
    """Latents and images, in the server's own threads."""
    config = ServeConfig(reward="dinalrm + 0.2*pixel", devices=["cuda"])
    with gpu:
        metrics, (spec, _) = Metrics(), resolve_model(str(world.folder))
        with TestClient(create_app(load_rewards(config, spec, metrics), config, metrics)) as client:
            assert client.post("/v1/score", content=own()).status_code == 200
            assert client.post("/compute", content=compute()).status_code == 200


def test_a_pixel_reward_scores_on_the_gpu(world, gpu):
    spec, _ = resolve_model(str(world.folder))
    with gpu:
        pipeline = StableDiffusion3Pipeline.from_pretrained(world.folder / "pipeline").to("cuda", torch.bfloat16)
        reward = load_reward("pixel", spec=spec, pipeline=pipeline, device="cuda")
        latents = torch.randn(1, 16, 8, 8, device="cuda", requires_grad=True)
        reward(latents, [PROMPT]).sum().backward()
        assert latents.grad.is_cuda
