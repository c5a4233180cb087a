"""Checks of values: at once on the CPU; on a GPU in one transfer, in order, and before the optimiser's step."""

import pytest
import torch
from accelerate import Accelerator
from toy_run import toy

from dinalrm_align.train import cost
from dinalrm_align.train.checks import check, deferred
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.loop import Closures, RunFolder, fit
from dinalrm_align.train.progress import progress
from dinalrm_align.train.state import RunState


class Remote(torch.Tensor):
    """A CPU tensor that answers cuda:0 for its device. `reads` counts how often values are read."""

    reads = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    def tolist(self):
        Remote.reads += 1
        return self.as_subclass(torch.Tensor).tolist()

    __float__ = __bool__ = item = __int__ = lambda self: pytest.fail("a value is read by itself")


@pytest.fixture(autouse=True)
def no_reads():
    Remote.reads = 0


def remote(*values: float) -> Remote:
    return torch.tensor(values).as_subclass(Remote)


def expecting(*expected: float, heard: list | None = None):
    """A judge that notes what it gets, and raises ValueError for values other than `expected`."""

    def judge(values):
        if heard is not None:
            heard.append(values)
        if values != list(expected):
            raise ValueError(f"got {values}")

    return judge


def test_a_value_on_the_cpu_is_judged_at_once_also_where_checks_are_deferred():
    reached = []
    with pytest.raises(ValueError, match=r"got \[2.0\]"), deferred():
        check(torch.tensor(2.0), expecting(1))
        reached.append(1)
    assert not reached


def test_values_on_a_gpu_are_read_in_one_transfer_with_the_metrics():
    heard = []
    with deferred() as readings:
        check(remote(1, 2), expecting(1, 2, heard=heard))
        with deferred():  # of a function that is called inside
            check(remote(3)[0] > 2, expecting(1, heard=heard))
        assert not heard
        assert readings.read([remote(0.5)[0], 7, torch.tensor(0.25)]) == [0.5, 7.0, 0.25]
        assert heard == [[1, 2], [1]] and Remote.reads == 1
    assert Remote.reads == 1  # nothing was left to read


def test_the_first_failed_check_raises_at_the_end_of_the_block():
    reached = []
    with pytest.raises(ValueError, match=r"got \[5.0\]"), deferred():
        check(remote(1), expecting(1))
        check(remote(5), expecting(1))
        check(remote(6), expecting(1))
        reached.append(1)
    assert reached and Remote.reads == 1


def test_outside_of_a_block_a_check_on_a_gpu_raises_at_once():
    with pytest.raises(ValueError, match="got"):
        check(remote(5), expecting(1))


def test_an_error_of_the_block_does_not_hide_the_failed_check_before_it():
    """NaN in latents was reported as an error of whatever could not work with NaN."""
    with pytest.raises(ValueError, match=r"got \[5.0\]") as raised, deferred():
        check(remote(5), expecting(1))
        raise KeyError("other")
    assert isinstance(raised.value.__context__, KeyError)
    with pytest.raises(KeyError, match="other"), deferred():
        check(remote(1), expecting(1))
        raise KeyError("other")
    with deferred():
        pass
    assert Remote.reads == 2


def test_an_error_of_a_lost_device_is_raised_if_no_value_can_be_read():
    def lost(values):
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="out of memory"), deferred():
        check(remote(5), lost)
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("bad_at", [None, 1])
def test_a_failed_check_ends_the_update_before_the_optimisers_step(tmp_path, bad_at):
    """Two micro-steps an update, one check each: one read an update, and the weights of the last good update stay."""
    parameters, seen = toy(), []

    def step(number):
        seen.append(parameters["a"].detach().clone())
        check(remote(float(number == bad_at)), expecting(0))
        return parameters["a"].square().mean(), {"level": remote(0.5)[0]}

    def train():
        config = LoopConfig(steps=2, accumulate=2, checkpoint_every=0, ema_decay=0.0)
        state = RunState.initial(parameters, config, OptimConfig(lr=0.1))
        method = Closures(lambda micro_step: micro_step, step)
        fit(config, OptimConfig(lr=0.1), state, method, accelerator=Accelerator(cpu=True), run=RunFolder(tmp_path))

    if bad_at is None:
        train()
        assert Remote.reads == 2 and len(seen) == 4 and not torch.equal(seen[0], parameters["a"])
    else:
        with pytest.raises(ValueError, match=r"got \[1.0\]"):
            train()
        assert Remote.reads == 1 and len(seen) == 2 and torch.equal(seen[0], parameters["a"])


def test_phases_on_a_gpu_are_timed_by_events_without_waiting(monkeypatch):
    class Event:
        now = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 1
            self.time = Event.now

        def elapsed_time(self, end):  # in milliseconds
            return (end.time - self.time) * 1000

    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(cost.torch.cuda, name, lambda device: 2**20)
    monkeypatch.setattr(cost.torch.cuda, "Event", Event)
    monkeypatch.setattr(cost.torch.cuda, "synchronize", lambda *device: pytest.fail("waits"))
    meter = PhaseMeter("cuda")
    meter.start_step()
    for name in ("rollout", "reward", "rollout"):
        with meter.phase(name):
            pass
    expected = {"seconds/rollout": 2.0, "seconds/reward": 1.0, "memory_mib/rollout": 0.0, "memory_mib/reward": 0.0}
    assert meter.finish_step() == expected


def test_progress_is_one_line_in_a_log_and_a_bar_on_a_terminal(capsys, monkeypatch):
    assert [*progress(range(3), "evaluation")] == [0, 1, 2]
    assert capsys.readouterr().err == "evaluation: 3 batches\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert [*progress(range(3), "evaluation")] == [0, 1, 2]
    assert "evaluation:   0%" in capsys.readouterr().err
