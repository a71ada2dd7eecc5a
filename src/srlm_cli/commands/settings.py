"""srlm settings."""

import json
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Context, Option

from srlm_cli.errors import OptionError
from srlm_cli.options.common import OPERATIONAL, Config, new_app
from srlm_cli.streams.reader import file_hash
from srlm_cli.streams.writer import replace_text

app = new_app()


@app.command()
def settings(
    ctx: Context,
    stamps: Annotated[
        str | None,
        Option(
            "--stamps",
            metavar="FOLDER",
            help="Write one file per command to this folder, only when its settings change.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None, Option("--also", metavar="NAME=VALUE", help="Additional KEY=VALUE to record (repeatable).")
    ] = None,
    get: Annotated[
        str | None,
        Option("--get", metavar="COMMAND.OPTION", help="Print the value of one option only, nothing if it is not set."),
    ] = None,
    meta: Annotated[
        bool,
        Option("--meta", help="Refuse a judge whose judgements `srlm judge --meta` cannot compare (META=1 in Make)."),
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="With --stamps: print the files that would change, write nothing.")
    ] = False,
    config: Config = None,
) -> None:
    """Print the settings of the commands, as Make compares them.

    \b
    Examples:
      srlm settings --config srlm.toml
      srlm settings --get "eval rules.prompts"
      srlm settings --stamps runs/demo/.settings --also M0=smollm2-135m-instruct

    Prints one JSON line per command: the options as set by srlm.toml and SRLM_*, without those that do
    not change the output (batch size, progress, file names). With --stamps each line is written to
    FOLDER/COMMAND.json, only when it changes, so Make rebuilds what depends on it.
    """
    root = ctx.find_root()
    lines = {}
    for name, command in commands_below(root):
        own = command.make_context(name, [], parent=root, resilient_parsing=True, default_map=None)
        lines[name] = {"command": name, **resolved(own, config or "", name)}
    if meta:
        refuse_incomparable(lines["judge"])
    if get is not None:
        print_value(lines, get)
        return
    for pair in also or []:
        name, _, value = pair.partition("=")
        lines[name] = {"name": name, "value": value}
    for name, values in lines.items():
        line = json.dumps(values, sort_keys=True, default=str) + "\n"
        if stamps is None:
            print(line, end="")
        else:
            keep(Path(stamps) / f"{name.replace(' ', '-')}.json", line, dry_run)


def print_value(lines: dict[str, dict[str, Any]], name: str) -> None:
    """Print the value of `COMMAND.OPTION`, nothing if it is not set; raise OptionError for an unknown name."""
    command, _, option = name.rpartition(".")
    if option not in lines.get(command, {}):
        raise OptionError(f"--get {name} names no option of a command", 'for instance --get "eval rules.prompts"')
    value = lines[command][option]
    if value is not None:
        print(value if isinstance(value, str) else json.dumps(value))


def commands_below(root: Context) -> list[tuple[str, Any]]:
    """Return (name, command) of every command of the loop, those of a group by both words."""
    found = []
    for name in root.command.list_commands(root):
        command = root.command.get_command(root, name)
        inner = getattr(command, "commands", None)
        found += [(f"{name} {sub}", one) for sub, one in inner.items()] if inner else [(name, command)]
    return [
        (name, command)
        for name, command in found
        if any(p.name == "config" for p in command.params) and name != "settings"
    ]


def resolved(ctx: Context, path: str, name: str) -> dict[str, Any]:
    """Return the options of a command as environment and settings file leave them, by dashed name."""
    from srlm_cli.options.common import settings_for
    from srlm_cli.options.renamed import refuse_setting, rename_environment

    section = name
    ctx.default_map = settings_for(ctx, path, section)
    ctx.auto_envvar_prefix = "SRLM_" + section.upper().replace(" ", "_").replace("-", "_")
    rename_environment(ctx, section, ctx.auto_envvar_prefix)
    values = {}
    for option in ctx.command.params:
        dashed = max((o.lstrip("-") for o in option.opts), key=len)
        if option.name != "help" and not {dashed, option.name.strip("_").replace("_", "-")} & OPERATIONAL:
            value, source = option.consume_value(ctx, {})
            ctx.set_parameter_source(option.name, source)
            value = value if value is not None else option.get_default(ctx)
            if value is not None:
                try:
                    option.process_value(ctx, value)  # a value of the wrong kind is an error here, before any work
                except BadParameter as error:
                    error.param = option  # a parser of our own does not know it
                    refuse_setting(error, ctx, section, path)
                    raise
            name = option.name.strip("_").replace("_", "-")
            values[name] = value
            if name.endswith("template") and Path(str(value)).is_file():
                values[f"{name}-hash"] = file_hash(value)
            if name == "rule-file":
                files = [place.rpartition(":")[0] for place in value or ()]
                values["rule-file-hash"] = [file_hash(path) for path in files if Path(path).is_file()]
    return values


def refuse_incomparable(judge: dict[str, Any]) -> None:
    """Raise OptionError unless a judge of these settings writes several judgements of a response, with reasons."""
    from srlm_cli.options.judging import judge_template
    from srlm_cli.options.kinds import draws_of

    draws = draws_of(judge["num-judgements"])
    direct = judge_template(judge["template"], None).direct and judge["score"] == "expected"
    reasons = '`template = "additive"` or `score = "text"`'
    faults = {
        ("--engine reward writes no judgements", '`engine = "hf"`'): judge["engine"] == "reward",
        ("--implicit writes no judgements", "`implicit = false`"): judge["implicit"],
        ("rules write no judgements", "another `model`"): (judge["engine"], judge["model"]) == ("echo", "rules"),
        (f"--by {judge['by']} judges several responses together", '`by = "pointwise"`'): judge["by"] != "pointwise",
        ("a judge that gives no reasons has nothing to compare", reasons): direct,
        ("one judgement of a response has no other to be compared with", "`num-judgements = 11`"): draws == 1,
    }
    for (what, remedy), wrong in faults.items():
        if wrong:
            raise OptionError(f"META=1 compares the judgements of a response: {what}", f"{remedy} in [judge]")


def keep(path: Path, text: str, dry_run: bool) -> None:
    """Write a small file only when its content changes, or print its name instead."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    if dry_run:
        print(path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
