"""Settings of the server: names, addresses, tokens; a missing extra is named."""

import sys

import pytest

from dinalrm_align.serve.__main__ import main
from dinalrm_align.serve.config import ServeConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": "picscore"}, "unknown reward 'picscore'"),
        ({"rewards": {"a/b": "oracle"}}, "rewards: got the name 'a/b'"),
        ({"rewards": {"default": "oracle"}}, "rewards: got the name 'default'"),
        ({"rewards": {"judge": "dinalrm + "}}, "reward 'dinalrm \\+'"),
        ({"port": 70000}, "port: got 70000"),
        ({"devices": []}, "devices: got none"),
        ({"max_queue": 4}, "max_queue: got 4; expected at least max_batch_size 8"),
        ({"max_wait_ms": -1.0}, "max_wait_ms: got -1.0"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(**values)


def test_rewards_by_name_the_default_first():
    assert ServeConfig(rewards={"judge": "oracle"}).texts == {"default": "dinalrm", "judge": "oracle"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", "127.0.0.1.example.org"])
def test_an_address_that_others_reach_needs_a_token(host):
    with pytest.raises(ValueError, match=f"host: got {host}, .*DINALRM_TOKEN"):
        ServeConfig(host=host).check_token(None)
    ServeConfig(host=host).check_token("0123456789abcdef")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machine_needs_none(host):
    ServeConfig(host=host).check_token(None)


@pytest.mark.parametrize("token", ["", "fifteen-letters", "with blanks with blanks", "non-ascii-äöü-0123456789"])
def test_tokens_are_long_and_plain(token):
    with pytest.raises(ValueError, match="DINALRM_TOKEN: got") as caught:
        ServeConfig().check_token(token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_without_the_extra_the_command_says_what_to_install(package, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "dinalrm_align.serve.app", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        main(["--model=shapes"])
    assert stopped.value.code == 2
    assert f"needs {package}, which is not installed: pip install 'dinalrm-align[serve]'" in capsys.readouterr().err


def test_the_server_limits_its_connections(monkeypatch):
    """Over the limit, uvicorn answers with status 503; a request for each sample that may wait is within it."""
    given = {}
    monkeypatch.setattr("dinalrm_align.serve.pool.load_rewards", lambda *arguments: {})
    monkeypatch.setattr("uvicorn.run", lambda app, **options: given.update(options))
    main(["--model=shapes", "--max_queue=1000"])
    assert given["limit_concurrency"] == 2000 and given["http"] == "h11"


def test_the_command_refuses_an_open_address(monkeypatch, capsys):
    monkeypatch.delenv("DINALRM_TOKEN", raising=False)
    with pytest.raises(SystemExit):
        main(["--host=0.0.0.0"])
    assert "host: got 0.0.0.0" in capsys.readouterr().err
