"""A dry run of a training: its data, one record with its loss mask, and estimates of steps, memory and time."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from srlm_cli.models.hardware import pick_device
from srlm_cli.records import Record
from srlm_cli.streams.console import clock, say
from srlm_cli.train.data import IGNORED, DataReport
from srlm_cli.train.options import TrainSpec
from srlm_cli.train.render import Sequence
from srlm_cli.train.setup import device_batch_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

GIGABYTE = 1e9
EPOCHS = 3  # whose passes are looked through
FORWARD = 1 / 3  # of the time of a step; the backward pass takes two


@dataclass(frozen=True)
class Passes:
    """The rows of three forward and backward passes of a training, and whether each step is one pass."""

    longest: list[Record]  # the pass with the most tokens
    targets: list[Record]  # the pass with the most target tokens, whose logits are in memory
    middle: list[Record]
    alone: bool

    @property
    def rows(self) -> list[Record]:
        """The rows of all three."""
        return self.longest + self.targets + self.middle


def passes_of(rows: list[Record], length: Callable[[Record], int], spec: TrainSpec) -> Passes:
    """Return passes of the training of these rows, as its sampler makes them."""
    from srlm_cli.train.packing import groups
    from srlm_cli.train.step_trainer import StepSampler

    packs, at_a_time = pick_device(spec.device) == "cpu", device_batch_size(spec)
    sampler = StepSampler(list(map(length, rows)), spec.batch, spec.seed)
    sizes, steps = [size_of(row) for row in rows], []
    wanted = spec.max_steps if spec.max_steps > 0 else math.ceil(spec.epochs * math.ceil(len(rows) / spec.batch))
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        order = list(sampler)
        steps += [order[at : at + spec.batch] for at in range(0, len(order), spec.batch)]
    steps = steps[: max(1, wanted)]
    parts = [step[at : at + at_a_time] for step in steps for at in range(0, len(step), at_a_time)]
    if packs:
        parts = [part[some] for part in parts for some in groups((sizes[row][0] for row in part), len(part))]

    def tokens(some: list[int]) -> int:
        return sum(sizes[row][0] for row in some) if packs else len(some) * max(sizes[row][0] for row in some)

    def targets(some: list[int]) -> int:
        return sum(sizes[row][1] for row in some)

    parts.sort(key=lambda some: (tokens(some), targets(some)))
    chosen = parts[-1], max(parts, key=lambda some: (targets(some), tokens(some))), parts[len(parts) // 2]
    return Passes(*([rows[row] for row in some] for some in chosen), alone=len(parts) == len(steps))


def size_of(row: Record) -> tuple[int, int]:
    """Return the tokens of a rendered row and how many of them are targets; of a pair, of both sides."""
    if "labels" in row:
        return len(row["labels"]), sum(label != IGNORED for label in row["labels"])
    replies = [len(ids) for name, ids in row.items() if name.endswith("_ids") and name != "prompt_ids"]
    return len(replies) * len(row["prompt_ids"]) + sum(replies), sum(replies)


def show(trainer: Trainer, name: str, report: DataReport, spec: TrainSpec, passes: Passes) -> dict[str, Any]:
    """Print estimates of a training on stderr, measured in real passes, whose rows the trainer has; return them."""
    from srlm_cli.train.packing import TOKENS

    at_a_time = device_batch_size(spec)
    shown = f"up to {TOKENS} tokens" if trainer.splits and not spec.device_batch_size else str(at_a_time)
    an_epoch = math.ceil(report.rows / spec.batch)
    steps = spec.max_steps if spec.max_steps > 0 else math.ceil(an_epoch * spec.epochs)
    epochs = steps / an_epoch
    rows = iter([trainer.train_dataset[row] for row in range(len(trainer.sampler.lengths))])
    longest, targets, middle = (
        list(islice(rows, len(some))) for some in (passes.longest, passes.targets, passes.middle)
    )
    trainer.create_optimizer()
    # as the Trainer prepares them: with the autocast of bfloat16
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    timed(trainer, model, longest)
    if not passes.alone:
        timed(trainer, model, targets)
    optimizer.step()
    optimizer.zero_grad()
    of_one_step = peak_bytes(model)
    seconds, tokens = timed(trainer, model, middle)
    for some in (longest, targets) if steps > 1 else ():  # now beside what the optimizer keeps
        if passes.alone:
            optimizer.zero_grad()
        timed(trainer, model, some)
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
        f"srlm {name}: memory about {measured / GIGABYTE:.1f} GB, measured over its largest passes and a step of the "
        f"optimizer {spec.optim}"
    )
    passes = f", {beside:.2f} epochs for passes without a gradient" if beside else ""
    say(
        f"srlm {name}: time about {clock(wanted / rate)}: {rate:.0f} tokens/s measured over a pass of middle length, "
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
