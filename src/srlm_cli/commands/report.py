"""srlm report."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from srlm_cli.commands.options import Config, new_app

app = new_app()


@app.command()
def report(
    folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a run, such as runs/first.")],
    config: Config = None,
) -> None:
    """Show what a run did, round by round.

    \b
    Examples:
      srlm report runs/first
      srlm report runs/first > report.txt

    Three tables: rows in and out of each stage with its drops; the judge of each round (share of
    scores it wrote itself, share finished for it, prompts whose scores are all equal, histogram,
    agreement with people on held-out replies beside "the longest reply wins"); the models against
    each other with their lengths in characters.
    """
    from rich.console import Console

    from srlm_cli.report.collect import collect
    from srlm_cli.report.tables import show

    rounds = collect(folder)
    console = Console(markup=False, highlight=False)
    show(rounds, console if console.is_terminal else Console(markup=False, highlight=False, width=160))
