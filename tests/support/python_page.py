"""docs/python.md shows what its code prints: `--write` runs its `python` blocks and writes their output."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout

from helpers import ROOT

PAGE = ROOT / "docs" / "python.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def render() -> str:
    """Return the page with what each block prints after it; the blocks run in one namespace, in their order."""
    names: dict[str, object] = {}

    def with_output(code: str) -> str:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, str(PAGE), "exec"), names)
        shown = f"\n```text\n{printed.getvalue().rstrip()}\n```\n" if printed.getvalue() else ""
        return f"```python\n{code}```\n{shown}"

    return BLOCK.sub(lambda found: with_output(found[1]), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    made = render()
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(made, encoding="utf-8")
    else:
        print(made)
