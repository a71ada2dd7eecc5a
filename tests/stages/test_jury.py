"""srlm jury: what is joined, what is missing, what is refused, and what the scores become."""

from __future__ import annotations

import json
import math
import random
from itertools import count
from pathlib import Path

import pytest

from commands_table import JURY
from helpers import PROGRAM, Record, Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli.stages import jury as stage
from srlm_cli.streams import spill
from srlm_cli.templates import load


def of_template(name: str) -> Record:
    return {"template": name, "template_hash": load(name, fields={"prompt", "response"}).hash}


ADDITIVE = of_template("additive")


def judged(juror: int, prompts: int = 6, replies: int = 3) -> list[Record]:
    """Return the judged rows of a juror; juror 0 is right about people, the others less and less."""
    draw = random.Random(juror)
    return [
        {
            "id": f"p{p}/{k}",
            "prompt_id": f"p{p}",
            "prompt": f"Question {p}?",
            "response": f"Reply {k} to {p}.",
            "k": k,
            "note": juror,
            "human": float(truth := (7 * p + 3 * k) % 5),
            "score": float(min(5, max(0, truth + draw.randint(-juror, juror)))),
            "scores": [1.0, 2.0],
            "score_from": ["text", "text"],
            "judgements": ["Good.", "Bad."],
            "judgement_finish_reasons": ["stop", "stop"],
            "judge": {"model": f"J{juror}", **ADDITIVE},
        }
        for p in range(prompts)
        for k in range(replies)
    ]


A, B, C = map(judged, range(3))


def jurors(number: int, weights: tuple[float, ...] = (1, 1, 1)) -> list[stage.Juror]:
    return [stage.Juror(f"{n}.jsonl", f"J{n}", {"model": f"J{n}"}, weights[n]) for n in range(number)]


def join(*files: list[Record], on_disk: bool = False, **more) -> tuple[list[Record], stage.Bench]:
    """Return the rows of a jury over these files, in memory or by the tables on disk, and what was counted."""
    bench = stage.Bench(len(files))
    tables = {"is_new": spill.Seen().add, "group_by_key": spill.group_by_key} if on_disk else {}
    streams = [zip(count(1), map(dict, rows), strict=False) for rows in files]
    made = stage.jury(streams, jurors(len(files)), bench, **tables, **more)
    return [row for outcome in made for row in outcome.rows], bench


def without(rows: list[Record], *ids: str) -> list[Record]:
    return [row for row in rows if row["id"] not in ids and row["prompt_id"] not in ids]


def by_id(rows: list[Record]) -> dict[str, Record]:
    return {row["id"]: row for row in rows}


@pytest.fixture
def files(srlm: Srlm) -> list[str]:
    """Three judged files, and the options that name them."""
    for name, rows in (("a", A), ("b", B), ("c", C)):
        write_rows(srlm.folder / f"{name}.jsonl", rows)
    return ["jury", *(word for name in "abc" for word in ("--in", f"{name}.jsonl"))]


# --- the join --------------------------------------------------------------------------------


def test_a_reply_has_the_mean_and_each_score_and_all_other_fields_of_the_first_file() -> None:
    rows, _ = join(A, B, C)
    assert [row["id"] for row in rows] == [row["id"] for row in A]
    for row, a, b, c in zip(rows, A, B, C, strict=True):
        assert row["scores"] == [a["score"], b["score"], c["score"]] and row["score_from"] == ["text"] * 3
        assert row["score"] == pytest.approx(sum(row["scores"]) / 3)
        assert (row["response"], row["human"], row["note"]) == (a["response"], a["human"], 0)
        assert row["judge"]["model"] == "jury" and [j["model"] for j in row["judge"]["jurors"]] == ["J0", "J1", "J2"]
        assert not row.keys() & {"judgements", "judgement_finish_reasons"}


def shuffled(rows: list[Record], seed: int) -> list[Record]:
    return random.Random(seed).sample(rows, len(rows))


def backwards(rows: list[Record]) -> list[Record]:
    return sorted(rows, key=lambda row: -int(row["prompt_id"][1:]))


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(
    ("files", "unsorted"),
    [
        ((A, backwards(B), C), False),
        ((backwards(A), B, backwards(C)), False),
        ((A, B, C), True),
        ((shuffled(A, 1), shuffled(B, 2), shuffled(C, 3)), True),
    ],
    ids=["one backwards", "one not", "unsorted needlessly", "shuffled"],
)
def test_order_changes_no_score(files: tuple, unsorted: bool, on_disk: bool) -> None:
    rows, bench = join(*files, unsorted=unsorted, on_disk=on_disk)
    whole, of_whole = join(A, B, C)
    assert by_id(rows) == by_id(whole) and len(rows) == len(whole)
    assert bench.reliability.alpha() == pytest.approx(of_whole.reliability.alpha())
    assert [pair["n_order"] for pair in bench.reliability.of_pairs()] == [6 * 3] * 3
    prompts = [row["prompt_id"] for row in rows]
    assert all(
        prompts.count(one) == 3 and len(set(prompts[at : at + 3])) == 1
        for at, one in enumerate(prompts[::3])
        for at in [3 * at]
    )


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("gone", [("p2/1",), ("p0/0", "p5/2"), ("p0",), ("p3", "p4/1"), ("p5",)], ids=" ".join)
@pytest.mark.parametrize("juror", [0, 1])
def test_a_missing_juror_is_counted_and_does_not_count(gone: tuple, juror: int, on_disk: bool) -> None:
    files = [A, B, C]
    files[juror] = without(files[juror], *gone)
    rows, bench = join(*files, on_disk=on_disk)
    whole = by_id(join(A, B, C)[0])
    lost = {row["id"] for row in A} - {row["id"] for row in files[juror]}
    assert by_id(rows).keys() == whole.keys() and bench.missing == [len(lost) * (n == juror) for n in range(3)]
    for row in rows:
        if row["id"] in lost:
            others = [score for n, score in enumerate(whole[row["id"]]["scores"]) if n != juror]
            assert row["scores"][juror] is None and row["score_from"][juror] == "missing"
            assert row["score"] == sum(others) / 2 and row["note"] == (juror == 0)
        else:
            assert row == whole[row["id"]]
    prompts = [row["prompt_id"] for row in rows]
    assert sum(one != other for one, other in zip(prompts, prompts[1:], strict=False)) == 5  # grouped, for make-pairs


def test_a_jury_of_nobody_is_null() -> None:
    silent = [{**row, "score": None} for row in A]
    rows, bench = join(silent, silent, without(C, "p0/0"))
    assert rows[0]["score"] is None and rows[0]["scores"] == [None] * 3
    assert rows[0]["score_from"] == [None, None, "missing"]
    assert rows[1]["score"] == C[1]["score"]
    assert (bench.unscored, bench.missing) == ([18, 18, 0], [0, 0, 1])


@pytest.mark.parametrize(
    ("scores", "weights", "mean"),
    [
        ([1, 4], [3, 1], 1.75),
        ([None, 4], [3, 1], 4),
        ([2, 4], [0, 1], 4),
        ([2, None], [0, 1], None),
        ([0.1] * 3, [0.2, 0.3, 0.7], 0.1),
        ([5.0] * 3, [0.1, 0.2, 0.3], 5.0),
    ],
)
def test_the_weighted_mean_is_of_those_who_gave_a_score(scores: list, weights: list, mean: float | None) -> None:
    assert stage.weighted_mean(scores, weights) == mean


def test_an_expected_score_stays_one() -> None:
    expected = [{**row, "score_from": ["direct"]} for row in A]
    assert join(expected, B)[0][0]["score_from"] == ["expected", "text"]


def test_each_line_is_what_json_writes_of_the_row(srlm: Srlm) -> None:
    odd = {"note": 'naïve \u2028 "}"', "tiny": 1e-9, "huge": 1e22, "many": 1 << 70, "inner": {"judge": [None, 0.0]}}
    for name, rows in (("a", A), ("b", B)):
        made = [
            {**row, **odd, "score": row["score"] / 3e5, "judge": {"model": f"\ud83d{name}é", "t": 1e-7}} for row in rows
        ]
        (srlm.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    result = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl", "--out", "out.jsonl")
    assert result.code == 0, result.err
    text = (srlm.folder / "out.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    assert text == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) and len(rows) == len(A)
    assert all(list(row)[-4:] == ["score", "scores", "score_from", "judge"] for row in rows)
    assert [juror["model"] for juror in rows[0]["judge"]["jurors"]] == ["\ufffdaé", "\ufffdbé"]


# --- weights ---------------------------------------------------------------------------------


def test_weights_are_log_odds_with_one_hit_and_one_miss_more_and_chance_has_none() -> None:
    found = stage.Accuracy(3)
    found.add([2, 1, None], [[5, 1, 0], [1, 1, 4], [0, 0, 0]])  # right, a tie, wrong; a reply nobody ranked
    found.add([1, 2], [[1, 1, 0], [3, 2, None]])
    assert (found.hits, found.pairs) == ([2, 1.5, 0], [2, 2, 1])
    assert found.weights() == [pytest.approx(math.log(3 / 1)), pytest.approx(math.log(2.5 / 1.5)), 0.0]
    assert found.of(1) == {"accuracy": 0.75, "n": 2}


def test_accuracy_weighs_by_people_and_says_so(srlm: Srlm, files: list[str]) -> None:
    result = srlm(*files, "--weights", "accuracy", "--out", "out.jsonl")
    assert result.code == 0, result.err
    about = read_json(srlm.folder / "out.jsonl.meta.json")["jury"]["jurors"]
    weights = [juror["weight"] for juror in about]
    assert weights[0] > weights[1] > weights[2] and about[0]["accuracy"] == 1.0
    assert re_weights(read_rows(srlm.folder / "out.jsonl"), weights)
    assert f"J0: weight {weights[0]:.3g}, accuracy 1.000 of {about[0]['n']} pairs" in result.err


def re_weights(rows: list[Record], weights: list[float]) -> bool:
    """Return whether the scores are the weighted means, and the rows say the weights."""
    means = [sum(w * s for w, s in zip(weights, row["scores"], strict=True)) / sum(weights) for row in rows]
    said = [[juror["weight"] for juror in row["judge"]["jurors"]] for row in rows]
    return [row["score"] for row in rows] == pytest.approx(means) and said == [weights] * len(rows)


def test_people_can_stand_in_a_ranked_file(srlm: Srlm, files: list[str]) -> None:
    ranked = [
        {
            "prompt": f"Question {p}?",
            "responses": [{"text": row["response"], "score": row["human"]} for row in A[3 * p : 3 * p + 3]],
        }
        for p in range(6)
    ]
    write_rows(srlm.folder / "ranked.jsonl", ranked)
    inside = srlm(*files, "--weights", "accuracy").rows
    for name, rows in (("a", A), ("b", B), ("c", C)):
        write_rows(srlm.folder / f"{name}.jsonl", [{**row, "human": None} for row in rows])
    beside = srlm(*files, "--weights", "accuracy", "--ranked", "ranked.jsonl")
    assert [row["score"] for row in beside.rows] == [row["score"] for row in inside], beside.err
    unknown = srlm(*files, "--weights", "accuracy")
    assert unknown.code == 3 and unknown.out == "" and "--ranked FILE" in unknown.err


def test_weights_of_a_file_go_by_name(srlm: Srlm, files: list[str]) -> None:
    (srlm.folder / "w.json").write_text('{"J1": 1, "J0": 3, "J2": 0}')
    rows = srlm(*files, "--weights", "w.json").rows
    assert re_weights(rows, [3, 1, 0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"J0": 1, "J1": 1}', "missing or not known: J2"),
        ('{"J0": 1, "J1": 1, "J2": 1, "J9": 1}', "missing or not known: J9"),
        ('{"J0": -1, "J1": 1, "J2": 1}', "a number from 0 up"),
        ('{"J0": 0, "J1": 0, "J2": 0}', "not all 0"),
        ("[1, 2, 3]", "expected an object"),
        ("{", "not JSON"),
    ],
)
def test_wrong_weights_are_refused(srlm: Srlm, files: list[str], text: str, said: str) -> None:
    (srlm.folder / "w.json").write_text(text)
    result = srlm(*files, "--weights", "w.json", "--out", "out.jsonl")
    assert result.code == 2 and result.err.startswith("srlm jury: error: w.json: ") and said in result.err
    assert not (srlm.folder / "out.jsonl").exists()


# --- what is refused -------------------------------------------------------------------------


def changed(rows: list[Record], at: int, **fields) -> list[Record]:
    return [*rows[:at], {**rows[at], **fields}, *rows[at + 1 :]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (changed(B, 4, response="Another."), "b.jsonl:5: the reply p1/1 has another text than in a.jsonl:5"),
        (changed(B, 4, prompt="Another?"), "b.jsonl:5: two prompts have the prompt_id p1"),
        (changed(B, 4, id="p1/0"), "b.jsonl:5: the reply p1/0 is also in line 4"),
        (
            changed(backwards(B), 4, response="Another."),
            "a.jsonl:14: the reply p4/1 has another text than in b.jsonl:5",
        ),
        (changed(B, 4, score="high"), "b.jsonl:5: expected `score`"),
        ([*B[:4], "{", *B[4:]], "b.jsonl:5: not JSON"),
        ([*B, B[0]], "the replies to prompt p0 are not grouped"),
        ([{**row, "id": f"other/{n}"} for n, row in enumerate(B)], "no reply is in two of the files"),
    ],
    ids=["text", "prompt", "twice", "text on disk", "score", "json", "not grouped", "no common id"],
)
def test_what_does_not_fit_is_one_line_and_no_file(srlm: Srlm, rows: list, said: str) -> None:
    write_rows(srlm.folder / "a.jsonl", A)
    write_rows(srlm.folder / "b.jsonl", rows)
    result = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl", "--out", "out.jsonl", "--quiet")
    assert result.code == 3 and len(result.err.splitlines()) == 1, result.err
    assert said in result.err and not (srlm.folder / "out.jsonl").exists()
    kept = read_rows(srlm.folder / "out.jsonl.part")
    whole = by_id(join(A, B)[0])
    assert "no reply" in said or all(row["score"] == whole[row["id"]]["score"] for row in kept)


def test_a_bad_row_of_one_file_can_be_skipped_and_is_a_missing_juror(srlm: Srlm) -> None:
    write_rows(srlm.folder / "a.jsonl", A)
    write_rows(srlm.folder / "b.jsonl", [*B[:4], "{", *B[5:]])
    options = ["--out", "out.jsonl", "--on-error", "skip", "--rejects", "bad.jsonl"]
    result = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl", *options)
    assert result.code == 0 and "1 dropped: bad row" in result.err and "J1: weight 1, 1 replies missing" in result.err
    counts = read_json(srlm.folder / "out.jsonl.meta.json")["counts"]
    assert counts["read"] + counts["counts"]["missing jurors"] == 2 * counts["kept"] == 36
    assert [row["at"] for row in read_rows(srlm.folder / "bad.jsonl")] == ["b.jsonl:5"]


def test_different_scales_are_refused(srlm: Srlm) -> None:
    write_rows(srlm.folder / "a.jsonl", A)
    write_rows(srlm.folder / "b.jsonl", [{**row, "judge": {"model": "J1", **of_template("rating")}} for row in B])
    result = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl")
    assert result.code == 2 and "different scales: J0 from 0 to 5, J1 from 1 to 10" in result.err


IMPLICIT = {"model": "I", "implicit": {"ref": "M1", "beta": 0.1}}
REWARD = {"model": "R", "engine": "reward"}
PAIRWISE = {"model": "P", "by": "pairwise", "template": "pairwise", "template_hash": "0"}


@pytest.mark.parametrize(
    ("judge", "other", "said"),
    [
        (ADDITIVE, IMPLICIT, "I by --implicit"),
        (ADDITIVE, REWARD, "R by --engine reward"),
        (ADDITIVE, PAIRWISE, "P by --by pairwise"),
        (ADDITIVE, {"model": "jury", "jurors": [{**IMPLICIT, "weight": 1.0}]}, "jury by --implicit"),
        (IMPLICIT, REWARD, "I by --implicit, R by --engine reward"),
        ({"template": "own.toml", "template_hash": "0"}, IMPLICIT, "J0 by a template, I by --implicit"),
    ],
)
def test_scores_without_a_common_scale_are_refused(srlm: Srlm, judge: Record, other: Record, said: str) -> None:
    write_rows(srlm.folder / "a.jsonl", [{**row, "judge": {"model": "J0", **judge}} for row in A])
    write_rows(srlm.folder / "b.jsonl", [{**row, "judge": other} for row in B])
    result = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl", "--out", "out.jsonl")
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1, result.err
    assert "no common scale" in result.err and not (srlm.folder / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("judge", "source"), [(IMPLICIT, "implicit"), (REWARD, "reward"), (PAIRWISE, "pairwise"), (ADDITIVE, "rules")]
)
def test_jurors_of_one_kind_are_joined_and_their_source_is_named(srlm: Srlm, judge: Record, source: str) -> None:
    for name, rows in (("a", A), ("b", B)):
        made = [{**row, "judge": {**judge, "model": name}, "score_from": [source]} for row in rows]
        write_rows(srlm.folder / f"{name}.jsonl", made)
    result = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl", "--out", "out.jsonl")
    assert result.code == 0, result.err
    assert all(row["score_from"] == [source, source] for row in read_rows(srlm.folder / "out.jsonl"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--in", "a.jsonl", "--in", "a.jsonl"], "given twice"),
        (["--in", "a.jsonl", "--in", "./a.jsonl"], "given twice"),
        (["--in", "-", "--in", "-"], "given twice"),
        (["--in", "a.jsonl", "--ranked", "a.jsonl"], "--weights accuracy"),
        (["--in", "a.jsonl", "--weights", "acuracy"], "--weights takes equal, accuracy or a JSON file"),
        (["--in", "a.jsonl", "--in", "b.jsonl", "--out", "b.jsonl"], "is the input"),
        (["--in", "a.jsonl", "--in", "nowhere.jsonl"], "cannot open nowhere.jsonl"),
    ],
    ids=["file", "other spelling", "stdin", "ranked alone", "typing error", "own input", "no file"],
)
def test_options_that_do_not_fit_are_refused(srlm: Srlm, files: list[str], args: list[str], said: str) -> None:
    result = srlm("jury", *args)
    assert result.code == 2 and said in result.err, result.err


def test_other_weights_are_another_run(srlm: Srlm, files: list[str]) -> None:
    write_rows(srlm.folder / "c.jsonl", [*C, "{"])
    argv = [*files, "--out", "out.jsonl", "--quiet"]
    assert srlm(*argv).code == 3
    write_rows(srlm.folder / "c.jsonl", C)
    other = srlm(*argv, "--weights", "accuracy")
    assert other.code == 2 and "weights 'equal' -> 'accuracy'" in other.err and "--restart" in other.err
    assert srlm(*argv).code == 0 and read_rows(srlm.folder / "out.jsonl") == srlm(*files).rows


# --- with the other commands -----------------------------------------------------------------


def test_one_juror_has_its_own_scores(srlm: Srlm) -> None:
    result = srlm(*JURY.argv(), stdin=as_lines(A))
    assert [row["score"] for row in result.rows] == [row["score"] for row in A]
    assert "Krippendorff's alpha not defined" in result.err


def test_the_file_of_a_jury_is_a_judged_file(srlm: Srlm, files: list[str]) -> None:
    assert srlm(*files, "--out", "jury.jsonl").code == 0
    rows = read_rows(srlm.folder / "jury.jsonl")
    pairs = srlm("make-pairs", "--in", "jury.jsonl").rows
    assert pairs and all(pair["judge"] == rows[0]["judge"] and "scores" not in pair for pair in pairs)
    for pair in pairs:
        scores = [row["score"] for row in rows if row["prompt_id"] == pair["prompt_id"]]
        assert (pair["score_chosen"], pair["score_rejected"]) == (max(scores), min(scores))
    accuracy = srlm("eval", "reward", "--in", "jury.jsonl").rows
    assert {row["model"] for row in accuracy} == {"jury"}
    assert next(row["n"] for row in accuracy if row["metric"] == "scored_rate") == 18
    health = {row["metric"]: row for row in srlm("eval", "health", "--in", "jury.jsonl").rows}
    assert (health["parse_rate"]["value"], health["parse_rate"]["n"]) == (1.0, 3 * 18)
    run = srlm.folder / "runs" / "M1"
    run.mkdir(parents=True)
    (run / "judged.jsonl").write_text(as_lines(rows))
    (run / "judged.jsonl.meta.json").write_text((srlm.folder / "jury.jsonl.meta.json").read_text())
    (run / "pairs.jsonl").write_text(as_lines(pairs))
    shown = srlm("report", "runs", "--html", "page.html")
    assert shown.code == 0 and (srlm.folder / "page.html").stat().st_size > 1000, shown.err


def test_a_jury_in_a_pipe_with_process_substitution(srlm: Srlm, files: list[str]) -> None:
    program = " ".join(PROGRAM)
    line = (
        f"set -o pipefail; {program} jury --quiet --in <({program} judge --engine echo --model longest -i a.jsonl -q)"
        f" --in <(cat b.jsonl) --in c.jsonl | {program} make-pairs --quiet"
    )
    done = srlm.run(["bash", "-c", line])
    assert done.code == 0 and done.err == "" and len(done.rows) == 6
    assert [juror["model"] for juror in done.rows[0]["judge"]["jurors"]] == ["echo:longest", "J1", "J2"]


def test_the_agreement_is_in_the_meta_file_and_on_stderr(srlm: Srlm, files: list[str]) -> None:
    result = srlm(*files, "--out", "out.jsonl")
    about = read_json(srlm.folder / "out.jsonl.meta.json")["jury"]
    assert [pair["jurors"] for pair in about["pairs"]] == [["J0", "J1"], ["J0", "J2"], ["J1", "J2"]]
    assert f"Krippendorff's alpha {about['alpha']:.3f} (interval), 18 replies" in result.err
    for pair in about["pairs"]:
        assert f"{' and '.join(pair['jurors'])}: weighted kappa {pair['kappa']:.3f}" in result.err
    assert json.dumps(about)
    assert srlm(*files, "--quiet").err == ""


def test_jurors_of_one_model_are_named_by_their_files(srlm: Srlm, files: list[str], tmp_path: Path) -> None:
    for name, rows in (("a", A), ("b", B), ("c", C)):
        write_rows(srlm.folder / f"{name}.jsonl", [{**row, "judge": {"model": "M", **ADDITIVE}} for row in rows])
    assert "a and b: weighted kappa" in srlm(*files).err
