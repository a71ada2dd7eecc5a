"""Contender: an engine of srlm behind its public protocol, with the requests of its own stage code."""

from __future__ import annotations

import sys
from pathlib import Path

from protocol import Job, Run, serve

sys.path.insert(0, str(Path(__file__).parents[1]))
from work import requests_of  # noqa: E402

from srlm_cli.engines import EngineSpec, open_engine  # noqa: E402


def open_contender(job: Job) -> Run:
    """Return the run; how the engine batches, caches and stops is its own affair."""
    engine = open_engine(EngineSpec("hf", job["model"], dtype=job["dtype"], batch_size=job["rows"]))
    asked = requests_of(**job["work"])

    def run(requests: list[dict]) -> tuple[int, int]:
        done = list(engine.generate(asked[one["at"]] for one in requests))
        return sum(one.tokens_out for one in done), sum(len(one.texts) for one in done)

    return run


serve(open_contender, ("torch", "transformers"))
