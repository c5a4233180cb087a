"""Run everything that needs a GPU, and write one table and one JSON: `tests/gpu/run_all.sh --output_dir DIR`.

Steps, in this order: the tests marked `gpu`; the folders of random weights; the gradient part of a ReFL update, counted
and measured; one update of every recipe; the kernels of an update; quantised weights; NCCL and FSDP2 on one card;
torch.compile. Every step has a time limit and a log. A step that fails, or that the time does not suffice for, is a row
that says so, and the others go on. The same command continues: what has succeeded is kept.

--dry_run needs no GPU: tiny networks on one that is not there. Its times and bytes are no measurements.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DONE = "done"
CARD = "import torch; print(torch.cuda.get_device_name(), torch.__version__, sep=', torch ')"


@dataclass(frozen=True)
class Step:
    """A part of the report. hardware: why it needs a GPU also in a dry run; empty if it does not."""

    name: str
    seconds: float
    hardware: str = ""


STEPS = (
    Step("tests", 90, "tests marked gpu"),
    Step("folders", 120),
    Step("measured", 180),
    Step("recipes", 300),
    Step("profile", 90),
    Step("quantised", 150, "kernels of bitsandbytes"),
    Step("distributed", 120, "NCCL"),
    Step("compiled", 400, "kernels that torch.compile makes for the card"),
)
"""Seconds are limits; on one H100 the steps before `compiled` should take about six minutes in all."""


def command_of(steps: Sequence[Step], weights: Path, folder: Path, dry_run: bool) -> list[str]:
    if steps[0].name == "tests":
        return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/unit"]
    places = ["--weights", f"{weights}", "--folder", f"{folder / 'runs'}", "--rows", f"{folder / 'rows.jsonl'}"]
    names = [step.name for step in steps]
    return [sys.executable, "tests/gpu/worker.py", *names, *places, *(["--dry_run"] if dry_run else [])]


def run_step(command: Sequence[str], log: Path, seconds: float) -> str:
    """Run a command with a time limit; return how it ended."""
    with open(log, "a") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    return DONE if done.returncode == 0 else f"failed: status {done.returncode}"


def run_all(folder: Path, weights: Path, *, minutes: float, dry_run: bool) -> dict[str, Any]:
    """Run the steps that have not succeeded; return the content of gpu.json."""
    folder.mkdir(parents=True, exist_ok=True)
    file, end = folder / "gpu.json", time.monotonic() + 60 * minutes
    skipped = {step.name: f"needs a GPU: {step.hardware}" for step in STEPS if dry_run and step.hardware}
    steps = {name: dict(status=status, seconds=0.0, last="") for name, status in skipped.items()}
    fresh = {"dry_run": dry_run, "card": card(dry_run), "steps": steps}
    found = json.loads(file.read_text()) if file.exists() else fresh
    if found["dry_run"] != dry_run:
        raise SystemExit(f"output_dir: {folder} has a report with dry_run {found['dry_run']}; choose another folder")
    soft = [step for step in STEPS if not step.hardware]
    for steps in [soft] if dry_run else [[step] for step in STEPS]:  # a dry run needs one process
        if any(found["steps"].get(step.name, {}).get("status") != DONE for step in steps):
            begun, log, limit = time.monotonic(), folder / f"{steps[0].name}.log", sum(step.seconds for step in steps)
            if end - begun < 20:
                status = "not run: out of time; the same command continues"
            else:
                print(f"{', '.join(step.name for step in steps)} ...", flush=True)
                status = run_step(command_of(steps, weights, folder, dry_run), log, min(limit, end - begun))
            result = dict(status=status, seconds=time.monotonic() - begun, last=last_line(log))
            found["steps"] |= {step.name: dict(result) for step in steps}
        found["rows"] = read_rows(folder / "rows.jsonl")
        for row in found["rows"]:
            if row["status"] != DONE and found["steps"][row["step"]]["status"] == DONE:
                found["steps"][row["step"]]["status"] = "a run failed"
        file.write_text(json.dumps(found, indent=1))
        (folder / "gpu.md").write_text(markdown(found))
    return found


def card(dry_run: bool) -> str:
    if dry_run:
        return "no GPU: a dry run"
    asked = subprocess.run([sys.executable, "-c", CARD], capture_output=True, text=True)
    if asked.returncode:
        raise SystemExit("torch finds no CUDA GPU here; --dry_run needs none")
    return asked.stdout.strip()


def last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines() if log.exists() else []
    return lines[-1][:200] if lines else ""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of the worker; of several attempts the last."""
    rows = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return list({(row["step"], row["name"]): row for row in rows}.values())


def markdown(found: dict[str, Any]) -> str:
    """Return gpu.md: a table of the steps, and one of the rows of each kind."""
    rows, warning = found.get("rows", []), ""
    if found["dry_run"]:
        warning = "\n\n**A dry run on a GPU that is not there, with tiny networks: no number is a measurement.**"
    parts = [f"# GPU report: {found['card']}{warning}", table(
        ["step", "status", "s"],
        [[name, step["status"], f"{step['seconds']:.0f}"] for name, step in found["steps"].items()],
    )]  # fmt: skip
    measured = [row for row in rows if row["step"] == "measured"]
    if measured:
        parts += ["## Gradient part of one ReFL update, counted and measured", table(
            ["case", "counted GiB", "measured GiB", "error", "ms", "TFLOP", "TFLOP/s", "status"],
            [measured_cells(row) for row in measured],
        )]  # fmt: skip
    runs = [row for row in rows if row["step"] != "measured"]
    if runs:
        parts += ["## Recipes: the last update by phase", table(
            ["step", "run", "whole run, s", "ms by phase", "MiB above the start, by phase", "reserved GiB", "status"],
            [run_cells(row) for row in runs],
        )]  # fmt: skip
    for row in runs:
        if kernels := row.get("kernels"):
            cells = [
                [kernel["name"].replace("|", "/"), f"{kernel['calls']}", f"{kernel['milliseconds']:.2f}"]
                for kernel in kernels
            ]
            parts += [f"## Kernels of {row['name']}", table(["kernel", "calls", "ms"], cells)]
    return "\n\n".join(parts) + "\n"


def measured_cells(row: dict[str, Any]) -> list[str]:
    if "counted_gib" not in row:
        speed = f"{row['teraflops']:.0f}" if "teraflops" in row else ""
        return [row["name"], "", "", "", "", "", speed, row["status"]]
    counted, got, time_ = row["counted_gib"], row["measured_gib"], row["milliseconds"]["update"]
    off = f"{100 * (counted / got - 1):+.1f} %" if got else ""
    speed = f"{1000 * row['teraflop'] / time_:.1f}"
    return [
        row["name"],
        f"{counted:.2f}",
        f"{got:.2f}",
        off,
        f"{time_:.1f}",
        f"{row['teraflop']:.2f}",
        speed,
        row["status"],
    ]


def run_cells(row: dict[str, Any]) -> list[str]:
    times, bytes_ = (
        ", ".join(f"{name} {value:.0f}" for name, value in row.get(kind, {}).items())
        for kind in ("milliseconds", "memory_mib")
    )
    reserved = f"{row['reserved_mib'] / 1024:.2f}" if "reserved_mib" in row else ""
    return [row["step"], row["name"], f"{row['seconds']:.0f}", times, bytes_, reserved, row["status"]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"), help="gpu.md, gpu.json, logs and runs")
    parser.add_argument("--weights", type=Path, help="folder of the random weights; default: OUTPUT_DIR/weights")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all steps")
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args(argv)
    folder = options.output_dir.absolute()
    weights = (options.weights or folder / "weights").absolute()
    found = run_all(folder, weights, minutes=options.minutes, dry_run=options.dry_run)
    print(markdown(found))
    return found


if __name__ == "__main__":
    main()
