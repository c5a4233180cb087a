"""File faults: full disks, unwritable folders, damaged, missing and foreign checkpoints.

Each raises an error that names the file and what to do, before anything is overwritten.
"""

import errno
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from same_run import differences
from tiny_recipes import make_world, recipes, stand_in
from toy_run import run, toy, without_times

from dinalrm_align.train import files, metrics
from dinalrm_align.train.checkpoints import check_checkpoint, checkpoint_to_resume, latest_checkpoint, load_checkpoint
from dinalrm_align.train.config import OptimConfig
from dinalrm_align.train.metrics import read_metrics
from dinalrm_align.train.state import RunState, adamw

FILES = ("weights.safetensors", "ema.safetensors", "optimizer.pt", "rng_0.pt", "state.json")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A run of four updates with whole checkpoints after 2 and 4; tests damage it."""
    run(tmp_path / "run", steps=4)
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------- full disks


class FullDisk:
    """`open` on a disk that fails in the middle of write number `at`, from 0."""

    def __init__(self, at: int, error: int = errno.ENOSPC) -> None:
        self.left, self.error, self.failed = at, error, False

    @contextmanager
    def __call__(self, path, mode="r", **options):
        with open(path, mode, **options) as file:
            if "r" not in mode:
                self.left -= 1
                if self.left < 0:
                    file, self.failed = self.Half(file, self.error), True
            yield file

    class Half:
        def __init__(self, file, error: int) -> None:
            self.file, self.error = file, error

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            raise OSError(self.error, "No space left on device")


@pytest.mark.parametrize("module", [files, metrics])
def test_a_disk_full_at_any_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, module):
    """Resume a run from its checkpoint at 2, and fail at each write up to the checkpoint at 4 in turn."""
    run(tmp_path / "whole", steps=4)
    folder, at = tmp_path / "run", 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        first = tmp_path / "whole" / "checkpoints" / "step_000002"
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "checkpoints" / "step_000004")
        disk = FullDisk(at)
        monkeypatch.setattr(module, "open", disk, raising=False)
        resumed = folder / "checkpoints" / first.name
        if module is files and at == 6:
            break  # metrics.jsonl and five files of a checkpoint
        if module is metrics and at == 2:
            break  # the rows of two updates
        with pytest.raises(OSError) as full:
            run(folder, steps=4, resume=resumed)
        assert disk.failed
        said, newest = str(full.value), latest_checkpoint(folder)
        assert "No space left on device" in said and f"{newest} with: python train.py" in said
        # if only the metrics cannot be written, the state after the last update is saved all the same
        written = {files: ["step_000002"], metrics: ["step_000002", f"step_00000{3 + at}"]}[module]
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == written
        check_checkpoint(resumed)
        monkeypatch.undo()
        run(folder, steps=4, resume=checkpoint_to_resume(folder), keep_last=3)
        if "step_000003" in written:
            shutil.rmtree(folder / "checkpoints" / "step_000003")
        assert differences(tmp_path / "whole", folder) == []
        at += 1


@pytest.mark.parametrize("limit", [0, 100, 3000, 5500])
def test_a_limit_on_the_size_of_files_leaves_the_previous_checkpoint(tmp_path, limit):
    """Writes beyond RLIMIT_FSIZE fail in the kernel after a part. RNG states have 20000 bytes."""
    run(tmp_path, steps=2)
    newest = latest_checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as full:
            run(tmp_path, steps=4, resume=newest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(full.value) and f"resume from {newest} with" in str(full.value)
    assert checkpoint_to_resume(tmp_path) == newest


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file.*no checkpoint yet"):
        run(tmp_path / "file" / "run")
    monkeypatch.setattr(files, "open", FullDisk(0, errno.EACCES), raising=False)
    with pytest.raises(OSError, match=r"run stopped .*metrics.jsonl"):
        run(tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run") is None


# ------------------------------------------------------------------------------------------------ damaged checkpoints


def refusal(folder: Path, name: str) -> str:
    """The error about the newest checkpoint, the same by a check and by `fit`, which must change nothing."""
    newest, before = latest_checkpoint(folder), bytes_of(folder)
    with pytest.raises(ValueError) as looked:
        checkpoint_to_resume(folder)
    with pytest.raises(ValueError) as fitted:
        run(folder, steps=6, resume=newest)
    assert str(looked.value) == str(fitted.value)
    assert bytes_of(folder) == before
    assert name in str(looked.value)
    return str(looked.value)


def spread(size: int, number: int) -> list[int]:
    """About `number` positions below `size`, the first and the last among them."""
    return sorted({round(i * (size - 1) / (number - 1)) for i in range(number)})


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_cut_short_is_refused_and_the_one_before_it_named(damaged, name):
    path = latest_checkpoint(damaged) / name
    content = path.read_bytes()
    for size in spread(len(content), 12):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError) as refused:
            checkpoint_to_resume(damaged)
        assert str(path) in str(refused.value)
        assert f"--resume {path.parent.with_name('step_000002')}" in str(refused.value)
    assert "is damaged" in refusal(damaged, str(path))
    run(damaged, steps=4, resume=path.parent.with_name("step_000002"))  # the suggestion works
    checkpoint_to_resume(damaged)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_wherever_it_is(damaged, name):
    path = latest_checkpoint(damaged) / name
    content = path.read_bytes()
    for number, position in enumerate(spread(len(content), 200)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << number % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="is damaged"):
            check_checkpoint(path.parent)
    refusal(damaged, str(path))
    path.write_bytes(content)
    check_checkpoint(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(damaged, name):
    path = latest_checkpoint(damaged) / name
    path.unlink()
    assert f"{path} is missing; resume from an earlier checkpoint: --resume" in refusal(damaged, name)


def test_metrics_changed_before_the_checkpoint_are_refused(damaged):
    path = damaged / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"step": 3', b'"step": 7'))
    said = refusal(damaged, str(path))
    assert said.endswith("step_000002")  # it depends on earlier rows only
    path.write_bytes(b" " + content)
    assert "no earlier checkpoint is intact" in refusal(damaged, str(path))
    path.unlink()
    assert "is missing" in refusal(damaged, str(path))


def test_a_damaged_checkpoint_is_not_suggested(damaged):
    for checkpoint in (damaged / "checkpoints").iterdir():
        (checkpoint / "weights.safetensors").write_bytes(b"")
    assert "no earlier checkpoint is intact" in refusal(damaged, "weights")


# ------------------------------------------------------------------------------------------------- of another run


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path / "one", identity={"seed": "0", "base model": "a"})
    run(tmp_path / "other", identity={"seed": "1", "base model": "a"})
    newest, before = latest_checkpoint(tmp_path / "one"), bytes_of(tmp_path / "one")
    for identity in ({"seed": "1", "base model": "a"}, {"seed": "0", "base model": "b"}, {"seed": "0"}, None):
        with pytest.raises(ValueError, match=r"step_000006 belongs to another run: its (seed|base model) is"):
            run(tmp_path / "one", steps=8, resume=newest, identity=identity)
    with pytest.raises(ValueError, match="is not a checkpoint of .*one"):
        run(tmp_path / "one", steps=8, resume=latest_checkpoint(tmp_path / "other"))
    assert bytes_of(tmp_path / "one") == before
    shutil.rmtree(newest)
    shutil.copytree(latest_checkpoint(tmp_path / "other"), newest)
    shutil.copy(tmp_path / "other" / "metrics.jsonl", tmp_path / "one" / "metrics.jsonl")
    with pytest.raises(ValueError, match="belongs to another run: its seed is 1, here it is 0"):
        run(tmp_path / "one", steps=8, resume=newest, identity={"seed": "0", "base model": "a"})


def test_a_new_run_does_not_overwrite_another(damaged):
    before = bytes_of(damaged)
    with pytest.raises(ValueError, match=r"run holds a run: resume from .*step_000004, or choose a new folder"):
        run(damaged)
    assert bytes_of(damaged) == before


def test_a_checkpoint_beyond_the_last_step_is_refused_before_anything_is_touched(damaged):
    before = bytes_of(damaged)
    with pytest.raises(ValueError, match="is at update 4, beyond loop.steps 3; raise loop.steps"):
        run(damaged, steps=3, resume=latest_checkpoint(damaged))
    assert bytes_of(damaged) == before


def test_leftovers_of_a_kill_are_deleted(damaged):
    whole = without_times(read_metrics(damaged / "metrics.jsonl"))
    for leftover in (".tmp_step_000004", ".old_step_000001"):
        (damaged / "checkpoints" / leftover).mkdir()
        (damaged / "checkpoints" / leftover / "weights.safetensors").write_bytes(b"half")
    (damaged / ".tmp_metrics.jsonl").write_bytes(b"half")
    run(damaged, steps=4, resume=damaged / "checkpoints" / "step_000002")
    names = sorted(path.name for path in damaged.rglob("*") if path.name not in FILES)
    assert names == ["checkpoints", "metrics.jsonl", "step_000002", "step_000004"]
    assert without_times(read_metrics(damaged / "metrics.jsonl")) == whole


def test_an_interrupted_deletion_leaves_no_folder_that_looks_complete(damaged, monkeypatch):
    def cut_short(folder: Path, **options: object) -> None:
        if Path(folder).is_dir():
            (Path(folder) / "weights.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run(damaged, steps=6, keep_last=1, resume=latest_checkpoint(damaged))
    for checkpoint in (damaged / "checkpoints").glob("step_*"):
        check_checkpoint(checkpoint)
    monkeypatch.undo()
    run(damaged, steps=6, keep_last=1, resume=latest_checkpoint(damaged))
    assert [path.name for path in (damaged / "checkpoints").iterdir()] == ["step_000006"]


def test_moments_of_parameters_in_another_order_are_refused(damaged):
    """Moments are stored by number: 0 is `a`, of shape (2, 4), and 1 is `b`, of shape (1,)."""
    parameters = toy()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = adamw([{"params": [parameters["b"], parameters["a"]]}], OptimConfig())
    with pytest.raises(ValueError, match=r"does not fit this optimiser: exp_avg of parameter 0 is \(2, 4\), expected"):
        load_checkpoint(
            latest_checkpoint(damaged), RunState(parameters, optimizer), steps=4, accelerator=Accelerator(cpu=True)
        )  # fmt: skip
    assert not optimizer.state and all(torch.equal(before[name], p) for name, p in parameters.items())


# ------------------------------------------------------------------------------------------------ the command lines


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "world"
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def other_world(world) -> Path:
    """Equal names and shapes, other weights."""
    make_world(world.with_name("other"), seed=5)
    return world.with_name("other")


@pytest.fixture(scope="module", params=["refl_sd35", "train_reward"])
def finished(request, world, tmp_path_factory):
    """A recipe and its finished run of two updates; tests undo their damage."""
    recipe = next(recipe for recipe in recipes(world) if recipe.name == request.param)
    folder = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", stand_in)
        patch.setattr("matplotlib.figure.Figure.tight_layout", lambda figure: None)
        recipe.main([*recipe.arguments, f"--output_dir={folder}", "--loop.steps=2"])
    return recipe, folder


def ended(recipe, arguments: list[str], capsys) -> str:
    """The error message with which the recipe exits."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        recipe.main(arguments)
    assert stopped.value.code in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_the_command_line_refuses_a_damaged_checkpoint_and_suggests_an_intact_one(finished, capsys):
    recipe, folder = finished
    path = folder / "checkpoints" / "step_000002" / "optimizer.pt"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    before = bytes_of(folder)
    said = ended(recipe, [f"--resume={folder}", "--loop.steps=3"], capsys)
    assert f"error: {path} is damaged: got {len(content) - 1} bytes, expected {len(content)}" in said
    assert f"resume from an earlier checkpoint: --resume {path.parent.with_name('step_000001')}" in said
    assert bytes_of(folder) == before
    path.write_bytes(content)


def test_the_command_line_refuses_another_world_and_another_reward(finished, world, other_world, capsys):
    recipe, folder = finished
    before = bytes_of(folder)
    resume = [f"--resume={folder}", "--loop.steps=3"]
    said = ended(recipe, [*resume, f"--model={other_world}"], capsys)
    assert f"model: got '{other_world}'; expected '{world}', as in {folder}" in said and "start a new run" in said
    assert bytes_of(folder) == before
    another = {"refl_sd35": f"--reward={other_world / 'dinalrm'}", "train_reward": "--reward.head.dropout=0"}
    said = ended(recipe, [*resume, another[recipe.name]], capsys)
    assert f"{another[recipe.name].removeprefix('--').split('=')[0]}: got " in said and "start a new run" in said
    assert "seed: got 1; expected 0, as in" in ended(recipe, [*resume, "--seed=1"], capsys)
    assert bytes_of(folder) == before


def test_a_full_disk_ends_the_command_line_with_a_message(finished, tmp_path, monkeypatch, capsys):
    recipe, folder = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    resume = [f"--resume={copy}", "--loop.steps=3"]

    def full(*arguments: object, **options: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)  # exports a LoRA
    if recipe.name == "train_reward":
        monkeypatch.setattr(files, "open", FullDisk(3), raising=False)
    said = ended(recipe, resume, capsys)
    saved = {"refl_sd35": "step_000003", "train_reward": "step_000002"}[recipe.name]  # the export fails after update 3
    assert "No space left on device" in said and f"{saved} with: python" in said
    check_checkpoint(copy / "checkpoints" / "step_000002")


def test_a_folder_that_cannot_be_created_ends_the_command_line_with_a_message(finished, tmp_path, capsys):
    recipe, _ = finished
    (tmp_path / "file").write_text("in the way")
    said = ended(recipe, [*recipe.arguments, f"--output_dir={tmp_path / 'file' / 'run'}"], capsys)
    assert str(tmp_path / "file") in said
