"""A reward server and its client in one file: the server scores for a process that has loaded no weights.

    python examples/reward_server.py

In your own work the two are on different machines or in different environments: `python -m dinalrm_align.serve` in one,
`--reward http://host:port` or the lines below in the other.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

import dinalrm_align
from dinalrm_align import load_reward

with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
environment = {**os.environ, "PYTHONPATH": str(Path(dinalrm_align.__file__).parents[1])}
command = [sys.executable, "-m", "dinalrm_align.serve", "--model=shapes", f"--port={port}"]
server = subprocess.Popen([*command, "--rewards={judge: oracle}"], env=environment)
try:
    reward = load_reward(f"http://127.0.0.1:{port}")  # waits until the server is up
    judge = load_reward(f"http://127.0.0.1:{port}#judge")
    prompts = ["a large yellow triangle on black", "a small cyan square on white"]
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.zeros(2, 3, 64, 64)
    print(
        f"latents {reward(latents, prompts).tolist()}, another noise {reward(latents, prompts, seeds=[1, 2]).tolist()}"
    )
    print(f"black images, by the reward {reward.score_images(images, prompts).tolist()}")
    print(f"black images, by the judge {judge.score_images(images, prompts).tolist()}")
finally:
    server.terminate()  # finishes what it has accepted
    server.wait()
