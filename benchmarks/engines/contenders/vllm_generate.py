"""Contender: vLLM's own offline loop, `LLM.generate` over all requests at once, prefix caching on.

Its scheduler runs in the process that asks. In a process of its own, vLLM's default, it waits busily
on a core, which on two cores halves the rate or worse; `VLLM_ENABLE_V1_MULTIPROCESSING=1` shows it.
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

from protocol import Job, Run, serve
from vllm import LLM, SamplingParams


def open_contender(job: Job) -> Run:
    """Return the run: one request a prompt with `n` completions; only stop texts need their text."""
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        max_num_seqs=job["rows"],
        max_model_len=-1,
        enable_prefix_caching=True,
        use_tqdm_on_load=False,
    )

    def run(requests: list[dict]) -> tuple[int, int]:
        llm.reset_prefix_cache()  # else a second run would find its prompts read already
        params = [
            SamplingParams(
                n=len(one["seeds"]),
                stop_token_ids=job["stop_ids"],
                stop=job["stops"],
                detokenize=bool(job["stops"]),
                **job["sampling"],
            )
            for one in requests
        ]
        prompts = [{"prompt_token_ids": one["tokens"]} for one in requests]
        done = [text for one in llm.generate(prompts, params, use_tqdm=False) for text in one.outputs]
        return sum(len(text.token_ids) for text in done), len(done)

    return run


if __name__ == "__main__":  # vLLM's worker process imports this file too
    serve(open_contender, ("torch", "transformers", "vllm"))
