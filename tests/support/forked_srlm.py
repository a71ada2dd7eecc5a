"""`srlm` as a program for make and shells, forked by a server of the tests: `forked_srlm.py ARGS`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from forked import Forked, server_for

folder, argv = Path.cwd(), ["-m", "srlm_cli", *sys.argv[1:]]
server = server_for([sys.executable, *argv], folder)
code = Forked(server, argv, folder, {**os.environ}, stdin=0, stdout=1, stderr=2).wait()
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
