"""What commands declare that show replies to a judge."""

from srlm_cli import templates
from srlm_cli.errors import OptionError
from srlm_cli.templates import Template


def judge_template(name: str, system: str | None) -> Template:
    """Return a judge template; raise OptionError if it and `--system` both give a system message."""
    form = templates.load_judge(name)
    if form.system and system is not None:
        raise OptionError(f"template {name} has a `system` message, and --system gives another", "use one of the two")
    return form
