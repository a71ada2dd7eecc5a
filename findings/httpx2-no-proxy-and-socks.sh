#!/usr/bin/env bash
# httpx2 opens a transport for each proxy variable before it looks at NO_PROXY: with ALL_PROXY=socks5://..., and
# without socksio, a client cannot even be made for a server on this machine that NO_PROXY names. The message names
# another package (httpx[socks]). A transport of one's own, or trust_env=False, is the way around it.
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet httpx2==2.16.2
cat > "$work/try.py" <<'PY'
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx2


class Hello(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Hello)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/"
for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"):
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = "127.0.0.1"
print("httpx2", httpx2.__version__)
print("HTTP proxy and NO_PROXY:", end=" ")
os.environ["ALL_PROXY"] = "http://127.0.0.1:9"
print(httpx2.Client().get(url).text)
same = 0
for proxy in ("socks5://127.0.0.1:9", "socks://127.0.0.1:9"):
    os.environ["ALL_PROXY"] = proxy
    try:
        print(f"{proxy} and NO_PROXY:", httpx2.Client().get(url).text)
    except (ImportError, ValueError) as error:
        same += 1
        print(f"{proxy} and NO_PROXY: {type(error).__name__}: {error}")
print("a transport of one's own:", httpx2.Client(transport=httpx2.HTTPTransport()).get(url).text)
sys.exit(same != 2)
PY
"$work/venv/bin/python" "$work/try.py"
