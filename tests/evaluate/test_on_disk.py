"""Numbers kept on disk are those kept in memory, and the figures are those of an implementation that kept every row."""

from __future__ import annotations

from random import Random

import pytest

from helpers import ROOT, Srlm
from srlm_cli.evaluate.health import ByPrompt, Numbers, health_metrics, numbers_of
from srlm_cli.evaluate.length_control import Comparisons
from srlm_cli.evaluate.reward import Replies, judge_metrics, metric_rows, replies_of
from srlm_cli.records import judged_record
from srlm_cli.stats.bootstrap import in_order
from srlm_cli.streams.spill import ByKey, Rows, Table

RANKED = ROOT / "examples" / "quickstart" / "ranked.jsonl"
# metric: value, n, ci_low, ci_high; found with all rows in memory and scipy's correlations (commit 44a945c)
REWARD = {
    "pairwise_accuracy": (0.4540229885057471, 348, 0.3957769531415348, 0.5142962184873948),
    "tie_rate": (0.1235632183908046, 348, 0.08823529411764706, 0.16164898250059384),
    "exact_match": (0.18181818181818182, 99, 0.1111111111111111, 0.26262626262626265),
    "spearman": (0.023416858349510145, 99, -0.11548532418838868, 0.1576447620550625),
    "kendall_tau": (0.017483823082064566, 99, -0.11405380818186202, 0.1446099755025998),
    "random": (0.42528735632183906, 348, 0.36265688622754494, 0.4884946814694257),
    "longest_wins_matched_length": (0.4520547945205479, 73, 0.32182881773399014, 0.5976219512195119),
}
HEALTH = {
    "top_score_share": (0.1976112920738328, 921, 0.1709355828220859, 0.22631095769682724),
    "score_std_within_k": (1.2833549721640363, 307, 1.2191664635300823, 1.35040466342666),
    "gap": (1.5521885521885521, 99, 1.3973063973063977, 1.71043771043771),
    "mean_score": (2.3919652551574377, 307, 2.2637295574795573, 2.5153712301238045),
    "longest_agreement": (0.5445544554455446, 303, 0.48285509539876387, 0.6112915963346998),
    "score_length_spearman": (0.12936654736049283, 97, -0.030165513690214023, 0.2774967260040693),
    "score_length_spearman_overall": (-0.00015530135978933593, 307, None, None),
}


def rows(draw: Random, prompts: int = 40) -> list[dict]:
    """Return judged rows of prompts in a random order, the ids of some of them odd."""
    made = [
        judged_record(
            {
                "prompt": f"Question {n}?",
                "prompt_id": f"{n * 7919 % 97}'\"é\ud83d" if n % 5 == 0 else f"{n}",
                "response": "x" * draw.randint(1, 9),
                "k": k,
                "human": -k,
                "score": draw.choice([None, 1, 2.5, 4, 10**30]),
                "scores": [draw.choice([None, 1, 2.5]) for _ in range(3)],
                "score_from": ["text", None, "finish"],
            }
        )
        for n in range(prompts)
        for k in range(draw.randint(1, 4))
    ]
    draw.shuffle(made)
    return made


def test_health_on_disk_is_health_in_memory() -> None:
    judged = rows(Random(0))
    on_disk, in_memory = (numbers_of(judged, store) for store in (ByKey(Numbers), ByPrompt()))
    assert list(on_disk.prompts) == list(in_memory.prompts) == list(on_disk.prompts)
    assert health_metrics(on_disk) == health_metrics(in_memory)


def test_reward_on_disk_is_reward_in_memory() -> None:
    judged = rows(Random(1))
    store = ByKey(Replies)
    for row in judged:
        store.add(row["prompt_id"], replies_of([row], 0, 5.0))
    groups = [[row for row in judged if row["prompt_id"] == key] for key in sorted({r["prompt_id"] for r in judged})]
    assert metric_rows(store, {None}) == judge_metrics(groups)


def test_a_table_on_disk_is_a_dict() -> None:
    draw, on_disk, in_memory = Random(2), Table(), {}
    for _ in range(500):
        key, value = (
            draw.choice(["", "a", "é", "\ud83d", "a'\"", *map(str, range(40))]),
            draw.choice([0.1, 1, "x", {"a": []}]),
        )
        match draw.randrange(3):
            case 0:
                on_disk[key] = in_memory[key] = value
            case 1:
                on_disk.setdefault(key, value)
                in_memory.setdefault(key, value)
            case _:
                assert on_disk.pop(key, None) == in_memory.pop(key, None)
        assert (key in on_disk) == (key in in_memory)
    assert dict(on_disk) == in_memory and len(on_disk) == len(in_memory) > 10


def test_rows_on_disk_come_as_they_went_each_time() -> None:
    rows = Rows()
    for n in range(50):
        rows.add({"n": n, "text": "\ud83d\n"})
    for _ in range(2):
        assert list(rows) == [{"n": n, "text": "\ud83d\n"} for n in range(50)]


def test_prompts_of_comparisons_are_told_apart_as_names_and_numbers_are() -> None:
    indices = [1, 1.0, "1", -1, -2, None, None, 1e300, "p", "p", 1.5]
    given = {"len_model": 1, "len_baseline": 2, "preference": 2, "difficulty": None}
    compared = Comparisons({**given, "index": index} for index in indices)
    assert in_order(compared.prompts).tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 8]
    assert [len(prompt) for prompt in compared.by_prompt()] == [2, 1, 1, 1, 1, 1, 1, 2, 1]


def test_figures_are_those_of_before(srlm: Srlm) -> None:
    assert srlm("judge", "--engine", "echo", "--in", str(RANKED), "--out", "judged.jsonl").code == 0
    for command, known in (("reward", REWARD), ("health", HEALTH)):
        found = {
            row["metric"]: row for row in srlm("eval", command, "--in", "judged.jsonl").rows if "replies" not in row
        }
        for name, (value, n, low, high) in known.items():
            expected = {"value": value, "n": n, "ci_low": low, "ci_high": high}
            for key, figure in expected.items():
                same = None if figure is None else pytest.approx(figure, rel=1e-9, abs=1e-12)
                assert found[name][key] == same, (name, key)
