"""Two ranks with half the batch each train as one with all of it, with FSDP and without; a lost rank ends the run, and
a run is resumed with another world size.

Every recipe runs by its command line, once in this process and once under `torch.distributed.run` with two gloo ranks.
Sums are in another order, so weights agree to 1e-5 after updates of 1e-2, and metrics to a relative 1e-3.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_worker
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_recipes import make_world

from dinalrm_align import LatentReward
from dinalrm_align.reward.sharding import shard_base, sharding_asked
from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.metrics import read_metrics

HELPERS = Path(__file__).parents[1] / "helpers"
TIMED = ("seconds", "elapsed", "memory", "gflop")
HANG = 240
"""Seconds after which two ranks are considered deadlocked."""

ALIGN = [
    "--prompts=prompts.txt", "--eval_prompts=prompts.txt", "--device=cpu", "--policy.rank=2", "--policy.alpha=4",
    "--gradient_checkpointing=false", "--profile_every=0", "--optim.lr=0.01", "--optim.eps=1e-5",
    "--loop.checkpoint_every=1", "--loop.keep_last=9", "--evaluation.samples=2", "--evaluation.batch_size=2",
    "--evaluation.shown=1", "--evaluation.every=0", "--watch.sigmas=[]", "--watch.drift_sigmas=[]",
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
         "--lpo.temperature=0.01", "--lpo.threshold=[0.3,0.4]", "--lpo.beta=5"],
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
"""name -> recipe, arguments, arguments of a single process, arguments of two ranks."""
SHARDED = ["reward", "refl", "grpo"]
"""Cases that run under FSDP too: a trunk alone, a policy and a trunk, and ranks with different amounts of work."""


def launch(folder: Path, script: Path, *options: str, look_every: float = 0.1) -> subprocess.CompletedProcess:
    """Run a script on two ranks; they are killed if they hang. torchrun looks at them every `look_every` seconds, and
    ends the other rank when it sees that one has died."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HELPERS.parents[1]}{os.pathsep}{HELPERS}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--monitor-interval={look_every}", str(script)]
    with subprocess.Popen(
        [*command, *options], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            process.terminate()  # ends the workers too
            printed, _ = process.communicate(timeout=60)
            pytest.fail(f"two processes hang: {printed[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, printed)


def test_two_ranks_equal_one_that_accumulates(tmp_path):
    """2 ranks x 1 micro-batch equal 1 rank x 2 in weights and metrics; the initial weights of rank 1 do not matter."""
    script, environment = HELPERS / "linear_worker.py", {**os.environ, "PYTHONPATH": str(HELPERS.parents[1])}
    ended = launch(tmp_path, script, str(tmp_path / "two"))
    assert ended.returncode == 0, ended.stdout
    subprocess.run([sys.executable, str(script), str(tmp_path / "one")], env=environment, check=True, timeout=300)
    weights = [load_file(latest_checkpoint(tmp_path / name) / "weights.safetensors") for name in ("two", "one")]
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key])
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one")]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks_world")
    make_world(folder)
    return folder


@pytest.fixture
def here(world, monkeypatch):
    """here(recipe, *arguments): a run in this process, in the world's folder."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(ranks_worker.Figure, "savefig", None)  # restored after `run` replaces it
    monkeypatch.setattr(ranks_worker.Figure, "tight_layout", None)
    monkeypatch.setattr(ranks_worker.stage, "plot_run", None)
    return lambda recipe, *arguments: ranks_worker.run(recipe, list(arguments))


@pytest.fixture
def of_one(world, here):
    """of_one(name): the folder of the case's run in one process, made on first use."""

    def folder(name: str) -> Path:
        recipe, given, alone, _ = CASES[name]
        if not (world / "one" / name).exists():
            here(recipe, f"--model={world}", f"--output_dir=one/{name}", *given, *alone)
        return world / "one" / name

    return folder


@pytest.fixture
def of_two(world, of_one):
    """Every case on two ranks, started once; with FSDP as NAME_fsdp; refl_resumed resumes a run of one process."""
    if not (world / "two").exists():
        shutil.copytree(of_one("refl"), world / "two" / "refl_resumed")
        runs = []
        for name, (recipe, given, _, each) in CASES.items():
            for sharded in (False, True)[: 1 + (name in SHARDED)]:
                folder = f"--output_dir=two/{name}{'_fsdp' * sharded}"
                runs.append([recipe, [f"--model={world}", folder, *given, *each], sharded])
        first = "two/refl_resumed/checkpoints/step_000001"
        runs.append(["refl_sd35", [f"--resume={first}", "--refl.batch_size=1"], False])
        (world / "runs.json").write_text(json.dumps(runs))
        result = launch(world, HELPERS / "ranks_worker.py", "runs.json")
        assert result.returncode == 0, [line for line in result.stdout.splitlines() if "rror" in line]
        assert result.stdout.count("base weights are sharded over 2 processes") == len(SHARDED)
    return world / "two"


def assert_same_run(one: Path, two: Path) -> None:
    """Compare weights after every update, the exported reward or LoRA, and metrics."""
    for step in sorted(path.name for path in (one / "checkpoints").iterdir()):
        first, second = (load_file(run / "checkpoints" / step / "weights.safetensors") for run in (one, two))
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5)
    left = next(iter([*one.glob("lora/*.safetensors"), *one.glob("reward/*.safetensors")])).relative_to(one)
    first, second = load_file(one / left), load_file(two / left)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-4) for name in first)
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        for key in row:
            if not key.startswith(TIMED):
                assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), (key, row["step"])


@pytest.mark.parametrize("name", [*CASES, *(f"{name}_fsdp" for name in SHARDED)])
def test_two_processes_with_half_the_batch_are_one_with_all(name, of_two, of_one):
    one = of_one(name.removesuffix("_fsdp"))
    rows = read_metrics(one / "metrics.jsonl")
    assert max(row.get("grad_norm", 0.0) for row in rows) > 1e-3  # the comparison is not trivial
    if name.startswith("grpo"):
        assert rows[1]["dropped_groups"] == 0.5  # one rank had nothing to train on
    if name == "lpo":
        assert 0 < min(row["pairs_kept"] for row in rows[1:]) < 1
    assert_same_run(one, of_two / name)


def test_a_run_is_resumed_with_two_ranks(of_two, of_one):
    assert_same_run(of_one("refl"), of_two / "refl_resumed")


def test_a_run_is_resumed_with_one_rank(of_two, of_one, here, tmp_path):
    """Between two rollouts, which have two updates each."""
    shutil.copytree(of_two / "grpo", tmp_path / "run")
    here("grpo_sd35", f"--resume={tmp_path / 'run' / 'checkpoints' / 'step_000002'}", "--grpo.groups=2")
    assert_same_run(of_one("grpo"), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "grpo",
            ["--grpo.groups=2"],
            "by 2 processes, this run has 1, and each holds its share of a rollout in use",
        ),
        ("nft", ["--nft.groups=2"], "a rollout in use"),
        ("refl", [], "by 2 processes, this run has 1: samples per update: got 1, expected 2"),
    ],
)
def test_a_world_size_with_which_a_run_cannot_be_resumed_is_refused(name, options, message, of_two, here, capsys):
    first = of_two / name / "checkpoints" / "step_000001"
    before = (of_two / name / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as refused:
        here(CASES[name][0], f"--resume={first}", *options)
    assert refused.value.code == 2 and message in capsys.readouterr().err
    assert (of_two / name / "metrics.jsonl").read_bytes() == before


# ----------------------------------------------------------------------------- FSDP


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP version: got 1; expected 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: got true"),
    ],
)
def test_what_fsdp_is_not_here_is_refused(variables, message, monkeypatch):
    assert not sharding_asked()
    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        sharding_asked()


def test_a_reward_with_base_weights_of_its_own_is_not_sharded_beside_a_policy(tiny_reward_dir, tiny_pipeline):
    reward = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline, share_weights=False)
    with pytest.raises(ValueError, match="1 rewards have base weights of their own"):
        shard_base(Accelerator(cpu=True), tiny_pipeline.transformer.transformer_blocks, [reward])


# ----------------------------------------------------------------------------- one is lost

LOST = """
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.loop import Closures, Hook, RunFolder, fit
from dinalrm_align.train.state import RunState
from dinalrm_align.train.checkpoints import latest_checkpoint

folder, how = Path(sys.argv[1]), sys.argv[2]
accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=3))])
rank, size = accelerator.process_index, accelerator.num_processes
data = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
p = {"w": nn.Parameter(torch.ones(4))}
optim = OptimConfig(lr=0.05)


def lose(step):
    if rank == 1 and step == 3 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and step == 3 and how == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(600)


config = LoopConfig(steps=5, accumulate=2 // size, checkpoint_every=2)
fit(
    config,
    optim,
    RunState.initial(p, config, optim, samples=6),
    Closures(
        lambda micro_step: data[(micro_step * size + rank) * 3 :][: 1 + 2 * ((micro_step * size + rank) % 2)],
        lambda batch: (((batch @ p["w"] - 1) ** 2).mean(), {}),
        count=len,
    ),
    accelerator=accelerator,
    run=RunFolder(folder, checkpoint=latest_checkpoint(folder), resume_command="the same again"),
    hooks=[Hook(1, lose)],
)
"""


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_lost_rank_ends_the_run_which_can_be_resumed(how, tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(LOST)
    lost = launch(tmp_path, script, "run", how, look_every=3)  # the rank that is left has time to see it first
    assert lost.returncode not in (0, None) and "another process was lost" in lost.stdout
    assert "step_000002 with: the same again" in lost.stdout
    assert latest_checkpoint(tmp_path / "run").name == "step_000002"
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "whole"):  # one process resumes a run of two, weighting batches of 1 and 3 rows
        monkeypatch.setattr(sys, "argv", [str(script), folder, "well"])
        runpy.run_path(str(script))
    ends = [load_file(latest_checkpoint(tmp_path / name) / "weights.safetensors")["w"] for name in ("run", "whole")]
    torch.testing.assert_close(*ends)
