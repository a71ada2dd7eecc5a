"""The table of chat templates in docs/thinking.md: `--write` makes it from the templates of the installed TRL."""

from __future__ import annotations

import re
import sys

import chat_templates
from helpers import ROOT
from srlm_cli.engines.chat_template import MARK, ChatTemplate, assistant
from srlm_cli.train.render import Renderer

PAGE = ROOT / "docs" / "thinking.md"
TABLE = re.compile(r"(?<=<!-- templates -->\n).*?(?=<!-- end -->)", re.DOTALL)
USER = [{"role": "user", "content": "Is 7 prime?"}]


def line(name: str) -> str:
    """Return the line of one template."""
    template = ChatTemplate(chat_templates.tokenizer(name), name=name)
    opened = template.render(USER)
    whole = template.render([*USER, assistant(MARK)], add_generation_prompt=False)
    mark = f"`{template.family.opening.strip()}`" if template.family else ""
    begins = "the prompt" if template.marks.opened(opened) else "the model" if mark else ""
    follows = whole.startswith(opened) and not whole[len(opened) :].partition(MARK)[0].strip()
    renderer = Renderer(template.tokenizer, template)
    made = renderer.rendered({"prompt": USER, "completion": "No.", "thought": "Three."}, ("completion",))[0]
    target = template.tokenizer.decode(made.ids[made.start :]).replace("\n", "\\n")
    by = "the template" if follows else "the generation prompt and the reply"
    cells = [name, mark, begins, f"`{template.switch}`" if template.switch else "", by, f"`{target}`"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table() -> str:
    """Return the table of all templates."""
    head = (
        "| template | mark of a thought | opened by | switch | a reply is rendered by | target of thought and answer |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *map(line, chat_templates.NAMES), ""])


def render() -> str:
    """Return the page with the table."""
    return TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(render(), encoding="utf-8")
    else:
        print(table())
