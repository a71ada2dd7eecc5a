"""The tables in docs/models.md: `--write` makes them from the tests' architectures and the templates of TRL."""

from __future__ import annotations

import re
import sys

import chat_templates
from helpers import ROOT
from srlm_cli.engines.chat_template import MARK, ChatTemplate, assistant
from srlm_cli.train.render import Renderer
from tiny_models import KINDS, PACKED, PLAIN

PAGE = ROOT / "docs" / "models.md"
TABLE = re.compile(r"(<!-- (templates|architectures) -->\n).*?(?=<!-- end -->)", re.DOTALL)
NOTES = {"dynamic": ", with dynamic RoPE", "mistral": ", with a sliding window", "lfm2": ", a hybrid"}
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


def architectures() -> str:
    """Return the table of architectures; tests/engines/hf and tests/train prove what it says."""
    paths = {**dict.fromkeys(PACKED, "packed"), **dict.fromkeys(PLAIN, "one by one")}
    lines = [
        f"| {KINDS[kind][0].removesuffix('Config')}{NOTES.get(kind, '')} | {path} |" for kind, path in paths.items()
    ]
    return "\n".join(["| architecture | path |", "|---|---|", *lines, ""])


def render() -> str:
    """Return the page with the tables."""
    made = {"templates": table, "architectures": architectures}
    return TABLE.sub(lambda found: found[1] + made[found[2]](), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(render(), encoding="utf-8")
    else:
        print(table())
