"""How the cost of a training grows with the model and with the length of the rows: tokens per second, and peak memory.

    python benchmarks/growth.py [--task sft] [--shape 135M] [--tokens 256] [--out growth.jsonl] [--plot growth.svg]

Each combination trains random weights of the shape of a real model in a process of its own: `--steps` steps, of which
the first is not timed. A step of `sft` has about 1,024 tokens, or one row that is longer; one of `dpo` has as many on
each side. All rows are cut to the same length, and a quarter of it is the prompt. The seconds are those of the
processor with one thread, so that other programs at the same time change less. `--out` keeps the figures, and a later
run measures only what is not there yet; `--plot` draws all that are. Weights, gradients and moments of the 1B shape are
20 GB with AdamW, and 10 GB with `--optim adafactor`.
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

from paths import output_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from srlm_cli.train import session, setup
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec

MODEL = "smollm2-135m-instruct"  # its tokenizer
TASKS = ("sft", "dpo")
LENGTHS = (256, 1024, 2048, 4096)
A_STEP = 1024
# The shapes of SmolLM2-135M, SmolLM2-360M and Llama-3.2-1B.
SHAPES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5, "vocab_size": 49152},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


class Clock(TrainerCallback):
    """Notes the seconds of the processor at the end of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, *args: Any, **rest: Any) -> None:
        self.seconds.append(time.process_time())


def rows_of(task: str, count: int, tokens: int) -> list[dict[str, str]]:
    """Return rows that are longer than `tokens`, a quarter of them in the prompt."""
    made = []
    for row in range(count):
        prompt, reply = f"{row}" + " sky" * (tokens // 4), f" {row} blue" * tokens
        sides = {"chosen": "yes" + reply, "rejected": "no" + reply} if task == "dpo" else {"completion": reply}
        made.append({"prompt": prompt, **sides})
    return made


def measure(task: str, shape: str, tokens: int, steps: int, optim: str, out: Path) -> dict[str, Any]:
    """Train in this process; return tokens per second of the processor and the peak of its memory in GB."""

    def random_policy(spec: TrainSpec, tokenizer: Any) -> LlamaForCausalLM:
        setup.keep_freed_memory()
        config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=8192, use_cache=False)
        return LlamaForCausalLM(config)

    def timed(trainer: Any, *args: Any) -> dict[str, Any]:
        trainer.add_callback(clock)
        return run_training(trainer, *args)

    clock, run_training = Clock(), session.run_training
    setup.load_policy, session.run_training, session.save = random_policy, timed, lambda *args: None
    batch = max(1, A_STEP // tokens)
    spec = TrainSpec(MODEL, out, 1e-6, 1e-7, batch=batch, max_steps=steps, max_length=tokens, optim=optim)
    rows, run = rows_of(task, batch * steps, tokens), RunOptions(quiet=True)
    if task == "dpo":
        from srlm_cli.train.dpo import dpo

        results = dpo(rows, spec, DPOLossConfig(), run=run)
    else:
        from srlm_cli.train.sft import sft

        results = sft(rows, spec, run=run)
    data = results["data"]
    assert data["longest"] == tokens and results["steps"] == steps, data
    seconds = (clock.seconds[-1] - clock.seconds[0]) / (steps - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"task": task, "shape": shape, "tokens": tokens, "optim": optim, "dtype": results["dtype"]}
    return found | {"tokens_per_second": data["tokens"] / steps / seconds, "peak_gb": peak}


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Draw the figures over the length of the rows: a line per task and shape."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = ("tokens per second of the processor", "peak memory, GB")
    for axes, key, label in zip(panels, ("tokens_per_second", "peak_gb"), labels, strict=True):
        for colour, shape in zip(("#2f6fbb", "#c2571a", "#3b8a4d"), SHAPES, strict=True):
            for line, task in zip(("-", "--"), TASKS, strict=True):
                some = sorted(
                    (one["tokens"], one[key]) for one in found if (one["task"], one["shape"]) == (task, shape)
                )
                if some:
                    axes.plot(*zip(*some, strict=True), line, color=colour, marker="o", ms=4, label=f"{task} {shape}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.set_xlabel("tokens of each row")
        axes.set_title(label, loc="left", fontsize=10)
        axes.grid(axis="y", linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(fontsize=8, frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Measure what is asked for and not there yet, each in a process of its own, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--tokens", type=int, action="append", help=f"of each row, as {', '.join(map(str, LENGTHS))}")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="more of them also count seconds of waiting")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--out", type=output_file, help="JSONL file to keep the figures in")
    parser.add_argument("--plot", type=output_file, help="image to draw, .svg or .png")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    wanted = [
        (task, shape, tokens)
        for shape in asked.shape or SHAPES
        for tokens in asked.tokens or LENGTHS
        for task in asked.task or TASKS
    ]
    if asked.steps < 2:
        parser.error("--steps is at least 2: the first step is not timed")
    if asked.here:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(*wanted[0], asked.steps, asked.optim, Path(scratch) / "m")))
        return
    there = asked.out.read_text().splitlines() if asked.out and asked.out.exists() else []
    found = [json.loads(line) for line in there]
    for task, shape, tokens in wanted:
        if any((one["task"], one["shape"], one["tokens"]) == (task, shape, tokens) for one in found):
            continue
        argv = [sys.executable, __file__, "--here", "--task", task, "--shape", shape, "--tokens", str(tokens)]
        argv += ["--steps", str(asked.steps), "--optim", asked.optim]
        env = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
        done = subprocess.run(argv, stdout=subprocess.PIPE, env=env, check=False)
        if done.returncode:
            print(f"{task} {shape} {tokens} tokens: ended with {done.returncode} (out of memory?)", flush=True)
            continue
        found.append(json.loads(done.stdout.splitlines()[-1]))
        if asked.out:
            asked.out.write_text("".join(json.dumps(one) + "\n" for one in found))
    print(
        "| task | shape | tokens of a row | dtype | optimizer | tokens/s of the processor | peak, GB |\n|" + "---|" * 7
    )
    for one in found:
        about = " | ".join(str(one[name]) for name in ("task", "shape", "tokens", "dtype", "optim"))
        print(f"| {about} | {one['tokens_per_second']:.0f} | {one['peak_gb']:.1f} |")
    if asked.plot:
        plot(found, asked.plot)


if __name__ == "__main__":
    main()
