"""Requests to servers that score: one attempt, and repeated attempts with growing pauses. Uses the standard library."""

import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from dinalrm_align.train.files import InputError

Answer = TypeVar("Answer")
LOG = logging.getLogger(__name__)
ADDRESS = re.compile(
    r"https?://(?:[!-.0-?A-~]+@)?(?:[\w.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?(?:/[!-~]*)?", re.ASCII | re.IGNORECASE
)
RETRIED = (408, 425, 429)
"""HTTP status codes below 500 after which a request is repeated, as it is after every code from 500."""
LONGEST_PAUSE = 60.0
"""Longest wait between two attempts, in seconds."""


class Refused(InputError):
    """The server refuses the request. Another attempt would not help."""


class NoAnswer(ConnectionError):
    """An attempt got no answer. Another attempt may help, after `pause` seconds if the server asks for a pause."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


def check_address(name: str, url: object, example: str) -> None:
    """Raise ValueError unless `url` is an http or https address."""
    if not isinstance(url, str) or not ADDRESS.fullmatch(url):
        raise ValueError(f"{name}: got {url!r}; expected {example}")


def send(
    url: str, body: bytes | None, headers: Mapping[str, str], *, timeout: float, limit: int, what: str = "request"
) -> bytes:
    """Send one request, POST if there is a body, and return the body of the answer.

    timeout: seconds without data after which the attempt fails. limit: largest accepted answer in bytes. what: word
    for the request in error messages. Raises `Refused` if the server refuses the request, `NoAnswer` if another attempt
    may help, and InputError for an answer that is too large.
    """
    try:
        request = urllib.request.Request(url, body, dict(headers), method="GET" if body is None else "POST")
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read(limit + 1)
    except urllib.error.HTTPError as error:
        said = ""
        with error, suppress(OSError, http.client.HTTPException):
            said = error.read(500).decode(errors="replace").strip()
        reason = f"HTTP {error.code}: {said:.300}"
        if error.code not in RETRIED and error.code < 500:
            raise Refused(f"{url} refuses the {what} ({reason})") from error
        asked = error.headers.get("Retry-After", "")
        raise NoAnswer(reason, float(asked) if asked.isdigit() else 0.0) from error
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"{type(error).__name__}: {error}") from error
    if len(data) > limit:
        raise InputError(f"{url}: got an answer of over {limit} bytes")
    return data


def repeated(call: Callable[[], Answer], url: str, *, attempts: int, pause: float, timeout: float) -> Answer:
    """Return `call()`. Call again, at most `attempts` times in all, after `NoAnswer` and after an unreadable answer.

    The pause before the second attempt is `pause` seconds. The pause doubles after each later failure, up to
    `LONGEST_PAUSE`, and is never shorter than the server asks for. Raises ConnectionError if the last attempt got no
    answer, and the InputError of `call` if the last answer cannot be read or the server refuses.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Refused:
            raise
        except (NoAnswer, InputError) as error:
            wait = min(max(pause * 2 ** (attempt - 1), getattr(error, "pause", 0.0)), LONGEST_PAUSE)
            if attempt == attempts:
                if isinstance(error, InputError):
                    raise
                tried = f"no answer in {attempts} attempts of {timeout:g} s (the last: {error})"
                raise ConnectionError(f"{url}: {tried}; is the server up, and is this its address?") from error
            LOG.warning("%s: attempt %d of %d failed (%.200s); next in %g s", url, attempt, attempts, error, wait)
        time.sleep(wait)
    raise AssertionError("attempts is at least 1")
