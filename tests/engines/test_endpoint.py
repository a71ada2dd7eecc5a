"""Where a server is: its URL, its key and the proxy on the way, and that no secret is shown or kept."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from helpers import Srlm, as_lines, read_json
from srlm_cli.cli import run
from srlm_cli.commands.doctor import openai_server
from srlm_cli.engines import EngineSpec, open_engine
from srlm_cli.engines.base import Request, Sampling
from srlm_cli.engines.endpoint import OPENAI, base_url, key_for, proxy_for
from srlm_cli.errors import OptionError
from srlm_cli.redact import redacted
from stub_server import Stub, error

HERE = "http://127.0.0.1:8000/v1"
FAR = "https://models.example.org/v1"
PROXY = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", *PROXY):
        for spelling in (name, name.lower()):
            monkeypatch.delenv(spelling, raising=False)


# --- base URL and key --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (None, OPENAI),
        (" \n", OPENAI),
        (f"\t{HERE}/\r\n", HERE),
        ("HTTP://Example.org/v1/", "HTTP://Example.org/v1"),
        ("https://a.b/v1/?api-version=3", "https://a.b/v1?api-version=3"),
        ("http://me:w@rd@host/v1", "http://me:w@rd@host/v1"),
    ],
)
def test_a_base_url_is_taken_as_it_is_meant(given: str | None, used: str) -> None:
    assert base_url(given) == used


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "me:hidden-word@host/v1", "http://me:hidden-word@host:80a/v1", "ftp://me:hidden-word@host/v1"]
    + ["http://me:hidden-word@host /v1", "http://host\n/v1"],
)
def test_what_is_no_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(OptionError, match="is not a URL") as raised:
        base_url(url)
    assert "hidden-word" not in redacted(str(raised.value)) and "hidden" not in raised.value.message


@pytest.mark.parametrize("around", ["\n", "\r", "\r\n", " ", "\t", "\u00a0"])
def test_white_space_around_a_key_is_taken_off(monkeypatch: pytest.MonkeyPatch, around: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{around}sk-0123456789{around}")
    assert key_for(HERE) == "sk-0123456789"


@pytest.mark.parametrize("key", ["sk-first\nsk-second", "sk-first second", "sk-…", "sk-\x07bell"])
def test_a_key_that_no_header_holds_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(OptionError, match="^OPENAI_API_KEY is not a key") as raised:
        key_for(HERE)
    assert "sk-" not in str(raised.value)


def test_only_openai_itself_asks_for_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_for(HERE) == "none"
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    with pytest.raises(OptionError, match="no OPENAI_API_KEY"):
        key_for(OPENAI)


# --- the proxy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, FAR, None),
        ({"HTTPS_PROXY": "http://p:3128"}, FAR, "http://p:3128"),
        ({"HTTPS_PROXY": "p:3128"}, FAR, "http://p:3128"),
        ({"HTTP_PROXY": "http://p:3128"}, FAR, None),
        ({"ALL_PROXY": "http://p:3128"}, FAR.upper(), "http://p:3128"),
        ({"ALL_PROXY": "socks5://p:1080", "HTTPS_PROXY": "http://q:1"}, FAR, "http://q:1"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "example.org"}, FAR, None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "*"}, FAR, None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8, other"}, "http://10.1.2.3:8000/v1", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3:8000/v1", "http://p:1"),
        ({"ALL_PROXY": "socks5://p:1080", "NO_PROXY": "[fd00::1]"}, "http://[fd00::1]:8000/v1", None),
        ({"ALL_PROXY": "socks5://p:1080"}, HERE, None),
        ({"ALL_PROXY": "socks://p:1080"}, "http://localhost:8000/v1", None),
        ({"ALL_PROXY": "socks4://p:1080"}, "http://[::1]:8000/v1", None),
        ({"HTTP_PROXY": "http://p:3128"}, HERE, "http://p:3128"),
    ],
)
def test_the_proxy_is_the_one_for_this_server(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, proxy: str | None
) -> None:
    monkeypatch.setattr("srlm_cli.engines.endpoint.find_spec", lambda name: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(url) == proxy


def test_a_proxy_that_cannot_be_spoken_to_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://me:hidden-word@p:1080")
    with pytest.raises(
        OptionError, match=r"^ALL_PROXY has a protocol that is not supported: socks:// \(or NO_PROXY=models.example"
    ):
        proxy_for(FAR)
    monkeypatch.setenv("ALL_PROXY", "socks5://me:hidden-word@p:1080")
    monkeypatch.setattr("srlm_cli.engines.endpoint.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="^ALL_PROXY needs socksio: pip install socksio"):
        proxy_for(FAR)
    monkeypatch.setattr("srlm_cli.engines.endpoint.find_spec", lambda name: object())
    assert proxy_for(FAR) == "socks5://me:hidden-word@p:1080"


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9"])
def test_a_server_here_is_asked_whatever_all_proxy_says(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    request = Request([{"role": "user", "content": "Why?"}], Sampling(), (1,))
    with Stub() as stub:
        [made] = open_engine(EngineSpec("openai", base_url=stub.url.replace("http", "HTTP"))).generate([request])
        assert len(stub.posts()) == len(made.texts) == 1


# --- secrets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot reach http://me:w@rd@host:1/v1, in 2 tries", "cannot reach http://***@host:1/v1, in 2 tries"),
        ("https://token@host/v1?api_key=abc&x=1#f", "https://***@host/v1?api_key=***&x=1#f"),
        ("mail me@host or see http://host/a@b", "mail me@host or see http://host/a@b"),
        ("Incorrect API key provided: sk-0123456789", "Incorrect API key provided: ***"),
    ],
)
def test_secrets_are_taken_out_of_a_text(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789\n")
    assert redacted(text) == shown
    monkeypatch.setenv("OPENAI_API_KEY", "host")  # too short to be one
    assert redacted("a host") == "a host"


def test_neither_password_nor_key_is_shown_or_kept(
    srlm: Srlm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The server is told both; files, errors and `srlm doctor` have neither."""
    argv = ["sample", "--engine", "openai", "--model", "m", "-n", "1", "--retries", "0"]
    rows = as_lines([{"prompt": "Why?"}])
    env = {"OPENAI_API_KEY": "sk-very-secret\r\n"}
    with Stub() as stub, Stub(lambda asked: error(401, "no such key: sk-very-secret")) as refusing:
        urls = [server.url.replace("://", "://me:hidden-word@") for server in (stub, refusing)]
        done = srlm(*argv, "--out", "r.jsonl", stdin=rows, env={**env, "OPENAI_BASE_URL": urls[0] + "\n"})
        refused = srlm(*argv, "--out", "s.jsonl", "--base-url", urls[1], stdin=rows, env=env)
    assert done.code == 0, done.err
    assert refused.code == 1 and "no such key: ***" in refused.err
    away = srlm(*argv, "--out", "t.jsonl", "--base-url", urls[0], stdin=rows, env=env)
    assert away.code == 1 and "cannot reach http://***@" in away.err
    monkeypatch.setenv("OPENAI_BASE_URL", urls[0])
    assert urls[0].replace("me:hidden-word", "***") in openai_server()
    assert run([*argv, urls[0]]) == 2
    assert read_json(srlm.folder / "r.jsonl.meta.json")["base_url"] == stub.url.replace("://", "://***@")
    kept = [path for path in srlm.folder.rglob("*") if path.is_file()]
    assert {path.name for path in kept} >= {"r.jsonl.meta.json", "s.jsonl.part.meta.json", "t.jsonl.part.meta.json"}
    said = done.err + refused.err + away.err + "".join(capsys.readouterr()) + "".join(map(Path.read_text, kept))
    for secret in ("hidden-word", "very-secret", base64.b64encode(b"me:hidden-word").decode()):
        assert secret not in said
