"""Ask an OpenAI-compatible chat endpoint one question about one image, with the standard library alone."""

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field

from PIL import Image

from dinalrm_align.train.files import parse_json
from dinalrm_align.train.settings import check_integer, check_number

ANSWER_LIMIT = 4 * 2**20
"""Largest answer in bytes; a usual one has a few kilobytes."""
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""HTTP status codes after which a request is repeated."""


@dataclass(frozen=True)
class ChatEndpoint:
    """A server and its model, asked with greedy decoding.

    Args:
        url: including the version, as for OpenAI clients: http://127.0.0.1:8080/v1.
        model: the name under which the server serves it.
        timeout: of an attempt without any data, in seconds.
        attempts: at most, with pauses of `pause`, 2 `pause`, 4 `pause`, ... seconds between them.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    attempts: int = 3
    pause: float = 1.0
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url) if isinstance(self.url, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"endpoint: got {self.url!r}; expected http://host:port/v1, as OpenAI clients take it")
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model: got {self.model!r}; expected the name under which the server serves it")
        check_number("timeout", self.timeout, low=1e-3)
        check_integer("attempts", self.attempts, low=1, high=20)
        check_number("pause", self.pause, low=0)
        check_integer("max_tokens", self.max_tokens, low=1)

    def ask(self, image: Image.Image, question: str) -> str:
        """The answer's text; ConnectionError if no attempt succeeds, ValueError if the server refuses the request."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        encoded = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": encoded}}, {"type": "text", "text": question}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        return _content(self._post(json.dumps(body).encode()), self.url)

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        target, reason = self.url.rstrip("/") + "/chat/completions", ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(target, body, headers, method="POST")
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    data = response.read(ANSWER_LIMIT + 1)
            except urllib.error.HTTPError as error:
                said = ""
                with error, suppress(OSError, http.client.HTTPException):
                    said = error.read(500).decode(errors="replace").strip()
                reason = f"HTTP {error.code}: {said:.200}"
                if error.code not in RETRIED:
                    raise ValueError(f"{target} refuses the question ({reason})") from error
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if len(data) > ANSWER_LIMIT:
                    raise ValueError(f"{target}: got over {ANSWER_LIMIT} bytes; expected a chat completion")
                return data.decode(errors="replace")
        tried = f"no answer in {self.attempts} attempts of {self.timeout:g} s (the last: {reason})"
        raise ConnectionError(f"{target}: {tried}; is the server up, and is this its address?")


def _content(text: str, where: str) -> str:
    values = parse_json(text, f"the answer of {where}")
    try:
        content = values["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ValueError(f"{where}: got {text!r:.200}; expected a chat completion with choices[0].message.content")
    return content
