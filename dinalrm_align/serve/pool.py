"""The served rewards: one copy per device, each behind a queue whose samples are scored in batches."""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import torch

from dinalrm_align.adapters.shared import shared_reward
from dinalrm_align.models.specs import ModelSpec
from dinalrm_align.reward.batching import MicroBatcher
from dinalrm_align.reward.names import parse_reward
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.serve.config import ServeConfig
from dinalrm_align.serve.metrics import Metrics
from dinalrm_align.serve.protocols import Job, joined, score_job
from dinalrm_align.train.digest import fingerprint, text_digest

_LOCKS = defaultdict[int, threading.Lock](threading.Lock)  # by id of a part of a reward, held while it scores


class ServedReward:
    """Copies of one reward, each with a queue (`MicroBatcher`) and a thread. A job goes where the fewest samples are.

    Jobs with equal keys are scored together, unless the reward compares the samples of a call (`wants_groups`).
    """

    def __init__(self, copies: Sequence[Reward], config: ServeConfig, metrics: Metrics) -> None:
        reward = copies[0]
        self.metrics, self._groups = metrics, reward.wants_groups
        limits = dict(max_batch_size=config.max_batch_size, max_wait_ms=config.max_wait_ms, max_queue=config.max_queue)
        self._queues = [
            MicroBatcher(lambda jobs, copy=copy: self._score(copy, jobs), key=self._key, size=len, **limits)
            for copy in copies
        ]
        vaes = [fingerprint(part.vae) for part in reward.named_parts.values() if part.reads_images and part.has_vae]
        self.facts: dict[str, Any] = {
            "fingerprint": text_digest(" ".join([reward.fingerprint(), *vaes])) if vaes else reward.fingerprint(),
            "reads_noise": reward.reads_noise,
            "sigmas": reward.sigmas,
            "scores_images": reward.scores_images,
            "wants_groups": reward.wants_groups,
            "max_batch_size": config.max_batch_size,
            "max_body_bytes": config.max_body_mb * 2**20,
            "devices": len(copies),
        }

    @property
    def waiting(self) -> int:
        """Number of samples in the queues."""
        return sum(queue.waiting for queue in self._queues)

    def submit(self, jobs: Sequence[Job]) -> list["Future[list[float]]"]:
        """Queue the jobs of a request. Raises queue.Full, and cancels the request, if there is no room for all."""
        futures = list["Future[list[float]]"]()
        try:
            for job in jobs:
                futures.append(min(self._queues, key=lambda queue: queue.load).submit(job, timeout=0))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return futures

    def close(self) -> None:
        """Finish what was accepted, and stop the threads."""
        for queue in self._queues:
            queue.close()

    def _key(self, job: Job) -> Any:
        return id(job) if self._groups else job.key

    def _score(self, reward: Reward, jobs: Sequence[Job]) -> list[list[float]]:
        together = joined(jobs)
        self.metrics.batch(len(together), time.monotonic() - together.arrived)
        with ExitStack() as held:
            for part in sorted(map(id, reward.named_parts.values())):  # in one order, or queues wait for each other
                held.enter_context(_LOCKS[part])
            scores = iter(score_job(reward, together))
        return [[next(scores) for _ in range(len(job))] for job in jobs]


def load_rewards(config: ServeConfig, spec: ModelSpec, metrics: Metrics) -> dict[str, ServedReward]:
    """Load every reward of the settings on every device. Raises the errors of `load_reward`."""
    served = {}
    for name, text in config.texts.items():
        made, own = [], {}
        if config.text_length is not None and any(term.name == "dinalrm" for term in parse_reward(text)):
            own["dinalrm"] = {"text_length": config.text_length}
        for device in config.devices:
            device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            dtype = (spec.dtype if device.startswith("cuda") else "float32") if config.dtype == "auto" else config.dtype
            made.append(shared_reward(text, spec=spec, pipeline=spec.pipeline, device=device, dtype=dtype, options=own))
        served[name] = ServedReward(made, config, metrics)
    return served
