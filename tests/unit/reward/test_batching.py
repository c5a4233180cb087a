"""MicroBatcher: batches, errors, limits, closing; batched scores equal the score alone."""

import asyncio
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dinalrm_align.reward.batching import MicroBatcher


class Recorder:
    """Doubles numbers and keeps the batches. Negative numbers fail. `gate` holds the worker inside a batch."""

    def __init__(self):
        self.batches, self.gate, self.entered = [], threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.entered.set()
        assert self.gate.wait(20)
        self.batches.append(list(items))
        for item in items:
            if item < 0:
                raise ValueError(f"got {item}")
        return [2 * item for item in items]


@pytest.fixture
def recorder():
    return Recorder()


def hold(recorder, batcher):
    """Make the worker wait inside a batch of [0]."""
    recorder.gate.clear()
    first = batcher.submit(0)
    assert recorder.entered.wait(20)
    return first


def test_calls_of_many_threads_form_full_batches_in_order(recorder):
    with MicroBatcher(recorder, max_batch_size=4, max_wait_ms=20_000) as batcher, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda item: batcher.submit(item).result(20), range(8))) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [len(batch) for batch in recorder.batches] == [4, 4]
    assert sorted(sum(recorder.batches, [])) == list(range(8))


def test_what_waits_meanwhile_forms_the_next_batch(recorder):
    with MicroBatcher(recorder, max_batch_size=3, max_wait_ms=0) as batcher:
        hold(recorder, batcher)
        futures = [batcher.submit(item) for item in (1, 2, 3, 4)]
        assert batcher.waiting == 4
        recorder.gate.set()
        assert [future.result(20) for future in futures] == [2, 4, 6, 8]
    assert recorder.batches == [[0], [1, 2, 3], [4]]


def test_a_lone_item_is_scored_after_the_wait(recorder):
    with MicroBatcher(recorder, max_wait_ms=30) as batcher:
        started = time.monotonic()
        assert batcher.submit(3).result(20) == 6
        assert time.monotonic() - started >= 0.03
    assert recorder.batches == [[3]]


def test_a_bad_item_fails_alone(recorder, caplog):
    with MicroBatcher(recorder, max_batch_size=3, max_wait_ms=20_000) as batcher:
        good, bad, other = (batcher.submit(item) for item in (1, -1, 2))
        assert (good.result(20), other.result(20)) == (2, 4)
        with pytest.raises(ValueError, match="got -1"):
            bad.result(20)
    assert recorder.batches == [[1, -1, 2], [1], [-1], [2]]
    assert "a batch of 3 failed (ValueError: got -1)" in caplog.text


def test_items_with_different_keys_are_never_in_one_batch(recorder):
    with MicroBatcher(recorder, max_batch_size=2, max_wait_ms=20_000, key=lambda item: item % 2) as batcher:
        futures = [batcher.submit(item) for item in (1, 2, 3, 4)]
        assert [future.result(20) for future in futures] == [2, 4, 6, 8]
    assert recorder.batches == [[1, 3], [2, 4]]


def test_a_full_queue_refuses_or_waits(recorder):
    with MicroBatcher(recorder, max_batch_size=1, max_wait_ms=0, max_queue=1) as batcher:
        hold(recorder, batcher)
        waiting = batcher.submit(1)
        with pytest.raises(queue.Full, match="1 samples wait already"):
            batcher.submit(2, timeout=0)
        with ThreadPoolExecutor(1) as pool:
            blocked = pool.submit(lambda: batcher.submit(3).result(20))
            assert not blocked.done()
            recorder.gate.set()
            assert (waiting.result(20), blocked.result(20)) == (2, 6)


def test_close_finishes_what_was_taken_and_takes_no_more(recorder):
    batcher = MicroBatcher(recorder, max_batch_size=8, max_wait_ms=20_000)
    futures = [batcher.submit(item) for item in (1, 2)]
    batcher.close()
    assert [future.result(0) for future in futures] == [2, 4]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(3)
    batcher.close()


def test_close_frees_a_blocked_caller(recorder):
    batcher = MicroBatcher(recorder, max_batch_size=1, max_wait_ms=0, max_queue=1)
    hold(recorder, batcher)
    batcher.submit(1)
    with ThreadPoolExecutor(2) as pool:
        blocked = pool.submit(batcher.submit, 2)
        closing = pool.submit(batcher.close)
        with pytest.raises(RuntimeError, match="closed"):
            blocked.result(20)
        recorder.gate.set()
        closing.result(20)


def test_a_cancelled_item_is_not_scored(recorder):
    with MicroBatcher(recorder, max_batch_size=1, max_wait_ms=0) as batcher:
        hold(recorder, batcher)
        left, kept = batcher.submit(1), batcher.submit(2)
        assert left.cancel()
        recorder.gate.set()
        assert kept.result(20) == 4
    assert recorder.batches == [[0], [2]]


def test_results_that_do_not_match_the_items_are_errors():
    with MicroBatcher(lambda items: [1.0, 2.0], max_batch_size=1) as batcher:
        with pytest.raises(RuntimeError, match="got 2 results for 1 samples"):
            batcher.submit(0).result(20)


def test_asyncio_callers_share_a_batch(recorder):
    async def together(batcher):
        return await asyncio.gather(*(asyncio.wrap_future(batcher.submit(item)) for item in range(3)))

    with MicroBatcher(recorder, max_batch_size=3, max_wait_ms=20_000) as batcher:
        assert asyncio.run(together(batcher)) == [0, 2, 4]
    assert recorder.batches == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"max_wait_ms": -1.0}, "max_wait_ms=-1.0"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms=nan"),
        ({"max_queue": 3}, "max_queue: got 3"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MicroBatcher(list, **settings)


def test_batched_scores_equal_scores_alone(tiny_reward_dir):
    from dinalrm_align import LatentReward

    reward = LatentReward.from_pretrained(tiny_reward_dir)
    latents = torch.randn(6, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = [f"a red circle and {index} squares" for index in range(6)]
    sizes = []

    def score(items):
        sizes.append(len(items))
        rows, seeds = zip(*items, strict=True)
        return reward(torch.stack([latents[row] for row in rows]), [prompts[row] for row in rows], seeds=seeds).tolist()

    with MicroBatcher(score, max_batch_size=6, max_wait_ms=20_000) as batcher:
        futures = [batcher.submit((row, 7 + row)) for row in range(6)]
        batched = [future.result(60) for future in futures]
    alone = [reward(latents[row : row + 1], [prompts[row]], seeds=[7 + row]).item() for row in range(6)]
    assert sizes == [6] and len(set(alone)) == 6
    assert batched == pytest.approx(alone, abs=1e-4)
