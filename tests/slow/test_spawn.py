"""A reward that is handed to another process by pickle, as Ray and torch's data loaders do."""

import multiprocessing

import torch
from spawned import score
from tiny_clip import save_clip
from tiny_reward import make_inputs

from dinalrm_align import load_reward
from dinalrm_align.models.pipeline import load_pipeline

PROMPTS = ["a red circle", "two blue squares"]


def test_a_spawned_process_scores_alike(tiny_world, tiny_reward_dir, tiny_pipeline, tmp_path):
    pipeline = load_pipeline(tiny_world / "pipeline", dtype=torch.float32)
    latents = make_inputs(tiny_pipeline.transformer, height=16, width=16)["latents"]
    reward = load_reward(f"dinalrm={tiny_reward_dir} + 0.2*pixel={save_clip(tmp_path)}", pipeline=pipeline)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=score, args=(reward, latents, PROMPTS, [3, 4], queue))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    assert queue.get(timeout=10) == reward(latents, PROMPTS, seeds=[3, 4]).tolist()
