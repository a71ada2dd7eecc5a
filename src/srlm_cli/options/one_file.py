"""An option that takes one file is refused with two: the second would take the place of the first without a word."""

from __future__ import annotations

from typing import Any

from typer import BadParameter


def refuse_second_files(parser: Any) -> None:
    """Let a parser refuse an option for one file that is given twice."""
    for names in (parser._long_opt, parser._short_opt):  # no public way to see how often an option is given
        for name, option in names.items():
            if getattr(option.obj, "metavar", None) == "FILE" and not option.obj.multiple:
                names[name] = _Once(option)


class _Once:
    """An option of the parser that can be given once."""

    def __init__(self, option: Any) -> None:
        self.option = option
        self.takes_value, self.nargs, self.obj = option.takes_value, option.nargs, option.obj

    def process(self, value: Any, state: Any) -> None:
        if self.obj.name in state.opts:
            name = max(self.obj.opts, key=len)
            hint = "; `cat A B |` gives it both" if name == "--in" else ""
            raise BadParameter(f"{name} takes one file, and is given twice{hint}")
        self.option.process(value, state)
