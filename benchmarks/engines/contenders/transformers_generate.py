"""Contender: `transformers.generate`, prompts batched by length, all completions of a prompt in one batch.

    transformers_generate.py [static | compiled]

The cache is the dynamic one; or one of fixed size; or that and a forward pass that torch.compile made.
"""

from __future__ import annotations

import sys

import torch
from protocol import Job, Run, serve
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig
from transformers.utils import logging


def open_contender(job: Job) -> Run:
    """Return the run: batches of `rows` completions, longest prompts first."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    torch.manual_seed(0)
    stops = {"stop_strings": job["stops"], "tokenizer": tokenizer} if job["stops"] else {}
    stop_ids = torch.tensor(job["stop_ids"])
    ways = {"cache_implementation": "static"} if sys.argv[1:] else {}
    if "compiled" in sys.argv:
        ways["compile_config"] = CompileConfig(fullgraph=False, mode="default", dynamic=True)
        ways["compile_config"]._compile_all_devices = True  # by default only on a GPU
    elif ways:
        ways["disable_compile"] = True

    def batch(requests: list[dict]) -> int:
        inputs = tokenizer.pad({"input_ids": [one["tokens"] for one in requests]}, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            written = model.generate(
                **inputs,
                do_sample=job["sampling"]["temperature"] > 0,
                temperature=job["sampling"]["temperature"],
                top_p=job["sampling"]["top_p"],
                top_k=0,
                max_new_tokens=job["sampling"]["max_tokens"],
                num_return_sequences=len(requests[0]["seeds"]),
                eos_token_id=job["stop_ids"],
                pad_token_id=job["stop_ids"][0],
                **stops,
                **ways,
            )[:, width:]
        ended = torch.isin(written, stop_ids).long()
        return int((ended.cumsum(-1) - ended == 0).sum())  # up to the first stop token, which counts

    def run(requests: list[dict]) -> tuple[int, int]:
        each = len(requests[0]["seeds"])
        size = max(1, job["rows"] // each)
        ordered = sorted(requests, key=lambda one: len(one["tokens"]), reverse=True)
        tokens = sum(batch(ordered[at : at + size]) for at in range(0, len(ordered), size))
        return tokens, len(requests) * each

    return run


serve(open_contender, ("torch", "transformers"))
