"""Every command line of the help pages, the README and two guides runs as it is printed, on a tiny model.

Only the names of models stand for others here, and counts are small.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT, Record, clean_env, read_rows, write_rows
from stub_server import Stub
from tiny import ALONE, reward_model, tiny_model

QUICKSTART = ROOT / "examples" / "quickstart"
pytestmark = pytest.mark.slow

FILES = ("README.md", "docs/commands.md", "docs/engines.md", "docs/evidence.md", "docs/judge.md")
PAGES = {name: (ROOT / name).read_text() for name in FILES}
LINES = sorted(
    {line.strip() for line in re.findall(r"^ *(?:srlm|echo|cat) .*$", "\n".join(PAGES.values()), re.MULTILINE)}
)
SMALLER = {
    r"meta-llama/Llama-2-70b(-chat)?-hf|smollm2-135m-instruct": "M0",
    r"--count \d+": "--count 1 --max-tries 3",
    r"make iterate ITER=2": "make -n iterate ITER=2",  # the demo runs it
    r"/tmp/first.html": "first.html",
}
BRIEF = {
    **{
        f"SRLM_{name}_MAX_NEW_TOKENS": "12"
        for name in ("SAMPLE", "JUDGE", "EVAL_JUDGES", "MAKE_EFT", "GEN_PROMPTS", "MAKE_RUBRIC")
    },
    "SRLM_SFT_MAX_STEPS": "1",
    "SRLM_DPO_MAX_STEPS": "1",
    "SRLM_KTO_MAX_STEPS": "1",
}
# A model of random words writes no prompt that passes the filters, and no criterion; grep found nothing missing.
OTHER_ENDS = {"srlm gen-prompts": 4, "srlm make-rubric": 4, "srlm doctor |": 1}


def smaller(line: str) -> str:
    for pattern, stands_in in SMALLER.items():
        line = re.sub(pattern, stands_in, line)
    return line


def ranked(count: int) -> list[Record]:
    rows = read_rows(QUICKSTART / "ranked.jsonl")[:count]
    return [{**row, "facts": "Air scatters short waves.", "responses": row["responses"][:2]} for row in rows]


def of_people() -> list[Record]:
    """The responses of `answers("M1", 2)`, ranked."""
    found = [[row for row in answers("M1", 2) if row["prompt_id"] == f"p{n}"] for n in range(2)]
    return [
        {"prompt": rows[0]["prompt"], "responses": [{"text": row["response"], "rank": row["k"]} for row in rows]}
        for rows in found
    ]


def answers(model: str, count: int) -> list[Record]:
    """Two responses a prompt, each judged twice, in the additive form; the scores differ by model."""
    rows = []
    for n in range(2):
        for k in range(count):
            scores = [float((n + k + at + len(model)) % 6) for at in range(2)]
            rows.append(
                {
                    "id": f"p{n}/{k}", "prompt_id": f"p{n}", "prompt": f"Ask {n}?",
                    "response": f"{model} {k} says {n}.",
                    "k": k, "finish_reason": "stop", "model": f"{model}/model", "judge": f"{model}/model",
                    "score": sum(scores) / 2, "scores": scores, "score_from": "text",
                    "judgements": [f"It is so.\nScore: {score:.0f}" for score in scores],
                }
            )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every file and model that an example names."""
    here = tmp_path_factory.mktemp("files")
    for model in ("M0", "M1/model", "M2/model", "M3/model", "sft/model", "judge"):
        tiny_model(here / model, max_position_embeddings=1 << 14)
        (here / model / "provenance.json").write_text("{}")  # made by srlm, so it may be made anew
    reward_model(here / "reward" / "model")
    for name, rows in {
        "ift": read_rows(QUICKSTART / "ift.jsonl")[:8],
        "eft": [{"prompt": "judge this", "completion": "Score: 4", "score": 4.0, "prompt_id": "x", "id": "x"}],
        "eft-1": [{"prompt": f"judge {n}", "completion": "Score: 4", "score": 4.0, "prompt_id": "x"} for n in range(3)],
        "ranked": ranked(30),
        "ranked_eval": [*read_rows(QUICKSTART / "ranked_eval.jsonl")[:2], *of_people()],
        "prompts": [{"id": f"p{n}", "prompt": f"Ask {n}?"} for n in range(2)],
        **{name: [{**row, "id": f"p{at}", "prompt_id": f"p{at}"} for at, row in enumerate(answers(name, 1))]
           for name in ("m1", "m2", "m3")},
        **{f"{folder}responses": answers(model, 2)
           for folder, model in (("", "M1"), ("M1/", "M1"), ("M2/", "M2"))},
        **{
            f"{folder}judged{end}": answers(model, 2)
            for folder, end, model in (("", "", "M1"), ("", "-1", "M1"), ("M1/", "", "M1"), ("M2/", "", "M2"))
        },
        "M2/implicit": answers("M2", 2),
        **{f"judged-{juror}": [{**row, "judge": juror} for row in answers("M1", 2)] for juror in "abc"},
        "coded": [{"prompt": "Ask.", "response": "f = abs", "tests": ["assert f(-1) == 1"], "rules": ["passes=tests"]}],
        "ruled": [{"id": f"p{n}", "prompt": f"Ask {n}?", "rules": ["no-commas", "words:..30"]} for n in range(2)],
        "labelled": [{"prompt": f"Ask {n}?", "completion": "So.", "label": n > 0} for n in range(3)],
        "corpus": [{"text": "Air scatters short waves of light.", "title": "Sky", "source": "a book"}],
    }.items():  # fmt: skip
        write_rows(here / f"{name}.jsonl", rows)
    shutil.copy(QUICKSTART / "srlm.toml", here / "srlm.toml")
    shutil.copy(ROOT / "src/srlm_cli/templates/additive.toml", here / "own.toml")
    shutil.copy(ROOT / "src/srlm_cli/templates/criteria_score_only.toml", here / "rubric.toml")
    facts = (ROOT / "examples/facts/facts.toml").read_text().replace("$evidence", "$facts")
    (here / "facts_field.toml").write_text(facts)
    (here / "search.py").write_text(re.search(r"```python\n(.*?)```", PAGES["docs/evidence.md"], re.DOTALL)[1])
    (here / "notes").mkdir()
    (here / "notes" / "sky.md").write_text("# Sky\n\nAir scatters short waves of light.\n")
    first = here / "runs" / "first" / "M1"
    first.mkdir(parents=True)
    shutil.copy(here / "judged.jsonl", first)
    shutil.copytree(first, here / "runs" / "control" / "M1")
    made_before(here)
    return here


def made_before(here: Path) -> None:
    """Make what later examples read by the commands that come before them."""
    for line in (
        "srlm index --in corpus.jsonl --out corpus.db",
        "srlm make-pairs --in M1/judged.jsonl --out M1/pairs.jsonl",
        "srlm make-pairs --in M1/judged.jsonl --out pairs.jsonl",
        "srlm judge --in judged.jsonl --meta --out meta.jsonl",
        "srlm eval head-to-head --in m2.jsonl --against m1.jsonl --engine echo --matches matches.jsonl",
        "srlm judge --in ranked_eval.jsonl --engine echo --model random --out eval-a.jsonl",
        "srlm eval rules --in M1/responses.jsonl --rule words:5.. --out M1/eval-rules.jsonl",
        *[f"srlm judge --in ranked_eval.jsonl --engine echo --model random --seed {n} | srlm eval reward --out "
          f"M{n}/eval-reward.jsonl" for n in (1, 2)],
    ):  # fmt: skip
        done = run(line, here)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    ranks = {text["text"]: text["rank"] for row in read_rows(here / "ranked_eval.jsonl") for text in row["responses"]}
    as_people_do = [{**row, "score": 5.0 - ranks[row["response"]]} for row in read_rows(here / "eval-a.jsonl")]
    write_rows(here / "eval-b.jsonl", as_people_do)
    preferences = [
        {"model": model, "index": n, "len_baseline": 900 + n, "len_model": 800 + 40 * n, "preference": 1 + n % 2}
        for model in ("a", "b") for n in range(12)
    ]  # fmt: skip
    write_rows(here / "preferences.jsonl", preferences)
    write_rows(here / "variants.jsonl", [{**row, "model": "variants"} for row in preferences[:12]])


def run(line: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    bin_ = folder / "bin"
    if not bin_.exists():
        bin_.mkdir()
        (bin_ / "srlm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m srlm_cli "$@"\n')
        (bin_ / "srlm").chmod(0o755)
    env = clean_env({**ALONE, **BRIEF, **more, "PYTHONPATH": os.pathsep.join([str(ROOT / "src")])})
    env["PATH"] = f"{bin_}:{env['PATH']}"
    command = ["bash", "-uo", "pipefail", "-c", line]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def server() -> Iterator[Stub]:
    with Stub(steps=lambda asked: [{" ": 1.0}, {"4": 0.6, "3": 0.4}]) as stub:
        yield stub


@pytest.mark.parametrize("line", LINES)
def test_an_example_runs(line: str, files: Path, server: Stub, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    shutil.copytree(files, folder)
    if "--engine vllm" in line:
        pytest.importorskip("vllm")
        tiny_model(folder / "M1/model", max_position_embeddings=1 << 14, head_dim=32)  # vLLM on a CPU has no smaller
    line = line.replace("http://localhost:8000/v1", server.url)
    done = run(smaller(line), folder, OPENAI_BASE_URL=server.url)
    allowed = {0, *(code for start, code in OTHER_ENDS.items() if line.startswith(start))}
    assert done.returncode in allowed, f"{line}\nexit {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr
