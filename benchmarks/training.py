"""How fast srlm trains, and in how much memory, against TRL as it comes and TRL tuned by hand.

    python benchmarks/training.py [--rows 8] [--batch 8] [--only dpo] [--data FOLDER]

All contenders get the same model (SmolLM2-135M-Instruct), the same real rows of Open Assistant, the
same batch and learning rate, each in a process of its own. Timed is the work from the loaded model to
the last step: rendering, the reference's log-probabilities, the steps. Tokens are those of the rows,
without padding, each once. Memory is the peak of the process (ru_maxrss). Where other programs run
beside it, `--threads 1` and the processor's seconds tell more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from paths import folder_with

MODEL = "smollm2-135m-instruct"
DATA = Path(__file__).parents[1] / ".." / "shared" / "data" / "oasst2"
CONTENDERS = {
    "dpo": ("trl", "trl-tuned", "srlm", "srlm-lora", "trl-lora"),
    "sft": ("trl", "trl-tuned", "srlm"),
}


def pairs(folder: Path, count: int) -> list[dict[str, Any]]:
    """Return best against worst reply of the first ranked prompts."""
    made = []
    for line in (folder / "ranked_train.jsonl").read_text().splitlines():
        row = json.loads(line)
        ordered = sorted(row["responses"], key=lambda response: -response["score"])
        if len(ordered) > 1:
            made.append({"prompt": row["prompt"], "chosen": ordered[0]["text"], "rejected": ordered[-1]["text"]})
    return made[:count]


def completions(folder: Path, count: int) -> list[dict[str, Any]]:
    """Return the first IFT rows."""
    rows = [json.loads(line) for line in (folder / "ift.jsonl").read_text().splitlines()[:count]]
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def now() -> np.ndarray:
    """Return the clock and the processor time of this process, in seconds."""
    return np.array([time.monotonic(), time.process_time()])


def run_srlm(
    task: str, who: str, rows: list[dict[str, Any]], batch: int, length: int, out: Path
) -> tuple[np.ndarray, tuple[float, float]]:
    """Train with srlm; return the seconds (clock, processor) from the loaded model to the last step, and two losses."""
    from srlm_cli.train import session, setup
    from srlm_cli.train.losses import DPOLossConfig
    from srlm_cli.train.options import RunOptions, TrainSpec

    clock = {}
    load, save = setup.load_policy, session.save
    setup.load_policy = lambda *given: [load(*given), clock.update(start=now())][0]
    session.save = lambda *args: clock.update(end=now())
    spec = TrainSpec(MODEL, out, 1e-6, 1e-7, batch=batch, max_length=length, lora_r=16 if "lora" in who else 0)
    if task == "dpo":
        from srlm_cli.train.dpo import dpo

        results = dpo(rows, spec, DPOLossConfig(), run=RunOptions(quiet=True))
    else:
        from srlm_cli.train.sft import sft

        results = sft(rows, spec, run=RunOptions(quiet=True))
    setup.load_policy, session.save = load, save
    return clock["end"] - clock["start"], (results["first_loss"], results["last_loss"])


def run_trl(
    task: str, who: str, rows: list[dict[str, Any]], batch: int, length: int, out: Path
) -> tuple[np.ndarray, tuple[float, float]]:
    """Train with TRL: its defaults, or what is fastest with it on a CPU by its own settings."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from srlm_cli.models.load import load_model, load_tokenizer, quiet_libraries

    quiet_libraries()
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL, "float32")
    started = now()
    settings: dict[str, Any] = {"per_device_train_batch_size": min(8, batch)}
    if who == "trl-tuned":
        settings = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "bf16": False}
        settings |= {"precompute_ref_log_probs": True} if task == "dpo" else {}
    settings |= {"gradient_accumulation_steps": batch // settings["per_device_train_batch_size"]}
    settings |= {"output_dir": str(out), "learning_rate": 1e-6, "num_train_epochs": 1, "max_length": length}
    settings |= {
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "disable_tqdm": True,
    }

    def messages(text: str, role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    data = Dataset.from_list(
        [{key: messages(text, "user" if key == "prompt" else "assistant") for key, text in row.items()} for row in rows]
    )
    kind, config = (DPOTrainer, DPOConfig) if task == "dpo" else (SFTTrainer, SFTConfig)
    more = {}
    if "lora" in who:
        from peft import LoraConfig

        more = {"peft_config": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")}
    trainer = kind(model=model, args=config(**settings), train_dataset=data, processing_class=tokenizer, **more)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return now() - started, (losses[0], losses[-1])


def figures(task: str, who: str, made: list[dict[str, Any]], batch: int, length: int, out: Path) -> dict[str, Any]:
    """Return the figures of one contender, run in this process."""
    from srlm_cli.train import setup
    from srlm_cli.train.data import dpo_rows, sft_rows
    from srlm_cli.train.options import TrainSpec

    spec = TrainSpec(MODEL, out, 1e-6, 1e-7)
    renderer = setup.renderer(setup.open_tokenizer(spec), spec)
    _, report = (dpo_rows if task == "dpo" else sft_rows)(made, renderer, length)
    run = run_srlm if who.startswith("srlm") else run_trl
    (seconds, processor), (first, last) = run(task, who, made, batch, length, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"tokens": report.tokens, "seconds": seconds, "processor": processor, "peak_gb": peak}
    return {**found, "first_loss": first, "last_loss": last}


def main() -> None:
    """Run the contenders one after the other and print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=folder_with("ranked_train.jsonl", "ift.jsonl"), default=str(DATA))
    parser.add_argument("--only", choices=sorted(CONTENDERS))
    parser.add_argument("--without", action="append", default=[], help="a contender to leave out")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        task, who = options.contender
        made = (pairs if task == "dpo" else completions)(options.data, options.rows)
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(figures(task, who, made, options.batch, options.length, Path(scratch) / "m")))
        return
    print(f"{' '.join(sys.argv)}: {options.rows} rows, steps of {options.batch}, max length {options.length}, {MODEL}")
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    env = {**os.environ, "TQDM_DISABLE": "1", **threads}
    for task in [options.only] if options.only else CONTENDERS:
        found = {}
        for who in [name for name in CONTENDERS[task] if name not in options.without]:
            argv = [sys.executable, __file__, "--contender", task, who, "--data", str(options.data)]
            argv += ["--rows", str(options.rows), "--batch", str(options.batch), "--length", str(options.length)]
            done = subprocess.run(argv, stdout=subprocess.PIPE, env=env, check=True)
            found[who] = json.loads(done.stdout.splitlines()[-1])
            own, first = found[who], next(iter(found.values()))
            print(
                f"{task} {who:10} {own['tokens'] / own['seconds']:6.0f} tokens/s ({own['tokens']} tokens, "
                f"{own['seconds']:.0f} s, {first['seconds'] / own['seconds']:.2f} times {next(iter(found))}; processor "
                f"{own['processor']:.0f} s, {first['processor'] / own['processor']:.2f} times), "
                f"peak {own['peak_gb']:.2f} GB, first loss {own['first_loss']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
