"""Old names of options: they work on the command line, in srlm.toml and in the environment, with a line on stderr."""

from __future__ import annotations

import os
from typing import Any

from typer import BadParameter, Context
from typer.core import TyperCommand

from srlm_cli import settings
from srlm_cli.distributed import LAUNCHED
from srlm_cli.errors import OptionError
from srlm_cli.options.environment import variable_of
from srlm_cli.options.help import write_options
from srlm_cli.options.one_file import refuse_second_files
from srlm_cli.streams.console import say

# By command; an option whose old name had two meanings has two new ones, of which a command uses one.
RENAMED: dict[str, dict[str, tuple[str, ...]]] = {
    "make-eft": {
        "samples": ("num-judgements", "rows-per-reply"),
        "finish-score": ("force-score",),
        "part": ("split",),
    },
    "sft": {"in-weight": ("mix-weight",), "eval-in": ("eval-file",)},
    "gen-prompts": {"together": ("prompt-batch-size",)},
    "sample": {"n": ("num-responses",)},
    "judge": {"samples": ("num-judgements",), "finish-score": ("force-score",), "reparse": ("rescore",)},
    "make-pairs": {
        "length-alpha": ("length-penalty",),
        "rejected-from": ("rejected-pool",),
        "agree-with": ("consistency-with",),
    },
    "dpo": {"length-alpha": ("rdpo-alpha",), "eval-in": ("eval-file",)},
}


class Command(TyperCommand):
    """A command whose help has sections, and that also takes the old names of its options, which are not in it."""

    def format_options(self, ctx: Context, formatter: Any) -> None:
        write_options(self.get_params(ctx), ctx, formatter)

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except BadParameter as error:
            refuse_setting(error, ctx, section(ctx), ctx.params.get("config") or "")
            raise

    def make_parser(self, ctx: Context) -> Any:
        parser = super().make_parser(ctx)
        known = parser._long_opt  # no public way to add a name that the help does not show
        for old, new in RENAMED.get(section(ctx), {}).items():
            for negated in ("", "no-"):
                options = [known[f"--{negated}{name}"] for name in new if f"--{negated}{name}" in known]
                if options:
                    shown = " or ".join(f"--{negated}{name}" for name in new)
                    known[f"--{negated}{old}"] = _Old(options, f"--{negated}{old} is now {shown}", ctx)
        refuse_second_files(parser)
        return parser


class _Old:
    """An option of the parser by an old name: it sets the options that have its meaning now."""

    def __init__(self, options: list[Any], text: str, ctx: Context) -> None:
        self.options, self.text, self.ctx = options, text, ctx
        self.takes_value, self.nargs, self.obj = options[0].takes_value, options[0].nargs, options[0].obj

    def process(self, value: Any, state: Any) -> None:
        _note(self.ctx, self.text)
        for option in self.options:
            option.process(value, state)


def section(ctx: Context) -> str:
    """Return the name of a command as srlm.toml has it: `eval reward`."""
    return ctx.command_path.partition(" ")[2]


def refuse_setting(error: BadParameter, ctx: Context, command: str, path: str) -> None:
    """Raise OptionError that names the place in srlm.toml, or the variable, if a wrong value comes from there."""
    source = error.param and ctx.get_parameter_source(error.param.name)
    if not source or source.name not in ("DEFAULT_MAP", "ENVIRONMENT"):
        return
    names = {name.lstrip("-") for name in error.param.opts}
    old = {was for was, now in RENAMED.get(command, {}).items() if names & set(now)}
    typed = source.name == "ENVIRONMENT"
    where = variable_of(error.param, ctx) if typed else settings.place(path, command, names | old)
    raise OptionError(f"{where}: {error.message.removeprefix('Value error, ')}") from None


def rename_environment(ctx: Context, command: str, prefix: str) -> None:
    """Give the variables of a command's options that are set by an old name their new one, unless that is set too."""
    for old, new in RENAMED.get(command, {}).items():
        variable = _variable(prefix, old)
        names = [_variable(prefix, name) for name in new]
        if variable in os.environ and not any(name in os.environ for name in names):
            _note(ctx, f"{variable} is now {' or '.join(names)}", command)
            os.environ.update(dict.fromkeys(names, os.environ[variable]))


def note_setting(ctx: Context, command: str, path: str, old: str) -> None:
    """Say that a key of srlm.toml has another name now."""
    _note(ctx, f"`{old}` in {path} is now {' or '.join(f'`{name}`' for name in RENAMED[command][old])}", command)


def _variable(prefix: str, option: str) -> str:
    return f"{prefix}_{option.upper().replace('-', '_')}"


def _note(ctx: Context, text: str, command: str | None = None) -> None:
    """Say once that a name has changed; of the processes of one training only the one that starts them does."""
    said = ctx.meta.setdefault("srlm.renamed", set())
    if text not in said and LAUNCHED not in os.environ:
        said.add(text)
        say(f"srlm {command or section(ctx)}: {text}")
