"""How a server is reached: its base URL, its key and its proxy."""

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
PROXIES = ("http", "https", "socks5", "socks5h")  # proxy protocols of httpx2; SOCKS needs socksio


def base_url(text: str | None) -> str:
    """Return a base URL without surrounding white space and last slash; OpenAI's URL for None or an empty text.

    Raise OptionError if the text is not a URL. A user and a password in the URL are sent and never shown.
    """
    url = (text or "").strip()
    try:
        httpx2.URL(url)
        right = not url or (re.match(r"https?://[^/\s]", url, re.IGNORECASE) and urlsplit(url).port != 0)
    except (httpx2.InvalidURL, ValueError):  # too long, a lone surrogate; a port that is not a valid number
        right = False
    if not right or re.search(r"\s", url):
        shown = redacted(url) if "://" in url else url.rpartition("@")[2]
        raise OptionError(f"--base-url {shown[:200]} is not a URL", "for instance http://localhost:8000/v1")
    url, mark, query = (url or OPENAI).partition("?")
    return url.rstrip("/") + mark + query


def key_for(url: str) -> str:
    """Return OPENAI_API_KEY without surrounding white space, or a placeholder for a server that needs no key.

    Raise OptionError if a header cannot hold the key, or if it is missing and the server is OpenAI's.
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
    """Return the proxy for a server from the environment, or None if there is none or the server is excluded.

    The variables are those of curl: HTTP_PROXY or HTTPS_PROXY, else ALL_PROXY, unless NO_PROXY has the host, its
    domain or its network. A proxy with an unsupported protocol raises OptionError; for a server on this machine it is
    ignored.
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
    """Return whether a host name or address is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def in_networks(host: str, no_proxy: str) -> bool:
    """Return whether a host is an address in one of the networks in NO_PROXY, such as 10.0.0.0/8 or ::1."""
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
