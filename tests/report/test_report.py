"""`srlm report`: the page and the tables say what the files say, whatever files there are."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from helpers import Record, Srlm, read_json, write_rows
from srlm_cli.errors import DataError, OptionError
from srlm_cli.report import page, plots, tables, words
from srlm_cli.report.collect import Run, collect
from srlm_cli.report.findings import findings
from srlm_cli.report.samples import sample_matches, sample_pairs
from srlm_cli.report.svg import NAMES, spread

HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(2)> & "so"'
VOID = {"meta", "img", "br", "hr", "input", "link"}


# --- a run, written by hand ------------------------------------------------------------------


def metric(task: str, name: str, value: float | None, low: float | None, high: float | None, **more) -> Record:
    return {"task": task, "metric": name, "value": value, "n": 40, "ci_low": low, "ci_high": high, **more}


def counts(read: int, kept: int, dropped: dict | None = None, **more: int) -> Record:
    return {"read": read, "kept": kept, "dropped": dropped or {}, "counts": more, "tokens_out": 7, "seconds": 3.0}


def write_meta(path: Path, command: str, made: Record) -> None:
    meta = {"command": command, "argv": [command, "--out", str(path.name)], "versions": {"srlm": "0.0"}, "counts": made}
    path.with_name(f"{path.name}.meta.json").write_text(json.dumps(meta))


def write_model(folder: Path, command: str, source: str, steps: list[Record]) -> None:
    (folder / "model").mkdir(parents=True)
    made = {
        "command": command,
        "argv": [command, "--model", source],
        "from": {"model": source, "fingerprint": "f00d"},
        "settings": {"learning_rate": 2e-5, "final_learning_rate": 2e-6, "batch": 8},
        "data": {"rows": 11, "truncated": 0, "left_out": 2},
        "steps": len(steps),
        "first_loss": 0.75,
        "last_loss": 0.5,
        "seconds": 30.0,
        "margin": 0.125,
    }
    (folder / "model" / "provenance.json").write_text(json.dumps(made))
    (folder / "model" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def judged(prompt: str, k: int, text: str, scores: list[float | None]) -> Record:
    known = [score for score in scores if score is not None]
    return {
        "id": f"{prompt}/{k}", "prompt_id": prompt, "prompt": f"What of {prompt}?", "response": text, "k": k,
        "finish_reason": "stop", "score": sum(known) / len(known) if known else None, "scores": scores,
        "score_from": [None if score is None else "text" for score in scores],
        "judgements": [f"I say.\nScore: {score}" for score in scores],
        "judgement_finish_reasons": ["stop"] * len(scores),
    }  # fmt: skip


JUDGED = [  # single scores: 5 5 | 3 1 | 2 2 | 2 null: parse rate 7/8, mean of the means (5 + 2 + 2 + 2) / 4
    judged("p1", 0, "x" * 30, [5, 5]),
    judged("p1", 1, "x" * 10, [3, 1]),
    judged("p2", 0, "x" * 20, [2, 2]),
    judged("p2", 1, "x" * 20, [2, None]),
]
PAIR = {
    "id": "p1", "prompt": "What of p1?", "prompt_id": "p1", "chosen": [{"role": "assistant", "content": "x" * 30}],
    "rejected": [{"role": "assistant", "content": "x" * 10}], "score_chosen": 5.0, "score_rejected": 2.0,
    "chosen_id": "p1/0", "rejected_id": "p1/1",
}  # fmt: skip
HEALTH = [
    metric("health", "parse_rate", 0.61, 0.5, 0.7),
    *(metric("health", "share_of_score", share, 0, 1, score=s) for s, share in enumerate((0.25, 0, 0, 0, 0, 0.75))),
    metric("health", "top_score_share", 0.75, 0.6, 0.9, score=5),
    metric("health", "mean_score", 3.75, 3.0, 4.5),
    metric("health", "length", 17.0, 15.0, 19.0),
]
REWARD = [
    metric("reward", "pairwise_accuracy", 0.99, 0.98, 1.0, replies=2),
    metric("reward", "pairwise_accuracy", 0.637, 0.55, 0.72),
    metric("reward", "pairwise_accuracy_ties_half", 0.66, 0.58, 0.74),
    metric("reward", "longest_wins", 0.41, 0.33, 0.49),
    metric("reward", "spearman", -0.12, -0.3, 0.06),
    metric("reward", "pairwise_accuracy", 0.11, 0.1, 0.2, replies=3),
    *(
        metric("reward", "calibration", 0.3 + 0.2 * at, 0.2, 0.9, bin=1 + at, score=1.5 + at, people="place")
        for at in (0, 1)
    ),
]
SIDES = {"model": "runs/x/M1/model", "baseline": "base-model"}
MATCHES = [
    metric("head_to_head", "win_rate", 0.93, 0.9, 0.95, category="poems", **SIDES),
    *(
        metric("head_to_head", name, value, value - 0.05, value + 0.05, **SIDES)
        for name, value in (("win", 0.55), ("tie", 0.3), ("loss", 0.15), ("win_rate", 0.7), ("first_position", 0.52))
    ),
    metric("head_to_head", "length", 300.0, 280.0, 320.0, **SIDES),
    metric("head_to_head", "baseline_length", 200.0, 180.0, 220.0, **SIDES),
]
PLAYED = {
    "id": "h1", "prompt": "And?", "winner": "A", "verdicts": ["A", "B"], "model_a": "runs/x/M1/model",
    "model_b": "base-model", "response_a": "Mine.", "response_b": "Theirs.",
}  # fmt: skip
SFT_STEPS = [{"step": n, "loss": 2.0 / n, "learning_rate": 1e-5, "grad_norm": 1.0} for n in range(1, 31)]
DPO_STEPS = [{"step": n, "loss": 0.7 - 0.1 * n, "margin": 0.1 * n, "accuracy": 0.5, "novelty": 3} for n in (1, 2, 3)]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run to M2 with a file of every kind."""
    run = tmp_path / "mine"
    (run / ".settings").mkdir(parents=True)
    (run / ".settings" / "sample.json").write_text('{"command": "sample", "n": 4, "seed": 0, "model": null}')
    write_meta(write_rows_in(run / "eft.jsonl", []), "make-eft", counts(9, 21, {"tie": 2}))
    one, two = run / "M1", run / "M2"
    write_model(one, "sft", "base-model", SFT_STEPS)
    write_model(two, "dpo", "runs/x/M1/model", DPO_STEPS)
    write_meta(write_rows_in(one / "prompts.jsonl", []), "gen-prompts", counts(7, 2, {"near-duplicate": 4, "odd": 1}))
    write_meta(write_rows_in(one / "judged.jsonl", JUDGED), "judge", counts(4, 4, judgements=8, unparsed=1))
    write_meta(write_rows_in(one / "pairs.jsonl", [PAIR]), "make-pairs", counts(4, 1, {"tie": 1}, prompts=2))
    write_rows_in(one / "eval-health.jsonl", HEALTH)
    write_rows_in(one / "eval-reward.jsonl", REWARD)
    write_rows_in(one / "eval-head-to-head.jsonl", MATCHES)
    write_rows_in(one / "eval-matches.jsonl", [PLAYED])
    return run


def write_rows_in(path: Path, rows: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_rows(path, rows)


# --- reading a page --------------------------------------------------------------------------


class Reader(HTMLParser):
    """A page as open and closed tags, attributes, the text, and the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] and {"td", "th"} & set(self.open) and self.rows[-1:]:
            self.rows[-1][-1] += data

    def note(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def page_of(folder: Path, pairs: int = 5, seed: int = 0) -> str:
    return page.render(collect(folder, seed), pairs, seed)


def printed(folder: Path, srlm: Srlm, *args: str) -> str:
    done = srlm("report", str(folder), "--no-html", *args)
    assert done.code == 0, done.err
    return done.out


# --- the page itself -------------------------------------------------------------------------


def test_the_page_is_well_formed_and_its_ids_are_its_own(run_folder: Path) -> None:
    read = Reader(page_of(run_folder))
    ids = read.values("id")
    assert len(ids) == len(set(ids)) and {"judge", "models", "training", "pairs", "provenance"} <= set(ids)
    inside = {value[1:] for name in ("href", "xlink:href") for value in read.values(name)}
    assert inside <= set(ids)


def test_the_page_loads_nothing(run_folder: Path) -> None:
    html = page_of(run_folder)
    read = Reader(html)
    assert not read.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
    assert all(value.startswith("#") for name in ("href", "xlink:href", "src") for value in read.values(name))
    assert not any(name.startswith("on") or name in ("srcset", "action", "poster") for _, name, _ in read.attributes)
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html and "http" not in html.replace("http-equiv", "")
    assert any("default-src 'none'" in value for value in read.values("content"))


def test_every_colour_has_a_light_and_a_dark_value(run_folder: Path) -> None:
    html = page_of(run_folder)
    light, dark = (set(re.findall(r"--([a-z]+):", block)) for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL))
    used = set(re.findall(r"var\(--([a-z]+)\)", html))
    assert set(NAMES) <= light and light == dark and used <= light
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--own)" in drawn and not re.search(r"#[0-9a-f]{6}\b", drawn)


def test_foreign_text_is_shown_and_never_run(run_folder: Path) -> None:
    rows = [{**row, "prompt": HOSTILE, "judgements": [HOSTILE, "\x00\x1b[2J \ud800"]} for row in JUDGED]
    sides = {"chosen": HOSTILE, "rejected": HOSTILE}
    write_rows(run_folder / "M1" / "judged.jsonl", [json.dumps(row) for row in rows])
    write_rows(run_folder / "M1" / "pairs.jsonl", [{**PAIR, **sides, "prompt": HOSTILE}])
    write_rows(run_folder / "M1" / "eval-matches.jsonl", [{**PLAYED, "response_a": HOSTILE, "model_b": HOSTILE}])
    write_rows(
        run_folder / "M1" / "eval-head-to-head.jsonl",
        [{**row, "baseline": HOSTILE, **({"category": HOSTILE} if "category" in row else {})} for row in MATCHES],
    )
    write_meta(run_folder / "M1" / "prompts.jsonl", "gen-prompts", counts(3, 2, {HOSTILE: 1}))
    html = page_of(run_folder)
    read = Reader(html)
    assert not read.tags & {"script", "img"}
    assert read.text.count("<script>alert(1)</script><img src=") >= 7
    assert "\x1b" not in html and "\x00" not in html
    html.encode()


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(srlm: Srlm, run_folder: Path) -> None:
    pages = []
    for hash_seed in ("1", "2"):
        done = srlm("report", str(run_folder), "--html", f"{hash_seed}.html", env={"PYTHONHASHSEED": hash_seed})
        assert done.code == 0, done.err
        pages.append((srlm.folder / f"{hash_seed}.html").read_bytes())
    assert pages[0] == pages[1] and len(pages[0]) > 10_000


# --- what it says ----------------------------------------------------------------------------


def test_the_figures_are_those_of_the_files(run_folder: Path) -> None:
    read = Reader(page_of(run_folder))
    by_label = {row[0].split("\n")[0].strip().split(" n ")[0]: row for row in read.rows if row}
    cell = lambda label, at=1: " ".join(by_label[label][at].split())  # noqa: E731
    assert cell("parse rate") == "61% [50–70]"
    assert cell("commonest score") == "5: 75% [60–90]"
    assert cell("pairwise accuracy") == "64% [55–72]"
    assert cell("Spearman") == "−0.12 [−0.30 to +0.06]"
    assert cell("2 replies: pairwise accuracy") == "99.0% [98.0–100.0]"
    assert cell("win") == "55% [50–60]"
    assert cell("poems") == "93% [90–95]"
    assert "n 40" in " ".join(by_label["parse rate"][0].split())


def test_the_stages_are_shown_with_what_they_dropped(srlm: Srlm, run_folder: Path) -> None:
    read = Reader(page_of(run_folder))
    line = next(row for row in read.rows if len(row) == 7 and row[1].strip() == "prompts")
    assert [cell.strip() for cell in line[2:]] == ["7tries", "2prompts", "", "4 near-duplicate, 1 odd", "3 s"]
    assert re.search(r"prompts +7 +2 +4 near-duplicate, 1 odd +3 s", printed(run_folder, srlm))
    widths = [value for tag, name, value in read.attributes if tag == "i" and name == "style"]
    # M1 has at most 7 rows in a stage: prompts 2 kept and 5 dropped, judged 4, pairs 1 and 1
    assert widths[2:] == [f"width: {100 * part / 7:.1f}%" for part in (2, 5, 4, 0, 1, 1)]


def test_a_row_over_a_part_never_stands_for_the_whole(run_folder: Path) -> None:
    for rows in (REWARD, REWARD[::-1]):
        write_rows(run_folder / "M1" / "eval-reward.jsonl", rows)
        write_rows(run_folder / "M1" / "eval-head-to-head.jsonl", MATCHES if rows is REWARD else MATCHES[::-1])
        found = collect(run_folder).rounds[1]
        assert found.reward.value("pairwise_accuracy") == 0.637
        assert found.matches.value("win_rate") == 0.7
        assert found.health.row("top_score_share")["score"] == 5
        assert {row["replies"] for row in found.reward.parts["replies"]} == {2, 3}


def test_several_matches_of_a_round_keep_apart(run_folder: Path) -> None:
    other = [
        {**row, "baseline": "runs/x/M2/model"} | ({"value": 0.2} if row["metric"] == "win" else {}) for row in MATCHES
    ]
    third = [{**row, "model": "runs/x/M2/model"} for row in MATCHES]
    ratings = [metric("head_to_head", "bradley_terry", 35.0, -10.0, 80.0, model="runs/x/M1/model")]
    write_rows(run_folder / "M1" / "eval-head-to-head.jsonl", [*MATCHES, *other, *third, *ratings])
    run = collect(run_folder)
    table = tables.match_table(run)
    assert table.columns[1:] == ["M1 vs M0", "M1 vs M2", "M2 vs M0, by M1"]
    assert [cell.text for cell in table.rows[0][1:]] == ["55%", "20%", "55%"]
    assert [cell.text for cell in tables.rating_table(run).rows[0]] == ["M1", "+35"]


def test_an_unknown_metric_is_shown_by_its_name(run_folder: Path) -> None:
    write_rows(run_folder / "M1" / "eval-health.jsonl", [*HEALTH, metric("health", "new_one", 0.25, None, None)])
    row = next(row for row in tables.health_table(collect(run_folder)).rows if row[0].text == "new one")
    assert (row[1].text, row[1].interval) == ("0.25", "")


def test_metrics_of_an_earlier_version_are_shown_by_their_new_names(run_folder: Path) -> None:
    old, new = ("spread_within_k", "finished"), ("score_std_within_k", "forced_score_rate")
    pages = []
    for names in (old, new):
        rows = [metric("health", name, 0.25, 0.2, 0.3) for name in names]
        write_rows(run_folder / "M1" / "eval-health.jsonl", [*HEALTH, *rows])
        pages.append(page_of(run_folder))
    assert pages[0] == pages[1] and "std within K" in pages[0] and "forced scores" in pages[0]


def test_a_run_that_did_not_measure_its_judge_is_measured(run_folder: Path) -> None:
    """By hand: 7 of 8 judgements have a score; p2 is all tied; gaps 3 and 0; lengths 30, 10, 20, 20."""
    (run_folder / "M1" / "eval-health.jsonl").unlink()
    health = collect(run_folder).rounds[1].health
    expected = {"parse_rate": 7 / 8, "tied_prompts": 1 / 2, "gap": 1.5, "mean_score": 11 / 4, "length": 20.0}
    assert {name: health.value(name) for name in expected} == pytest.approx(expected)
    shares = tables.score_shares(collect(run_folder).rounds[1])
    assert shares == pytest.approx({0: 0, 1: 1 / 7, 2: 3 / 7, 3: 1 / 7, 4: 0, 5: 2 / 7})


def test_what_was_measured_is_not_measured_again(run_folder: Path) -> None:
    assert collect(run_folder).rounds[1].health.value("parse_rate") == 0.61  # the judged file says 7/8


def test_settings_and_provenance_are_all_there(srlm: Srlm, run_folder: Path) -> None:
    text = Reader(page_of(run_folder)).text
    for words_ in (
        "srlm gen-prompts --out prompts.jsonl",
        "srlm dpo --model runs/x/M1/model",
        "from.fingerprint",
        "f00d",
    ):
        assert words_ in text
    assert "sample: n 4, seed 0" in printed(run_folder, srlm)


def test_the_terminal_shows_the_same(srlm: Srlm, run_folder: Path) -> None:
    out = printed(run_folder, srlm)
    for line in (
        r"parse rate +61% \[50–70\] +judgements whose score",
        r"scores 0 to 5 +▃    █  25 0 0 0 0 75",
        r"pairwise accuracy +64% \[55–72\]",
        r"M1 +sft +64% \[55–72\] +41% \[33–49\] +M0 +55% / 30% / 15% +70% \[65–75\] +300 \(×1.50 !\) \[280–320\] +1",
        r"M1 +sft +13 +11 +2 too long, 30 steps, loss 0.750 to 0.500",
        r"chosen +5.00  x{30}",
    ):
        assert re.search(line, out), line
    assert "\x1b" not in out


def test_the_terminal_is_not_moved_by_foreign_text(srlm: Srlm, run_folder: Path) -> None:
    write_rows(run_folder / "M1" / "pairs.jsonl", [json.dumps({**PAIR, "chosen": "a\x1b[2Jb \ud800 [red]c"})])
    write_meta(run_folder / "M1" / "prompts.jsonl", "gen-prompts", counts(3, 2, {"odd\x1b[1A": 1}))
    out = printed(run_folder, srlm)
    assert "\x1b" not in out and "[red]c" in out


# --- findings --------------------------------------------------------------------------------


def found_in(run_folder: Path, reward: list[Record] = (), matches: list[Record] = ()) -> str:
    write_rows(run_folder / "M1" / "eval-reward.jsonl", reward)
    write_rows(run_folder / "M1" / "eval-head-to-head.jsonl", matches)
    return "\n".join(findings(collect(run_folder)))


def test_findings_follow_the_intervals(run_folder: Path) -> None:
    half = "pairwise_accuracy_ties_half"
    assert found_in(run_folder, [metric("reward", half, 0.6, 0.51, 0.7)]) == ""
    assert "are not distinguishable from chance" in found_in(run_folder, [metric("reward", half, 0.6, 0.49, 0.7)])
    assert "against people" in found_in(run_folder, [metric("reward", half, 0.4, 0.3, 0.49)])
    win = lambda low, high: metric("head_to_head", "win_rate", (low + high) / 2, low, high, **SIDES)  # noqa: E731
    assert "Better than the previous model (win rate): M1 vs M0 60% [55–65]." in found_in(
        run_folder, [], [win(0.55, 0.65)]
    )
    assert "Worse" in found_in(run_folder, [], [win(0.35, 0.45)])
    assert "Not distinguishable" in found_in(run_folder, [], [win(0.45, 0.55)])
    one_prompt = (
        [metric("reward", half, 0.0, None, None)],
        [metric("head_to_head", "win_rate", 1.0, None, None, **SIDES)],
    )
    assert found_in(run_folder, *one_prompt) == ""


def test_findings_name_length_and_position(run_folder: Path) -> None:
    lines = found_in(run_folder, REWARD, MATCHES)
    assert "Longer replies than the previous model (characters): M1 300 against 200." in lines
    assert "longest reply wins" not in lines and "shown first" not in lines
    biased = [metric("head_to_head", "first_position", 0.2, 0.1, 0.3, **SIDES)]
    longest = [metric("reward", "pairwise_accuracy", 0.3, 0.2, 0.4), metric("reward", "longest_wins", 0.5, 0.4, 0.6)]
    lines = found_in(run_folder, longest, biased)
    assert "prefer the reply shown second: M1 80% of its verdicts." in lines
    assert "than the judge: M1 50% against 30%." in lines


def test_probes_are_shown_by_round(run_folder: Path, srlm: Srlm) -> None:
    rows = [metric("probe", "changed_wins", 0.25, 0.1, 0.4, probe="score-stuffed")]
    write_rows(run_folder / "M1" / "eval-probe.jsonl", [*rows, metric("probe", "changed_wins", 0.5, 0.4, 0.6)])
    assert "score-stuffed" in page_of(run_folder) and "Probes of the judge" in page_of(run_folder)
    assert "score-stuffed" in srlm("report", run_folder).out


def test_the_calibration_is_shown_by_bin(run_folder: Path, srlm: Srlm) -> None:
    rows = Reader(page_of(run_folder)).rows
    assert any(row[0].startswith("bin 2") and row[1] == "2.5: 50% [20–90]" for row in rows)
    out = printed(run_folder, srlm)
    assert "Calibration of the judge" in out and "1.5: 30% [20–90]" in out and "people rank lower" in out
    scored = [{**row, "people": "score", "value": 3.25, "ci_high": 4} for row in REWARD if "bin" in row]
    write_rows(run_folder / "M1" / "eval-reward.jsonl", scored)
    assert "2.5: 3.25 [0.20–4.00]" in printed(run_folder, srlm)
    assert plots.calibration_plot(collect(run_folder)).startswith("<svg ")


# --- what may be missing ---------------------------------------------------------------------


def kept(value: float, low: float, high: float, length: float) -> list[Record]:
    return [
        metric("rules", "rules_kept", 0.25, 0.2, 0.3, rule="words"),
        metric("rules", "rules_kept", value, low, high),
        metric("rules", "all_rules_kept", 0.125, 0.1, 0.2),
        metric("rules", "length", length, length - 1, length + 1),
    ]


def test_the_rules_kept_are_shown_by_round(srlm: Srlm, run_folder: Path) -> None:
    assert "Rules kept on held-out prompts" not in printed(run_folder, srlm)
    (run_folder / "M1" / "eval-head-to-head.jsonl").unlink()
    write_rows(run_folder / "M1" / "eval-rules.jsonl", kept(0.375, 0.3, 0.44, 60))
    write_rows(run_folder / "M2" / "eval-rules.jsonl", kept(0.625, 0.5, 0.7, 45))
    rows = Reader(page_of(run_folder)).rows
    assert [row[0].split(" n ")[0] for row in rows if row[1:3] == ["38% [30–44]", "62% [50–70]"]]
    assert any(row[0].startswith("words") and row[1] == "25% [20–30]" for row in rows)
    out = printed(run_folder, srlm)
    assert "Rules kept on held-out prompts" in out and "×0.75 !" in out
    lines = "\n".join(findings(collect(run_folder)))
    assert "More rules kept than by the previous model (held-out prompts): M2 62% against 38%." in lines
    assert "changed by more than a fifth; read the other figures with this in mind: M2 ×0.75 of M1." in lines


def test_a_length_within_a_fifth_is_not_marked(run_folder: Path) -> None:
    (run_folder / "M1" / "eval-head-to-head.jsonl").unlink()
    lengths = (50.0, 60.0, 52.0, 61.0)  # M1 to M4: no step above a fifth; M4 is ×1.22 of M1
    for at, length in enumerate(lengths, 1):
        (run_folder / f"M{at}").mkdir(exist_ok=True)
        write_rows(run_folder / f"M{at}" / "eval-rules.jsonl", kept(0.5, 0.4, 0.6, length))
    lines = "\n".join(findings(collect(run_folder)))
    assert "with this in mind: M4 ×1.22 of M1." in lines
    assert "not distinguishable from the previous model (held-out prompts): M2 50% against 50%, M3" in lines


def test_a_control_is_named(run_folder: Path) -> None:
    assert "A control" not in "\n".join(findings(collect(run_folder)))
    write_rows(run_folder / "M2" / "pairs.jsonl", [{**PAIR, "shuffled_labels": "kept"}])
    assert "A control: chosen and rejected dealt at random (--shuffle-labels): M2, 1 of 1 pairs." in findings(
        collect(run_folder)
    )


@pytest.mark.parametrize("of_a_name", ["one", pytest.param("all", marks=pytest.mark.slow)])
def test_every_file_may_be_missing(of_a_name: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each name, with figures that are painted but not laid out and written, or all of them as they are."""
    if of_a_name == "one":
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write("<svg></svg>"))
    files = [path for path in sorted(run_folder.rglob("*")) if path.is_file()]
    assert len(files) > 15
    last = {path.name: path for path in files}
    for path in last.values() if of_a_name == "one" else files:
        kept = path.read_bytes()
        path.unlink()
        Reader(page_of(run_folder))
        path.write_bytes(kept)
    for path in files:
        path.unlink()
    assert "Nothing has been judged yet" in page_of(run_folder)


def test_a_run_with_eft_only_is_shown(srlm: Srlm, tmp_path: Path) -> None:
    run = tmp_path / "young"
    write_meta(write_rows_in(run / "eft.jsonl", []), "make-eft", counts(9, 21, {"tie": 2}))
    assert re.search(r"M0 +eft +9 +21 +2 tie", printed(run, srlm))


def test_the_judgements_that_were_compared_are_a_stage(srlm: Srlm, run_folder: Path) -> None:
    write_meta(
        write_rows_in(run_folder / "M1" / "meta.jsonl", []), "judge", counts(24, 6, {"another reply varies more": 18})
    )
    write_meta(write_rows_in(run_folder / "M1" / "judge-pairs.jsonl", []), "make-pairs", counts(6, 4, {"tie": 2}))
    text = printed(run_folder, srlm)
    assert re.search(r"M1 +meta +24 +6 +18 another reply varies more", text)
    assert re.search(r"M1 +judge-pairs +6 +4 +2 tie", text)


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [
        (["judged.jsonl"], []),
        (["pairs.jsonl"], ["pairs"]),
        (["pairs.jsonl", "judge-pairs.jsonl"], ["pairs", "meta", "judge-pairs"]),
        (["better.jsonl"], ["pairs", "meta", "judge-pairs"]),
        ([], ["pairs", "meta", "judge-pairs"]),
    ],
)
def test_pairs_of_other_settings_that_no_training_read_are_left_out(
    srlm: Srlm, run_folder: Path, inputs: list[str], shown: list[str]
) -> None:
    """METHOD=kto reads judged replies, META=0 no pairs of judgements; a file of another name tells nothing."""
    one, trained = run_folder / "M1", run_folder / "M2" / "model" / "provenance.json"
    for name in ("meta", "judge-pairs"):
        write_meta(write_rows_in(one / f"{name}.jsonl", []), "make-pairs", counts(6, 4))
    read = {f"runs/x/M1/{name}": "f00d" for name in inputs}
    trained.write_text(json.dumps({**read_json(trained), "inputs": read}))
    run = collect(run_folder)
    assert [stage for stage in run.rounds[1].stages if stage not in ("prompts", "judged")] == shown
    assert bool(run.rounds[1].pairs) == bool(sample_pairs(run.rounds[1], 5, 0)) == ("pairs" in shown)
    assert bool(re.search("M1 +pairs ", printed(run_folder, srlm))) == ("pairs" in shown)


def test_what_is_not_finished_is_named(srlm: Srlm, run_folder: Path) -> None:
    (run_folder / "M2" / "model.part").mkdir()
    part = write_rows(run_folder / "M2" / "responses.jsonl.part", [{"id": "torn"}])
    part.with_name(f"{part.name}.meta.json").write_text('{"fingerprint": {}, "checkpoint": {"kept": 17}}')
    write_rows(run_folder / "M2" / "eval-health.jsonl.part", HEALTH)
    for text in (Reader(page_of(run_folder)).text, printed(run_folder, srlm)):
        assert "M2/model is not finished" in text
        assert "M2/responses.jsonl is not finished, 17 rows so far" in text
        assert "M2/eval-health.jsonl was held back: a guard stopped the loop here" in text


def test_a_folder_that_is_no_run_is_refused(srlm: Srlm, tmp_path: Path) -> None:
    (tmp_path / "M").mkdir()
    with pytest.raises(OptionError, match="is not a run folder"):
        collect(tmp_path)
    done = srlm("report", "nowhere")
    assert done.code == 2 and "is not a run folder" in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text", "words_"),
    [
        ("eval-reward.jsonl", '{"metric": "win"}\n{"value": 3}\n', "eval-reward.jsonl:2: expected a metric row"),
        ("eval-health.jsonl", '{"metric": "x", "value": "high"}\n', "eval-health.jsonl:1: expected a metric row"),
        ("pairs.jsonl", "{\n", "pairs.jsonl:1: not JSON"),
        ("model/provenance.json", "{", "provenance.json: not JSON"),
        ("model/provenance.json", "[]", "provenance.json: expected a JSON object"),
        ("model/metrics.jsonl", "{\n", "metrics.jsonl: not JSON"),
    ],
)
def test_a_broken_file_is_named(run_folder: Path, name: str, text: str, words_: str) -> None:
    (run_folder / "M1" / name).write_text(text)
    with pytest.raises(DataError) as caught:
        collect(run_folder)
    assert words_ in str(caught.value)


# --- samples ---------------------------------------------------------------------------------


def many_pairs(folder: Path, count: int = 20) -> Run:
    pairs = [{**PAIR, "id": f"q{n}", "prompt_id": f"q{n}", "prompt": f"What of {n}?"} for n in range(count)]
    write_rows(folder / "M1" / "pairs.jsonl", pairs)
    return collect(folder)


def drawn(run: Run, count: int, seed: int = 0) -> list[str]:
    return [sample.id for sample in sample_pairs(run.rounds[1], count, seed)]


def test_pairs_are_drawn_by_seed_and_id(run_folder: Path) -> None:
    run = many_pairs(run_folder)
    assert len(drawn(run, 5)) == 5 and drawn(run, 5) == drawn(run, 5) != drawn(run, 5, seed=1)
    assert set(drawn(run, 5)) < set(drawn(run, 9))
    before = set(drawn(run, 5))
    lines = (run_folder / "M1" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "M1" / "pairs.jsonl").write_text("".join(lines[::-1]))
    assert set(drawn(run, 5)) == before
    assert len(drawn(run, 99)) == 20 and drawn(run, 0) == []


def test_a_pair_has_the_judgements_of_both_replies(run_folder: Path) -> None:
    (sample,) = sample_pairs(collect(run_folder).rounds[1], 5, 0)
    assert [(side.label, side.score, [one["score"] for one in side.judgements]) for side in sample.sides] == [
        ("chosen", 5.0, [5, 5]),
        ("rejected", 2.0, [3, 1]),
    ]
    assert sample.sides[0].judgements[1]["text"] == "I say.\nScore: 5"


def test_a_reply_of_an_earlier_model_has_no_judgements_of_its_namesake(run_folder: Path) -> None:
    other = [{"role": "assistant", "content": "What an earlier model said."}]
    write_rows(run_folder / "M1" / "pairs.jsonl", [{**PAIR, "rejected": other}])
    (sample,) = sample_pairs(collect(run_folder).rounds[1], 5, 0)
    assert [len(side.judgements) for side in sample.sides] == [2, 0] and sample.sides[1].score == 2.0


def test_pairs_of_texts_without_scores_are_shown(run_folder: Path) -> None:
    write_rows(run_folder / "M1" / "pairs.jsonl", [{"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}])
    read = Reader(page_of(run_folder))
    assert "Yes." in read.text and collect(run_folder).rounds[1].pairs["gap"] is None


def test_a_match_names_both_verdicts(run_folder: Path) -> None:
    run = collect(run_folder)
    (sample,) = sample_matches(run, run.rounds[1], 5, 0)
    assert sample.verdict == "M1 wins; M1 shown first: M1 better; M0 shown first: M1 better"
    assert [side.label for side in sample.sides] == ["M1", "M0"]


def test_the_number_of_pairs_is_an_option(srlm: Srlm, run_folder: Path) -> None:
    many_pairs(run_folder)
    done = srlm("report", str(run_folder), "--html", "-", "--pairs", "3")
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("<!doctype html>") and done.out.rstrip().endswith("</html>")
    assert len(re.findall(r'<article class="sample">', done.out)) == 3 + 1  # and the one match


# --- plots -----------------------------------------------------------------------------------


def test_each_plot_is_there_when_its_data_are(run_folder: Path) -> None:
    write_rows(run_folder / "M1" / "eval-rules.jsonl", kept(0.5, 0.4, 0.6, 50))
    run = collect(run_folder)
    for name in page.PLOTS:
        assert getattr(plots, f"{name}_plot")(run).startswith("<svg ")
    assert re.findall(r'aria-label="([^"]*)"', "".join(plots.curve_plots(run))) == [
        "SFT loss", "DPO loss", "DPO reward margin", "DPO pairs with a margin above 0", "SFT gradient norm",
    ]  # fmt: skip
    empty = Run("none", [], {}, [])
    assert plots.curve_plots(empty) == [] and all(getattr(plots, f"{name}_plot")(empty) == "" for name in page.PLOTS)


def test_a_model_that_was_trained_without_pairs_has_its_plots(run_folder: Path) -> None:
    model = run_folder / "M2" / "model"
    (model / "provenance.json").write_text(json.dumps({**read_json(model / "provenance.json"), "command": "kto"}))
    write_rows(model / "metrics.jsonl", [{"step": n, "loss": 0.5, "margin": 0.1 * n, "kl": 0.2} for n in (1, 2)])
    titles = re.findall(r'aria-label="([^"]*)"', "".join(plots.curve_plots(collect(run_folder))))
    assert [title for title in titles if title.startswith("KTO")] == [
        "KTO loss", "KTO reward margin", "KTO estimate of the KL divergence"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("starts", "level"), [((0.6931, 0.6931), 0.693), ((1.0,), 1.0), ((0.6931, 1.0), None), ((), None)]
)
def test_the_line_of_the_loss_at_the_start_is_that_of_the_losses(starts, level) -> None:
    trained = [SimpleNamespace(training={"command": "dpo", "start": {"loss": loss}}) for loss in starts]
    trained += [SimpleNamespace(training={"command": "sft"}), SimpleNamespace(training={"command": "dpo"})]
    assert plots.level_at_start(trained) == level


def test_a_step_that_is_no_number_is_no_point(run_folder: Path) -> None:
    lines = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": null}\n{"step": 4, "loss": 1.5}\n'
    (run_folder / "M1" / "model" / "metrics.jsonl").write_text(lines)
    assert plots.curve(collect(run_folder).rounds[1], "loss") == [(1, 2.0), (4, 1.5)]


def test_accuracy_is_drawn_in_per_cent(run_folder: Path) -> None:
    assert plots.curve(collect(run_folder).rounds[2], "accuracy") == [(1, 50.0), (2, 50.0), (3, 50.0)]


def test_scores_of_another_scale_have_bars_too(run_folder: Path) -> None:
    write_rows(
        run_folder / "M1" / "eval-health.jsonl", [metric("health", "share_of_score", 0.4, 0, 1, score=9), *HEALTH]
    )
    svg = plots.score_plot(collect(run_folder))
    assert ">9</text>" in svg and ">40</text>" in svg


def test_a_dollar_sign_is_no_formula(run_folder: Path) -> None:
    rows = [{**row, "baseline": "model $x_1$"} for row in MATCHES]
    write_rows(run_folder / "M1" / "eval-head-to-head.jsonl", rows)
    assert ">M1 vs model $x_1$</text>" in plots.match_plot(collect(run_folder))


def test_the_running_mean_by_hand() -> None:
    assert plots.running_mean([0, 3, 6, 9], 3) == [1.5, 3.0, 6.0, 7.5]
    assert plots.running_mean([4, 2], 0) == [4, 2]


def test_names_that_would_touch_are_moved_apart() -> None:
    assert spread([0.2, 0.9], 0.1) == [0.2, 0.9]
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    moved = spread([0.5, 0.52, 0.1, 0.51], 0.1)
    assert moved[2] == 0.1 and moved[0] < moved[3] < moved[1]
    assert min(b - a for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False)) >= 0.1 - 1e-6


@pytest.mark.parametrize(
    ("row", "kind", "text"),
    [
        ((0.4237, 0.31, 0.53), words.SHARE, "42% [31–53]"),
        ((0.9981, 0.99, 1.0), words.SHARE, "99.8% [99.0–100.0]"),
        ((None, None, None), words.SHARE, "–"),
        ((0.5, None, None), words.SHARE, "50%"),
        ((2.654, 2.0, 3.0), words.NUMBER, "2.65 [2.00–3.00]"),
        ((-0.04, -0.32, 0.25), words.SIGNED, "−0.04 [−0.32 to +0.25]"),
        ((1.18, 0.93, 1.53), words.RATIO, "×1.18 [0.93–1.53]"),
        ((251.6, 208.2, 294.4), words.LENGTH, "252 [208–294]"),
    ],
)
def test_figures_are_written_as_people_read_them(row: tuple, kind: str, text: str) -> None:
    value, low, high = row
    assert words.with_interval({"value": value, "ci_low": low, "ci_high": high}, kind) == text


# --- where the page goes ---------------------------------------------------------------------


def test_the_page_stands_in_the_run_unless_told_otherwise(srlm: Srlm, run_folder: Path) -> None:
    done = srlm("report", str(run_folder))
    assert done.code == 0 and "The judge of each round" in done.out
    assert done.err == f"srlm report: {run_folder}/report.html shows the same with plots\n"
    assert (run_folder / "report.html").read_text().startswith("<!doctype html>")
    before = sorted(run_folder.iterdir())
    assert srlm("report", str(run_folder), "--html", "new/place.html", "--quiet").err == ""
    assert (srlm.folder / "new" / "place.html").read_bytes() == (run_folder / "report.html").read_bytes()
    assert sorted(run_folder.iterdir()) == before


def test_without_a_page_nothing_is_written(srlm: Srlm, run_folder: Path) -> None:
    before = sorted(run_folder.rglob("*"))
    done = srlm("report", str(run_folder), "--no-html")
    assert (done.code, done.err) == (0, "") and sorted(run_folder.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_one_line_behind_the_tables(srlm: Srlm, run_folder: Path) -> None:
    (srlm.folder / "file").write_text("")
    done = srlm("report", str(run_folder), "--html", "file/page.html")
    assert done.code == 1 and "The judge of each round" in done.out
    assert len(done.err.splitlines()) == 1 and "file/page.html: " in done.err and "--no-html" in done.err


def test_a_file_that_is_no_page_is_spared(srlm: Srlm, run_folder: Path) -> None:
    pairs = run_folder / "M1" / "pairs.jsonl"
    before = pairs.read_bytes()
    done = srlm("report", str(run_folder), "--html", str(pairs))
    assert done.code == 2 and "not a page made by srlm" in done.err and pairs.read_bytes() == before
    done = srlm("report", str(run_folder), "--html", str(run_folder))
    assert done.code == 2 and "is a folder" in done.err


def test_an_older_page_is_replaced_through_a_link(srlm: Srlm, run_folder: Path) -> None:
    (srlm.folder / "real.html").write_text("<!doctype html>old")
    (srlm.folder / "link.html").symlink_to("real.html")
    assert srlm("report", str(run_folder), "--html", "link.html").code == 0
    assert (srlm.folder / "link.html").is_symlink() and "old" not in (srlm.folder / "real.html").read_text()[:40]


def test_figures_stay_whole_in_a_narrow_terminal() -> None:
    from rich.console import Console

    from srlm_cli.report.tables import Cell, Table
    from srlm_cli.report.terminal import grid

    figure = Cell("2.057", "1.99–2.12")
    rows = [[Cell(name, note="how to read this line of the table"), figure, figure] for name in ("loss", "rate")]
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(grid(Table("Training", "", ["", "M1", "M2"], rows)))
    assert console.export_text().count("2.057 [1.99–2.12]") == 4


# --- a round in parts ------------------------------------------------------------------------


def test_a_round_in_parts_is_shown_as_one(run_folder: Path) -> None:
    """Rows, steps and seconds are summed; files of parts that the run no longer has are left out."""
    one = run_folder / "M1"
    (run_folder / ".settings" / "SMALL.json").write_text('{"name": "SMALL", "value": "2"}')
    (one / "judged.jsonl.meta.json").unlink()
    for k in (1, 2, 3):
        part = one / f"part-{k}"
        write_model(part, "dpo", "runs/x/M1/model", DPO_STEPS)
        write_meta(write_rows_in(part / "judged.jsonl", []), "judge", counts(4 * k, 3 * k, {"tie": k}, judgements=8))
    (one / "part-2" / "pairs.jsonl.part").touch()
    run = collect(run_folder)
    assert [found.name for found in run.rounds] == ["M0", "M1", "M2"]
    shown = run.rounds[1].stages["judged"]
    assert (shown["read"], shown["kept"], shown["dropped"], shown["seconds"]) == (12, 9, {"tie": 3}, 6.0)
    assert shown["counts"] == {"judgements": 16, "parts": 2}
    made = run.rounds[2].training
    assert (made["steps"], made["data"]["rows"], made["seconds"], made["parts"]) == (6, 22, 60.0, 2)
    assert made["from"]["model"] == "runs/x/M1/model" and made["first_loss"] == 0.75
    assert [row["step"] for row in run.rounds[2].steps] == [1, 2, 3, 4, 5, 6]
    assert any(line.startswith("M1/part-2/pairs.jsonl is not finished") for line in run.unfinished)
    rows = [[cell.text for cell in row] for row in tables.stage_table(run).rows]
    assert ["M1", "judged", "12", "9", "3 tie, 2 parts", "6 s"] in rows
    assert rows[-1][:4] == ["M2", "dpo", "26", "22"] and "6 steps, 2 parts" in rows[-1][4]
    assert {"part-1/judged.jsonl", "part-2/judged.jsonl"} <= run.rounds[1].files.keys()
