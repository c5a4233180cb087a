"""Two processes with half the batch each make the update that one makes with all of it; and what if one is lost.

Every recipe runs as it is typed, once here and once under `torch.distributed.run` with two gloo processes. Both do the
same sums in another order, so that weights agree to 1e-5 after updates of 1e-2, and metrics to 1e-3 of their size.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_worker
import torch
from safetensors.torch import load_file
from tiny_recipes import make_world

from dinalrm_align.metrics import read_metrics
from dinalrm_align.resume import latest_checkpoint

HERE = Path(__file__).parent
TIMED = ("seconds", "elapsed", "memory", "gflop")
HANG = 240
"""Seconds after which two processes are taken to wait for each other for ever."""

ALIGN = [
    "--prompts=prompts.txt", "--eval_prompts=prompts.txt", "--device=cpu", "--policy.rank=2", "--policy.alpha=4",
    "--gradient_checkpointing=false", "--profile_every=0", "--optim.lr=0.01", "--optim.eps=1e-5",
    "--loop.checkpoint_every=1", "--keep_last=9", "--evaluation.samples=3", "--evaluation.batch_size=1",
    "--evaluation.shown=1", "--evaluation.every=0",
]  # fmt: skip
REWARD = [
    "--pairs=pairs", "--batch_size=2", "--held_out_prompts=1", "--reward.num_layers=2", "--reward.visual_taps=[1,2]",
    "--reward.text_taps=[1,2]", "--reward.lora.rank=2", "--accuracy.sigmas=[0.3]", "--accuracy.ensemble=[]",
    "--device=cpu", "--optim.lr=0.01", "--optim.eps=1e-5", "--loop.checkpoint_every=1",
]  # fmt: skip
ROLLOUT = ["--loop.steps=4"]
CASES: dict[str, tuple[str, list[str], list[str], list[str]]] = {
    "reward": ("train_reward", [*REWARD, "--loop.steps=2"], ["--loop.accumulate=2"], []),
    "refl": (
        "refl_sd35",
        [*ALIGN, "--loop.steps=2", "--refl.num_steps=3", "--refl.earliest=0", "--refl.reward_sigma_range=[0.1,0.6]",
         "--refl.kl_weight=0.1", "--refl.pretrain_weight=0.5", "--refl.pretrain_samples=2"],
        ["--refl.batch_size=2"],
        ["--refl.batch_size=1"],
    ),
    "dpo_offline": (
        "dpo_sd35",
        [*ALIGN, "--loop.steps=2", "--dpo.mode=offline", "--pairs=pairs", "--dpo.batch_size=1"],
        ["--loop.accumulate=2"],
        [],
    ),
    "dpo_online": (
        "dpo_sd35",
        [*ALIGN, "--loop.steps=3", "--dpo.group_size=3", "--dpo.num_steps=2", "--dpo.refresh_every=2"],
        ["--dpo.batch_size=2"],
        ["--dpo.batch_size=1"],
    ),
    "grpo": (
        "grpo_sd35",
        [*ALIGN, *ROLLOUT, "--reward=ranks_worker:patchy", "--grpo.group_size=3", "--grpo.num_steps=4",
         "--grpo.window_range=[0,3]", "--grpo.minibatches=2", "--grpo.advantage_std=global", "--grpo.kl_beta=0.1",
         "--grpo.clip_range=0.01", "--grpo.sample_batch=2"],
        ["--grpo.groups=2"],
        ["--grpo.groups=1"],
    ),
    "lpo": (
        "lpo_sd35",
        [*ALIGN, *ROLLOUT, "--lpo.candidates=3", "--lpo.num_steps=4", "--lpo.steps=[0,3]", "--lpo.minibatches=2",
         "--lpo.threshold=[0.01,0.02]", "--lpo.beta=5"],
        ["--lpo.batch_size=2"],
        ["--lpo.batch_size=1"],
    ),
    "nft": (
        "nft_sd35",
        [*ALIGN, *ROLLOUT, "--reward=ranks_worker:uneven", "--nft.group_size=3", "--nft.num_steps=4",
         "--nft.minibatches=2", "--nft.old_slope=0.3"],
        ["--nft.groups=2"],
        ["--nft.groups=1"],
    ),
}  # fmt: skip
"""name -> recipe, its arguments, those of one process, those of each of two."""


def launch(folder: Path, runs: list, *options: str) -> subprocess.CompletedProcess:
    """Two processes that make these runs; killed, with what they started, when they hang."""
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "ranks_worker.py"), str(path), *options]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            process.terminate()  # torch.distributed.run then ends its workers
            printed, _ = process.communicate(timeout=60)
            pytest.fail(f"two processes hang: {printed[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, printed)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks_world")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def of_two(world):
    """Every case, run by two processes: the folder that holds their runs."""
    runs = [
        [recipe, [f"--model={world}", f"--output_dir=two/{name}", *given, *each]]
        for name, (recipe, given, _, each) in CASES.items()
    ]
    result = launch(world, runs)
    assert result.returncode == 0, [line for line in result.stdout.splitlines() if "rror" in line]
    return world / "two"


@pytest.fixture
def by_one(world, monkeypatch):
    """by_one(name, folder, *options): the same run, by this process alone."""

    def start(name: str, folder: str, *options: str) -> Path:
        recipe, given, alone, _ = CASES[name]
        ranks_worker.run(recipe, [f"--model={world}", f"--output_dir={folder}", *given, *alone, *options])
        return world / folder

    monkeypatch.chdir(world)
    monkeypatch.setattr(ranks_worker.Figure, "savefig", ranks_worker.stand_in)
    return start


def weights(run: Path, step: str | None = None) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(run)
    return load_file((newest if step is None else newest.with_name(step)) / "weights.safetensors")


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_with_half_the_batch_are_one_with_all(name, of_two, by_one):
    one, two = by_one(name, f"one/{name}"), of_two / name
    start, end = weights(one, "step_000001"), weights(one)
    assert max((start[key] - end[key]).abs().max().item() for key in end) > 1e-3  # they did learn something
    assert_same_weights(weights(two, "step_000001"), start)
    assert_same_weights(weights(two), end)
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        for key in row:
            if not key.startswith(TIMED):
                assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), (key, row["step"])
