"""The docs say what the program does: help pages, commands and numbers of the seed data."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import help_pages
import python_page
import quickstart_page
from helpers import ROOT
from srlm_cli import templates

QUICKSTART = ROOT / "examples" / "quickstart"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text().splitlines()]


def test_help_pages_are_those_of_the_program():
    assert help_pages.PAGE.read_text() == help_pages.render(), "run `make docs`"


def test_no_help_shows_a_type_of_python():
    """An option without a metavar gets the name of its type, which is `<list[float]>` for several numbers."""
    assert not re.findall(r"<(?:list|tuple|dict)\b.*", help_pages.render())


@pytest.mark.slow
def test_the_quickstart_shows_what_its_commands_print():
    page = quickstart_page.PAGE.read_text(encoding="utf-8")
    assert quickstart_page.without_times(page) == quickstart_page.without_times(quickstart_page.render()), (
        "run `make docs`"
    )


def test_the_python_page_shows_what_its_code_prints():
    assert python_page.PAGE.read_text(encoding="utf-8") == python_page.render(), "run `make docs`"


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_command_of_the_readme_exists():
    from srlm_cli.cli import COMMANDS

    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\bsrlm ((?:[a-z]+-)?[a-z]+)\b", text)) - {"does", "is", "command"}
    assert named <= set(COMMANDS), named - set(COMMANDS)
    assert set(COMMANDS) <= named | {"settings"}


def test_every_target_of_the_readme_exists():
    targets = {
        name
        for file in (ROOT / "Makefile", ROOT / "src/srlm_cli/recipes/Makefile")
        for name in re.findall(r"^([a-z-]+):", file.read_text(), re.MULTILINE)
    }
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)\b", (ROOT / "README.md").read_text())) - {"and"} <= targets


# --- links, options and words ----------------------------------------------------------------


def test_the_template_hashes_shown_are_those_of_the_templates() -> None:
    for page in ("README.md", "docs/quickstart.md"):
        shown = re.findall(r'"template": "(\w+)", "template_hash": "(\w+)', (ROOT / page).read_text())
        assert shown and all(
            templates.load(name, fields={"prompt", "response"}).hash.startswith(start) for name, start in shown
        ), page


DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
DOCS += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
CODE = re.compile(r"^```.*?^```|``.+?``|`[^`\n]+`|<!--.*?-->", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_every_link_leads_somewhere(page: Path):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for link in (one or other for one, other in links):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_file_of_the_repository_that_the_docs_name_exists():
    for page in DOCS:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/.-])((?:tests|benchmarks|src|examples|docs)/[\w/.-]+\.\w+)", text)
        assert not (missing := {name for name in named if not (ROOT / name).exists()}), f"{name_of(page)}: {missing}"


def test_every_option_of_the_docs_exists():
    from srlm_cli.cli import COMMANDS, command

    known = {"--help", "--version"}
    for name in COMMANDS:
        made = command(name)
        for one in getattr(made, "commands", {"": made}).values():
            known |= {word for option in one.params for word in (*option.opts, *option.secondary_opts)}
    for page in DOCS:
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            if (first := code.split()[0]).startswith("--") or first in {"srlm", *COMMANDS}:
                unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code)) - known - OF_BENCHMARKS
                assert not unknown, f"{name_of(page)}: {unknown}"


def declared(script: Path) -> set[str]:
    """Return the options that a benchmark declares, or the race that it is."""
    calls = [
        call
        for file in {script, script.parent / "race.py"}
        if file.exists()
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
    ]
    return {word.value for call in calls for word in call.args if isinstance(word, ast.Constant)}


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_every_benchmark_of_the_docs_has_the_options_shown(page: Path):
    for code in re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")):
        if found := re.search(r"python (benchmarks/\S+\.py)([^;]*)", code):
            unknown = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", found[2])) - declared(ROOT / found[1])
            assert not unknown, f"{code}: {unknown}"
        for folder, target in re.findall(r"make -C (benchmarks/\w+)(?: +([a-z][\w-]*))?", code):
            words = (ROOT / folder / "Makefile").read_text(encoding="utf-8").replace(":", " ").split()
            assert not target or target in words, f"{code}: {target}"


OF_BENCHMARKS = {"--only", "--prompts", "--rows", "--runs", "--texts", "--write"}

# Habits of this project's earlier English, each with the words to use. A reader of the field has to read them twice.
HABITS = {
    r"\bbehind\b": "after",
    r"\b(?:go(?:es|ing|ne)?|went) on\b(?! (?:stdout|stderr|a GPU))": "continue, resume",
    r"\bst(?:ands?|ood|anding)\b(?!-)": "is, are",
    r"(?<!here\s)\b(?:is|are|was|were) no (?!longer\b|more than\b|less than\b)": "is not a",
    r"\b(?:\d+|rows?|records?|tokens?|bytes|lines?|files?|prompts?|responses?|judgements?|rates?|metrics?) "
    r"an? (?:row|record|token|prompt|reply|response|second|step|pass|process|line|command|number|file|metric|pair)\b":
        "per",
    r"\bso (?:many|much)\b": "N, the number of",
    r"\bwhat (?:may|lies|stands|passes|comes between)\b": "a noun",
    r"\bWhat `srlm` (?:writes|makes|reads)\b": "a noun: every record",
    r"\btold\b|\b(?:is|are|was|were) said\b": "reported, shown",
    r"\bmend(?:s|ed|ing)?\b": "fix, correct",
    r"\bat once\b": "immediately; at the same time",
    r"\bours\b": "not in the paper; of srlm",
    r"\breader of the pipe\b": "the program that read the output",
    r"\bjoined in their order\b": "concatenated in order",
    r"\blanes?\b": "worker process",
    r"\braced?s?\b": "throughput benchmark",
    r"\banew\b": "again",
    r"\bbut for\b": "except",
    r"\ba lot decides\b": "chosen at random",
    r"\bthe likes? (?:of|$)": "similar",
    r"\b(?:can|could) be had\b|\bis had\b": "is available",
    r"\bone's own\b": "your own",
}  # fmt: skip


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_the_docs_are_in_plain_words(page: Path):
    text = page.read_text(encoding="utf-8")
    if page.name != "commands.md":  # whose blocks are the help texts
        text = CODE.sub(lambda found: "\n" * found[0].count("\n") or "`code`", text)
    found = [
        f"{name_of(page)}:{text.count(chr(10), 0, hit.start()) + 1}: {hit[0]!r}; write: {better}"
        for habit, better in HABITS.items()
        for hit in re.finditer(habit, text, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


def docstrings_and_comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the words of each docstring and comment of a module."""
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (words := ast.get_docstring(node)):
            yield node.body[0].lineno, words
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def messages(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the words of each text of a module with a space in it: messages, and parts of them."""
    tree = ast.parse(text)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if is_text and " " in node.value:
            yield node.lineno, node.value


def test_docstrings_comments_and_messages_are_in_plain_words():
    found = []
    for file in sorted((ROOT / "src/srlm_cli").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for line, words in [*messages(text), *docstrings_and_comments(text)]:
            words = " ".join(CODE.sub("`code`", words).split())
            hits = [(hit[0], better) for habit, better in HABITS.items() for hit in re.finditer(habit, words, re.I)]
            found += [f"{file.relative_to(ROOT)}:{line}: {hit!r}; write: {better}" for hit, better in hits]
    assert not found, "\n".join(found)


def test_the_habits_are_found_and_nothing_else():
    """The list above finds the sentences that it was made of."""
    examples = (
        "rows come out behind it", "it goes on there", "which stands in the file", "X is no model", "one row a metric",
        "so many rows", "what may pass", "it is told on stderr", "mended rows", "8 rows at once", "a rule of ours",
    )  # fmt: skip
    assert all(any(re.search(habit, text, re.IGNORECASE) for habit in HABITS) for text in examples)
    plain = "There is no GPU. A tie is no longer a miss. 16 bytes per weight. It runs on a GPU; nothing is lost."
    assert not any(re.search(habit, plain, re.IGNORECASE) for habit in HABITS)


def test_the_loop_of_the_checkout_takes_data_of_ones_own():
    words = ["make", "-o", ".venv/.ready", "iterate", "RANKED=mine.jsonl", "MAKE=echo"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {"RANKED=mine.jsonl", "RANKED_EVAL=examples/quickstart/ranked_eval.jsonl"} <= set(said)


def test_a_bare_make_lists_the_targets_with_a_line_each():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True)
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and {"demo", "test", "iterate", "report"} <= set(listed) and all(listed.values())


def test_make_can_be_asked_what_it_would_do_before_anything_is_installed(tmp_path):
    command = ["make", "-n", "iterate", f"VENV={tmp_path}/none", "NAME=nothing-of-that-name", "ITER=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout and "--out runs/nothing-of-that-name/M3/model" in done.stdout


def test_no_file_names_a_machine_path_or_a_registry_host():
    found = []
    for file in [*ROOT.glob("*"), *ROOT.glob(".ci/*"), *ROOT.glob("docs/**/*"), *ROOT.glob("src/**/*.py")]:
        if file.is_file() and not file.name.startswith("."):
            text = file.read_text(errors="ignore")
            found += [(file.name, hit) for hit in re.findall(r"/(?:root|opt|home)/\w+|pypi\.org|pythonhosted", text)]
    assert not found


def test_seed_data_is_what_the_readme_of_it_says():
    ift, ranked, held_out = rows("ift.jsonl"), rows("ranked.jsonl"), rows("ranked_eval.jsonl")
    assert len(ift) >= 150 and len(ranked) + len(held_out) >= 80
    prompts = [row["prompt"] for row in [*ift, *ranked, *held_out]]
    assert len(set(prompts)) == len(prompts)
    assert len({row["category"] for row in ift}) >= 8
    for rows_ in (ranked, held_out, ranked + held_out):
        longest = [max(row["responses"], key=lambda reply: len(reply["text"]))["rank"] == 0 for row in rows_]
        assert 0.45 <= sum(longest) / len(longest) <= 0.60
    for row in ranked + held_out:
        assert 2 <= len(row["responses"]) <= 4
        assert sorted(reply["rank"] for reply in row["responses"]) == list(range(len(row["responses"])))


def test_seed_prompts_are_no_near_duplicates():
    from srlm_cli.stages.gen_prompts import NearDuplicates

    known = NearDuplicates([], 0.7)
    for row in [*rows("ift.jsonl"), *rows("ranked.jsonl"), *rows("ranked_eval.jsonl")]:
        assert not known.fault(row["prompt"]), row["prompt"]
        known.add(row["prompt"])
