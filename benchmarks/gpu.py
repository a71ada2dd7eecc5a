"""The table of benchmarks/gpu.sh: tokens per second of sampling, judging and training on one device.

    python benchmarks/gpu.py --device cuda --seconds 300
    python benchmarks/gpu.py --device cpu          # a tiny model and a few rows, to rehearse

Each row is measured in a process of its own. Generation is timed after a warm-up, with the requests of the stages;
training from the loaded model to the last step, as in benchmarks/training.py, against TRL's defaults. Prompts, replies
and pairs are those of examples/quickstart. A row that could not be measured says why; unless a library is only not
installed, the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "examples" / "quickstart"
sys.path[:0] = [str(HERE), str(HERE / "engines"), str(HERE.parent / "tests" / "support")]

PARTS = [(task, engine) for task in ("sample", "judge") for engine in ("hf", "vllm")]
PARTS += [(task, who) for task in ("sft", "dpo") for who in ("srlm", "trl")]
NEEDED = {"vllm": "vllm", "trl": "trl"}
SIZES = {  # rows, completions per row, new tokens, rows to train on, rows per step
    "cuda": {"rows": 128, "each": 4, "tokens": 256, "trained": 96, "batch": 16},
    "cpu": {"rows": 2, "each": 1, "tokens": 8, "trained": 2, "batch": 2},
}
MODELS = {"cuda": "smollm2-135m-instruct", "cpu": "tiny"}
MADE: dict[str, dict[str, Any]] = {  # made here, with random weights and a tokenizer of bytes
    "tiny": {"head_dim": 32},  # vLLM on a CPU has no smaller heads
    "random-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}  # fmt: skip


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of the quickstart."""
    return [json.loads(line) for line in (QUICKSTART / name).read_text(encoding="utf-8").splitlines()]


def generation(task: str, engine: str, device: str, model: str, scratch: Path) -> dict[str, Any]:
    """Return the generated tokens and the seconds of sampling or judging with an engine."""
    from work import requests_of

    from srlm_cli.engines import open_engine
    from srlm_cli.engines.base import EngineSpec

    size, rows = SIZES[device], rows_of("ift.jsonl")
    if task == "judge":
        ranked = rows_of("ranked.jsonl")
        rows = [{"prompt": row["prompt"], "response": one["text"]} for row in ranked for one in row["responses"]]
        rows = [{"id": str(at), **row} for at, row in enumerate(rows)]
    file = scratch / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[: size["rows"]]), encoding="utf-8")
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": size["tokens"]}
    asked = requests_of(task, str(file), size["each"], sampling)
    opened = open_engine(EngineSpec(engine, model, device=device if engine == "hf" else "auto"))
    list(opened.generate(asked[:2]))
    started = time.monotonic()
    tokens = sum(completion.tokens_out for completion in opened.generate(asked))
    return {"tokens": tokens, "seconds": time.monotonic() - started}


def training(task: str, who: str, device: str, model: str, scratch: Path) -> dict[str, Any]:
    """Return the tokens of the rows and the seconds of a training, and its first loss."""
    import training as benchmark

    benchmark.MODEL = model
    size = SIZES[device]
    if task == "sft":
        rows = [{key: row[key] for key in ("prompt", "completion")} for row in rows_of("ift.jsonl")]
    else:
        ordered = [
            (row["prompt"], sorted(row["responses"], key=lambda one: one["rank"])) for row in rows_of("ranked.jsonl")
        ]
        rows = [
            {"prompt": text, "chosen": best["text"], "rejected": rest[-1]["text"]} for text, (best, *rest) in ordered
        ]
    return benchmark.figures(task, who, rows[: size["trained"]], size["batch"], 1024, scratch / "m")


def model_of(name: str, scratch: Path) -> str:
    """Return the model by its name; those of MADE are made here."""
    if name not in MADE:
        return name
    from tiny import tiny_model

    return str(tiny_model(scratch / name, **MADE[name]))


def measure(task: str, who: str, device: str, model: str) -> dict[str, Any]:
    """Return the figures of one row, measured in this process."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        work = generation if task in ("sample", "judge") else training
        return work(task, who, device, model_of(model, scratch), scratch)


def row(task: str, who: str, device: str, model: str, seconds: float) -> dict[str, Any]:
    """Return the figures of one row from a process of its own, or why there are none."""
    needed = NEEDED.get(who)
    if needed and not find_spec(needed):
        return {"missing": f"{needed} is not installed", "allowed": True}
    if seconds < 1:
        return {"missing": "no time was left"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    argv = [sys.executable, __file__, "--device", device, "--model", model, "--part", task, who]
    with tempfile.TemporaryFile() as said:
        env = {**os.environ, "TQDM_DISABLE": "1", **hidden}
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=said, env=env, start_new_session=True)
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"missing": f"not done after {seconds:.0f} s"}
        finally:
            if process.poll() is None:  # its workers hold memory of the device, too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        if process.returncode:
            last = said.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            return {"missing": f"ended with {process.returncode}: {last[0][:160]}"}
    return json.loads(out.splitlines()[-1])


def machine(device: str) -> str:
    """Return the device and the versions that the figures are of."""
    import torch
    import transformers

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU; --device cpu rehearses on a CPU")
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> None:
    """Measure all rows, and print them as they come."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=sorted(SIZES), default="cuda")
    parser.add_argument("--model", help=f"model folder or name, or one made here: {', '.join(MADE)}")
    parser.add_argument("--seconds", type=float, default=300.0, help="no row is begun after so long")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or MODELS[options.device]
    if options.part:
        print(json.dumps(measure(*options.part, options.device, model)))
        return
    until = time.monotonic() + options.seconds
    print(f"{machine(options.device)}; {model}; {SIZES[options.device]}")
    print("| task | with | tokens/s | tokens | seconds | |")
    print("|---|---|---|---|---|---|", flush=True)
    failed = False
    for task, who in PARTS:
        found = row(task, who, options.device, model, min(options.seconds / 3, until - time.monotonic()))
        if "missing" in found:
            failed |= "allowed" not in found
            print(f"| {task} | {who} | not measured | | | {found['missing']} |", flush=True)
            continue
        loss = f"first loss {found['first_loss']:.4f}" if "first_loss" in found else ""
        rate = found["tokens"] / found["seconds"]
        print(f"| {task} | {who} | {rate:.0f} | {found['tokens']} | {found['seconds']:.1f} | {loss} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
