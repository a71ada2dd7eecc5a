"""The docs say what the program does: help pages, commands and numbers of the seed data."""

from __future__ import annotations

import json
import re
import subprocess

import help_pages
from helpers import ROOT

QUICKSTART = ROOT / "examples" / "quickstart"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text().splitlines()]


def test_help_pages_are_those_of_the_program():
    assert help_pages.PAGE.read_text() == help_pages.render(), "run `make docs`"


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
