"""The command line: the commands in the order of the loop, and the one place where errors end."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from srlm_cli import __version__, distributed
from srlm_cli.errors import ClosedPipe, ExitCode, SrlmError
from srlm_cli.options import environment, numbers
from srlm_cli.redact import redacted

# One line per command; its module is imported only when the command runs, so that --help is fast.
COMMANDS = {
    "init": "Start a run: copy Makefile, srlm.toml and seed data into a folder.",
    "doctor": "Show what is installed, which devices there are and what is missing.",
    "make-eft": "Turn ranked replies into fine-tuning rows for the judge (EFT).",
    "sft": "Fine-tune a model on prompts and completions (IFT and EFT): M0 to M1.",
    "gen-prompts": "Let a model write new prompts, 8-shot, filtered as in Self-Instruct.",
    "sample": "Draw N candidate responses for each prompt.",
    "make-rubric": "Let a model write criteria from ranked replies, and keep those that agree with people.",
    "judge": "Score responses with a model as the judge, K judgements each.",
    "jury": "Join the judged rows of several judges into one judged file.",
    "make-pairs": "Pair the best with the worst response of each prompt.",
    "dpo": "Train on preference pairs from Mt, with Mt as the reference: Mt to M(t+1).",
    "kto": "Train on single replies that are desirable or not, without pairs (KTO): Mt to M(t+1).",
    "index": "Make an index of passages from texts, to be searched for evidence.",
    "eval": "Measure: a judge against people, one model against another.",
    "report": "Show what a run did, round by round.",
    "settings": "Print the settings of the commands, as Make compares them.",
}

# The commands of a group, which srlm.toml names by both words.
GROUPS = {"eval": ("reward", "head-to-head", "health", "length-control", "probe", "judges", "rules")}

CONTEXT = {
    "help_option_names": ["--help", "-h"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "auto_envvar_prefix": "SRLM",
    "max_content_width": 100,
}


class LazyCommands(TyperGroup):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def sections(self) -> list[str]:
        """Return the names that a section of srlm.toml can have."""
        return [f"{name} {sub}".strip() for name in COMMANDS for sub in GROUPS.get(name, ("",))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return command(cmd_name) if cmd_name in COMMANDS else None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # of which typer makes an exit without a word
            raise typer.Abort from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def command(name: str) -> Any:
    """Return one command, built from its module in `commands`."""
    module = import_module(f"srlm_cli.commands.{name.replace('-', '_')}")
    made = get_command(module.app)
    made.name = name
    for one in getattr(made, "commands", {"": made}).values():
        for option in one.params:  # the automatic SRLM_<COMMAND>_<OPTION> names would drown the help
            option.show_envvar = bool(getattr(option, "envvar", None))
        numbers.bound(one.params)
        environment.prefer_own(one.params)
    return made


app = typer.Typer(
    cls=LazyCommands, add_completion=False, rich_markup_mode=None, no_args_is_help=True, context_settings=CONTEXT
)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"srlm {__version__}")
        raise typer.Exit


@app.callback()
def srlm(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version.", callback=show_version, is_eager=True, allow_from_autoenv=False
        ),
    ] = False,
) -> None:
    """Self-rewarding language models: answer, judge, train, again.

    \b
    Each command reads and writes JSONL, so a pipe or a Makefile makes the loop:
      srlm sample --in prompts.jsonl --model M1/model | srlm judge | srlm make-pairs > pairs.jsonl
      srlm init my-run && cd my-run && make iterate ITER=2
    """


def main() -> None:
    """Run the program and exit with its code; every error ends here as one plain line."""
    open_closed_streams()
    code = run(sys.argv[1:])
    distributed.leave(code)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Return the exit code of a command line."""
    words = args[: 2 if args[:1] and args[1:2] and args[1] in GROUPS.get(args[0], ()) else 1]
    name = " ".join(["srlm", *words]) if words and words[0] in COMMANDS else "srlm"
    try:
        code = get_command(app).main(args, prog_name="srlm", standalone_mode=False) or ExitCode.OK
        sys.stdout.flush()
        return code
    except (ClosedPipe, BrokenPipeError):
        silence_stdout()
        return ExitCode.CLOSED_PIPE
    except SrlmError as error:
        if error.shared:
            distributed.let_main_speak()
        complain(name, str(error))
        return error.code
    except SystemExit as error:  # typer's own way out of a closed pipe
        closed = isinstance(error.__context__, BrokenPipeError)
        if closed:
            silence_stdout()
        return ExitCode.CLOSED_PIPE if closed else error.code
    except typer.Abort:  # Ctrl-C where no row was being written, which a stage or a training reports itself
        distributed.let_main_speak()
        complain(name, "interrupted before its output was written (run the same command again)")
        return ExitCode.INTERRUPTED
    except OSError as error:
        complain(name, f"{error.filename or 'input or output'}: {error.strerror or error}")
        return ExitCode.FAILURE
    except Exception as error:  # noqa: BLE001 - the boundary: nothing gets past it as a traceback
        if (code := getattr(error, "exit_code", None)) is not None and hasattr(error, "format_message"):
            return usage(error, name, code)
        if os.environ.get("SRLM_DEBUG"):
            raise
        complain(
            name, missing_package(error) or f"{type(error).__name__}: {error}".strip() + " (SRLM_DEBUG=1 shows where)"
        )
        return ExitCode.FAILURE


def missing_package(error: Exception) -> str:
    """Return what to install where an import failed for lack of a package, "" for any other error."""
    package = (getattr(error, "name", None) or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or package == "srlm_cli":
        return ""
    return f"this command needs {package}, which is not installed; install srlm-cli with its dependencies"


def usage(error: Any, name: str, code: int) -> int:
    """Report a wrong command line; without any arguments the help is the answer."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        return code
    where = context.command_path if context else name
    complain(where, f"{error.format_message()}{what_it_takes(error)} (see {where} --help)")
    return code


def what_it_takes(error: Any) -> str:
    """Return the options of a command that has no arguments and got one, "" for any other error."""
    options = error.ctx.command.params if getattr(error, "ctx", None) else []
    if "unexpected extra argument" not in error.format_message() or any(o.param_type_name != "option" for o in options):
        return ""
    names = [max(option.opts, key=len) for option in options]
    return f": it takes only options{', ' * (len(names) < 9)}{', '.join(names) if len(names) < 9 else ''}"


def complain(name: str, message: str) -> None:
    """Print one plain error line."""
    if not distributed.is_main():
        name += f" (process {distributed.rank()})"
    print(f"{name}: error: {' '.join(redacted(message).split())}", file=sys.stderr, flush=True)


def open_closed_streams() -> None:
    """Replace a stdout or stderr that was closed before the start by the null device."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w"))


def silence_stdout() -> None:
    """Keep Python from complaining of the closed pipe once more as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
