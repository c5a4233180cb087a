"""Trackers of metrics and images besides metrics.jsonl: wandb or tensorboard, by accelerate. Torch-free at import.

tensorboard writes to the run's folder (`tensorboard --logdir RUN`), wandb to its server, or with WANDB_MODE=offline to
the run's folder, for `wandb sync RUN/wandb/offline-run-*`.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from dinalrm_align.train.files import read_json
from dinalrm_align.train.seal import STATE

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "dinalrm_align"
TENSORBOARD = "tensorboard"


def check_tracker(name: str) -> None:
    """Raise ImportError, naming the extra, if the package of this tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ImportError(f"--tracker {name} needs the package {name}: pip install 'dinalrm-align[{name}]'")


def tracker_options(name: str, folder: Path) -> dict[str, Any]:
    """Arguments of `Accelerator` for a run in `folder`."""
    return {} if name == "none" else {"log_with": name, "project_dir": folder}


def open_tracker(
    accelerator: "Accelerator", name: str, folder: Path, settings: str, checkpoint: Path | None = None
) -> None:
    """Start the tracker of `tracker_options`; the accelerator's `end_training` closes it.

    settings: of the run, as YAML. checkpoint: that the run is resumed from; what was tracked after it is dropped.
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
    """Log an image file to every tracker of the accelerator; called on the main process."""
    if not accelerator.trackers:
        return
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
        tracker.log_images({name: pixels[None]}, step=step, **options)
