"""srlm.toml: defaults for options, by command; a key that no option has is refused.

    [defaults]          # options of several commands
    seed = 0
    [sample]            # options of one command
    n = 4
    ["eval reward"]     # a command of a group

Precedence: flag > SRLM_* environment > srlm.toml > the option's own default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from srlm_cli.errors import OptionError

DEFAULTS = "defaults"
FILE = "srlm.toml"


def load(path: str) -> dict[str, dict[str, Any]]:
    """Return the sections of a settings file, keys in their dashed spelling; an empty path has none."""
    if not path:
        return {}
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(f"cannot read the settings {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: not TOML: {error}") from None
    for section, keys in content.items():
        if not isinstance(keys, dict):
            raise OptionError(f"{path}: `{section}` is outside a section", f"put it under [{DEFAULTS}] or a command")
        if twice := [key for key in keys if "_" in key and key.replace("_", "-") in keys]:
            raise OptionError(f"{path}: [{section}] has `{twice[0].replace('_', '-')}` in both spellings")
    return {section: {key.replace("_", "-"): value for key, value in keys.items()} for section, keys in content.items()}


def of_command(
    path: str,
    command: str,
    options: dict[str, str],
    commands: list[str],
    shared: set[str],
    renamed: dict[str, tuple[str, ...]] | None = None,
    note: Callable[[str], None] = lambda old: None,
) -> dict[str, Any]:
    """Return the settings of one command as {parameter name: value}.

    `options` maps the command's dashed option names to parameter names. `shared` are the options that are allowed in
    [defaults]. `renamed` maps old option names to new ones; `note` is called with each old name. A section that is not
    a command, or a key that is not an option, raises OptionError.
    """
    sections = load(path)
    for section in sections:
        if section != DEFAULTS and section not in commands:
            raise OptionError(f"{path}: no command [{section}]{_nearest(section, commands)}")
    own, common = (
        _by_new_names(path, command, sections.get(command, {}), renamed or {}, note),
        sections.get(DEFAULTS, {}),
    )
    for where, keys, known in ((command, own, set(options)), (DEFAULTS, common, shared)):
        for key in keys:
            if key not in known:
                raise OptionError(f"{path}: [{where}] has no option `{key}`{_nearest(key, sorted(known))}")
    return {options[key]: value for key, value in {**common, **own}.items() if key in options}


def place(path: str, command: str, names: Collection[str]) -> str:
    """Return where a settings file sets an option of a command that has these names; "" if it does not."""
    sections = load(path)
    found = [(key, section) for section in (command, DEFAULTS) for key in sections.get(section, {}) if key in names]
    return f"{path}: `{found[0][0]}` in [{found[0][1]}]" if found else ""


def _by_new_names(
    path: str, command: str, keys: dict[str, Any], renamed: dict[str, tuple[str, ...]], note: Callable[[str], None]
) -> dict[str, Any]:
    """Return the keys of a section by the names that options have now; raise OptionError where one has both."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if both := [name for name in renamed.get(key, ()) if name in keys]:
            raise OptionError(f"{path}: [{command}] has `{both[0]}` and `{key}`, the old name of the same option")
        if key in renamed:
            note(key)
        found |= dict.fromkeys(renamed.get(key, (key,)), value)
    return found


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else ""
