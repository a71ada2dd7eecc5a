"""A dry run of a training: its data, one record with its loss mask, and estimates of steps, memory and time."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from srlm_cli.records import Record
from srlm_cli.streams.console import clock, say
from srlm_cli.train.data import DataReport
from srlm_cli.train.options import TrainSpec
from srlm_cli.train.render import Sequence
from srlm_cli.train.setup import device_batch_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

GIGABYTE = 1e9
FORWARD = 1 / 3  # of the time of a step; the backward pass takes two


def sample(rows: list[Record], length: Callable[[Record], int], count: int) -> list[Record]:
    """Return the longest records, which determine the memory, followed by as many of medium length."""
    ordered = sorted(rows, key=length, reverse=True)
    middle = max(0, len(ordered) // 2 - count // 2)
    return ordered[:count] + ordered[middle : middle + count]


def show(trainer: Trainer, name: str, report: DataReport, spec: TrainSpec) -> dict[str, Any]:
    """Print estimates of a training on stderr, measured in real steps on the records of `sample`; return them."""
    from srlm_cli.train.packing import TOKENS

    at_a_time = device_batch_size(spec)
    shown = f"up to {TOKENS} tokens" if trainer.splits and not spec.device_batch_size else str(at_a_time)
    an_epoch = math.ceil(report.rows / spec.batch)
    steps = spec.max_steps if spec.max_steps > 0 else math.ceil(an_epoch * spec.epochs)
    epochs = steps / an_epoch
    rows = [trainer.train_dataset[row] for row in range(len(trainer.sampler.lengths))]
    trainer.create_optimizer()
    # as the Trainer prepares them: with the autocast of bfloat16
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    timed(trainer, model, rows[:at_a_time])
    optimizer.step()
    optimizer.zero_grad()
    of_one_step = peak_bytes(model)
    if steps > 1:
        timed(trainer, model, rows[:at_a_time])  # now beside what the optimizer keeps
    seconds, tokens = timed(trainer, model, rows[-at_a_time:])
    measured = peak_bytes(model) if steps > 1 else of_one_step
    rate = tokens / seconds
    beside = FORWARD * trainer.forward_passes(epochs)
    wanted = report.tokens * (epochs + beside)
    say(f"srlm {name}: one row as the model sees it; it is trained on the lines after `~` (thought) and `>` (answer)")
    for label, sequence in report.examples.items():
        say(f"--- {label}")
        say(marked(trainer.processing_class, sequence))
    say(f"srlm {name}: {steps} steps of {spec.batch} rows, {shown} at a time, in {spec.dtype}")
    say(
        f"srlm {name}: memory about {measured / GIGABYTE:.1f} GB, measured over forward and backward passes of the "
        f"longest rows and a step of the optimizer {spec.optim}"
    )
    passes = f", {beside:.2f} epochs for passes without a gradient" if beside else ""
    say(
        f"srlm {name}: time about {clock(wanted / rate)}: {rate:.0f} tokens/s measured over rows of middle length, "
        f"{report.tokens} tokens, {epochs:.2f} epochs{passes}; checkpoints not counted"
    )
    return {
        "dry_run": True,
        "data": report.as_dict(),
        "dtype": spec.dtype,
        "steps": steps,
        "memory_bytes": measured,
        "seconds": round(wanted / rate, 1),
        "tokens_per_second": round(rate, 1),
    }


def timed(trainer: Trainer, model: Any, rows: list[Record]) -> tuple[float, int]:
    """Return the seconds of one forward and backward pass of rows by a prepared model, and their tokens."""
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator(rows)
    tokens = int(batch["attention_mask"].sum())
    started = time.monotonic()
    trainer.training_step(model, batch)
    return time.monotonic() - started, tokens


def peak_bytes(model: Any) -> int:
    """Return the most memory so far: of the GPU that holds the model, or of this process."""
    if model.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(model.device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def marked(tokenizer: PreTrainedTokenizerBase, sequence: Sequence) -> str:
    """Return a sequence as text, special tokens too: the prompt after `|`, a thought after `~`, an answer after `>`.

    On a terminal each is in a colour of its own.
    """
    ids, start, answer, _ = sequence
    parts = zip("|~>", (ids[:start], ids[start:answer], ids[answer:]), (2, 33, 32), strict=True)
    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    lines = [
        (f"{mark} {line}", colour)
        for mark, tokens, colour in parts
        if tokens
        for line in tokenizer.decode(tokens).removesuffix("\n").split("\n")
    ]
    return "\n".join(f"\033[{colour}m{line}\033[0m" if colours else line for line, colour in lines)
