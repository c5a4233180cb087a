"""What a run needs to go on exactly: checkpoint folders and the metrics file.

A checkpoint is `checkpoints/step_000050/` with

    weights.safetensors  ema.safetensors  optimizer.pt  rng_0.pt (one per process)  state.json

It is written under a temporary name, flushed to disk and renamed, so that a folder called step_* is whole, and what
came before it stays until it is. Everything read back is plain tensors, numbers and text (`weights_only=True`).
"""

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = "checkpoints"


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, each with its `step`. A line is complete or it is not there."""

    def __init__(self, path: Path, *, last_step: int = -1) -> None:
        """Keep the lines of steps up to `last_step`, since a resumed run writes the later ones again, and go on."""
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= last_step] if path.exists() else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out. ValueError for any other bad line."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):  # every complete line ends in a newline, so this one was meant to be whole
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(
    run: Path,
    *,
    step: int,
    elapsed: float,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor] | None,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    keep_last: int,
) -> Path:
    """Write `run`/checkpoints/step_<step>, replacing one of that name, and delete all but the `keep_last` newest.

    Called by every process; each writes its own random state, the main one everything else.
    """
    folder = run / FOLDER / f"step_{step:06d}"
    temporary = folder.with_name(f".tmp_{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(_random_state(), temporary / f"rng_{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in parameters.items()}, temporary / "weights.safetensors"
        )
        if average is not None:
            save_file({name: mean.cpu().contiguous() for name, mean in average.items()}, temporary / "ema.safetensors")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        state = {"step": step, "elapsed": elapsed, "num_processes": accelerator.num_processes}
        (temporary / "state.json").write_text(json.dumps(state))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _move_into_place(temporary, folder)
        for old in _checkpoints(folder.parent)[:-keep_last]:
            if old != folder:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(
    folder: Path,
    *,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor] | None,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Put a checkpoint back in place, random state included; returns its state.json (step, elapsed, num_processes).

    The optimiser keeps the hyperparameters it was built with and takes the saved moments. Raises ValueError when names
    or shapes differ, when an average is wanted and none was saved, and for another number of processes.
    """
    state = json.loads((folder / "state.json").read_text())
    if state["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"{folder} was written by {state['num_processes']} processes, this run has {accelerator.num_processes}; "
            "start as many, since each has its own share of the data"
        )
    _copy(load_file(folder / "weights.safetensors"), parameters, folder)
    if average is not None:
        if not (folder / "ema.safetensors").exists():
            raise ValueError(f"{folder} holds no averaged weights; resume with ema_decay 0, as the run was started")
        _copy(load_file(folder / "ema.safetensors"), average, folder)
    saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    _set_random_state(torch.load(folder / f"rng_{accelerator.process_index}.pt", weights_only=True))
    return state


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of the run in this folder, or None."""
    found = _checkpoints(run / FOLDER)
    return found[-1] if found else None


def checkpoint_to_resume(path: Path) -> Path:
    """`path` itself when it is a checkpoint, else the newest one of the run in `path`; ValueError if there is none."""
    if not path.is_dir():
        raise ValueError(f"nothing to resume: no folder {path}; give that of a run or of one of its checkpoints")
    path = path.resolve()
    if (path / "state.json").exists():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise ValueError(f"nothing to resume: {path} holds no checkpoint yet; start the run again without --resume")
    return newest


def new_run_folder(asked: str | None, name: str) -> Path:
    """A folder that holds no run yet: the one asked for, else runs/<name>, runs/<name>_2, ... ValueError if taken."""
    if asked is not None:
        if latest_checkpoint(Path(asked)) is not None:
            raise ValueError(f"{asked} holds a run: go on with --resume {asked}, or choose another --output_dir")
        return Path(asked)
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}_{number}")).exists():
        number += 1
    return folder


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder lies in."""
    return checkpoint.parent.parent


def settings_of(checkpoint: Path) -> Path:
    """The config.yaml of the run that a checkpoint lies in; ValueError when there is none."""
    path = run_of(checkpoint) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} does not lie in the folder of a run ({path} is missing): its settings are unknown; resume "
            "it where it was written"
        )
    return path


def drop_later_checkpoints(run: Path, step: int) -> None:
    """Delete the run's checkpoints after `step`: it goes on from there, and they belong to what it leaves behind."""
    for folder in _checkpoints(run / FOLDER):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first; leftovers under temporary names are not among them."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if re.fullmatch(r"step_\d{6,}", entry.name))


def _move_into_place(temporary: Path, folder: Path) -> None:
    for entry in (*temporary.iterdir(), temporary):
        _flush(entry)
    if folder.exists():  # a step saved a second time, after a resume from before it
        replaced = folder.with_name(f".old_{folder.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
        os.rename(temporary, folder)
        shutil.rmtree(replaced)
    else:
        os.rename(temporary, folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(saved: dict[str, Tensor], into: dict[str, Any], where: Path) -> None:
    """Copy saved tensors into those of the same names, strictly."""
    expected = {name: tuple(tensor.shape) for name, tensor in into.items()}
    got = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if expected != got:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ValueError(
            f"{where} does not fit this model: {len(differing)} tensors differ, first {differing[0]!r}: saved "
            f"{got.get(differing[0])}, expected {expected.get(differing[0])}; resume with the settings of the run"
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


def _random_state() -> dict[str, Any]:
    """The global random states of torch, CUDA, numpy and Python, as tensors, numbers and text."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
