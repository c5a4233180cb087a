"""Write and read metrics.jsonl, one JSON object per line with its `step`; log to trackers. Torch-free.

The trackers are accelerate's. tensorboard writes to the folder of the run: `tensorboard --logdir RUN`. wandb writes to
its server; with WANDB_MODE=offline it writes to the folder of the run, for `wandb sync RUN/wandb/offline-run-*`.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from dinalrm_align.train.files import STATE, flush, parse_json, read_json, read_text, write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

METRICS = "metrics.jsonl"
PROJECT = "dinalrm_align"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Appends rows to metrics.jsonl and updates the SHA-256 of the file."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Keep only the first `keep` bytes of an existing file; a resumed run writes the later rows again."""
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
        """Flush the file to disk; return its size in bytes and its SHA-256, which a checkpoint stores."""
        flush(self.path)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.jsonl. Skips a last line cut short by a crash; other bad lines raise ValueError."""
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
    """Raise ImportError, naming the extra to install, if the package of the tracker `name` is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ImportError(f"--tracker {name} needs the package {name}: pip install 'dinalrm-align[{name}]'")


def open_tracker(
    accelerator: "Accelerator", name: str, folder: Path, settings: str, checkpoint: Path | None = None
) -> None:
    """Start the tracker `name` and log the settings of the run, a YAML text. `accelerator.end_training` closes it.

    checkpoint: the checkpoint that the run resumes from; tensorboard then discards what was logged after it.
    """
    if name == "wandb":
        options = {"name": folder.name, "group": folder.name, "dir": str(folder)}
        accelerator.init_trackers(PROJECT, config=yaml.safe_load(settings), init_kwargs={name: options})
    elif name == TENSORBOARD:
        options = {} if checkpoint is None else {"purge_step": read_json(checkpoint / STATE)["step"] + 1}
        accelerator.init_trackers(TENSORBOARD, init_kwargs={name: options})  # a subfolder of the run
        if accelerator.is_main_process:
            text = "\n".join(f"    {line}" for line in settings.splitlines())  # a Markdown code block
            accelerator.get_tracker(TENSORBOARD, unwrap=True).add_text("settings", text)


def track_image(accelerator: "Accelerator", name: str, path: Path, step: int) -> None:
    """Log the image file `path` as `name` to every tracker. Call it on the main process."""
    for tracker in accelerator.trackers:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        options = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
        tracker.log_images({name: pixels[None]}, step=step, **options)
