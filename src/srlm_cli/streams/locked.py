"""A file that is written under another name until it is complete, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from srlm_cli.errors import OptionError

WAIT = 5.0  # seconds: a process that was killed can have children that end a little later
PAUSE = 0.05


def open_locked(path: Path) -> IO[bytes]:
    """Open a file to read and write, as it is or empty, and lock it until it is closed.

    Raises OptionError if another process has it. The lock is on the file, not on the name: a file that was renamed or
    deleted in the meantime is opened again. File systems without locks are not locked.
    """
    end = time.monotonic() + WAIT
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                file.close()
                raise OptionError(
                    f"another process is writing {path}", "wait for it, or use another --out file"
                ) from None
            time.sleep(PAUSE)
        except OSError:  # the file system has no locks
            return file
        else:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        file.close()
