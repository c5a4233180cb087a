"""The HTTP side of the server: addresses, limits, tokens, errors. An error is a status and a sentence, never a score.

    POST /v1/score      own protocol, or version 1 of the DRM protocol (`serve.protocols`); ?reward=NAME
    POST /compute       Flow-Factory; ?reward=NAME
    GET  /v1/rewards    names and properties of the rewards, for `RemoteReward`
    GET  /healthz, /health, /metrics

Statuses: 400 malformed; 401 no token or another; 404 unknown reward; 408 slow upload; 413 too large; 429, with
Retry-After, full queue; 499, in the metrics only, the client went away; 500 a fault inside; 503 too many connections.
"""

import asyncio
import base64
import binascii
import hmac
import logging
import queue
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse
from starlette.requests import ClientDisconnect

from dinalrm_align.reward.inputs import ScoreError
from dinalrm_align.reward.remote import PROTOCOL
from dinalrm_align.serve.config import DEFAULT, ServeConfig
from dinalrm_align.serve.metrics import Metrics
from dinalrm_align.serve.pool import ServedReward
from dinalrm_align.serve.protocols import DRM_HEADER, DRM_VERSION, Job, read_compute, read_drm, read_own
from dinalrm_align.train.command import is_about_input
from dinalrm_align.train.files import InputError

LOG = logging.getLogger(__name__)
BODY_SECONDS = 60.0
"""Longest upload of a request. The server ends when all requests have ended, so none may take for ever."""


def create_app(
    rewards: Mapping[str, ServedReward], config: ServeConfig, metrics: Metrics, token: str | None = None
) -> FastAPI:
    """Return the application. token: required of every request but health checks; None: no token."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for reward in rewards.values():
            await asyncio.to_thread(reward.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def scored(request: Request, read: Callable[[bytes], Sequence[Job]]) -> tuple[ServedReward, list[float]]:
        status = 500
        try:
            check_token(request, token)
            name = request.query_params.get("reward", DEFAULT)
            if name not in rewards:
                raise HTTPException(404, f"reward: got {name!r:.80}; expected one of {', '.join(rewards)}")
            jobs = await asyncio.to_thread(read, await body_of(request, config.max_body_mb * 2**20))
            if (count := sum(map(len, jobs))) > config.max_queue:
                raise HTTPException(413, f"got {count} samples; expected at most max_queue, {config.max_queue}")
            status, scores = 200, await scores_of(request, list(map(asyncio.wrap_future, rewards[name].submit(jobs))))
            return rewards[name], scores
        except Exception as error:
            refusal = as_refusal(error)
            status = refusal.status_code
            raise refusal from error
        finally:
            metrics.answered(request.url.path, status)

    @app.post("/v1/score")
    async def score(request: Request) -> dict[str, Any]:
        if (version := request.headers.get(DRM_HEADER)) is not None:
            _, scores = await scored(request, lambda body: read_drm(body, version))
            return {"protocol_version": DRM_VERSION, "raw_scores": scores}
        reward, scores = await scored(request, read_own)
        return {"protocol": PROTOCOL, "fingerprint": reward.facts["fingerprint"], "scores": scores}

    @app.post("/compute")
    async def compute(request: Request) -> dict[str, Any]:
        return {"rewards": (await scored(request, lambda body: read_compute(body, config.max_queue)))[1]}

    @app.get("/v1/rewards")
    async def describe(request: Request) -> dict[str, Any]:
        check_token(request, token)
        return {"protocol": PROTOCOL, "rewards": {name: reward.facts for name, reward in rewards.items()}}

    @app.get("/metrics")
    async def counters(request: Request) -> PlainTextResponse:
        check_token(request, token)
        return PlainTextResponse(metrics.text(sum(reward.waiting for reward in rewards.values())))

    @app.get("/healthz")
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def check_token(request: Request, token: str | None) -> None:
    """Raise HTTPException unless the request has the token, as a bearer token or as the password of HTTP Basic."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            value = ""
    if token is not None and not hmac.compare_digest(value.encode(), token.encode()):
        message = "token: got none or another; expected the header 'Authorization: Bearer TOKEN'"
        raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})


async def scores_of(request: Request, futures: Sequence["asyncio.Future[list[float]]"]) -> list[float]:
    """Return the scores of all futures. If the client goes away, cancel those that wait and raise ClientDisconnect."""
    try:
        while (await asyncio.wait(futures, timeout=1))[1]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return [score for part in await asyncio.gather(*futures) for score in part]
    except InputError as error:  # of a reward, such as another server's answer: not about this request
        raise ScoreError(str(error)) from error
    finally:
        for future in futures:
            future.cancel()


async def body_of(request: Request, limit: int) -> bytes:
    """Return the body. Raise HTTPException as soon as it has over `limit` bytes, and if it takes over BODY_SECONDS."""
    body, declared = bytearray(), request.headers.get("content-length", "0")
    size = int(declared) if declared.isdigit() else 0
    if size <= limit:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if (size := len(body)) > limit:
                        break
        except TimeoutError as error:
            late = f"body: got {len(body)} bytes in {BODY_SECONDS:g} s; expected all of it by then"
            raise HTTPException(408, late, {"Connection": "close"}) from error
    if size > limit:
        raise HTTPException(413, f"body: got over {limit} bytes; expected at most that many")
    return bytes(body)


def as_refusal(error: Exception) -> HTTPException:
    """Return the answer to a request that raised `error`."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, ClientDisconnect):
        return HTTPException(499, "the client went away")
    if isinstance(error, queue.Full):
        return HTTPException(429, str(error), {"Retry-After": "1"})
    if isinstance(error, ValueError | TypeError) and not isinstance(error, ScoreError) and is_about_input(error):
        return HTTPException(400, str(error))
    LOG.error("a request failed", exc_info=error)
    return HTTPException(500, f"the server failed ({type(error).__name__}: {error!s:.300})")
