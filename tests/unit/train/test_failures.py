"""A run that fails saves its last whole state and says how to go on; faults of the program keep their traceback."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from same_run import differences
from toy_run import Memory, run

from dinalrm_align.data.formats.record import Preference, check_preference
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.models.images import open_image
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.checkpoints import check_checkpoint, checkpoint_near, latest_checkpoint
from dinalrm_align.train.command import refusing
from dinalrm_align.train.files import InputError, parse_json, read_json
from dinalrm_align.train.loop import Hook
from dinalrm_align.train.metrics import read_metrics
from dinalrm_align.train.settings import check_integer

RESUME = "with: python train.py --resume here"
FAULTS = [TypeError("x"), ValueError("x"), KeyError("x"), AssertionError("x"), RuntimeError("CUDA out of memory")]
FAULTS.append(torch.OutOfMemoryError("CUDA out of memory"))
STOPS = [OSError(28, "No space left on device"), ConnectionError("no answer"), InputError("x"), FloatingPointError("x")]


@pytest.fixture(autouse=True)
def fixed_seeds():
    seed()


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def failing(error: Exception, at: int):
    def fail(number: int) -> None:
        if number == at:
            raise error

    return fail


def told(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


@pytest.mark.parametrize("error", [*FAULTS, *STOPS], ids=lambda error: type(error).__name__)
def test_the_state_before_the_failed_update_is_saved_and_resumes_bit_for_bit(tmp_path, error):
    """Update 4 draws random numbers and changes the method's state before it fails."""
    run(tmp_path / "whole", steps=6, state=Memory(), keep_last=9)
    seed()
    with pytest.raises(OSError if isinstance(error, OSError) else type(error)) as failed:
        run(tmp_path / "cut", steps=6, state=Memory(), keep_last=9, fail=failing(error, 4))
    newest = latest_checkpoint(tmp_path / "cut")
    assert newest.name == "step_000003" and f"resume from {newest} {RESUME}" in told(failed.value)
    run(tmp_path / "cut", steps=6, state=Memory(), keep_last=9, resume=newest)
    assert {line for line in differences(tmp_path / "whole", tmp_path / "cut") if "step_000003" not in line} == set()


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_of_the_program_keeps_its_type_and_its_traceback(tmp_path, error, capsys):
    with pytest.raises(type(error)) as failed, refusing():
        run(tmp_path, fail=failing(error, 2))
    assert failed.value is error and failed.traceback[-1].name == "fail"
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize("error", STOPS, ids=lambda error: type(error).__name__)
def test_a_stop_from_outside_is_one_line_with_the_command_and_status_1(tmp_path, error, capsys):
    with pytest.raises(SystemExit) as failed, refusing():
        run(tmp_path, fail=failing(error, 2))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert failed.value.code == 1 and last.startswith(f"error: run {tmp_path} stopped (") and RESUME in last


def test_a_non_finite_loss_is_one_line_too(tmp_path, capsys):
    with pytest.raises(SystemExit) as failed, refusing():
        run(tmp_path, poison_at=4)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert failed.value.code == 1 and "update 4 is not finite" in last and f"step_000003 {RESUME}" in last


def test_a_hook_that_fails_is_called_again_by_the_resumed_run(tmp_path):
    """The update before it is kept: weights, metrics and the other hooks' results."""
    calls = []

    def judge(step: int, down: bool = False) -> dict[str, float]:
        calls.append(step)
        if down and step == 3:
            raise ConnectionError("the judge does not answer")
        return {"gold": float(step)}

    run(tmp_path / "whole", steps=6, hooks=(Hook(3, judge),), keep_last=9)
    seed()
    with pytest.raises(OSError, match="the judge does not answer"):
        run(tmp_path / "cut", steps=6, hooks=(Hook(3, lambda step: judge(step, down=True)),), keep_last=9)
    newest = latest_checkpoint(tmp_path / "cut")
    assert newest.name == "step_000003"
    assert [row["step"] for row in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [0, 1, 2]
    calls.clear()
    run(tmp_path / "cut", steps=6, hooks=(Hook(3, judge),), keep_last=9, resume=newest)
    assert calls == [3, 6]
    assert {line for line in differences(tmp_path / "whole", tmp_path / "cut") if "step_000003" not in line} == set()


def test_a_hook_that_fails_after_the_last_update_is_called_again(tmp_path):
    with pytest.raises(KeyError):
        run(tmp_path, steps=3, hooks=(Hook(3, lambda step: {} if step == 0 else {}["gold"]),))
    run(tmp_path, steps=3, hooks=(Hook(3, lambda step: {"gold": 1.0}),), resume=latest_checkpoint(tmp_path))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["gold"] == 1.0


def test_nothing_is_saved_of_an_update_that_was_half_made(tmp_path, monkeypatch):
    def half(optimizer, closure=None):
        optimizer.param_groups[0]["params"][0].data.fill_(math.pi)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(torch.OutOfMemoryError) as failed:
        run(tmp_path)
    assert latest_checkpoint(tmp_path) is None and "there is no checkpoint yet" in told(failed.value)


def test_a_failure_before_the_first_update_saves_nothing(tmp_path):
    with pytest.raises(KeyError) as failed:
        run(tmp_path, fail=failing(KeyError("x"), 1))
    assert latest_checkpoint(tmp_path) is None and "there is no checkpoint yet, start again" in told(failed.value)


def test_a_failed_resume_keeps_the_checkpoint_that_it_began_with(tmp_path):
    run(tmp_path, steps=4)
    newest = latest_checkpoint(tmp_path)
    with pytest.raises(KeyError):
        run(tmp_path, steps=6, resume=newest, fail=failing(KeyError("x"), 1))
    assert latest_checkpoint(tmp_path) == newest
    check_checkpoint(newest)


# ------------------------------------------------------------------------------------------- set-up and other programs


def test_a_check_of_set_up_is_one_line_and_a_fault_is_not(capsys):
    for call, name in ((lambda: check_integer("steps", "x"), "steps"), (lambda: parse_json("{", "file"), "file")):
        with pytest.raises(SystemExit) as stopped, refusing():
            call()
        assert stopped.value.code == 2 and f"error: {name}" in capsys.readouterr().err
    with pytest.raises(TypeError), refusing():  # no check of this package: a library call with a wrong type
        parse_json(None, "file")
    with pytest.raises(KeyError), refusing():
        {}["x"]


def test_a_fault_in_a_program_that_resumes_says_how(capsys):
    with pytest.raises(ZeroDivisionError) as failed, refusing(stopped="the same command continues"):
        print(1 / 0)
    assert failed.value.__notes__ == ["stopped: the same command continues"]


def test_readers_of_data_raise_input_errors(tmp_path):
    """An error of data in the middle of a run is one line, without a traceback."""
    (tmp_path / "image.png").write_bytes(b"cut short")
    latents = torch.full((1, 16, 8, 8), math.nan)
    conditions = Conditions(["a"], torch.zeros(1, 5, 32), torch.zeros(1, 32))
    for read in (
        lambda: open_image(tmp_path / "image.png"),
        lambda: PairBatch.plain(latents, latents, conditions),
        lambda: read_json(tmp_path / "image.png"),
        lambda: check_preference(Preference("", Path("a.png"), Path("b.png"))),
    ):
        with pytest.raises(InputError):
            read()


def test_the_checkpoint_nearest_to_an_update(tmp_path):
    for step in (500, 1000, 2200):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    assert [checkpoint_near(tmp_path, step).name for step in (0, 440, 800, 5000)] == [
        "step_000500",
        "step_000500",
        "step_001000",
        "step_002200",
    ]
    with pytest.raises(ValueError, match="got no checkpoint"):
        checkpoint_near(tmp_path / "absent", 1)
