"""Run every recipe at full size for one update on a CPU, and compare the memory of each process with the prediction.

    python tests/full_size/rehearsal.py --weights DIR --output_dir runs/full_size       about an hour, 21 GB of disk

Weights are random and of true size, in the public layouts (`public_folders`); they are written to DIR if they are not
there. Every row is a process of its own: 256 x 256 pixels, two denoising steps, bfloat16. Rows that are finished are
kept, so that the same command continues after a stop. Writes full_size.md, full_size.json and one log a row.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = HELPERS.parents[1]
sys.path[:0] = [str(HELPERS), str(Path(__file__).parent)]
GB = 1e9
WITH_T5 = ("refl", "prepare_pairs")
"""Rows on the whole pipeline; the others leave out T5, which takes minutes to load."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""glibc's malloc returns freed blocks of 64 KiB and more to the system at once; else it keeps gigabytes."""
KEPT = ("--gradient_checkpointing", "false")
"""What `auto` chooses on this machine would depend on its free memory."""


def status_of(text: str) -> dict[str, int]:
    """Return the fields of /proc/PID/status that are sizes, in bytes."""
    rows = [line.split() for line in text.splitlines() if line.endswith(" kB")]
    return {name.removesuffix(":"): 1024 * int(size) for name, size, _ in rows}


def watch(command: Sequence[str], log: Path, timeout: float) -> dict[str, Any]:
    """Run a command; return its exit status, seconds, and peak bytes, resident and private, read ten times a second."""
    begun, peak, environment = (
        time.monotonic(),
        {"VmHWM": 0, "RssAnon": 0},
        dict(os.environ, HF_HUB_OFFLINE="1", **MALLOC),
    )
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            sizes = status_of(Path(f"/proc/{process.pid}/status").read_text())  # none once it has ended
            peak = {name: max(size, sizes.get(name, 0)) for name, size in peak.items()}
            if time.monotonic() - begun > timeout:
                process.kill()
            time.sleep(0.1)
    found = dict(status=process.returncode, seconds=time.monotonic() - begun)
    return found | dict(resident=peak["VmHWM"], private=peak["RssAnon"])


def rehearse(options: argparse.Namespace) -> dict[str, Any]:
    """Run the rows that are not finished; return the content of full_size.json."""
    from prediction import Memory, predict
    from public_folders import SIZES, build

    folder, size = options.output_dir.absolute(), options.size
    results = folder / "full_size.json"
    folder.mkdir(parents=True, exist_ok=True)
    build(options.weights, size)
    found = json.loads(results.read_text()) if results.exists() else {"machine": machine(), "rows": {}}
    found |= {"size": size, "pixels": SIZES[size].pixels}
    tiny = rows_of(build(folder / "tiny_weights", "tiny"), folder / "tiny", "tiny")
    rows = rows_of(options.weights, folder, size)
    for name, (scale, row) in rows.items():
        if options.rows and name not in options.rows:
            continue
        result = found["rows"].get(name, {})
        if result.get("status") != 0:
            log = f"{name.replace(', ', '_')}.log"
            start = run(tiny[name][1], folder / "tiny" / log, options.timeout)
            result = run(row, folder / log, options.timeout) | {"t5": name in WITH_T5, "libraries": start}
        start = result["libraries"]
        phases = predict(row, scale, size, Memory(start["private"], start["resident"] - start["private"]))
        phase, largest = max(phases.items(), key=lambda item: item[1].resident)
        found["rows"][name] = result | dict(
            phase=phase, predicted_resident=largest.resident,
            predicted_private=max(memory.private for memory in phases.values()),
            phases={each: vars(memory) for each, memory in phases.items()},
        )  # fmt: skip
        found["rows"] = {each: found["rows"][each] for each in rows if each in found["rows"]}
        results.write_text(json.dumps(found, indent=1))
        (folder / "full_size.md").write_text(table(found))
    return found


def rows_of(weights: Path, folder: Path, size: str) -> dict[str, tuple[Any, Any]]:
    """Write the data of the runs; return {name: (scale, row)}."""
    from public_folders import PIPELINE, SIZES, WITHOUT_T5
    from recipe_rows import Scale, alignment_rows, reward_rows, write_data

    write_data(folder / "data", SIZES[size].pixels)
    rows = {}
    for pipeline in (WITHOUT_T5, PIPELINE):
        scale = Scale(SIZES[size].pixels, pipeline=pipeline)
        places = weights.absolute(), folder / "data", folder / "runs", scale
        for row in [*alignment_rows(*places, KEPT), *reward_rows(*places, KEPT)]:
            if pipeline == WITHOUT_T5 or row.name in WITH_T5:
                rows[row.name] = scale, row
    return rows


def run(row: Any, log: Path, timeout: float) -> dict[str, Any]:
    """Run a row from the beginning, and print how it ended."""
    shutil.rmtree(row.output, ignore_errors=True)
    print(f"{row.name}: {row.recipe}.py ...", flush=True)
    found = watch([sys.executable, f"recipes/{row.recipe}.py", *row.arguments], log, timeout)
    print(f"    status {found['status']}, {found['seconds']:.0f} s, {found['resident'] / GB:.2f} GB", flush=True)
    if found["status"]:
        print(log.read_text()[-2000:], flush=True)
    return found | {"command": [f"recipes/{row.recipe}.py", *row.arguments]}


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    total = status_of(Path("/proc/meminfo").read_text())["MemTotal"]
    return f"{len(names)} cores, {names[0] if names else platform.machine()}, {total / GB:.1f} GB"


def error(row: dict[str, Any], kind: str) -> float:
    return 100 * (row[f"predicted_{kind}"] / row[kind] - 1)


def table(found: dict[str, Any]) -> str:
    """Return full_size.md. A row that failed has its exit status in place of the numbers."""
    lines = [
        f"# Every recipe at {found['size']} size for one update",
        "",
        f"On {found['machine']}. Random weights of the sizes and layouts of SD3.5 Medium, DiNa-LRM and PickScore; "
        f"{found['pixels']} x {found['pixels']} pixels, two denoising steps, bfloat16, no gradient checkpointing, one "
        "process a row. GB = 10^9 bytes. Resident: the process's peak, read files included (VmHWM); private: without "
        "the pages of files. Prediction: `tests/full_size/prediction.py`; its largest phase is named; the interpreter "
        "and its libraries are measured, by the same run on tiny weights. malloc returned freed blocks of 64 KiB at "
        "once. Seconds: the machine was shared.",
        "",
        "| run | T5 | s | resident | predicted | error | phase | private | predicted | error |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        t5 = "yes" if row["t5"] else "no"
        if row["status"]:
            lines.append(f"| {name} | {t5} | {row['seconds']:.0f} | failed, status {row['status']} | | | | | | |")
            continue
        cells = [
            f"{row['resident'] / GB:.2f}",
            f"{row['predicted_resident'] / GB:.2f}",
            f"{error(row, 'resident'):+.1f} %",
        ]
        cells += [row["phase"], f"{row['private'] / GB:.2f}", f"{row['predicted_private'] / GB:.2f}"]
        lines.append(f"| {name} | {t5} | {row['seconds']:.0f} | {' | '.join(cells)} | {error(row, 'private'):+.1f} % |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the weights, written if it is not there")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/full_size"))
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--rows", nargs="*", default=[], help="names of rows; by default all")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds after which a row is stopped")
    options = parser.parse_args(argv)
    found = rehearse(options)
    print(table(found))
    return found


if __name__ == "__main__":
    sys.exit(any(row["status"] for row in main()["rows"].values()))
