"""Steps of the GPU report in one process: `python tests/gpu/worker.py STEP ... --weights DIR --folder DIR --rows FILE`.

Every finished run is appended to FILE as one line of JSON, so that a step that is stopped keeps its rows; runs that
have succeeded before are left out. --dry_run: tiny networks on a GPU that is not there (`helpers/fake_gpu.py`).
"""

import argparse
import contextlib
import gc
import json
import os
import runpy
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import StableDiffusion3Pipeline  # noqa: F401  # and with it bitsandbytes and peft, before the fake GPU
from fake_gpu import FakeGpu
from public_folders import SIZES, build
from recipe_rows import Row, Scale, alignment_rows, reward_rows, write_data

from dinalrm_align.align.savings.config import Case
from dinalrm_align.align.savings.cost import count, matrix_rate, measure
from dinalrm_align.train.cost import PhaseMeter

MIB = 2**20
QUANTISED = {
    "refl, base nf4": ("--memory.base_quant", "nf4"),
    "refl, base int8": ("--memory.base_quant", "int8"),
    "refl, AdamW in 8 bits": ("--optim.name", "adamw8bit"),
}
TOP = 25
"""Kernels in the table of the profile."""


@dataclass(frozen=True)
class Job:
    """What a step needs. rows: file that runs are appended to; folder: for the files of the runs."""

    weights: Path
    folder: Path
    rows: Path
    dry_run: bool
    step: str = ""

    @property
    def size(self) -> str:
        return "tiny" if self.dry_run else "full"

    @property
    def scale(self) -> Scale:
        """512 x 512, 10 denoising steps, 4 samples; three updates, of which the last is reported."""
        if self.dry_run:
            return Scale(64, device="cuda")
        return Scale(512, num_steps=10, batch=4, updates=3, device="cuda")

    def alignment(self, *more: str) -> list[Row]:
        return alignment_rows(self.weights, self.folder / "data", self.folder, self.scale, more)

    def add(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Append what `work` returns, or the error it ends with, unless a run of this name has succeeded before."""
        if read_rows(self.rows).get((self.step, name), {}).get("status") == "done":
            return
        print(f"---- {name}", flush=True)
        begun = time.monotonic()
        try:
            found = {"status": "done", **work()}
        except (Exception, SystemExit) as error:  # of one run; the others go on
            traceback.print_exc()
            found = {"status": f"failed: {type(error).__name__}: {error}"[:300]}
        found |= {"step": self.step, "name": name, "seconds": time.monotonic() - begun}
        with open(self.rows, "a") as file:
            file.write(json.dumps(found) + "\n")
        gc.collect()
        torch.cuda.empty_cache()

    def on_gpu(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return work(); in a dry run on the fake GPU, and RuntimeError if a tensor was on the wrong device."""
        if not self.dry_run:
            return work()
        with FakeGpu() as gpu:
            found = work()
        print(gpu.report())
        if gpu.faults:
            raise RuntimeError(f"{len(gpu.faults)} faults of devices: {next(iter(gpu.faults))}")
        return found


class Reserved(threading.Thread):
    """The largest number of bytes that torch's allocator has reserved, read every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._end = 0, threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.02):
            self.peak = max(self.peak, torch.cuda.memory_reserved())

    def stop(self) -> int:
        self._end.set()
        self.join()
        return self.peak


def run_recipe(row: Row) -> dict[str, Any]:
    """Run a recipe in this process; return the last update's milliseconds and MiB by phase, and the memory reserved."""
    meter = Reserved()
    meter.start()
    try:
        runpy.run_path(str(ROOT / "recipes" / f"{row.recipe}.py"))["main"](row.arguments)
    finally:
        reserved = meter.stop()
    return {"reserved_mib": reserved / MIB} | last_update(row.output)


def last_update(run: Path) -> dict[str, Any]:
    """Return milliseconds and MiB by phase of a run's last update; nothing for a recipe without updates."""
    if not (metrics := run / "metrics.jsonl").exists():
        return {}
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {
        key: {name.split("/")[1]: scale * value for name, value in last.items() if name.startswith(prefix)}
        for key, prefix, scale in (("milliseconds", "seconds/", 1000.0), ("memory_mib", "memory_mib/", 1.0))
    }


def folders(job: Job) -> None:
    """The random weights; without T5, which is not measured here."""
    job.add("public folders", lambda: {"folder": str(build(job.weights, job.size, t5=False))})


def recipes(job: Job) -> None:
    """Every recipe, without torch.compile."""
    for row in [*job.alignment(), *reward_rows(job.weights, job.folder / "data", job.folder, job.scale)]:
        job.add(row.name, lambda row=row: job.on_gpu(lambda: run_recipe(row)))


def compiled(job: Job) -> None:
    """The alignment recipes with torch.compile."""
    for row in job.alignment("--memory.compile", "true"):
        if row.recipe != "mine_pairs":
            output = row.output.with_name(f"{row.output.name}_compiled")
            arguments = tuple(str(output) if word == str(row.output) else word for word in row.arguments)
            row = replace(row, name=f"{row.name}, compiled", arguments=arguments, output=output)
            torch._dynamo.reset()
            job.add(row.name, lambda row=row: job.on_gpu(lambda: run_recipe(row)))


def quantised(job: Job) -> None:
    """ReFL on a base model in 4 and 8 bits, and with 8-bit AdamW."""
    refl = {row.name: row for row in job.alignment()}["refl"]
    for name, options in QUANTISED.items():
        output = refl.output.with_name(name.replace(", ", "_").replace(" ", "_"))
        row = replace(
            refl, name=name, output=output, arguments=(*refl.arguments, *options, "--output_dir", f"{output}")
        )
        job.add(name, lambda row=row: job.on_gpu(lambda: run_recipe(row)))


def measured(job: Job) -> None:
    """Counted and measured cost of the gradient part of a ReFL update, and the rate of a large matrix product."""
    if not job.dry_run:
        job.add("matrix product", lambda: {"teraflops": matrix_rate()})
    for size in (64,) if job.dry_run else (512, 1024):
        for reward in ("dinalrm",) if job.dry_run else ("dinalrm", "pickscore", "hpsv3"):
            quant = dict(reward_quant="nf4") if reward == "hpsv3" else {}
            for case in ((base := Case(reward=reward, size=size, **quant)), base.kept)[: 1 if job.dry_run else 2]:
                kept = "" if case.policy_checkpointing else ", nothing recomputed"
                nf4 = " in 4 bits" if quant else ""
                job.add(f"{reward}{nf4}, {size} x {size}{kept}", lambda case=case: compare(job, case))


def compare(job: Job, case: Case) -> dict[str, Any]:
    """Count and measure a case. Memory in GiB."""
    networks = SIZES[job.size].networks
    cost = count(case, networks)

    def work() -> dict[str, Any]:
        found = measure(case, networks, warmup=1, repeats=3)
        numbers = dict(measured_gib=found.memory / 2**30, reserved_mib=found.reserved / MIB)
        return numbers | {"milliseconds": {"update": found.milliseconds}}

    return dict(counted_gib=cost.memory / 2**30, teraflop=cost.f2 / 1e12) | job.on_gpu(work)


def profile(job: Job) -> None:
    """The kernels of one update of ReFL, rollout included; on a GPU of the second update."""
    refl = {row.name: row for row in job.alignment()}["refl"]
    output = refl.output.with_name("refl_profiled")
    row = replace(refl, output=output, arguments=(*refl.arguments, "--output_dir", f"{output}"))

    def work() -> dict[str, Any]:
        with profiled_update(2 - job.dry_run, "CPU" if job.dry_run else "CUDA") as profiler:
            job.on_gpu(lambda: run_recipe(row))
        key = "self_cpu_time_total" if job.dry_run else "self_device_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))[:TOP]
        kernels = [dict(name=e.key[:90], calls=e.count, milliseconds=getattr(e, key) / 1000) for e in events]
        total = sum(getattr(event, key) for event in profiler.key_averages()) / 1000
        return {"kernels": kernels, "milliseconds": {"all kernels": total}}

    job.add("refl, one update", work)


@contextlib.contextmanager
def profiled_update(number: int, activity: str) -> Iterator[torch.profiler.profile]:
    """Profile the update of this number, from PhaseMeter.start_step to finish_step, which the training loop calls."""
    profiler = torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, activity)])
    started = 0
    start, finish = PhaseMeter.start_step, PhaseMeter.finish_step

    def start_step(meter: PhaseMeter, **options: bool) -> None:
        nonlocal started
        started += 1
        if started == number:
            profiler.start()
        start(meter, **options)

    def finish_step(meter: PhaseMeter) -> dict[str, float]:
        found = finish(meter)
        if started == number:
            profiler.stop()
        return found

    PhaseMeter.start_step, PhaseMeter.finish_step = start_step, finish_step
    try:
        yield profiler
    finally:
        PhaseMeter.start_step, PhaseMeter.finish_step = start, finish


def distributed(job: Job) -> None:
    """ReFL with NCCL in a process group of one rank, and the same with FSDP2."""
    refl = {row.name: row for row in job.alignment()}["refl"]
    launchers = {
        "refl, NCCL": ["torchrun", "--nproc-per-node", "1"],
        "refl, FSDP2": [
            "accelerate",
            "launch",
            "--config_file",
            "recipes/accelerate/gpu8_fsdp2.yaml",
            "--num_processes",
            "1",
        ],
    }
    for name, launcher in launchers.items():
        output = refl.output.with_name(name.replace(", ", "_"))
        command = [*launcher, "recipes/refl_sd35.py", *refl.arguments, "--output_dir", str(output)]

        def work(command: list[str] = command, output: Path = output) -> dict[str, Any]:
            subprocess.run(command, cwd=ROOT, check=True)
            return last_update(output)

        job.add(name, work)


def read_rows(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return {(step, name): row}; of several attempts the last."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {(row["step"], row["name"]): row for row in map(json.loads, lines)}


STEPS = {step.__name__: step for step in (folders, measured, recipes, profile, quantised, distributed, compiled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="files of the runs")
    parser.add_argument("--rows", type=Path, required=True, help="file that the rows are appended to")
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    job = Job(options.weights.absolute(), options.folder.absolute(), options.rows, options.dry_run)
    write_data(job.folder / "data", job.scale.pixels)
    if options.dry_run:
        torch.set_num_threads(1)
    for step in options.steps:
        print(f"======== {step}", flush=True)
        STEPS[step](replace(job, step=step))


if __name__ == "__main__":
    main()
