"""What sft, dpo and kto do around a training: its processes, its provenance, its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from typer import Exit

from srlm_cli import distributed
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.options.training import TrainOptions
from srlm_cli.runner.outputs import data_stdout, print_result
from srlm_cli.runner.provenance import versions
from srlm_cli.runner.stage import Interrupted
from srlm_cli.streams.reader import Reader
from srlm_cli.train.options import TrainSpec


def launch_processes(options: TrainOptions) -> None:
    """With `--accelerate-config`, run this command in the processes that it asks for, and end as they end."""
    if options.num_processes and not options.accelerate_config:
        raise OptionError("--num-processes goes with --accelerate-config")
    if distributed.started() and options.dry_run:
        raise OptionError("--dry-run is of one process", "run it without a launcher")
    if options.accelerate_config and not options.dry_run and not distributed.started():
        from srlm_cli.train.launch import launch

        raise Exit(launch(options.accelerate_config, options.num_processes, sys.argv[1:]))


def finish(name: str, spec: TrainSpec, reader: Reader, results: dict[str, Any]) -> None:
    """Print the one JSON line of results."""
    skipped = {"skipped": reader.skipped} if reader.skipped else {}
    if not results.get("dry_run"):
        results = {"model": str(spec.out), **results}
    print_result({"command": name, "from": spec.model, **skipped, **results})


def provenance(name: str, spec: TrainSpec, reader: Reader) -> dict[str, Any]:
    """Return the part of the provenance that is known before a training starts."""
    from srlm_cli.models.fingerprint import fingerprint
    from srlm_cli.models.locate import use
    from srlm_cli.streams.reader import file_hash

    use(spec.model, spec.revision, spec.trust_remote_code)
    return {
        "command": name,
        "argv": sys.argv[1:],
        "versions": versions("torch", "transformers", "trl", "peft", "datasets"),
        "from": {
            "model": spec.model,
            "fingerprint": fingerprint(spec.model),
            **({"revision": spec.revision} if spec.revision else {}),
        },
        "inputs": {path: file_hash(path) for path in reader.paths if path != "-"},
        **({"warnings": dict(reader.noted)} if reader.noted else {}),
    }


class Deserted(SrlmError):
    """Another process of a training ended before its end; it, or else the launcher, says why."""

    shared = True


def goes_on(out: Path) -> str:
    """Return a hint that says how to resume a training."""
    return f"finished work is in {out}.part; run the same command again to resume"


def guarded(work: Any, out: Path) -> dict[str, Any]:
    """Run a training; a full disk, too little memory or Ctrl-C give one line that says how to resume."""
    data_stdout()
    try:
        results = work()
        distributed.destroy()
        return results
    except KeyboardInterrupt:
        raise Interrupted("interrupted", goes_on(out)) from None
    except OSError as error:
        raise SrlmError(f"{error.filename or out}: {error.strerror or error}", "no model is written") from error
    except (MemoryError, RuntimeError) as error:
        if distributed.count() > 1 and ("gloo" in str(error) or type(error).__name__.startswith("Dist")):
            raise Deserted("another process of this training ended", goes_on(out)) from error
        if "memory" not in str(error).lower():
            raise
        raise SrlmError(
            f"out of memory: {str(error).splitlines()[0]}",
            "--device-batch-size 1, --gradient-checkpointing, --lora-r 16 or a smaller --max-length",
        ) from error
