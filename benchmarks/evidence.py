"""Does a judge that is shown passages know right replies from wrong ones, where the same judge without them cannot?

python benchmarks/evidence.py [--model M] [--template T] [--train N] [--test N] [--passages N] [--seed N] [--folder D]

All places are invented, so no model can know the facts about them; no place of the test is in the training data. A
question has one right reply and two wrong ones, which are right for other places. The same model is trained on scores
without reasons (`make-eft --method hindsight --reason none`), with passages and without, and measured before and after.
The index has N passages: facts about all places. In a second index the facts of the test are missing. Steps that are
done are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

from paths import made_folder

SYLLABLES = "ba dor el fi gan hul is ka lor mi nar ol pe qua ri sen tal ur ve wyn xo yar zim".split()
KINDS = {  # the question, the passage
    "capital": ("What is the capital of {e}?", "The capital of {e} is {v}."),
    "founder": ("Who founded {e}?", "{e} was founded by {v}."),
    "river": ("Which river flows through {e}?", "The river that flows through {e} is called {v}."),
    "year": ("In which year was {e} founded?", "The founding year of {e} was {v}."),
    "crop": ("What grows best in {e}?", "In the fields of {e}, {v} grows best."),
}
CROPS = (
    "barley oats rye wheat maize rice millet flax hemp hops lentils beans peas beets turnips onions grapes figs".split()
)
FORMS = ("{v}.", "The answer is {v}.", "It is {v}.", "I believe that it is {v}, if I remember rightly.")
TRAINING = "--learning-rate 1e-4 --final-learning-rate 4e-5 --train-batch-size 4 --warmup-steps 4".split()


def invented(draw: Random, count: int) -> list[str]:
    """Return names that differ from each other."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(SYLLABLES, k=draw.choice((3, 4)))).capitalize()] = None
    return list(names)


def facts_of(places: list[str], draw: Random) -> list[dict[str, str]]:
    """Return one fact of each kind about each place."""
    values = {
        "capital": invented(draw, len(places)),
        "founder": [f"{a} {b}" for a, b in zip(invented(draw, len(places)), invented(draw, len(places)), strict=True)],
        "river": invented(draw, len(places)),
        "year": [str(draw.randint(900, 1899)) for _ in places],
        "crop": draw.choices(CROPS, k=len(places)),
    }
    return [
        {"place": place, "kind": kind, "value": values[kind][at], "question": asked.format(e=place),
         "text": told.format(e=place, v=values[kind][at])}
        for at, place in enumerate(places) for kind, (asked, told) in KINDS.items()
    ]  # fmt: skip


def ranked(facts: list[dict[str, str]], everything: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a ranked row per fact: the right reply and two wrong ones, in the same forms, in any order."""
    rows = []
    for fact in facts:
        draw = Random(fact["question"])
        others = [one["value"] for one in draw.sample(everything, 60) if one["kind"] == fact["kind"]]
        wrong = [value for value in dict.fromkeys(others) if value != fact["value"]][:2]
        replies = [
            {"text": draw.choice(FORMS).format(v=value), "score": 5 * (value == fact["value"])}
            for value in (fact["value"], *wrong)
        ]
        draw.shuffle(replies)
        rows.append({"prompt": fact["question"], "responses": replies})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def srlm(folder: Path, out: str, *argv: str) -> None:
    """Run a command that makes `out`, unless it is there."""
    if (folder / out).exists():
        return
    started = time.monotonic()
    command = [sys.executable, "-m", "srlm_cli", *argv, "--out", out, "--config", "", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    print(f"  {argv[0]:10} {out:28} {time.monotonic() - started:6.0f} s", flush=True)


def agreement(path: Path) -> tuple[float, int, float]:
    """Return the share of pairs with the right reply above (a tie is half), their number, and the mean gap."""
    groups = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        groups[row["prompt_id"]].append(row)
    gaps = [
        right["score"] - wrong["score"]
        for rows in groups.values()
        for right in rows
        for wrong in rows
        if right["human"] > wrong["human"] and None not in (right["score"], wrong["score"])
    ]
    if not gaps:
        sys.exit(f"{path}: no pair of replies has two scores")
    return fmean((gap > 0) + (gap == 0) / 2 for gap in gaps), len(gaps), fmean(map(abs, gaps))


def search_times(index: Path, facts: list[dict[str, str]]) -> tuple[float, float]:
    """Return the median processor time of a query in milliseconds, and the share whose passage is among three."""
    from srlm_cli.evidence.search import Corpus

    corpus, times, right = Corpus(str(index)), [], 0
    for fact in facts:
        started = time.process_time()
        found = corpus.search(fact["question"], 3)
        times.append(time.process_time() - started)
        right += fact["text"] in [passage.text for passage in found]
    return 1000 * median(times), right / len(facts)


def main() -> None:
    """Make the data, train and measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--train", type=int, default=240, help="questions")
    parser.add_argument("--test", type=int, default=150, help="questions")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--template", default="evidence_score_only", help="of the judge with passages")
    parser.add_argument("--folder", type=made_folder, default="runs/evidence")
    options = parser.parse_args()
    folder = options.folder
    draw = Random(options.seed)
    places = invented(draw, options.passages // len(KINDS))
    facts = facts_of(places, draw)
    tested = set(places[: len(places) // 3])
    test = draw.sample([fact for fact in facts if fact["place"] in tested], options.test)
    train = draw.sample([fact for fact in facts if fact["place"] not in tested], options.train)
    answers = {fact["text"] for fact in test}
    for name, some in (("all", facts), ("without", [fact for fact in facts if fact["text"] not in answers])):
        if not (folder / f"{name}.db").exists():
            write(folder / f"{name}.jsonl", [{"id": str(at), "text": fact["text"]} for at, fact in enumerate(some)])
        srlm(folder, f"{name}.db", "index", "--in", f"{name}.jsonl")
    write(folder / "train.jsonl", ranked(train, facts))
    write(folder / "test.jsonl", ranked(test, facts))
    template = str(Path(options.template).resolve()) if Path(options.template).exists() else options.template
    shown = {
        "evidence": ("--template", template, "--evidence", "all.db"),
        "closed": ("--template", "score_only"),
    }
    scored = ("--reason", "none", "--scale", "linear", "--score-low", "0", "--score-high", "5", "--max-share", "1")
    judge = ("judge", "--in", "test.jsonl", "--score", "expected")
    lines = []
    for arm, how in shown.items():
        srlm(folder, f"{arm}-m0.jsonl", *judge, "--model", options.model, *how)
        srlm(folder, f"{arm}-eft.jsonl", "make-eft", "--in", "train.jsonl", "--method", "hindsight", *scored, *how)
        training = ("--model", options.model, *TRAINING, "--max-length", "512", "--seed", str(options.seed))
        srlm(folder, f"{arm}-M1", "sft", "--in", f"{arm}-eft.jsonl", *training)
        srlm(folder, f"{arm}-m1.jsonl", *judge, "--model", f"{arm}-M1", *how)
        lines += [(f"{arm}, M0", f"{arm}-m0.jsonl"), (f"{arm}, M1", f"{arm}-m1.jsonl")]
    gone = (*shown["evidence"][:-1], "without.db")
    srlm(folder, "without-m1.jsonl", *judge, "--model", "evidence-M1", *gone)
    lines.append(("evidence without the answer, M1", "without-m1.jsonl"))
    print(f"{len(facts)} passages; {options.train} questions to train on, {options.test} to measure on")
    for name, path in lines:
        share, pairs, gap = agreement(folder / path)
        print(f"{name:32} {share:6.1%} of {pairs} pairs, mean gap of the scores {gap:.2f}")
    middle, found = search_times(folder / "all.db", test)
    print(f"a query: median {middle:.2f} ms of processor time, the right passage among three for {found:.1%}")


if __name__ == "__main__":
    main()
