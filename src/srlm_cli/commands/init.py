"""srlm init."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from srlm_cli.errors import OptionError
from srlm_cli.options.common import new_app
from srlm_cli.recipes import recipe_files
from srlm_cli.streams.console import say

app = new_app()


@app.command()
def init(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Folder to create; it may already exist.")],
    force: Annotated[bool, Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Start a run: copy Makefile, srlm.toml and seed data into a folder.

    \b
    Examples:
      srlm init my-run && cd my-run && make iterate ITER=2
      srlm init my-run --force   # overwrites Makefile, srlm.toml and data

    The folder then has all files that `make iterate` needs: the Makefile of the loop, settings for a
    small machine, IFT rows (ift.jsonl) and ranked replies (ranked.jsonl to train the judge,
    ranked_eval.jsonl to measure it). Replace them with your own rows.
    """
    copies = {folder / name: source for name, source in recipe_files().items()}
    there = [path for path in copies if path.exists()]
    if there and not force:
        raise OptionError(f"{there[0]} exists already", "--force overwrites it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, source in copies.items():
            path.write_bytes(source.read_bytes())
    except OSError as error:
        raise OptionError(f"cannot write {error.filename}: {error.strerror}") from None
    say(f"srlm init: {len(copies)} files in {folder}; next: cd {folder} && make iterate ITER=2")
