"""Where metrics and pictures go besides metrics.jsonl, which is always written: wandb or tensorboard.

Both are accelerate's trackers, made here and given everything that `loop.fit` records. tensorboard writes below the run
(`tensorboard --logdir RUN`), wandb to its server, or with WANDB_MODE=offline below the run, to be sent later by
`wandb sync RUN/wandb/offline-run-*`. No torch at the top.
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
    """ImportError, naming the extra to install, unless the package of this tracker is there; "none" needs none."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ImportError(f"--tracker {name} needs the package {name}: pip install 'dinalrm-align[{name}]'")


def tracker_options(name: str, folder: Path) -> dict[str, Any]:
    """What `Accelerator` is to be told so that a run in `folder` can be tracked."""
    return {} if name == "none" else {"log_with": name, "project_dir": folder}


def open_tracker(
    accelerator: "Accelerator", name: str, folder: Path, settings: str, checkpoint: Path | None = None
) -> None:
    """Start the tracker that `tracker_options` announced; `end_training` of the accelerator shuts it.

    settings: of the run, as YAML. checkpoint: what the run goes on from; what was tracked after it counts no more.
    """
    if name == "wandb":
        options = {"name": folder.name, "group": folder.name, "dir": str(folder)}
        accelerator.init_trackers(PROJECT, config=yaml.safe_load(settings), init_kwargs={name: options})
    elif name == TENSORBOARD:
        options = {} if checkpoint is None else {"purge_step": read_json(checkpoint / STATE)["step"] + 1}
        accelerator.init_trackers(TENSORBOARD, init_kwargs={name: options})  # the name of its folder below the run's
        if accelerator.is_main_process:
            text = "\n".join(f"    {line}" for line in settings.splitlines())  # markdown's way to show text as it is
            accelerator.get_tracker(TENSORBOARD, unwrap=True).add_text("settings", text)


def track_picture(accelerator: "Accelerator", name: str, path: Path, step: int) -> None:
    """Give the picture in a file to every tracker of the accelerator; called on the main process."""
    if not accelerator.trackers:
        return
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
        tracker.log_images({name: pixels[None]}, step=step, **options)
