"""srlm report."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from srlm_cli.options.common import Config, Quiet, Seed, new_app

app = new_app()


@app.command()
def report(
    folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a run, such as runs/first.")],
    html: Annotated[
        str | None,
        Option(
            "--html",
            metavar="FILE",
            show_default="RUN/report.html",
            help="Path of the HTML page; - prints it instead of the tables.",
        ),
    ] = None,  # fmt: skip
    control: Annotated[
        Path | None,
        Option("--control", metavar="RUN", help="Run from the same M1 with `make-pairs --shuffle-labels`, to compare."),
    ] = None,
    no_html: Annotated[bool, Option("--no-html", help="Print the tables only.")] = False,
    pairs: Annotated[int, Option("--pairs", min=0, help="Sample pairs per round on the page.")] = 5,
    seed: Seed = 0,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Show what a run did, round by round: tables here, and a page with plots.

    \b
    Examples:
      srlm report runs/first
      srlm report runs/first --html /tmp/first.html --pairs 20
      srlm report runs/first --no-html > report.txt
      srlm report runs/first --control runs/control

    Shows rows in and out of each stage with dropped rows, the agreement of each round's judge with people,
    the models against each other, lengths, training, sample pairs with their judgements, and all settings.
    The page RUN/report.html is one file that opens from disk and loads nothing else. Missing files are
    left out, so you can look at a run in progress. With rules measured on held-out prompts (`srlm eval rules`)
    it ends with what was learned, in words and with intervals, beside the run of --control.
    """
    from rich.console import Console

    from srlm_cli.report import page, terminal
    from srlm_cli.report.collect import collect
    from srlm_cli.streams.console import say

    run = collect(folder, seed)
    beside = collect(control, seed) if control else None
    if html == "-" and not no_html:
        print(page.render(run, pairs, seed, beside), end="")
        return
    console = Console(markup=False, highlight=False)
    wide = Console(markup=False, highlight=False, width=400)
    terminal.show(run, console if console.is_terminal else wide, pairs, seed, beside)
    if not no_html:
        path = html or str(folder / "report.html")
        page.write(page.render(run, pairs, seed, beside), path)
        if not quiet:
            say(f"srlm report: {path} shows the same with plots")
