"""The processes of one training: which of them this one is, and waiting for each other.

The launcher (`accelerate launch`, `torchrun`, `--accelerate-config`) sets the environment of each process.
The main one speaks and writes files; the others compute along.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

GRACE = 60.0  # seconds
LAUNCHED = "SRLM_LAUNCHED"  # set for the processes of `--accelerate-config`, also where there is but one


def started() -> bool:
    """Return whether this process was started as one of a training's."""
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ


def count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if started() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if started() else 0


def is_main() -> bool:
    """Return whether this is the process that speaks and writes."""
    return rank() == 0


def sharded() -> bool:
    """Return whether weights or optimizer are spread over the processes while they train: by FSDP, or by DeepSpeed."""
    return "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))


def init(device: str) -> None:
    """Meet the other processes; they talk by gloo on a CPU and by NCCL on GPUs, as accelerate has it."""
    if started():
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def own_device(device: str) -> str:
    """Return the device of this process, of those of a kind."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def destroy() -> None:
    """Part from the other processes."""
    if started():
        from accelerate import PartialState

        PartialState().destroy_process_group()


def leave(code: int) -> None:
    """End this process of a training, without what Python does at its end; does nothing in any other process.

    Threads of gloo can still run then, and C++ aborts the process: a training that had succeeded ended with an error.
    """
    if started():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def barrier() -> None:
    """Return when all processes have come here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def let_main_speak() -> None:
    """Wait for the main process to tell what all have met: whoever started them then ends this one, while it waits."""
    if not is_main():
        time.sleep(GRACE)


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process do something before the others do it; where it fails, they are not let in."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def broadcast(value: Any) -> Any:
    """Return the main process's value in all of them, where each has one of its own, such as a time."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def all_gather(values: list[Any]) -> list[Any]:
    """Return the lists of all processes as one, in their order; the lists are of one length."""
    if count() == 1:
        return values
    from accelerate.utils import gather_object

    return gather_object(values)
