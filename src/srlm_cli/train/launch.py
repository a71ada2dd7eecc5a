"""Run a training command in several processes: by `accelerate launch`, with a profile of TRL's or a file."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from srlm_cli.distributed import LAUNCHED
from srlm_cli.errors import ExitCode, OptionError, SrlmError


def launch(config: str, processes: int | None, argv: list[str]) -> int:
    """Run `srlm ARGV` in several processes, by number or by configuration; return their exit code.

    Raises OptionError where they cannot be started, and SrlmError where one was killed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    path = profile(config)
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice on parameters that get no gradient
    options = [*launch_options(path), *(["--num_processes", str(processes)] if processes else [])]
    with without_their_logs():
        try:
            launch_command(
                launch_command_parser().parse_args(["--config_file", path, *options, "--module", "srlm_cli", *argv])
            )
        except ChildFailedError as error:
            return code_of(first_first(error.failures))
        except CalledProcessError as error:
            return code_of({0: error.returncode})
        except (SignalException, KeyboardInterrupt) as error:
            return 128 + getattr(error, "sigval", signal.SIGINT)
        except (ValueError, ImportError, AssertionError, RuntimeError, OSError) as error:
            raise OptionError(f"--accelerate-config {config}: {str(error).strip()}") from error
    return ExitCode.OK


def profile(config: str) -> str:
    """Return the file of a profile that TRL ships, by its name, or the file itself."""
    if Path(config).is_file():
        return config
    shipped = files("trl.accelerate_configs")
    if (found := shipped / f"{config}.yaml").is_file():
        return str(found)
    names = sorted(file.name.removesuffix(".yaml") for file in shipped.iterdir() if file.name.endswith(".yaml"))
    raise OptionError(f"--accelerate-config {config} is not a file and not a TRL profile", f"one of {', '.join(names)}")


def launch_options(path: str) -> list[str]:
    """Return the options of `accelerate launch` that its configuration does not have.

    Of itself it starts several processes on CPUs by MPI alone, and takes one port for all trainings of a machine.
    """
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionError(f"--accelerate-config {path}: {error}") from None
    if not isinstance(settings, dict):
        raise OptionError(
            f"--accelerate-config {path} is not an accelerate config file", "create one with `accelerate config`"
        )
    on_cpus = settings.get("distributed_type") == "MULTI_CPU" and not settings.get("mpirun_config")
    alone = settings.get("num_machines", 1) == 1 and "main_process_port" not in settings
    return ["--multi_gpu"] * on_cpus + ["--main_process_port", "0"] * alone


def first_first(failures: dict[int, Any]) -> dict[int, int]:
    """Return the exit codes of torch's failed processes by rank, the first that failed first.

    Those that torch itself ended, since another one failed, are left out.
    """
    order = sorted(failures, key=lambda rank: failures[rank].timestamp)
    codes = {rank: failures[rank].exitcode for rank in order}
    return {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes


def code_of(codes: dict[int, int]) -> int:
    """Return the exit code of a training from those of its failed processes, by rank, the first that failed first.

    This is the exit code of the main process, else that of the first. Raises SrlmError if a signal ended it, because
    then it printed no error.
    """
    rank = 0 if 0 in codes else next(iter(codes))
    if codes[rank] < 0:
        name = signal.Signals(-codes[rank]).name
        raise SrlmError(
            f"process {rank} was killed by {name}", "run the same command again to resume from the last checkpoint"
        )
    return codes[rank]


@contextmanager
def without_their_logs() -> Iterator[None]:
    """Hide the messages of torch's launcher about a failed process, which has printed its own error."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
