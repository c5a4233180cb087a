"""Serve rewards over HTTP, for trainers in another environment or on another card.

    python -m dinalrm_align.serve --model sd35                          # the released DiNa-LRM, 127.0.0.1:8000
    python -m dinalrm_align.serve --reward "dinalrm + 0.2*pickscore" --rewards '{judge: hpsv3}' --port 8001
    python -m dinalrm_align.serve --model sd35 --devices '[cuda:0, cuda:1]' --max_batch_size 32
    DINALRM_TOKEN=... python -m dinalrm_align.serve --model sd35 --host 0.0.0.0     # the same variable at the client

Clients: every recipe (--reward http://127.0.0.1:8000), the DRM client of verl-omni (server_url:
http://127.0.0.1:8000/v1/score), and the remote reward of Flow-Factory (server_url: http://127.0.0.1:8000). Serve the
model that the client trains: latents of another VAE are refused or score wrong. Samples of concurrent requests are
scored together, which changes no score; a reward that compares the samples of a call scores each request alone. SIGTERM
finishes what was accepted, then stops.
"""

import os
from collections.abc import Sequence

from dinalrm_align.models.specs import resolve_model
from dinalrm_align.reward.needs import check_sources
from dinalrm_align.serve.config import ServeConfig
from dinalrm_align.train.command import parse, refusing


def serve(config: ServeConfig, token: str | None) -> None:
    """Load the rewards, and serve them until SIGTERM or SIGINT. Raises ImportError without the extra `serve`."""
    try:
        import uvicorn

        from dinalrm_align.serve.app import create_app
    except ModuleNotFoundError as error:
        install = "pip install 'dinalrm-align[serve]'"
        raise ImportError(
            f"the server needs {error.name}, which is not installed: {install}", name=error.name
        ) from error
    import torch

    from dinalrm_align.serve.metrics import Metrics
    from dinalrm_align.serve.pool import load_rewards

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    spec, reason = resolve_model(config.model)
    print(reason, flush=True)
    check_sources(spec, {"reward": config.reward} | {f"rewards.{name}": text for name, text in config.rewards.items()})
    metrics = Metrics()
    rewards = load_rewards(config, spec, metrics)
    for name, reward in rewards.items():
        print(f"{name}: {config.texts[name]}, fingerprint {reward.facts['fingerprint']}", flush=True)
    print(f"serving on http://{config.host}:{config.port}", flush=True)
    app = create_app(rewards, config, metrics, token)
    limits = dict(http="h11", limit_concurrency=max(512, 2 * config.max_queue))  # connections
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning", access_log=False, **limits)


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        config, _ = parse(ServeConfig, __doc__, argv)
        token = os.environ.get("DINALRM_TOKEN")
        config.check_token(token)
        serve(config, token)


if __name__ == "__main__":
    main()
