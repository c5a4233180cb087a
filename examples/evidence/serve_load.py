"""Measure the reward server: concurrent clients that send one sample per request, against one sample at a time.

    python examples/evidence/serve_load.py                 # writes examples/results/serve_load.md
    python examples/evidence/serve_load.py --samples 32 --rounds 1 --output serve_load.md

Servers of the embedded world's reward run in processes of their own, with two CPU threads each: one without batches,
which is one-at-a-time scoring; one with micro-batches; and one whose threads each score batches of their own (two
devices, both of them the CPU, which share the weights). Clients are threads of this process; each sends a request when
the one before is answered. The servers take turns. The largest difference is between the scores that a
server returned and the score of each sample alone in this process.
"""

import argparse
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import median

import torch

from dinalrm_align.data.hub_prompts import load_prompts
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.registry import load_reward

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "one at a time": "--max_batch_size=1 --threads=2",
    "batches of up to 8": "--max_batch_size=8 --threads=2",
    "two copies, batches of up to 8": "--max_batch_size=8 --threads=1 --devices=[cpu,cpu]",
}
CLIENTS = (1, 8, 64)


@contextmanager
def server(options: str) -> Iterator[str]:
    """Run a server process; the value is its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "dinalrm_align.serve", "--model=shapes", f"--port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*command, *options.split()], env=environment, **quiet)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def measure(score: Callable[[int], float], samples: int, clients: int) -> tuple[float, list[float]]:
    """Return samples per second of `clients` threads that share `samples` calls, and the scores."""
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        scores = list(pool.map(score, range(samples)))
        return samples / (time.perf_counter() - start), scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "examples" / "results" / "serve_load.md")
    options = parser.parse_args()
    spec, samples = MODELS["shapes"], options.samples
    local = load_reward("dinalrm", spec=spec, pipeline=spec.pipeline)
    known = load_prompts(spec.heldout_prompts)
    prompts = [known[index % len(known)] for index in range(samples)]
    latents = torch.randn(samples, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [local(latents[index], prompts[index]).item() for index in range(samples)]

    rates: dict[tuple[str, int], list[float]] = {}
    worst = dict.fromkeys(SETTINGS, 0.0)
    with ExitStack() as servers:
        addresses = [servers.enter_context(server(settings)) for settings in SETTINGS.values()]
        remotes = dict(zip(SETTINGS, map(load_reward, addresses)))
        for turn, clients, name in product(range(-1, options.rounds), CLIENTS, SETTINGS):
            score = lambda index, of=remotes[name]: of(latents[index], prompts[index]).item()  # noqa: E731
            rate, scores = measure(score, samples if turn >= 0 else min(samples, clients), clients)
            worst[name] = max(worst[name], *(abs(a - b) for a, b in zip(scores, alone)))
            if turn >= 0:  # the turn before the first one starts threads and fills caches
                rates.setdefault((name, clients), []).append(rate)
    base = median(rates["one at a time", 1])
    header = ["clients", *SETTINGS, "ratio to one client, one at a time"]
    rows = []
    for clients in CLIENTS:
        found = {name: median(rates[name, clients]) for name in SETTINGS}
        ratios = ", ".join(f"{rate / base:.2f}" for rate in found.values())
        rows.append([clients, *(f"{rate:.0f}" for rate in found.values()), ratios])
    rows.append(["largest difference", *(f"{value:.1e}" for value in worst.values()), ""])
    about = (
        f"Samples per second, medians of {options.rounds} rounds of {samples} samples, one sample per request; "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"float32.\nScores have a standard deviation of {torch.tensor(alone).std().item():.2f}. "
        "Regenerate with `python examples/evidence/serve_load.py`.\n"
    )
    text = f"# The reward server under load\n\n{about}\n{table(header, rows)}\n"
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
