"""A reward server in this process, on a free port, for tests of its clients."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy

import uvicorn

from dinalrm_align.reward.protocol import Reward
from dinalrm_align.serve.app import create_app
from dinalrm_align.serve.config import ServeConfig
from dinalrm_align.serve.metrics import Metrics
from dinalrm_align.serve.pool import ServedReward


def mean(latents, prompts):
    """A reward without parameters."""
    return latents.mean(dim=(1, 2, 3))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def application(rewards: Mapping[str, Reward], *, token: str | None = None, copies: int = 1, **settings):
    """The application that serves these rewards, which must include `default`."""
    config, metrics = ServeConfig(**settings), Metrics()
    served = {
        name: ServedReward([copy(reward) if number else reward for number in range(copies)], config, metrics)
        for name, reward in rewards.items()
    }
    return create_app(served, config, metrics, token)


@contextmanager
def running(rewards: Mapping[str, Reward], *, port: int | None = None, **settings) -> Iterator[str]:
    """Serve rewards on a thread; the value is the address. At the end, requests that were accepted are finished."""
    port = port or free_port()
    config = uvicorn.Config(application(rewards, **settings), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
