"""srlm index."""

import os
from dataclasses import replace
from typing import Annotated

from typer import Option

from srlm_cli.errors import BadRow, OptionError
from srlm_cli.evidence import documents
from srlm_cli.evidence.index import open_index
from srlm_cli.options.common import ReadOptions, new_app
from srlm_cli.options.groups import grouped
from srlm_cli.records import Record
from srlm_cli.runner.inputs import check_whole, finished, open_reader, warn
from srlm_cli.runner.outputs import print_result, refuse_own_input
from srlm_cli.streams.console import say

app = new_app()


@app.command()
@grouped
def index(
    read: ReadOptions,
    in_: Annotated[
        str, Option("--in", "-i", metavar="PATH", help="JSONL, .txt or .md file, or a folder of these; - is stdin.")
    ] = "-",
    out: Annotated[
        str | None, Option("--out", "-o", metavar="FILE", help="Index to make or to add to, one SQLite file.")
    ] = None,
    passage_words: Annotated[int, Option("--passage-words", min=1, help="Words per passage.")] = 120,
    overlap_words: Annotated[
        int, Option("--overlap-words", min=0, help="Words that a passage shares with the one before.")
    ] = 20,
    text_field: Annotated[str, Option("--text-field", metavar="FIELD", help="Field of a row with the text.")] = "text",
    title_field: Annotated[
        str, Option("--title-field", metavar="FIELD", help="Field of a row with the title, if it has one.")
    ] = "title",
) -> None:
    """Make an index of passages from texts, to be searched for evidence.

    \b
    Examples:
      srlm index --in corpus.jsonl --out corpus.db
      srlm index --in notes/ --out notes.db --passage-words 80 --overlap-words 10
      zcat wiki.jsonl.gz | srlm index --text-field body --out corpus.db

    Each row or file is a document, named by its `id` or `url`, by file:line, or by its path. It is cut into
    passages, which are searched by the stems of their words (SQLite FTS5, porter, bm25). The title of a
    Markdown file is its first heading. An index that exists is added to: a document that it has is left as it
    is, or replaced if its text has changed. The index appears or changes as a whole at the end, so a run that
    is killed leaves no half of it. Prints one JSON line: what was added and what the index holds.
    """
    if out in (None, "-"):
        raise OptionError("no --out FILE", "the index is a file, not a stream")
    if overlap_words >= passage_words:
        raise OptionError(f"--overlap-words {overlap_words} is not below --passage-words {passage_words}")
    if os.path.isdir(out):
        raise OptionError(f"{out} is a folder", "--out takes a file")
    texts, rows = documents.files_of(in_)
    refuse_own_input(out, [*texts, *rows])
    texts = texts[: read.limit]
    left = replace(read, limit=None if read.limit is None else read.limit - len(texts))

    def check(row: Record) -> Record:
        made.add(documents.document_of_row(row, reader.at, text_field, title_field))
        return row

    reader = open_reader(left, check, rows, traced=False, beside=[*texts, out])
    with open_index(out, passage_words, overlap_words) as made:
        for path in texts:
            try:
                made.add(documents.document_of_file(path))
            except BadRow as error:
                reader.refuse_row(((path, 1), b""), str(error))
        for _ in finished(reader):
            pass
        check_whole(reader)
        holds = made.finish()
    warn("index", reader.noted)
    if reader.rejects:
        reader.rejects.open()
    counts = {name: made.counts[name] for name in ("added", "replaced", "unchanged")} | {"bad": reader.skipped}
    if not read.quiet:
        say(f"srlm index: {', '.join(f'{count} {name}' for name, count in counts.items() if count) or 'nothing added'}")
    print_result({"index": out, **counts, **holds})
