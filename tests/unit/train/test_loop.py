"""The loop on a model of nine numbers: exact resume, accumulation, moving average, guards, interruption."""

import dataclasses
import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from toy_run import Memory, run, toy, without_times

from dinalrm_align.train.checkpoints import checkpoint_to_resume, latest_checkpoint
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.loop import Closures, Hook, RunFolder, fit
from dinalrm_align.train.metrics import MetricsLog, read_metrics
from dinalrm_align.train.state import Ema, RunState, lr_factor


@pytest.fixture(autouse=True)
def fixed_seeds():
    torch.manual_seed(0)
    np.random.seed(0)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    optim = OptimConfig(lr=0.05, schedule="cosine", warmup_steps=2)
    whole = run(tmp_path / "whole", optim=optim)
    first = latest_checkpoint(tmp_path / "whole").with_name("step_000004")
    torch.manual_seed(99)  # what happens in between must not matter
    np.random.seed(99)
    again = run(tmp_path / "whole", optim=optim, resume=first)
    for name in whole:
        assert torch.equal(whole[name], again[name])
    other = run(tmp_path / "other", optim=optim)
    assert not torch.equal(whole["a"], other["a"])  # the noise depends on the global RNGs


def test_method_state_is_restored_from_the_checkpoint(tmp_path):
    whole, again = Memory(), Memory()
    expected = run(tmp_path / "whole", state=whole, stochastic=False)
    run(tmp_path / "cut", steps=4, state=Memory(), stochastic=False)
    got = run(tmp_path / "cut", resume=latest_checkpoint(tmp_path / "cut"), state=again, stochastic=False)
    assert torch.equal(whole.mean, again.mean) and float(whole.mean) != 0
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    with pytest.raises(ValueError, match="written by a method with other settings"):
        run(tmp_path / "cut", steps=8, resume=latest_checkpoint(tmp_path / "cut"))


def test_resume_rewrites_the_metrics_after_the_checkpoint(tmp_path):
    run(tmp_path)
    before = without_times(read_metrics(tmp_path / "metrics.jsonl"))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a line cut short by a crash
    run(tmp_path, resume=tmp_path / "checkpoints" / "step_000004")
    assert without_times(read_metrics(tmp_path / "metrics.jsonl")) == before
    assert [row["step"] for row in before] == [1, 2, 3, 4, 5, 6]


def test_evaluations_of_updates_that_were_not_saved_are_forgotten(tmp_path):
    """By a run that resumes and by a new one, but not by a run that is refused."""
    run(tmp_path / "a")
    for name in ("a", "b"):  # b: a run that was killed before its first checkpoint
        (tmp_path / name / "evaluations").mkdir(parents=True)
        for file in ("000000.json", "000004.png", "000006.json", "notes.json"):
            (tmp_path / name / "evaluations" / file).write_text("{}")

    def left(name):
        return sorted(path.name for path in (tmp_path / name / "evaluations").iterdir())

    with pytest.raises(ValueError, match="holds a run"):
        run(tmp_path / "a")
    assert len(left("a")) == 4
    run(tmp_path / "a", steps=4, resume=tmp_path / "a" / "checkpoints" / "step_000004")
    assert left("a") == ["000000.json", "000004.png", "notes.json"]
    run(tmp_path / "b", steps=2)
    assert left("b") == ["000000.json", "notes.json"]


def test_a_run_stopped_by_stop_when_can_be_resumed(tmp_path, capsys):
    """A hook's metric at update 3 stops the run: a checkpoint is saved, at_stop hooks are called, nothing is raised."""
    whole = run(tmp_path / "whole")
    torch.manual_seed(0)
    np.random.seed(0)
    called = []
    hooks = (Hook(3, lambda step: {"alarm": 1.0}, at_start=False), Hook(0, called.append, at_start=False, at_stop=True))
    run(tmp_path / "cut", hooks=hooks, stop_when=lambda row: "the alarm rang" if row.get("alarm") else None)
    newest = latest_checkpoint(tmp_path / "cut")
    assert (newest.name, called) == ("step_000003", [3])
    assert "stopped after update 3 of 6, because the alarm rang" in capsys.readouterr().out
    assert [row.get("alarm") for row in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [None, None, 1.0]
    went_on = run(tmp_path / "cut", resume=newest)
    assert all(torch.equal(went_on[name], whole[name]) for name in whole)


def test_hooks_made_up_on_resume_can_stop_the_run(tmp_path):
    """The evaluation at update 3 fails; on resume it succeeds, with an alarm: no further update."""
    results = iter([OSError("disk full"), {"alarm": 1.0}])

    def evaluate(step):
        if isinstance(result := next(results), Exception):
            raise result
        return result

    options = dict(hooks=(Hook(3, evaluate, at_start=False),), stop_when=lambda row: "alarm" * ("alarm" in row) or None)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, **options)
    run(tmp_path, resume=latest_checkpoint(tmp_path), **options)
    assert [row.get("alarm") for row in read_metrics(tmp_path / "metrics.jsonl")] == [None, None, 1.0]


def test_stop_when_at_the_last_update_changes_nothing(tmp_path, capsys):
    run(tmp_path, steps=1, stop_when=lambda row: "it is over")
    assert "stopped" not in capsys.readouterr().out
    assert latest_checkpoint(tmp_path).name == "step_000001"


def test_a_damaged_line_of_metrics_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_metrics_continue_after_the_bytes_that_a_checkpoint_refers_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    mark = log.mark()
    log.append({"step": 2})
    assert mark["bytes"] == len('{"step": 1}\n')
    again = MetricsLog(path, keep=mark["bytes"])
    assert read_metrics(path) == [{"step": 1}] and again.mark() == mark


def test_accumulating_4x1_equals_1x4(tmp_path):
    four = run(tmp_path / "four", batch_size=1, accumulate=4, stochastic=False)
    one = run(tmp_path / "one", batch_size=4, accumulate=1, stochastic=False)
    for name in four:
        torch.testing.assert_close(four[name], one[name], rtol=1e-5, atol=1e-6)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("four", "one")]
    assert rows[0][-1]["loss"] == pytest.approx(rows[1][-1]["loss"], rel=1e-5)


def test_moving_average_by_hand():
    """p = 1, 2, 3 after updates 1, 2, 3 from mean 0, decay 0.25; the early decays are 2/11, then 0.25 (3/12), 0.25.

    mean = 9/11; then 0.25 * 9/11 + 0.75 * 2 = 1.704545; then 0.25 * 1.704545 + 0.75 * 3 = 2.676136.
    """
    p = nn.Parameter(torch.zeros(1))
    ema = Ema({"p": p}, decay=0.25)
    for step in (1, 2, 3):
        p.data.fill_(float(step))
        ema.update(step)
    assert ema.mean["p"].item() == pytest.approx(2.676136, abs=1e-6)
    with ema.in_place():
        assert p.item() == pytest.approx(2.676136, abs=1e-6)
    assert p.item() == 3.0


def weights_seen(folder: Path, *stops: int, every: int) -> tuple[list[Tensor], list[Tensor]]:
    """What a hook sees before the first update and after each, and what is trained; runs to `stops`, each resumed."""
    seen, trained = [], []
    for stop in stops:
        parameters = toy()
        config, optim = LoopConfig(steps=stop, ema_decay=0.25, ema_every=every), OptimConfig(lr=0.1)

        def step(batch: None, parameters=parameters) -> tuple[Tensor, dict[str, float]]:
            trained.append(parameters["b"].detach().clone())
            return parameters["b"].square().sum() + parameters["a"].square().sum(), {}

        fit(
            config, optim, RunState.initial(parameters, config, optim), Closures(lambda micro_step: None, step),
            accelerator=Accelerator(cpu=True), run=RunFolder(folder, checkpoint=latest_checkpoint(folder)),
            hooks=[Hook(1, lambda step, parameters=parameters: seen.append(parameters["b"].detach().clone()))],
        )  # fmt: skip
    return seen, trained


def test_hooks_see_the_moving_average_once_it_has_moved(tmp_path):
    seen, trained = weights_seen(tmp_path, 3, every=2)
    torch.testing.assert_close(seen[0], trained[0])
    torch.testing.assert_close(seen[1], trained[1])  # until update 2, the average is that of the initial weights
    torch.testing.assert_close(seen[2], 0.25 * trained[0] + 0.75 * trained[2])
    torch.testing.assert_close(seen[3], seen[2])


def test_hooks_of_a_resumed_run_see_the_same_weights(tmp_path, capsys):
    """The average moves at update 3, after the resume; a run that ends before says so at its start."""
    whole, _ = weights_seen(tmp_path / "whole", 5, every=3)
    assert "ema_every" not in capsys.readouterr().out
    cut, trained = weights_seen(tmp_path / "cut", 2, 4, 5, every=3)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))
    assert torch.equal(cut[2], trained[2]) and not torch.equal(cut[3], trained[3])
    assert "loop.ema_every: got 3, more than the 2 updates of this run: the average of" in capsys.readouterr().out


def test_a_non_finite_loss_stops_before_the_weights_change(tmp_path):
    with pytest.raises(FloatingPointError, match="update 4 is not finite and was not made: loss nan"):
        run(tmp_path, poison_at=4)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert latest_checkpoint(tmp_path).name == "step_000003"  # the state before the failed update


def test_an_update_without_items_leaves_the_weights_as_they_are(tmp_path):
    """Neither momentum nor weight decay moves them; also the first updates may be empty, and a run can be resumed."""
    counts, seen = [0, 1, 0, 0, 1], []
    parameters, config, optim = toy(), LoopConfig(steps=5, checkpoint_every=1), OptimConfig(lr=0.1, weight_decay=0.5)

    def step(number: int):
        seen.append(parameters["a"].detach().clone())
        return (parameters["a"] ** 2).mean() + parameters["b"].mean(), {}

    for stop, resume in ((1, None), (5, tmp_path)):
        fit(
            dataclasses.replace(config, steps=stop),
            optim,
            RunState.initial(parameters, config, optim),
            Closures(lambda number: number, step, count=lambda number: counts[number]),
            accelerator=Accelerator(cpu=True),
            run=RunFolder(tmp_path, checkpoint=resume and latest_checkpoint(tmp_path), resume_command=""),
        )
    seen.append(parameters["a"])
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(seen)]
    assert moved == [count > 0 for count in counts]
    assert [row["lr"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 0.1, 0, 0, 0.1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_after_the_update_shows_the_resume_command_and_exits_130(tmp_path, capsys, number):
    hook = Hook(3, lambda step: os.kill(os.getpid(), number), at_start=False)
    whole = run(tmp_path / "whole")
    torch.manual_seed(0)
    np.random.seed(0)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "cut", hooks=(hook,))
    assert stopped.value.code == 130
    assert signal.getsignal(number) is handler
    assert "stopped after update 3 of 6" in (printed := capsys.readouterr().out)
    assert "resume with: python train.py --resume here" in printed
    checkpoint = latest_checkpoint(tmp_path / "cut")
    assert checkpoint.name == "step_000003"
    again = run(tmp_path / "cut", resume=checkpoint)
    assert torch.equal(whole["a"], again["a"])


def test_hooks_run_before_the_first_every_n_and_after_the_last_update(tmp_path):
    called: list[int] = []
    late: list[int] = []

    def note(step: int) -> dict[str, float]:
        called.append(step)
        return {"gold": float(step)}

    run(tmp_path, steps=5, hooks=(Hook(2, note), Hook(0, late.append, at_start=False)))
    assert called == [0, 2, 4, 5]
    assert late == [5]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == {"step": 0, "gold": 0.0}
    assert [row["step"] for row in rows if "gold" in row] == [0, 2, 4, 5]


def test_only_the_newest_checkpoints_are_kept_and_leftovers_are_ignored(tmp_path):
    (tmp_path / "checkpoints" / ".tmp_step_000099").mkdir(parents=True)
    run(tmp_path, steps=6, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_000004", "step_000006"]
    assert latest_checkpoint(tmp_path).name == "step_000006"


def test_resume_refuses_folders_without_a_fitting_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume: no folder"):
        checkpoint_to_resume(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        checkpoint_to_resume(tmp_path)
    assert latest_checkpoint(tmp_path) is None
    run(tmp_path, ema_decay=0.0)
    newest = checkpoint_to_resume(tmp_path)
    assert newest == checkpoint_to_resume(newest) == latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="holds no averaged weights"):
        run(tmp_path, resume=newest)


def test_learning_rate_by_hand():
    """Warm-up 2 of 6 steps: 1/2, 1; then cosine over four: progress 0, 1/4, 2/4, 3/4 -> 1, 0.853553, 0.5, 0.146447."""
    config = OptimConfig(schedule="cosine", warmup_steps=2)
    factors = [lr_factor(step, 6, config) for step in range(1, 7)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert lr_factor(1, 6, OptimConfig()) == 1.0


def test_the_recorded_learning_rate_and_clip_are_those_used(tmp_path):
    """AdamW's first update is lr * sign(gradient), whatever the clip: with warm-up 2 it is half of 0.05."""
    before, after = (
        toy(),
        run(tmp_path, steps=1, optim=OptimConfig(lr=0.05, warmup_steps=2, weight_decay=0.0, clip=1e-3)),
    )
    moved = (after["a"] - before["a"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.025), rtol=1e-3, atol=0)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["lr"] == pytest.approx(0.025)
