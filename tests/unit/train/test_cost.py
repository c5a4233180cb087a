"""The meter: storages are counted once and released, FLOPs equal those by hand, phases are separate."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinalrm_align.train.cost import MIB, LiveStorage, PhaseMeter


def test_live_storage_counts_each_storage_once_and_releases_it():
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
    assert set(profiled) == {f"{kind}/{phase}" for kind in ("memory_mib", "gflops") for phase in ("rollout", "reward")}
    assert profiled["memory_mib/reward"] == pytest.approx(2.0)  # the tensor of rollout, and its own


def counted(*runs) -> list[float]:
    """FLOPs of each callable, run as a phase of its own in one profiled step."""
    meter = PhaseMeter("cpu")
    meter.start_step(profile=True)
    for index, run in enumerate(runs):
        with meter.phase(str(index)):
            run()
    report = meter.finish_step()
    assert not any(name.startswith("seconds") for name in report)
    return [round(report[f"gflops/{index}"] * 1e9) for index in range(len(runs))]


def test_flops_of_a_linear_layer():
    """2 B in out = 2 * 5 * 3 * 4 = 120 forward; backward twice that, or once where the weights are frozen."""
    layer, x = torch.nn.Linear(3, 4), torch.ones(5, 3, requires_grad=True)
    kept = []
    assert counted(lambda: kept.append(layer(x)), lambda: kept[0].sum().backward()) == [120, 240]
    layer.requires_grad_(False)
    assert counted(lambda: kept.append(layer(x)), lambda: kept[1].sum().backward()) == [120, 120]


@pytest.mark.parametrize("fused", [True, False])
def test_flops_of_attention_on_the_cpu(fused):
    """2 heads x 2 samples, 3 queries, 7 keys of 8 channels: 2 * 4 * 3 * 7 * (8 + 8) = 2688 forward. Backward 2.5 times
    that with the fused kernel, which computes the scores once more; without it twice.
    """
    backend = SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
    query, key, value = (torch.rand(2, 2, n, 8).requires_grad_() for n in (3, 7, 7))
    kept = []
    with sdpa_kernel(backend):
        found = counted(
            lambda: kept.append(F.scaled_dot_product_attention(query, key, value)), lambda: kept[0].sum().backward()
        )
    assert found == [2688, 6720 if fused else 5376]


def test_flops_of_a_convolution():
    """3 x 3 from 2 to 5 channels on 4 x 4 with padding: 2 * 16 * 9 * 2 * 5 = 2880; backward that for input and weight
    each.
    """
    layer, x = torch.nn.Conv2d(2, 5, 3, padding=1), torch.ones(1, 2, 4, 4, requires_grad=True)
    kept = []
    assert counted(lambda: kept.append(layer(x)), lambda: kept[0].sum().backward()) == [2880, 5760]


def test_recomputation_under_checkpointing_is_counted_where_it_happens():
    """Layers of 2 * 5 * 3 * 4 = 120 and 2 * 5 * 4 * 4 = 160: backward twice their sum, and with checkpointing the
    forward once more.
    """
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4), torch.nn.Tanh())
    x = torch.ones(5, 3, requires_grad=True)
    kept = []
    plain = counted(lambda: kept.append(layers(x)), lambda: kept[0].sum().backward())
    again = counted(
        lambda: kept.append(torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False)),
        lambda: kept[1].sum().backward(),
    )
    assert (plain, again) == ([280, 560], [280, 840])


def test_flops_of_one_name_add_up_within_a_step():
    layer, x = torch.nn.Linear(3, 4), torch.ones(5, 3)
    meter = PhaseMeter("cpu")
    for _ in range(2):
        meter.start_step(profile=True)
        for _ in range(3):
            with meter.phase("reward"):
                layer(x)
        assert meter.finish_step()["gflops/reward"] == pytest.approx(360e-9)
    meter.start_step()
    with meter.phase("reward"):
        layer(x)
    assert set(meter.finish_step()) == {"seconds/reward"}


def test_counting_flops_does_not_change_the_measured_memory():
    """The same checkpointed blocks, by `LiveStorage` alone and by a profiled step."""
    blocks = [torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)) for _ in range(6)]

    def run():
        x = torch.ones(64, 64, requires_grad=True)
        for block in blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        x.sum().backward()

    run()  # allocates the gradients
    with LiveStorage() as alone:
        run()
    meter = PhaseMeter("cpu")
    meter.start_step(profile=True)
    with meter.phase("all"):
        run()
    assert meter.finish_step()["memory_mib/all"] == alone.peak / MIB > 0


def test_outside_a_step_nothing_is_measured():
    meter = PhaseMeter("cpu")
    with meter.phase("rollout"):
        pass
    meter.start_step()
    assert meter.finish_step() == {}
