"""Documents of a corpus, from text files and JSONL rows, and the passages that they are cut into."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import Record, encodable, is_number, short_hash

TEXTS = (".txt", ".md")
ROWS = (".jsonl", ".jsonl.gz")
WORD = re.compile(r"\S+")
HEADING = re.compile(r"^#[ \t]+(.+?)[ \t#]*$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A text with its title, and the source that names it: a path, the `id` or `url` of a row, or file:line."""

    source: str
    title: str
    text: str

    @property
    def hash(self) -> str:
        """A hash of the title and the text."""
        return short_hash(f"{self.title}\n{self.text}")


def files_of(path: str) -> tuple[list[str], list[str]]:
    """Return (text files, JSONL files) of a path, in the order of their names; a folder is read with all below it.

    Other files of a folder are left out. Raises OptionError for a path that is not there or of another kind, and for a
    folder without any.
    """
    if path == "-":
        return [], ["-"]
    place = Path(path)
    if not place.is_dir():
        if not place.exists():
            raise OptionError(f"cannot open {path}: No such file or directory")
        return ([path], []) if path.endswith(TEXTS) else ([], [path])
    found = sorted(str(file) for file in place.rglob("*") if file.is_file() and file.name.endswith((*TEXTS, *ROWS)))
    if not found:
        raise OptionError(f"{path} has no file that ends in {', '.join((*TEXTS, *ROWS))}")
    return [name for name in found if name.endswith(TEXTS)], [name for name in found if not name.endswith(TEXTS)]


def document_of_file(path: str) -> Document:
    """Return a text file as a document; its title is its first heading if it is Markdown, else its name.

    Raises BadRow if it is not UTF-8 or has no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 text: {error}") from None
    heading = HEADING.search(text) if path.endswith(".md") else None
    name = encodable(path)  # a name on disk need not be UTF-8
    return checked(Document(name, heading[1] if heading else Path(name).stem, text))


def document_of_row(row: Record, at: str, text_field: str, title_field: str) -> Document:
    """Return a JSONL row that was read at file:line as a document; raise BadRow if it has no text."""
    text, title = row.get(text_field), row.get(title_field)
    if not isinstance(text, str):
        raise BadRow(f"expected `{text_field}`, a text, got the fields {', '.join(map(repr, row)) or 'none'}")
    name = next((row[key] for key in ("id", "url") if isinstance(row.get(key), str) or is_number(row.get(key))), at)
    return checked(Document(str(name), title if isinstance(title, str) else "", text))


def checked(document: Document) -> Document:
    """Return a document that has words; raise BadRow for another."""
    if not WORD.search(document.text):
        raise BadRow("expected a text, got an empty one")
    return document


def passages(text: str, words: int, overlap: int) -> Iterator[str]:
    """Yield the passages of a text: `words` words each, of which `overlap` are the last of the passage before.

    Every passage is a part of the text as it is, with its spaces and line breaks; the last one can be shorter.
    """
    spaces_only = text.isprintable()  # no other white space is printable, and to count is faster than to split
    if (spaces_only and text.count(" ") < words) or len(text.split(None, words)) <= words:  # no places are needed
        yield text.strip()
        return
    spans = [found.span() for found in WORD.finditer(text)]
    for first in range(0, max(len(spans) - overlap, 1), words - overlap):
        part = spans[first : first + words]
        yield text[part[0][0] : part[-1][1]]
