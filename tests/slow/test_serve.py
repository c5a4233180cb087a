"""The server as a process: the command, SIGTERM, and a GRPO run whose server is killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from malformed_requests import own
from paths import RECIPES, ROOT, load_recipe
from reward_server import free_port, running
from same_run import differences
from tiny_recipes import make_world

from dinalrm_align.reward.callables import as_reward

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
START = 120
"""Seconds within which a server is up."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "world"
    make_world(folder)
    return folder


def start(world, port, *options):
    command = [sys.executable, "-m", "dinalrm_align.serve", f"--model={world}", f"--port={port}", *options]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(port, process):
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).read()
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


@contextmanager
def served(world, port, *options):
    process = start(world, port, *options)
    try:
        wait_for(port, process)
        yield process
    finally:
        process.kill()
        process.wait()


def test_sigterm_finishes_what_was_accepted(world):
    """A request waits 3 s for others when SIGTERM comes; it is answered, and new connections are refused."""
    port = free_port()
    with served(world, port, "--max_wait_ms=3000", "--rewards={both: dinalrm + 0.5*oracle}") as process:
        url = f"http://127.0.0.1:{port}"
        rewards = json.loads(urllib.request.urlopen(f"{url}/v1/rewards").read())["rewards"]
        assert list(rewards) == ["default", "both"]
        body = own(["a small red circle on white"])
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(lambda: urllib.request.urlopen(f"{url}/v1/score", body, timeout=60).read())
            while b"dinalrm_waiting 1" not in urllib.request.urlopen(f"{url}/metrics").read():
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert len(json.loads(answer.result(60))["scores"]) == 1
        process.wait(60)
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{url}/healthz", timeout=5)


def arguments(world, run, reward):
    return [
        f"--model={world}", f"--prompts={world / 'prompts.txt'}", f"--eval_prompts={world / 'prompts.txt'}",
        f"--reward={reward}", f"--output_dir={run}", "--device=cpu", "--policy.rank=2", "--profile_every=0",
        "--grpo.groups=2", "--grpo.group_size=2", "--grpo.num_steps=4", "--grpo.window_size=1",
        "--grpo.window_range=[0,2]",
        "--gradient_checkpointing=false", "--evaluation.samples=2", "--evaluation.shown=1", "--evaluation.every=0",
        "--loop.steps=6", "--loop.checkpoint_every=3",
    ]  # fmt: skip


def updates(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_a_grpo_run_outlives_its_server(world, tmp_path):
    """The server is killed after the first updates and started again. The run is the uninterrupted one, bit for bit."""
    port, run, whole = free_port(), tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, RECIPES / "grpo_sd35.py", *arguments(world, run, f"http://127.0.0.1:{port}")]
    begin = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with served(world, port):
        ended = subprocess.run(command, **begin)
    assert ended.returncode == 0 and "attempt 1 of" not in ended.stdout, ended.stdout
    run.rename(whole)
    with ThreadPoolExecutor(1) as pool:
        with served(world, port):
            process = subprocess.Popen(command, **begin)
            output = pool.submit(process.communicate)
            while updates(run) < 2:
                assert process.poll() is None, output.result()
                time.sleep(0.01)
        assert process.poll() is None and updates(run) < 6  # the server is dead
        with served(world, port):
            said, _ = output.result()
    assert process.returncode == 0 and "attempt 1 of 10 failed" in said, said
    assert updates(run) == updates(whole) >= 6 and differences(run, whole) == []


def test_a_run_whose_server_stays_away_says_how_to_go_on(world, tmp_path, monkeypatch, capsys):
    """After the last attempt the run ends with one line; resumed, it is the uninterrupted run, bit for bit."""
    main, run, whole, fails = load_recipe("grpo_sd35").main, tmp_path / "run", tmp_path / "whole", []

    def score(latents, prompts):
        if fails and updates(run) >= 5:
            raise RuntimeError("the card is gone")
        return latents.mean(dim=(1, 2, 3))

    monkeypatch.setattr("dinalrm_align.reward.http.time.sleep", lambda seconds: None)
    with running({"default": as_reward(score, name="mean")}) as address:
        main(arguments(world, run, address))
        run.rename(whole)
        fails.append(True)
        with pytest.raises(SystemExit) as stopped:
            main(arguments(world, run, address))
        assert stopped.value.code == 1 and 5 <= updates(run) < updates(whole)
        said = capsys.readouterr().err.splitlines()[-1]
        assert "no answer in 10 attempts" in said and "the card is gone" in said and f"--resume {run}" in said
        fails.clear()
        main([f"--resume={run}"])
    assert [line for line in differences(run, whole) if not line.startswith("checkpoints")] == []
