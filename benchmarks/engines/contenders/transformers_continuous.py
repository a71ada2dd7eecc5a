"""Contender: `generate_batch` of transformers, its continuous batching; it takes no stop texts."""

from __future__ import annotations

import sys

import torch
from protocol import Job, Run, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging


def open_contender(job: Job) -> Run:
    """Return the run: all completions as requests of their own, of which `rows` are under way at a time."""
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    torch.manual_seed(0)
    batching = ContinuousBatchingConfig(max_requests_per_batch=job["rows"], num_blocks=512, max_batch_tokens=2048)
    settings = GenerationConfig(
        do_sample=True,
        temperature=job["sampling"]["temperature"],
        top_p=job["sampling"]["top_p"],
        top_k=0,
        max_new_tokens=job["sampling"]["max_tokens"],
        eos_token_id=job["stop_ids"],
        pad_token_id=job["stop_ids"][0],
    )

    def run(requests: list[dict]) -> tuple[int, int]:
        prompts = [one["tokens"] for one in requests for _ in one["seeds"]]
        done = model.generate_batch(prompts, settings, batching)
        if failed := [one.error for one in done.values() if one.error]:
            sys.exit(f"continuous batching failed: {failed[0]}")
        return sum(len(one.generated_tokens) for one in done.values()), len(done)

    return run


serve(open_contender, ("torch", "transformers"))
