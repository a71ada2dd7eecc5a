"""How a contender talks: a job in, `ready` out, then a timed run for each line, all as JSON lines.

The job: `model` (a folder), `dtype`, `rows` (how many completions at once), `sampling` (`temperature`,
`top_p`, `max_tokens`), `stops` (texts that may end a completion), `stop_ids`, and `requests`, each
with its place `at`, the `tokens` of its prompt and a list of `seeds`, one completion a seed. `work`
says how srlm's own stage code makes the same requests. A line with a number runs so many of them and
answers `tokens` (generated, the stop token too, padding
not), `rows` (completions) and `seconds`.

Nothing here imports srlm, so that a contender can live in another environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

Job = dict[str, Any]
Run = Callable[[list[dict]], tuple[int, int]]  # requests -> (tokens, rows)


def serve(open_contender: Callable[[Job], Run], libraries: tuple[str, ...]) -> None:
    """Load, warm up on a few of the requests, and run the job each time that it is asked for."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    run = open_contender(job)
    run(job["requests"][:: max(1, len(job["requests"]) // 4)])
    answer(ready={name: import_module(name).__version__ for name in libraries})
    for line in sys.stdin:
        requests = job["requests"][: int(line)]
        started = time.perf_counter()
        tokens, rows = run(requests)
        answer(tokens=tokens, rows=rows, seconds=time.perf_counter() - started)
