"""Where a server is and how it is reached: its base URL, its key, and the proxy on the way."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from srlm_cli.errors import OptionError
from srlm_cli.redact import redacted

OPENAI = "https://api.openai.com/v1"
PROXIES = ("http", "https", "socks5", "socks5h")  # protocols of proxies that httpx2 has; those of SOCKS need socksio


def base_url(text: str | None) -> str:
    """Return a base URL without white space around it and its last slash; OpenAI's own for None or no text.

    Raise OptionError for another text. The URL may hold a user and a password, which are sent and never shown.
    """
    url = (text or "").strip()
    try:
        httpx2.URL(url)
        right = not url or (re.match(r"https?://[^/\s]", url, re.IGNORECASE) and urlsplit(url).port != 0)
    except (httpx2.InvalidURL, ValueError):  # too long, a lone surrogate; a port that is no number, or too large
        right = False
    if not right or re.search(r"\s", url):
        shown = redacted(url) if "://" in url else url.rpartition("@")[2]
        raise OptionError(f"--base-url {shown[:200]} is not a URL", "for instance http://localhost:8000/v1")
    url, mark, query = (url or OPENAI).partition("?")
    return url.rstrip("/") + mark + query


def key_for(url: str) -> str:
    """Return OPENAI_API_KEY without white space around it, or a placeholder for a server that asks for none.

    Raise OptionError for one that no header can hold, and for none where the server is OpenAI's.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and url == OPENAI:
        raise OptionError("no OPENAI_API_KEY in the environment", "or --base-url URL of a server of your own")
    if not re.fullmatch(r"[!-~]*", key):
        raise OptionError(
            "OPENAI_API_KEY is not a key: it has white space or more than ASCII", "copy it again, without other text"
        )
    return key or "none"


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for a server, None where there is none or it is passed by.

    The variables are those of curl: HTTP_PROXY or HTTPS_PROXY, else ALL_PROXY, unless NO_PROXY has the host, its
    domain or its network. One whose protocol cannot be spoken raises OptionError; a server on this machine does
    without.
    """
    server = urlsplit(url)
    host = server.hostname or ""
    names = getproxies()
    name = next((name for name in (server.scheme.lower(), "all") if names.get(name)), None)
    if name is None or proxy_bypass(f"[{host}]" if ":" in host else host) or in_networks(host, names.get("no", "")):
        return None
    proxy = names[name] if "://" in names[name] else f"http://{names[name]}"
    protocol = urlsplit(proxy).scheme.lower()
    if protocol.startswith("http") and protocol in PROXIES or protocol in PROXIES and find_spec("socksio"):
        return proxy
    if is_this_machine(host):
        return None
    needs = (
        "needs socksio: pip install socksio"
        if protocol in PROXIES
        else f"has a protocol that is not supported: {protocol}://"
    )
    raise OptionError(f"{name.upper()}_PROXY {needs}", f"or NO_PROXY={host}")


def is_this_machine(host: str) -> bool:
    """Return whether a host is the machine itself, whatever its name may be elsewhere."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def in_networks(host: str, no_proxy: str) -> bool:
    """Return whether a host is an address in one of the networks that NO_PROXY names, such as 10.0.0.0/8 or ::1."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    for network in no_proxy.split(","):
        try:
            if address in ip_network(network.strip().strip("[]"), strict=False):
                return True
        except ValueError:
            continue
    return False
