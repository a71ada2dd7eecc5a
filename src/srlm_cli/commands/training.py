"""Options that sft and dpo share, and what both do around a training."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from srlm_cli.commands import run
from srlm_cli.commands.options import ReadOptions, Seed
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.streams.reader import Reader
from srlm_cli.train.session import PROVENANCE, TrainSpec


@dataclass(frozen=True)
class TrainOptions(ReadOptions):
    """What is trained, and how."""

    out: Annotated[
        str | None, Option("--out", "-o", metavar="FOLDER", help="Model folder to write; it appears when it is whole.")
    ] = None
    model: Annotated[
        str | None,
        Option(
            "--model", "-m", "--model-name-or-path", metavar="MODEL", envvar="SRLM_MODEL",
            help="Model to start from: folder, adapter folder, hub id, .gguf file, or smollm2-135m-instruct.",
        ),
    ] = None  # fmt: skip
    learning_rate: Annotated[float, Option("--learning-rate", min=0.0, help="Learning rate at the start.")] = 5.5e-6
    final_learning_rate: Annotated[
        float, Option("--final-learning-rate", min=0.0, help="And at the end; a cosine lies between.")
    ] = 1.1e-6
    train_batch_size: Annotated[
        int, Option("--train-batch-size", min=1, help="Rows an optimizer step (the paper: 16).")
    ] = 16
    device_batch_size: Annotated[
        int, Option("--device-batch-size", min=1, help="Of these at a time on the device.")
    ] = 4
    epochs: Annotated[float, Option("--epochs", min=0.0, help="Passes over the rows.")] = 1.0
    max_steps: Annotated[int, Option("--max-steps", help="Stop after so many steps; -1 is all.")] = -1
    warmup_steps: Annotated[int, Option("--warmup-steps", min=0, help="Steps in which the learning rate rises.")] = 0
    max_length: Annotated[int, Option("--max-length", min=8, help="Tokens a row at most.")] = 2048
    lora_r: Annotated[int, Option("--lora-r", min=0, help="Train an adapter of this rank; 0 trains all weights.")] = 0
    lora_alpha: Annotated[int, Option("--lora-alpha", min=0, show_default="2 x r", help="Scale of the adapter.")] = 0
    checkpointing: Annotated[
        bool, Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory for more time.")
    ] = False
    device: Annotated[str, Option("--device", help="cpu, cuda, mps; auto takes the best there is.")] = "auto"
    seed: Seed = 0

    def spec(self) -> TrainSpec:
        """Return these options as the trainers take them."""
        if not self.out or self.out == "-":
            raise OptionError("no --out FOLDER: a model cannot go to stdout")
        if not self.model:
            raise OptionError("no model given", "--model takes a folder, a hub id or smollm2-135m-instruct")
        out = Path(self.out)
        if out.exists() and not (out.is_dir() and ((out / PROVENANCE).exists() or not any(out.iterdir()))):
            raise OptionError(f"{out} is there and is no model that srlm made", "--out another folder, or remove it")
        return TrainSpec(
            model=self.model,
            out=out,
            learning_rate=self.learning_rate,
            final_learning_rate=min(self.final_learning_rate, self.learning_rate),
            batch=self.train_batch_size,
            together=min(self.device_batch_size, self.train_batch_size),
            epochs=self.epochs,
            max_steps=self.max_steps,
            max_length=self.max_length,
            warmup_steps=self.warmup_steps,
            lora_r=self.lora_r,
            lora_alpha=self.lora_alpha,
            device=self.device,
            seed=self.seed,
            checkpointing=self.checkpointing,
        )


def finish(name: str, spec: TrainSpec, reader: Reader, results: dict[str, Any]) -> None:
    """Print the one JSON line of results."""
    skipped = {"skipped": reader.skipped} if reader.skipped else {}
    run.print_result({"command": name, "model": str(spec.out), "from": spec.model, **skipped, **results})


def provenance(name: str, spec: TrainSpec, reader: Reader) -> dict[str, Any]:
    """Return what is known of a training before it starts."""
    from srlm_cli.models import fingerprint
    from srlm_cli.streams.reader import file_hash

    return {
        "command": name,
        "argv": sys.argv[1:],
        "versions": run.versions(),
        "from": {"model": spec.model, "fingerprint": fingerprint(spec.model)},
        "inputs": {path: file_hash(path) for path in reader.paths if path != "-"},
    }


def guarded(work: Any, out: Path) -> dict[str, Any]:
    """Run a training; a full disk, too little memory and Ctrl-C end in one line that says what is left."""
    run.data_stdout()
    try:
        return work()
    except KeyboardInterrupt:
        raise run.Interrupted("interrupted", f"no model is written; {out}.part can be removed") from None
    except OSError as error:
        raise SrlmError(f"{error.filename or out}: {error.strerror or error}", "no model is written") from error
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower():
            raise
        raise SrlmError(
            f"out of memory: {str(error).splitlines()[0]}",
            "--device-batch-size 1, --gradient-checkpointing, --lora-r 16 or a smaller --max-length",
        ) from error
