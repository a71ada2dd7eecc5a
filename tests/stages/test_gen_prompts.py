"""New prompts: 8-shot requests, Self-Instruct's filters, no near-duplicates, a bounded number of tries."""

from __future__ import annotations

import random
import re
import unicodedata

import pytest
from rapidfuzz.distance import LCSseq

from helpers import ListEngine, Srlm, as_lines, asked_text, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Sampling
from srlm_cli.records import prompt_record
from srlm_cli.stages.gen_prompts import GenPromptsOptions, NearDuplicates, clean, fault, gen_prompts
from srlm_cli.stages.words import length, words_of

FORM = templates.load("new_prompt", fields={"tasks"})
SEEDS = [prompt_record({"prompt": f"Seed number {n} asks about {'abcdefghij'[n] * 5}"}) for n in range(10)]


def options(count: int = 3, **more) -> GenPromptsOptions:
    return GenPromptsOptions(
        **{"count": count, "max_tries": 100, "template": FORM, "sampling": Sampling(), "seed": 0, **more}
    )


def distinct(count: int) -> list[str]:
    """Return prompts that have no word in common."""
    return [" ".join(f"w{n}x{k}" for k in range(6)) for n in range(count)]


def outcomes(texts: list[str], **more) -> list:
    return list(gen_prompts(SEEDS, ListEngine([[text] for text in texts]), options(**more)))


def test_count_is_how_many_are_kept() -> None:
    made = outcomes(
        ["too short", *distinct(2), "one image of a cat", distinct(3)[2], "never asked for"], prompt_batch_size=1
    )
    assert [row["prompt"] for outcome in made for row in outcome.rows] == distinct(3)
    assert [dict(outcome.dropped) for outcome in made] == [{"too short: 2 words": 1}, {}, {}, {"keyword: image": 1}, {}]
    assert all(outcome.read == 1 for outcome in made)


def test_a_kept_prompt_says_where_it_comes_from() -> None:
    [outcome] = outcomes(distinct(1), count=1)
    [row] = outcome.rows
    assert (row["source"], row["model"], row["try"]) == ("generated", "fake", 0)
    assert row["id"] == prompt_record({"prompt": row["prompt"]})["id"]


def test_tries_are_bounded() -> None:
    engine = ListEngine([["no"]] * 100)
    made = list(gen_prompts(SEEDS, engine, options(count=3, max_tries=7, prompt_batch_size=4)))
    assert len(made) == len(engine.asked) == 7
    assert sum(outcome.dropped["too short: 1 word"] for outcome in made) == 7


def test_eight_shots_six_seeds_and_two_of_its_own() -> None:
    engine = ListEngine([[text] for text in distinct(30)])
    list(gen_prompts(SEEDS, engine, options(count=30, prompt_batch_size=2)))
    first, later = engine.asked[0], engine.asked[20]
    assert tasks_in(first, SEEDS) == 8
    assert tasks_in(later, SEEDS) == 6
    assert sum(text in asked_text(later) for text in distinct(30)) == 2
    assert "Task 8: " in asked_text(first) and first.prefix == "Task 9:"


def tasks_in(request, rows: list[dict]) -> int:
    """Return how many of these prompts a request shows."""
    return sum(row["prompt"] in asked_text(request) for row in rows)


def test_few_seeds_are_all_shown() -> None:
    engine = ListEngine([[text] for text in distinct(1)])
    list(gen_prompts(SEEDS[:3], engine, options(count=1)))
    assert tasks_in(engine.asked[0], SEEDS) == 3 and engine.asked[0].prefix == "Task 4:"


def test_each_try_and_each_iteration_shows_and_draws_differently() -> None:
    def asked(**more) -> list:
        engine = ListEngine([[text] for text in distinct(6)])
        list(gen_prompts(SEEDS, engine, options(count=6, **more)))
        return [(asked_text(request), request.seeds) for request in engine.asked]

    assert len(set(asked())) == 6
    assert asked() == asked()
    assert not set(asked()) & set(asked(iteration=2))
    assert not set(asked()) & set(asked(seed=1))


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_run_that_goes_on_makes_what_it_would_have_made(cut: int) -> None:
    texts = distinct(20)
    texts[2], texts[5] = "no", texts[1]
    whole = list(gen_prompts(SEEDS, ByNumber(texts), options(count=9, prompt_batch_size=3)))
    kept = [row for outcome in whole[:cut] for row in outcome.rows]
    rest = list(gen_prompts(SEEDS, ByNumber(texts), options(count=9, prompt_batch_size=3), kept=kept, tried=cut))
    assert rest == whole[cut:]


class ByNumber(ListEngine):
    """Answer by what is asked, as a model would: the demonstrations and the seed choose the text."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__([])
        self.texts = texts

    def generate(self, requests):
        for request in requests:
            chosen = random.Random(asked_text(request) + str(request.seeds)).choice(self.texts)
            self.answers = iter([[chosen]])
            yield from super().generate([request])


def test_no_near_duplicate_of_a_seed_of_each_other_or_of_what_is_to_avoid() -> None:
    one, two, three = distinct(3)
    seed = SEEDS[0]["prompt"]
    avoid = [prompt_record({"prompt": three})]
    engine = ListEngine([[seed], [one], [one.upper() + "!"], [three + " more"], [two]])
    made = list(gen_prompts(SEEDS, engine, options(count=2), avoid=avoid))
    assert [row["prompt"] for outcome in made for row in outcome.rows] == [one, two]
    assert sum(outcome.dropped.get("near-duplicate", 0) for outcome in made) == 3


def rouge_l(a: str, b: str) -> float:
    """Return ROUGE-L F by its definition."""
    a, b = words_of(a), words_of(b)
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b))


def test_likeness_is_rouge_l() -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choice("a b c d e f".split()) for _ in range(draw.randint(4, 12))) for _ in range(40)]
    for text in texts:
        known = NearDuplicates([other for other in texts if other is not text], 0.7)
        assert known.highest(text) == pytest.approx(max(rouge_l(text, o) for o in texts if o is not text))


def test_a_likeness_of_exactly_the_limit_is_kept() -> None:
    known = NearDuplicates(["a b c d e f g h i j"], 0.7)
    assert known.fault("a b c d e f g x y z") == ""
    assert known.fault("a b c d e f g h y z") == "near-duplicate"
    assert NearDuplicates([], 0.7).fault("a b") == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name three rivers", "too short: 3 words"),
        ("Name three long rivers", ""),
        ("", "too short: 0 words"),
        ("Rivers?", "too short: 1 word"),
        (" ".join(["word"] * 150), ""),
        (" ".join(["word"] * 151), "too long: over 150 words"),
        ("Describe the Image below now", "keyword: image"),
        ("Plot a curve of it", "keyword: plot"),
        ("Please go to the shop", "keyword: go to"),
        ("Describe the imagery in it", ""),
        ("Write a program that sorts words", "write a program"),
        ("Write a poem that sorts words", ""),
        ("- name three long rivers", "starts with punctuation: -"),
        ('"Hamlet" is by which author?', 'starts with punctuation: "'),
        ("(Name) three long rivers", "starts with punctuation: ("),
        ("$5 is how many euros?", "starts with a symbol: $"),
        ("\x07Name three long rivers", "starts with a control character"),
        ("3 rivers are to be named", ""),
    ],
)
def test_the_filters_of_self_instruct(text: str, reason: str) -> None:
    assert fault(text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Überlege dir einen guten Satz", ""),
        ("Назови три длинные реки", ""),
        ("Назови три реки", "too short: 3 words"),
        ("اذكر ثلاثة أنهار طويلة", ""),
        ("\u200fמנה שלושה נהרות ארוכים", ""),
        ("तीन लंबी नदियों के नाम", ""),
        ("긴 강 이름 세 개", ""),
        ("긴 강 이름", "too short: 3 words"),
        ("推荐三本好书。", ""),
        ("推荐三本书。", "too short: 5 letters"),
        ("《红楼梦》的作者是谁？", ""),
        ("¿Cuál es la capital?", ""),
        ("« Hamlet » est de qui ?", "starts with punctuation: «"),
        ("日本の首都はどこですか", ""),
        ("首都は？", "too short: 3 letters"),
        ("ประเทศไทยมีกี่จังหวัด", ""),
        ("สวัสดี", "too short: 4 letters"),
        ("用Python写一个函数", ""),
        ("好" * 225, ""),
        ("好" * 226, "too long: letters of over 150 words"),
        ("🙂 Name three long rivers", "starts with a symbol: 🙂"),
        ("。推荐三本好书吧", "starts with punctuation: 。"),
        ("\u0301Name three long rivers", "starts with a combining mark"),
    ],
)
def test_the_filters_in_any_script(text: str, reason: str) -> None:
    assert fault(text).startswith(reason) and bool(fault(text)) == bool(reason)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("Écris-moi 2 vers d'été, s_v_p!", ["écris", "moi", "2", "vers", "d", "été", "s", "v", "p"]),
        ("re\u0301sume\u0301", ["re", "sume"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("نصٌّ قصير", ["نصٌّ", "قصير"]),
        ("写3首诗。", ["写", "3", "首", "诗"]),
        ("カーの価格", ["カ", "ー", "の", "価", "格"]),
        ("คือGPT-4", ["คื", "อ", "gpt", "4"]),
        ("한국어 시", ["한국어", "시"]),
    ],
)
def test_the_units_of_rouge_are_words_or_letters(text: str, units: list[str]) -> None:
    assert words_of(text) == units


def test_words_of_latin_greek_and_cyrillic_are_runs_of_letters_and_digits() -> None:
    """The definition of ROUGE for English, and the length of Self-Instruct."""
    draw = random.Random(0)
    signs = [chr(at) for at in (*range(0x250), *range(0x300, 0x530), *range(0x1E00, 0x2070))]
    for _ in range(2000):
        text = "".join(draw.choices([sign for sign in signs if unicodedata.category(sign) != "Cn"], k=25))
        assert words_of(text) == re.findall(r"[^\W_]+", text.lower())
        assert length(text) == (len(text.split()), 0)


def test_near_duplicates_are_found_without_spaces() -> None:
    known = NearDuplicates(["请写一首关于春天的短诗。"], 0.7)
    assert known.fault("请写一首关于秋天的短诗") == "near-duplicate"
    assert known.fault("请解释一下为什么天空是蓝色的。") == ""


def test_a_prompt_that_was_cut_off_is_dropped() -> None:
    assert fault("Name three long rivers of", "length") == "cut off"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" Name three rivers.\n", "Name three rivers."),
        ("Task 9: Name three rivers.", "Name three rivers."),
        ("9. Name three rivers.", "Name three rivers."),
        ('"Name three rivers."', "Name three rivers."),
        ("Is 9 a prime?", "Is 9 a prime?"),
        ("'", "'"),
        ("", ""),
    ],
)
def test_a_prompt_loses_its_label_and_its_quotes(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_two_quotes_around_parts_are_not_quotes_around_the_whole() -> None:
    assert clean('"Cats" are better than "dogs"') == '"Cats" are better than "dogs"'


# --- the command -----------------------------------------------------------------------------

GEN = ["gen-prompts", "--engine", "echo", "--count", "50", "--max-tries", "6"]


def test_ending_short_is_said_and_fails_with_all_rows_written(srlm: Srlm) -> None:
    result = srlm(*GEN, "--out", "out.jsonl", stdin=as_lines(SEEDS))
    assert result.code == 4 and "6 of 50 prompts after 6 tries" in result.err
    assert len(read_rows(srlm.folder / "out.jsonl")) == 6


def test_drops_are_counted_by_reason(srlm: Srlm) -> None:
    options = ["--max-rouge-l", "0", "--max-new-tokens", "8", "--out", "out.jsonl"]
    srlm(*GEN, *options, stdin=as_lines(SEEDS))
    counts = read_json(srlm.folder / "out.jsonl.meta.json")["counts"]
    assert counts["read"] == 6 == counts["kept"] + sum(counts["dropped"].values())
    assert counts["dropped"]["cut off"] > 0


def test_prompts_to_avoid_are_read_from_files(srlm: Srlm) -> None:
    first = srlm(*GEN, stdin=as_lines(SEEDS))
    write_rows(srlm.folder / "old1.jsonl", first.rows[:3])
    write_rows(srlm.folder / "old2.jsonl", first.rows[3:])
    again = srlm(*GEN, "--avoid", "old1.jsonl", "--avoid", "old2.jsonl", stdin=as_lines(SEEDS))
    assert again.code == 4 and not {row["id"] for row in first.rows} & {row["id"] for row in again.rows}


def test_ranked_rows_serve_as_seeds(srlm: Srlm) -> None:
    ranked = [{**row, "responses": [{"text": "Yes.", "rank": 0}]} for row in SEEDS]
    assert srlm(*GEN, stdin=as_lines(ranked)).out == srlm(*GEN, stdin=as_lines(SEEDS)).out


def test_other_texts_under_the_same_ids_are_other_seeds(srlm: Srlm) -> None:
    def ask(word: str):
        seeds = [{"id": str(n), "prompt": f"{word} number {n}?"} for n in range(9)]
        argv = ["gen-prompts", "--engine", "echo", "--count", "3", "--max-tries", "1", "--on-limit", "hold"]
        return srlm(*argv, "--out", "p.jsonl", stdin=as_lines(seeds))

    assert ask("Question").code == 4
    result = ask("Riddle")
    assert result.code == 2 and "seeds" in result.err
