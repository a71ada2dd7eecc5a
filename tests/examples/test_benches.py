"""examples/benches: benchmarks for judges as ranked rows, and their published metrics."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, Srlm, read_rows, write_rows

BUILD = ROOT / "examples" / "benches" / "build.py"


def pair(name: str, source: str, first: str, second: str, label: str) -> dict:
    return {
        "pair_id": name,
        "source": source,
        "question": "Q",
        "response_A": first,
        "response_B": second,
        "label": label,
    }


def best(name: str, prompt: str, chosen: list[str], rejected: list[str], subset: str = "Ties") -> dict:
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset}


ROWS = {  # made up, in the form of each
    "rewardbench2": [
        best("7", "2+2?", ["4"], ["5", "6", "7"], "Math"),
        best("ref:0", "A month?", ["May"], ["Moon"]),
        best("tied:0", "Any?", ["May", "June"], ["Moon"]),
    ],
    "judgebench": [
        pair("a", "mmlu-pro-law", "x", "yy", "B>A"),
        pair("b", "livebench-math", "zz", "w", "A>B"),
    ],
    "llmbar": [
        {"input": "Say hi.", "output_1": "Hi.", "output_2": "Bye, and much more.", "label": 1},
        {"input": "Say bye.", "output_1": "Hi.", "output_2": "Bye, and much more.", "label": 2},
    ],
}


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_benches", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build


@pytest.mark.parametrize("bench", ROWS)
def test_a_bench_is_judged_and_measured(bench: str, build, tmp_path: Path, srlm: Srlm) -> None:
    write_rows(tmp_path / "ranked.jsonl", build(bench, ROWS[bench], "Natural" if bench == "llmbar" else None))
    srlm(
        "judge",
        "--in",
        tmp_path / "ranked.jsonl",
        "--engine",
        "echo",
        "--model",
        "longest",
        "--out",
        tmp_path / "j.jsonl",
    )
    metrics = [json.loads(line) for line in srlm("eval", "reward", "--in", tmp_path / "j.jsonl").out.splitlines()]
    found = {(row["metric"], row.get("category")): row["value"] for row in metrics if "replies" not in row}
    if bench == "rewardbench2":
        assert found["best_of_n", "Math"] == 1 / 4  # all of one length
        # "Moon" is longer than "May" and as long as "June": no reply is ahead
        assert found["ties_score", None] < 0.01 and ("pairwise_accuracy", "Ties") in found
    elif bench == "judgebench":
        assert found["pairwise_accuracy", "Knowledge"] == found["pairwise_accuracy", "Math"] == 1
        assert {row["id"] for row in read_rows(tmp_path / "ranked.jsonl")} == {"a", "b"}  # pairs of one question
    else:
        assert found["pairwise_accuracy", "Natural"] == 0.5
        assert [row["id"] for row in read_rows(tmp_path / "ranked.jsonl")] == ["Natural-1", "Natural-2"]


def test_a_row_of_another_form_is_named(build) -> None:
    with pytest.raises(SystemExit, match="row 2 is not a row of judgebench: KeyError"):
        list(build("judgebench", [ROWS["judgebench"][0], {**ROWS["judgebench"][1], "label": "A=B"}], None))


def test_a_reply_that_is_not_a_list_of_texts_is_not_cut_into_letters(build) -> None:
    with pytest.raises(
        SystemExit, match="row 1 is not a row of rewardbench2: ValueError expected texts as replies, got 'May'"
    ):
        list(build("rewardbench2", [best("1", "A month?", "May", "Moon")], None))
    with pytest.raises(SystemExit, match="row 1 is not a row of judgebench: .*None"):
        list(build("judgebench", [pair("a", "x", "b", None, "A>B")], None))


def test_an_id_of_zero_is_kept(build) -> None:
    assert [row["id"] for row in build("rewardbench2", [best(0, "A month?", ["May"], ["Moon"])], None)] == [0]


@pytest.mark.slow  # `datasets` takes seconds to import
def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "bench.jsonl", ROWS["llmbar"])
    command = [
        sys.executable,
        str(BUILD),
        "llmbar",
        "--dataset",
        str(source),
        "--out",
        str(tmp_path / "made" / "r.jsonl"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = read_rows(tmp_path / "made" / "r.jsonl")
    assert [[reply["rank"] for reply in row["responses"]] for row in made] == [[0, 1], [1, 0]]
    assert [row["category"] for row in made] == ["llmbar"] * 2
