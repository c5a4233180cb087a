"""Requests to servers: redirects, proxies, and what the last failure says."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dinalrm_align.reward.http import Refused, Server


@contextmanager
def answering(status: int, body: bytes = b"", **headers: str) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server that answers all requests alike; the value is its address, and the path and key of each request."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("body", [None, b"{}"], ids=["GET", "POST"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_stays(status, body):
    with answering(200, b"stolen") as (other, seen), answering(status, Location=f"{other}/x") as (address, _):
        with pytest.raises(Refused, match=f"HTTP {status}: {other}/x"):
            Server(address, api_key="secret", attempts=1).request("/v1/rewards", body, str)
    assert not seen


def test_this_machine_is_asked_without_a_proxy(monkeypatch):
    with answering(200, b"proxy") as (proxy, seen), answering(200, b"server") as (address, _):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        port = address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            assert Server(f"http://{host}:{port}", attempts=1).request("/v1/rewards", None, str) == "server"
        assert not seen
        assert Server("http://reward.invalid", attempts=1).request("/v1/rewards", None, str) == "proxy"


def test_a_server_that_fails_is_not_asked_whether_it_is_up():
    with answering(500, b"the server failed (RuntimeError: out of memory)") as (address, seen):
        with pytest.raises(ConnectionError, match="HTTP 500: the server failed .RuntimeError: out of memory") as caught:
            Server(address, attempts=2, pause=0).request("/v1/score", b"{}", str)
    assert (
        len(seen) == 2 and "is the server up" not in str(caught.value) and "see the server's log" in str(caught.value)
    )
