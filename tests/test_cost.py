"""The meter: storages are counted once and released, phases are told apart, evaluation is not measured."""

import time

import pytest
import torch

from dinalrm_align.cost import MIB, LiveStorage, PhaseMeter


def test_live_storage_counts_each_storage_once_and_lets_it_go():
    """1 MiB of float32 is 512 x 512; a view and an in-place add are the same storage."""
    held = torch.ones(512, 512)
    with LiveStorage() as tracker:
        held.add_(1)
        assert tracker.live == 0
        first = held * 2
        first.view(-1).add_(1)
        assert tracker.live == MIB
        second = first + 1
        assert tracker.live == tracker.peak == 2 * MIB
        del first, second
        assert (tracker.live, tracker.peak) == (0, 2 * MIB)
        tracker.restart()
        assert tracker.peak == 0


def test_backward_holds_the_activations_that_checkpointing_drops():
    def peak(checkpointed: bool) -> int:
        x = torch.ones(64, 64, requires_grad=True)
        with LiveStorage() as tracker:
            y = x
            for _ in range(8):
                y = torch.utils.checkpoint.checkpoint(_chain, y, use_reentrant=False) if checkpointed else _chain(y)
            y.sum().backward()
        return tracker.peak

    assert peak(checkpointed=True) < 0.6 * peak(checkpointed=False)


def _chain(x: torch.Tensor) -> torch.Tensor:
    for _ in range(4):
        x = torch.sin(x)
    return x


def test_phases_report_seconds_and_on_profiled_steps_memory():
    meter = PhaseMeter("cpu")
    meter.start_step()
    with meter.phase("rollout"):
        time.sleep(0.02)
    with meter.phase("rollout"):
        time.sleep(0.02)
    with meter.phase("reward"):
        pass
    plain = meter.finish_step()
    assert set(plain) == {"seconds/rollout", "seconds/reward"}
    assert plain["seconds/rollout"] >= 0.04 > plain["seconds/reward"]

    meter.start_step(profile=True)
    with meter.phase("rollout"):
        kept = torch.zeros(512, 512) + 1
    with meter.phase("reward"):
        _ = kept + 1
    profiled = meter.finish_step()
    assert set(profiled) == {"memory_mib/rollout", "memory_mib/reward"}
    assert profiled["memory_mib/reward"] == pytest.approx(2.0)  # what rollout left, and its own


def test_outside_a_step_nothing_is_measured():
    meter = PhaseMeter("cpu")
    with meter.phase("rollout"):
        pass
    meter.start_step()
    assert meter.finish_step() == {}
