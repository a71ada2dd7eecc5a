"""A process that forks commands, so that each is spared an interpreter's start and its imports.

`command_server.py SOCKET OWNER PLAN` imports modules, listens on a Unix socket, and computes nothing itself. PLAN is
JSON: `modules` to import, and `commands` of srlm whose late imports are found by running each once in a process of its
own. A client sends what to run with the files 0, 1 and 2, and gets the process number and later the wait status.

A command is a process of its own as any other: its files, folder, environment, limits, signals and exit status are
those of a `python -m srlm_cli`. Only what Python and libraries read as they start or are imported is the server's.
The server ends with the process OWNER.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
import weakref
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

LENGTH, NUMBER = struct.Struct("!Q"), struct.Struct("!i")


def serve(path: str, owner: int) -> None:
    """Fork a command for each client that asks for one, until the owner has ended.

    A command whose client has gone, as when it was killed, is killed.
    """
    selector, running = selectors.DefaultSelector(), {}
    selector.register(os.pidfd_open(owner), selectors.EVENT_READ)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                file = key.fileobj
                if file is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                elif key.data:
                    selector.unregister(file)
                    os.close(file)
                    client = running.pop(key.data)
                    tell_end(key.data, client)
                    if client in selector.get_map():
                        selector.unregister(client)
                    client.close()
                elif not isinstance(file, socket.socket):
                    return
                elif asked := read_request(file):
                    pid = fork(*asked)
                    running[pid] = file
                    file.sendall(NUMBER.pack(pid))
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                else:
                    selector.unregister(file)
                    for pid in (pid for pid, client in running.items() if client is file):
                        os.kill(pid, signal.SIGKILL)


def read_request(client: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return what a client asks for and the files of the command, None when it has closed its end."""
    try:
        head, files, _, _ = socket.recv_fds(client, LENGTH.size, 3)
    except ConnectionError:
        return None
    if not head:
        return None
    (size,) = LENGTH.unpack(head)
    body = bytearray()
    while len(body) < size:
        body += client.recv(size - len(body))
    return json.loads(body), files


def tell_end(pid: int, client: socket.socket) -> None:
    """Tell a client how its command ended."""
    _, status = os.waitpid(pid, 0)
    try:
        client.sendall(NUMBER.pack(status))
    except OSError:
        pass  # the client has gone


def fork(asked: dict[str, Any], files: list[int]) -> int:
    """Start a command and return its process number."""
    if pid := os.fork():
        for file in files:
            os.close(file)
        return pid
    status = 1
    try:
        become(asked, files)
        status = run(asked["argv"])
    except BaseException:  # noqa: BLE001 - this process may not go on as a second server
        traceback.print_exc()
    finally:
        os._exit(status)


def become(asked: dict[str, Any], files: Sequence[int]) -> None:
    """Take on the files, folder, environment, limits and signals of a command."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, tuple(asked["file_size"]))
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def run(argv: list[str]) -> int:
    """Run `-m MODULE ARGS`, `-c CODE ARGS` or `SCRIPT ARGS` as Python would, and return the exit code."""
    code = 0
    try:
        if argv[0] == "-m":
            sys.path[0] = os.getcwd()
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.path[0] = os.getcwd()
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path[0] = str(Path(argv[0]).parent)
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - as at the end of an interpreter
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    return code


def late_imports(argv: list[str]) -> list[str]:
    """Return the modules that a command imports when it runs, here with no input, in the order of their imports."""
    read_end, write_end = os.pipe()
    nowhere = os.open(os.devnull, os.O_RDWR)
    if pid := os.fork():
        os.close(write_end)
        with open(read_end) as names:
            found = names.read().split()
        os.waitpid(pid, 0)
        return found
    before = set(sys.modules)
    try:
        for number in range(3):
            os.dup2(nowhere, number)
        run(["-m", "srlm_cli", *argv])
        os.write(write_end, "\n".join(name for name in sys.modules if name not in before).encode())
    finally:
        os._exit(0)


def preload(modules: Sequence[str], commands: Sequence[list[str]]) -> None:
    """Import modules, `NAME.*` for a package with all that is in it, and what commands import late."""
    for name in modules:
        package = import_module(name.removesuffix(".*"))
        if name.endswith(".*"):
            found = [found.name for found in walk_packages(package.__path__, f"{package.__name__}.")]
            import_all(name for name in found if not name.endswith(".__main__"))
    for argv in commands:
        import_all(late_imports(argv))


def import_all(names: Iterable[str]) -> None:
    """Import what can be imported here; what needs another library, or is no module of its own, is left out."""
    for name in names:
        try:
            import_module(name)
        except ImportError:
            pass


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close their connections
    path, owner, plan = sys.argv[1:]
    preload(**json.loads(plan))
    for kept in tuple(weakref.finalize._registry):
        kept.atexit = False  # PyTorch's operators, taken apart one by one: half of the time of a command that is forked
    gc.collect()
    gc.freeze()  # what was imported is not looked through, and copied, by each command
    serve(path, int(owner))


if __name__ == "__main__":
    main()
