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
from wandb_log import finished_records

from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.loop import Closures, Hook, RunFolder, fit
from dinalrm_align.train.metrics import check_tracker, open_tracker, read_metrics, track_folder, track_image
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


class Wandb(Recorder):
    """As accelerate's WandBTracker (1.12, tracking.py): `tracker` is the run of wandb, which has log_artifact."""

    name = "wandb"

    @property
    def tracker(self):
        return self

    def log_artifact(self, path, name=None, type=None):
        self.artifact = path, name, type


def test_wandb_gets_weights_as_an_artifact_with_a_valid_name(tmp_path):
    wandb, other = Wandb(), Recorder()
    accelerator = Accelerator(cpu=True, log_with=[wandb, other])
    accelerator.init_trackers("any")
    track_folder(accelerator, tmp_path / "lora", "a sum+b-lora")
    assert wandb.artifact == (str(tmp_path / "lora"), "a_sum_b-lora", "model")
    Accelerator(cpu=True).init_trackers("none")
    track_folder(Accelerator(cpu=True), tmp_path / "absent", "name")


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
def test_wandb_offline_keeps_curves_images_settings_and_weights(tmp_path, monkeypatch):
    """The records of the run's file are read back: what `wandb sync` would upload."""
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DATA_DIR", str(tmp_path / "data"))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = tmp_path / "run"
    (folder / "lora").mkdir(parents=True)
    (folder / "lora" / "weights.safetensors").write_bytes(b"some weights")
    accelerator = Accelerator(cpu=True, log_with="wandb", project_dir=folder)
    open_tracker(accelerator, "wandb", folder, SETTINGS)
    run(accelerator, folder)
    track_folder(accelerator, folder / "lora", "run-lora")
    accelerator.end_training()
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert len(list((offline / "files" / "media" / "images").glob("held_out_*.png"))) == 3
    (file,) = offline.glob("*.wandb")
    records = finished_records(file)
    updates = [item for record in records for item in (*record.run.config.update, *record.config.update)]
    config = {item.key: item.value_json for item in updates}
    assert config["seed"] == "3" and config["optim"] == '{"lr":0.1}'
    logged = [{item.nested_key[0]: item.value_json for item in record.history.item} for record in records]
    losses = {int(row["_step"]): float(row["loss"]) for row in logged if "loss" in row}
    assert losses == {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl")}
    (artifact,) = [record.artifact for record in records if record.HasField("artifact")]
    assert (artifact.name, artifact.type) == ("run-lora", "model")
    (entry,) = artifact.manifest.contents
    assert entry.path == "weights.safetensors" and Path(entry.local_path).read_bytes() == b"some weights"
