"""Requests to servers that compute scores, repeated with growing pauses. Uses the standard library only."""

import http.client
import logging
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeVar

from dinalrm_align.train.files import InputError
from dinalrm_align.train.settings import check_integer, check_number

Answer = TypeVar("Answer")
LOG = logging.getLogger(__name__)
ADDRESS = re.compile(r"https?://(?:[\w.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?(?:/[!-~]*)?", re.ASCII | re.IGNORECASE)
LOOPBACK = re.compile(r"localhost|127(?:\.\d{1,3}){3}|::1", re.ASCII)
ANSWER_LIMIT = 4 * 2**20
"""Largest accepted answer in bytes. Usual answers have a few kilobytes."""
RETRIED = (408, 425, 429)
"""HTTP status codes under 500 after which a request is repeated. It is also repeated after all codes from 500."""
LONGEST_PAUSE = 60.0
"""Longest wait between two attempts, in seconds."""


class Refused(InputError):
    """The server refuses the request. Another attempt would not help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: the key would travel to the other address."""

    def redirect_request(self, *_: object) -> None: ...


class NoAnswer(ConnectionError):
    """An attempt got no answer. pause: seconds that the server asks to wait before the next attempt."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True)
class Server:
    """Address of a server, and how to ask it.

    Args:
        url: base URL of the server.
        api_key: key sent as a bearer token; None to send no key.
        timeout: seconds without data after which an attempt fails.
        attempts: maximum number of attempts per request. An attempt fails without an answer, or with one that cannot be
            read.
        pause: seconds to wait after the first failed attempt; the wait doubles after each later failure, up to 60.
    """

    url: str
    _: KW_ONLY
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 5
    pause: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not ADDRESS.fullmatch(self.url):
            got = "a password in the address" if "@" in str(self.url) else repr(self.url)
            how = "http://host:port/v1, for a reward server http://host:port with its token in DINALRM_TOKEN"
            raise ValueError(f"endpoint: got {got}; expected {how}")
        check_number("timeout", self.timeout, low=1e-3)
        check_integer("attempts", self.attempts, low=1, high=20)
        check_number("pause", self.pause, low=0)

    def request(
        self, path: str, body: bytes | None, read: Callable[[str], Answer], kind: str = "application/json"
    ) -> Answer:
        """Send `body`, of the media type `kind`, by POST, or a GET request if it is None; return `read(answer)`.

        `read` raises InputError for an answer to ask for again. Raises ConnectionError if the last attempt got no
        answer, and InputError if the last answer cannot be read or the server refuses the request.
        """
        target = self.url.rstrip("/") + path
        for attempt in range(1, self.attempts + 1):
            try:
                return read(self._send(target, body, kind))
            except (NoAnswer, InputError) as error:
                if isinstance(error, Refused) or (attempt == self.attempts and isinstance(error, InputError)):
                    raise
                if attempt == self.attempts:
                    tried = f"no answer in {attempt} attempts of {self.timeout:g} s (the last: {error})"
                    answered = isinstance(error.__cause__, urllib.error.HTTPError)
                    how = "see the server's log" if answered else "is the server up, and is this its address?"
                    raise ConnectionError(f"{target}: {tried}; {how}") from error
                wait = max(self.pause * 2 ** (attempt - 1), getattr(error, "pause", 0.0))
                LOG.warning("%s: attempt %d of %d failed (%.200s)", target, attempt, self.attempts, error)
            time.sleep(min(wait, LONGEST_PAUSE))
        raise AssertionError("attempts is at least 1")

    def _send(self, target: str, body: bytes | None, kind: str) -> str:
        """Send one request; return the text of the answer. Raises `NoAnswer` if another attempt may help."""
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        try:
            request = urllib.request.Request(
                target, body, {"Content-Type": kind} | key, method="GET" if body is None else "POST"
            )
            direct = LOOPBACK.fullmatch(urllib.parse.urlsplit(target).hostname or "")
            handlers = [_NoRedirect(), *([urllib.request.ProxyHandler({})] if direct else [])]
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as response:
                data = response.read(ANSWER_LIMIT + 1)
        except urllib.error.HTTPError as error:
            said = ""
            with error, suppress(OSError, http.client.HTTPException):
                said = error.read(500).decode(errors="replace").strip()
            reason = f"HTTP {error.code}: {said or error.headers.get('Location', ''):.300}"
            if error.code not in RETRIED and error.code < 500:
                raise Refused(f"{target} refuses the request ({reason})") from error
            asked = error.headers.get("Retry-After", "")
            raise NoAnswer(reason, float(asked) if asked.isdigit() else 0.0) from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from error
        if len(data) > ANSWER_LIMIT:
            raise InputError(f"{target}: got an answer of over {ANSWER_LIMIT} bytes")
        return data.decode(errors="replace")
