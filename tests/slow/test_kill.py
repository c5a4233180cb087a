"""Recipes that are interrupted at every update or killed anywhere and then resumed end as uninterrupted runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paths import RECIPES, ROOT
from same_run import differences
from tiny_recipes import make_world, recipes, stand_in, step_of

from dinalrm_align.train import loop
from dinalrm_align.train.checkpoints import checkpoint_to_resume, latest_checkpoint

HELPERS = Path(__file__).parents[1] / "helpers"

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "world"
    make_world(folder)
    return folder


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", stand_in)
    monkeypatch.setattr(FigureCanvasAgg, "print_png", stand_in)
    monkeypatch.setattr(Figure, "tight_layout", lambda figure: None)


@pytest.mark.parametrize("number", [0, 1], ids=["refl_sd35", "train_reward"])
def test_a_run_stopped_at_every_step_boundary_is_the_uninterrupted_one(
    world, tmp_path, no_drawing, monkeypatch, number
):
    """Weights, averages, optimiser state, metrics, evaluations, exports and RNG states, bit for bit."""
    recipe, run, whole = recipes(world)[number], tmp_path / "run", tmp_path / "whole"
    recipe.main([*recipe.arguments, f"--output_dir={run}"])
    run.rename(whole)
    lr_factor = loop.lr_factor
    for stop in range(1, STEPS):

        def interrupt(step: int, *rest: object, stop: int = stop) -> float:
            if step == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return lr_factor(step, *rest)

        monkeypatch.setattr(loop, "lr_factor", interrupt)
        with pytest.raises(SystemExit) as stopped:
            recipe.main([f"--resume={run}"] if stop > 1 else [*recipe.arguments, f"--output_dir={run}"])
        assert stopped.value.code == 130 and step_of(latest_checkpoint(run)) == stop
        torch.manual_seed(99 + stop)  # what happens in between must not matter
        np.random.seed(99 + stop)
        random.seed(99 + stop)
    monkeypatch.setattr(loop, "lr_factor", lr_factor)
    recipe.main([f"--resume={run}"])
    assert differences(whole, run) == []
    weights = run / "checkpoints" / "step_000004" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert differences(whole, run) == ["checkpoints/step_000004/weights.safetensors: differs"]


def test_a_run_stopped_by_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path):
    folder = tmp_path / "run"
    arguments = [*recipes(world)[0].arguments, f"--output_dir={folder}", "--loop.steps=100000"]
    command = [sys.executable, str(RECIPES / "refl_sd35.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    metrics = folder / "metrics.jsonl"
    for _ in range(600):
        if process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 1):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"--resume {folder}" in output
    assert checkpoint_to_resume(folder).is_dir()


def test_a_fork_killed_while_it_draws_a_bar_does_not_block_others(tmp_path):
    """tqdm's lock is shared by forks; without `own_bars` this program deadlocks."""
    program = (
        "import os, signal\n"
        "from kill_harness import fork, own_bars, tqdm\n"
        "own_bars()\n"
        "with tqdm(total=2) as bar:\n"
        "    def die():\n"
        "        tqdm.get_lock().acquire()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    print(fork(die, {str(tmp_path / 'out')!r}), flush=True)\n"
        "    bar.refresh()\n"
        f"    print(fork(bar.refresh, {str(tmp_path / 'out')!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{HELPERS.parent}:{HELPERS.parents[1]}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.split() == ["-9", "0"], done.stderr


def test_killed_runs_are_resumed_to_the_same_result(tmp_path):
    """The short form of `python tests/kill_harness.py --kills 120`."""
    harness, report = HELPERS.parent / "kill_harness.py", tmp_path / "report.json"
    environment = {**os.environ, "PYTHONPATH": str(harness.parents[1])}
    command = [sys.executable, str(harness), "--kills=8", "--seed=4", f"--report={report}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["kills"] >= 8 and found["lost"] == found["differing"] == 0
    assert found["by_recipe"].keys() == {"refl_sd35", "train_reward"} and found["by_moment"]["saving"] > 0
