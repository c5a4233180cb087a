"""Write and read metrics.jsonl, and log to the experiment trackers of accelerate. Does not import torch.

Each line of metrics.jsonl is a JSON object with `step`, the number of updates done, and the metrics by name.

TensorBoard logs to the run folder: `tensorboard --logdir RUN`. Weights & Biases logs to the wandb server. With
WANDB_MODE=offline, the log goes to the run folder; `wandb sync RUN/wandb/offline-run-*` uploads the log later. wandb
keeps the files of an artifact in its own folder (WANDB_DATA_DIR) until then.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dinalrm_align.train.files import STATE, flush, parse_json, read_json, read_text, write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

METRICS = "metrics.jsonl"
PROJECT = "dinalrm_align"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Appends rows of metrics to metrics.jsonl and keeps a running SHA-256 of the file."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Open the log file `path`. If the file exists, only its first `keep` bytes are kept."""
        self.path = path
        kept = path.read_bytes()[:keep] if keep else b""
        write_atomically(path, kept)
        self._bytes, self._digest = len(kept), hashlib.sha256(kept)

    def append(self, row: Mapping[str, float]) -> None:
        line = (json.dumps(row) + "\n").encode()
        with open(self.path, "ab") as file:
            file.write(line)
        self._bytes += len(line)
        self._digest.update(line)

    def mark(self) -> dict[str, Any]:
        """Flush the file to disk; return {"bytes": size, "sha256": digest} of the file. Checkpoints store this dict."""
        flush(self.path)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.jsonl file, without an incomplete last line. Raises ValueError for bad rows."""
    *lines, _ = read_text(path, "file of metrics").split("\n")
    rows = []
    for number, line in [(number, line) for number, line in enumerate(lines, 1) if line]:
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{where}: got {line!r:.80}; expected an object of metrics with its step")
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{where}: {name}: got {value!r:.80}; expected a number")
        rows.append(row)
    return rows


def check_tracker(name: str) -> None:
    """Raise ImportError if the package of the tracker `name` is not installed. "none" needs no package."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ImportError(f"--tracker {name} needs the package {name}: pip install 'dinalrm-align[{name}]'")


def open_tracker(
    accelerator: "Accelerator", name: str, folder: Path, settings: str, checkpoint: Path | None = None
) -> None:
    """Start the tracker `name` (`none`, `wandb` or `tensorboard`) and log `settings`, the run's settings as YAML.

    `checkpoint`: checkpoint that the run resumes from. TensorBoard discards entries logged after this checkpoint.
    `accelerator.end_training` closes the tracker.
    """
    if name == "wandb":
        options = {"name": folder.name, "group": folder.name, "dir": str(folder)}
        accelerator.init_trackers(PROJECT, config=yaml.safe_load(settings), init_kwargs={name: options})
    elif name == TENSORBOARD:
        options = {} if checkpoint is None else {"purge_step": read_json(checkpoint / STATE)["step"] + 1}
        accelerator.init_trackers(TENSORBOARD, init_kwargs={name: options})  # logs to RUN/tensorboard
        if accelerator.is_main_process:
            text = "\n".join(f"    {line}" for line in settings.splitlines())  # a Markdown code block
            accelerator.get_tracker(TENSORBOARD, unwrap=True).add_text("settings", text)


def track_image(accelerator: "Accelerator", name: str, image: "Image", step: int) -> None:
    """Log an RGB image under the title `name` to every tracker. Must be called on the main process only."""
    pixels = np.asarray(image)
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
        tracker.log_images({name: pixels[None]}, step=step, **options)


def track_folder(accelerator: "Accelerator", folder: Path, name: str) -> None:
    """Log the files of a folder, trained weights, as an artifact of wandb, if it is a tracker. TensorBoard has none."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.tracker.log_artifact(str(folder), name=re.sub(r"[^\w.-]+", "_", name)[-128:], type="model")
