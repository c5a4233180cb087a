"""Trackers get every row and image; a missing package is an error; metrics.jsonl is always written."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch import nn

from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.loop import Closures, Hook, RunFolder, fit
from dinalrm_align.train.metrics import check_tracker, open_tracker, read_metrics, track_image
from dinalrm_align.train.state import RunState

SETTINGS = "seed: 3\noptim:\n  lr: 0.1\n"


class Recorder(GeneralTracker):
    """Stores what it is given."""

    name, requires_logging_directory = "recorder", False

    def __init__(self):
        super().__init__(_blank=True)
        self.rows, self.images = {}, {}

    def start(self):
        pass

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **kwargs):
        self.rows.setdefault(step, {}).update(values)

    def log_images(self, values, step=None, **kwargs):
        self.images[step] = {name: np.array(images) for name, images in values.items()}


def run(accelerator: Accelerator, folder: Path, steps: int = 4, resume: Path | None = None) -> None:
    """Train one weight, with an image after updates 0, 2, 4, ..."""
    weight = nn.Parameter(torch.tensor(1.0))

    def image(step: int) -> None:
        track_image(accelerator, "held_out", Image.new("RGB", (9, 6), (10 * step,) * 3), step)

    folder.mkdir(exist_ok=True)
    config, optim = LoopConfig(steps=steps, ema_decay=0.0), OptimConfig(lr=0.1)
    fit(
        config,
        optim,
        RunState.initial({"weight": weight}, config, optim),
        Closures(float, lambda batch: (weight**2, {"batch": batch})),
        accelerator=accelerator,
        run=RunFolder(folder, checkpoint=resume),
        hooks=[Hook(2, image)],
    )


def test_a_tracker_gets_the_rows_of_the_metrics_file_and_the_images(tmp_path):
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=recorder)
    accelerator.init_trackers("any")
    run(accelerator, tmp_path / "run")
    written = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert written == [{"step": step, **recorder.rows[step]} for step in (1, 2, 3, 4)]
    assert sorted(recorder.images) == [0, 2, 4]
    assert recorder.images[4]["held_out"].shape == (1, 6, 9, 3)
    assert (recorder.images[4]["held_out"] == 40).all()


def test_no_tracker_leaves_the_metrics_file_alone(tmp_path):
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    open_tracker(accelerator, "none", tmp_path, SETTINGS)
    run(accelerator, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "checkpoints"}


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_an_import_error_that_names_the_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf"needs the package {name}: pip install 'dinalrm-align\[{name}\]'"):
        check_tracker(name)
    check_tracker("none")


@pytest.mark.extra
def test_tensorboard_reads_curves_images_and_settings_and_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    for steps, checkpoint in ((4, None), (6, folder / "checkpoints" / "step_000004")):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
        open_tracker(accelerator, "tensorboard", folder, SETTINGS, checkpoint)
        run(accelerator, folder, steps, checkpoint)
        accelerator.end_training()
    assert latest_checkpoint(folder).name == "step_000006"
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    rows = read_metrics(folder / "metrics.jsonl")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    shown = events.Images("held_out")
    assert (shown[0].width, shown[0].height) == (9, 6) and {event.step for event in shown} == {0, 2, 4, 6}
    assert any("seed: 3" in str(event.tensor_proto.string_val) for event in events.Tensors("settings/text_summary"))


@pytest.mark.extra
def test_wandb_offline_keeps_curves_images_and_settings_below_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    accelerator = Accelerator(cpu=True, log_with="wandb", project_dir=folder)
    open_tracker(accelerator, "wandb", folder, SETTINGS)
    run(accelerator, folder)
    tracked = accelerator.get_tracker("wandb", unwrap=True)
    assert tracked.config["seed"] == 3 and tracked.config["optim"] == {"lr": 0.1}
    rows = read_metrics(folder / "metrics.jsonl")
    assert tracked.summary["loss"] == rows[-2]["loss"]  # wandb commits a step when the next begins
    accelerator.end_training()
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    assert len(list((offline / "files" / "media" / "images").glob("held_out_*.png"))) == 3
