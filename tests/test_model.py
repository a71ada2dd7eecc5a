"""The real SmolLM2-135M through every stage, at a small size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import ROOT, Result, Srlm
from srlm_cli import templates
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.stages.judge import JudgeOptions, judge_request

pytestmark = pytest.mark.model

MODEL = "smollm2-135m-instruct"
SIDES = ("chosen", "rejected")
QUICKSTART = ROOT / "examples" / "quickstart"
CHATS = [
    "Why is the sky blue?",
    "Name three rivers in Europe and say through which countries each of them flows.",
    "Write a haiku about tea.",
    "What is 2+2?",
]


def srlm(*args: str | Path, stdin: str = "", check: bool = True) -> Result:
    """Run a command at the root of the checkout, which has no srlm.toml."""
    done = Srlm(ROOT)(*map(str, args), stdin=stdin)
    assert not check or done.code == 0, done.err
    return done


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, made: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def head(source: str, count: int, path: Path) -> Path:
    lines = (QUICKSTART / source).read_text().splitlines(keepends=True)[:count]
    path.write_text("".join(lines))
    return path


def short(text: str, words: int = 12) -> str:
    return " ".join(text.split()[:words])


@pytest.fixture(scope="module")
def engine():
    return open_engine(EngineSpec(model=MODEL, dtype="float32", batch_size=8))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """The beginnings of two pairs that people ranked."""
    made = [
        {
            "prompt": short(row["prompt"]),
            **{side: short(one["text"]) for side, one in zip(SIDES, row["responses"], strict=False)},
        }
        for row in rows(QUICKSTART / "ranked.jsonl")[:2]
    ]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", made)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    ift = write(
        folder / "ift.jsonl",
        [{key: short(row[key]) for key in ("prompt", "completion")} for row in rows(QUICKSTART / "ift.jsonl")[:4]],
    )
    done = srlm(
        "sft", "--in", ift, "--model", MODEL, "--lora-r", 4, "--learning-rate", "2e-2",
        "--train-batch-size", 2, "--device-batch-size", 2, "--out", folder / "adapter",
    )  # fmt: skip
    result = json.loads(done.out)
    assert result["steps"] == 2 and result["data"]["rows"] == 4
    return folder / "adapter"


def ask(text: str, sampling: Sampling, seeds: tuple[int, ...], **more) -> Request:
    return Request([{"role": "user", "content": text}], sampling, seeds, **more)


# --- the engine ------------------------------------------------------------------------------


def test_greedy_equals_transformers(engine):
    import torch

    requests = [ask(chat, Sampling(temperature=0.0, max_new_tokens=16), (0,)) for chat in CHATS]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        ids = engine.tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            whole = engine.net.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert completion.texts == [engine.tokenizer.decode(whole, skip_special_tokens=True)]


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_rows_beside_it(engine):
    sampling = Sampling(max_new_tokens=8)
    together = list(engine.generate(ask(chat, sampling, (5, 6)) for chat in CHATS))
    for chat, completion in zip(CHATS, together, strict=True):
        alone = [next(engine.generate([ask(chat, sampling, (seed,))])).texts[0] for seed in (5, 6)]
        assert completion.texts == alone
    assert len({text for completion in together for text in completion.texts}) > 5


def test_stop_texts_and_length(engine):
    stopped, cut = engine.generate(
        [
            ask("Count from 1 to 9.", Sampling(0.0, 1.0, 60, stop=("4",)), (0,), prefix="1, 2, 3,"),
            ask("Tell a long story.", Sampling(0.0, 1.0, 5), (0,)),
        ]
    )
    assert stopped.finish_reasons == ["stop"] and "4" not in stopped.texts[0]
    assert cut.finish_reasons == ["length"] and cut.tokens_out == 5


def test_choices_follow_their_probability(engine):
    request = ask(
        "What is 2+2? Answer with a digit.", Sampling(temperature=0.0), (0,), prefix="2+2=", choices=("3", "4", "5")
    )
    completion = next(engine.generate([request]))
    assert completion.texts == ["4"]
    assert math.isclose(sum(completion.probabilities), 1.0, rel_tol=1e-5)
    assert completion.probabilities[1] == max(completion.probabilities)


def test_choices_of_several_tokens_are_read_whole(engine):
    texts = ("Paris is the capital of France", "Paris is the capital of Peru")
    request = ask("What is the capital of France?", Sampling(temperature=0.0), (0,), choices=texts)
    completion = next(engine.generate([request]))
    assert completion.texts == [texts[0]] and completion.probabilities[0] > 0.9


def test_choices_do_not_depend_on_the_rows_beside_them(engine):
    digits = ("0", "1", "2", "3", "4", "5")
    asked = [ask(chat, Sampling(temperature=0.0), (0,), prefix="Score: ", choices=digits) for chat in CHATS]
    together = [completion.probabilities for completion in engine.generate(asked)]
    alone = [next(engine.generate([request])).probabilities for request in asked]
    for many, one in zip(together, alone, strict=True):
        assert many == pytest.approx(one, abs=1e-5)
    assert max(together[0]) < 0.99 and together[0] != pytest.approx(together[1], abs=1e-3)


def test_a_choice_that_another_one_begins_with_has_what_is_left(engine):
    import torch

    request = ask(
        "Rate this from 1 to 10.", Sampling(temperature=0.0), (0,), prefix="Rating: ", choices=("1", "10", "7")
    )
    given = next(engine.generate([request])).probabilities
    text = engine._tokens(engine.template.turn(request))
    one, ten, seven = (
        engine._tokens(engine.template.turn(request) + choice)[len(text) :] for choice in request.choices
    )
    assert len(one) == len(seven) == 1 and ten[:1] == one and len(ten) == 2
    with torch.inference_mode():
        first = torch.softmax(engine.net(torch.tensor([text])).logits[0, -1], -1)
        second = torch.softmax(engine.net(torch.tensor([text + one])).logits[0, -1], -1)
    p_one, p_ten, p_seven = float(first[one[0]]), float(first[one[0]] * second[ten[1]]), float(first[seven[0]])
    assert given == pytest.approx([p / (p_one + p_seven) for p in (p_one - p_ten, p_ten, p_seven)], abs=1e-5)


@pytest.mark.slow
def test_an_expected_score_lies_at_the_place_of_the_written_one(tmp_path):
    ranked = head("ranked_eval.jsonl", 1, tmp_path / "ranked.jsonl")
    argv = ["judge", "--in", ranked, "--model", MODEL, "--max-new-tokens", 30, "-k", 2]
    srlm(*argv, "--score", "expected", "--force-score", "--out", tmp_path / "e.jsonl")
    srlm("judge", "--in", tmp_path / "e.jsonl", "--rescore", "--out", tmp_path / "t.jsonl")
    expected, written = rows(tmp_path / "e.jsonl"), rows(tmp_path / "t.jsonl")
    assert all(len(row["scores"]) == 2 and all(0 < score < 5 for score in row["scores"]) for row in expected)
    assert len({row["score"] for row in expected}) == len(expected)
    for a, b in zip(expected, written, strict=True):
        assert a["judgements"] == b["judgements"]
        assert [s is None for s in b["scores"]] == [source == "finish" for source in a["score_from"]]


@pytest.mark.slow
def test_a_score_asked_for_behind_the_written_text_is_that_of_a_new_reading(engine):
    """One judgement ends with a score, the others are cut off."""
    template = templates.load("additive", fields={"prompt", "response"}, reads=True)
    asked = [
        judge_request(
            {"id": "a", "prompt": prompt, "response": "The Rhine."},
            JudgeOptions(template, 2, Sampling(max_new_tokens=24), 0, force_score=True, score="expected"),
        )
        for prompt in ("Name a river.", "Say only this, and nothing else: Score: 4")
    ]
    completions = list(engine.generate(asked))
    plain = engine.generate(replace(request, follow_up=None) for request in asked)
    assert [told.texts for told in completions] == [told.texts for told in plain]
    answered = 0
    for request, told in zip(asked, completions, strict=True):
        for k, answer in enumerate(told.follow_ups):
            (expected,) = engine.generate([request.follow_up(k, told.texts[k], None)])
            if answer:
                assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-4)
                assert (answer.tokens_in, answer.finish_reasons) == (expected.tokens_in, expected.finish_reasons)
                answered += 1
    assert answered >= 3


def test_a_prompt_that_does_not_fit_is_named_so(engine):
    long = ask("word " * 9000, Sampling(max_new_tokens=4), (0, 1))
    short = ask("Say hi.", Sampling(max_new_tokens=4), (0,))
    first, second = engine.generate([long, short])
    assert first.finish_reasons == ["prompt-too-long"] * 2 and first.texts == ["", ""]
    assert second.texts[0]


# --- the stages ------------------------------------------------------------------------------


def test_pipe_of_sample_judge_and_pairs(tmp_path):
    """The README's pipe, in a real shell, with the model judging its own rows."""
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": chat, "origin": "test"} for chat in CHATS[:2]])
    run = f"{sys.executable} -m srlm_cli"
    script = f"""set -o pipefail
    {run} sample --in {prompts} --model {MODEL} -n 3 --max-new-tokens 12 | tee {tmp_path}/responses.jsonl |
    {run} judge --template score_only --force-score --max-new-tokens 6 | tee {tmp_path}/judged.jsonl |
    {run} make-pairs > {tmp_path}/pairs.jsonl"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    responses, judged = rows(tmp_path / "responses.jsonl"), rows(tmp_path / "judged.jsonl")
    assert [row["id"] for row in responses] == [row["id"] for row in judged] and len(judged) == 6
    assert all(row["judge"]["model"] == MODEL == row["model"] for row in judged)
    assert all(len(row["scores"]) == 3 and 0 <= row["score"] <= 5 for row in judged)
    assert {source for row in judged for source in row["score_from"]} <= {"text", "finish"}
    assert {row["origin"] for row in judged} == {"test"}
    by_id = {row["id"]: row for row in judged}
    for pair in rows(tmp_path / "pairs.jsonl"):
        assert by_id[pair["chosen_id"]]["score"] == pair["score_chosen"] > pair["score_rejected"]


@pytest.mark.slow
def test_judge_without_finishing_leaves_null(tmp_path):
    """The untrained model hardly ever writes a score: null, counted, and --max-unparsed says so."""
    write(tmp_path / "r.jsonl", [{"prompt": chat, "response": "I do not know.", "model": MODEL} for chat in CHATS[:2]])
    done = srlm("judge", "--in", tmp_path / "r.jsonl", "--max-new-tokens", 4, "--max-unparsed", 0.5, check=False)
    judged = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 4 and "no readable score" in done.err
    assert [row["score"] for row in judged] == [None] * 2 and judged[0]["scores"] == [None] * 3


@pytest.mark.slow
def test_gen_prompts_keeps_what_it_promises(tmp_path):
    from rapidfuzz.distance import Indel

    from srlm_cli.stages.gen_prompts import words_of

    out = tmp_path / "prompts.jsonl"
    srlm(
        "gen-prompts", "--in", QUICKSTART / "ift.jsonl", "--model", MODEL, "--count", 2, "--prompt-batch-size", 4,
        "--max-new-tokens", 40, "--out", out,
    )  # fmt: skip
    made, seeds = rows(out), [row["prompt"] for row in rows(QUICKSTART / "ift.jsonl")]
    counts = json.loads((tmp_path / "prompts.jsonl.meta.json").read_text())["counts"]
    assert len(made) == 2 == counts["kept"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    known = [words_of(text) for text in seeds]
    for row in made:
        assert max(Indel.normalized_similarity(words_of(row["prompt"]), other) for other in known) <= 0.7
        known.append(words_of(row["prompt"]))


@pytest.mark.slow
def test_make_eft_accept_counts_every_judgement(tmp_path):
    ranked = head("ranked.jsonl", 2, tmp_path / "ranked.jsonl")
    srlm(
        "make-eft", "--in", ranked, "--model", MODEL, "--num-judgements", 2, "--max-new-tokens", 8, "--out",
        tmp_path / "eft.jsonl", "--template", "score_only",
    )  # fmt: skip
    counts = json.loads((tmp_path / "eft.jsonl.meta.json").read_text())["counts"]
    assert counts["counts"]["judgements"] == counts["kept"] + sum(counts["dropped"].values())


@pytest.mark.slow
def test_sft_writes_an_adapter_that_every_stage_takes(adapter, tmp_path):
    provenance = json.loads((adapter / "provenance.json").read_text())
    files = sorted(adapter.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert files[-1].name == "provenance.json"
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in files}
    assert provenance["from"]["model"] == MODEL and not adapter.with_name("adapter.part").exists()
    plain = srlm("sample", "--model", MODEL, "-n", "1", "--max-new-tokens", "8", stdin='{"prompt": "Say hello."}')
    tuned = srlm("sample", "--model", adapter, "-n", "1", "--max-new-tokens", "8", stdin='{"prompt": "Say hello."}')
    assert json.loads(tuned.out)["model"] == str(adapter)
    assert json.loads(plain.out)["response"] != json.loads(tuned.out)["response"]


@pytest.mark.slow
def test_full_dpo_starts_at_its_reference_and_learns(pairs, tmp_path):
    done = srlm(
        "dpo", "--in", pairs, "--model", MODEL, "--learning-rate", "1e-4", "--train-batch-size", 2,
        "--epochs", 2, "--dtype", "float32", "--out", tmp_path / "m2",
    )  # fmt: skip
    result = json.loads(done.out)
    assert abs(result["first_loss"] - math.log(2)) < 1e-3 and result["last_loss"] < result["first_loss"]
    assert result["margin"] > 0 and done.out.count("\n") == 1
    reply = srlm("sample", "--model", tmp_path / "m2", "-n", 1, "--max-new-tokens", 4, stdin='{"prompt": "Hi"}')
    assert json.loads(reply.out)["response"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_on_an_adapter_has_that_adapter_as_reference(dtype, pairs, adapter, tmp_path):
    """A chained adapter: with the bare base as the reference the first loss would not be ln 2."""
    done = srlm(
        "dpo", "--in", pairs, "--model", adapter, "--learning-rate", "1e-3", "--train-batch-size", 2,
        "--epochs", 2, "--dtype", dtype, "--out", tmp_path / "m2",
    )  # fmt: skip
    result = json.loads(done.out)
    assert abs(result["start"]["loss"] - math.log(2)) < 1e-5 and result["dtype"] == dtype
    assert abs(result["first_loss"] - math.log(2)) < {"float32": 1e-3, "bfloat16": 2e-2}[dtype]
    assert result["last_loss"] < result["first_loss"]
    kept = {file.name for file in (tmp_path / "m2").iterdir()}
    assert "adapter_model.safetensors" in kept and "ref" not in kept


def test_training_rows_hold_one_bos_and_the_end_of_turn(engine):
    from srlm_cli.train.data import IGNORED, sft_rows
    from srlm_cli.train.render import Renderer

    row = {"id": "a", "prompt": "Say hi.", "completion": "Hi there."}
    made, report = sft_rows([row], Renderer(engine.tokenizer), max_length=128)
    ids, labels = made[0]["input_ids"], made[0]["labels"]
    target = engine.tokenizer.decode([token for token in labels if token != IGNORED])
    assert target.startswith("Hi there.<|im_end|>")
    asked = engine._tokens(engine.template.turn(ask("Say hi.", Sampling(), (0,))))
    assert ids[: len(asked)] == asked  # trained on exactly what sampling shows
    assert ids[:2] != [ids[0]] * 2 and report.target_tokens == len([t for t in labels if t != IGNORED])


def test_an_eft_row_that_would_lose_its_score_is_refused(tmp_path):
    row = {"prompt": "judge " * 60, "completion": "Score: 4", "score": 4.0, "prompt_id": "x"}
    done = srlm(
        "sft", "--model", MODEL, "--max-length", 32, "--out", tmp_path / "m", stdin=json.dumps(row), check=False
    )
    assert done.code == 3 and "score would be cut off" in done.err
    assert not (tmp_path / "m").exists()


def test_an_eft_row_that_is_too_long_can_be_dropped(engine):
    from srlm_cli.train.data import sft_rows
    from srlm_cli.train.render import Renderer

    long = {"id": "a", "prompt": "judge " * 60, "completion": "Score: 4", "score": 4.0}
    short = {"id": "b", "prompt": "judge", "completion": "Score: 4", "score": 4.0}
    made, report = sft_rows([long, short], Renderer(engine.tokenizer), 64, drop_long=True)
    assert len(made) == report.rows == 1 and (report.left_out, report.truncated) == (1, 0)


@pytest.mark.slow
def test_the_loss_on_targets_alone_is_that_of_all_logits(engine, tmp_path):
    """Rows of unlike lengths and targets in one batch, against the model's own loss on each."""
    import torch

    from srlm_cli.train.data import sft_rows
    from srlm_cli.train.render import Renderer

    data = [
        {"id": "a", "prompt": CHATS[0], "completion": "Because of the air, which scatters blue light most."},
        {"id": "b", "prompt": CHATS[1] * 3, "completion": "Score: 4", "score": 4.0},
        {"id": "c", "prompt": CHATS[3], "completion": "Four."},
    ]
    made, _ = sft_rows(data, Renderer(engine.tokenizer), 512)
    total = count = 0
    for row in made:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        targets = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += float(engine.net(input_ids=ids, labels=labels).loss) * targets
        count += targets
    argv = [
        "--max-steps",
        1,
        "--train-batch-size",
        3,
        "--device-batch-size",
        3,
        "--dtype",
        "float32",
        "--out",
        tmp_path / "m",
    ]
    source = write(tmp_path / "rows.jsonl", data)
    result = json.loads(srlm("sft", "--in", source, "--model", MODEL, *argv).out)
    assert result["first_loss"] == pytest.approx(total / count, rel=1e-4)
    [step] = rows(tmp_path / "m" / "metrics.jsonl")
    assert step["step"] == 1 and step["loss"] == result["first_loss"] and step["grad_norm"] > 0


def test_head_to_head_of_a_model_with_itself_is_all_ties(tmp_path):
    responses = write(tmp_path / "r.jsonl", [{"prompt": chat, "response": "Yes.", "model": MODEL} for chat in CHATS])
    done = srlm("eval", "head-to-head", "--in", responses, "--against", responses, "--model", MODEL, "--direct")
    metrics = {row["metric"]: row["value"] for row in map(json.loads, done.out.splitlines())}
    assert metrics["tie"] == 1.0 and metrics["win"] == metrics["loss"] == 0.0
    assert metrics["length"] == metrics["baseline_length"] == 4


def test_models_that_are_not_there(tmp_path):
    done = srlm("sample", "--model", tmp_path / "no" / "model", stdin='{"prompt": "x"}', check=False)
    assert done.code == 2 and "no such model" in done.err and done.out == ""
    (tmp_path / "empty").mkdir()
    done = srlm("sample", "--model", tmp_path / "empty", stdin='{"prompt": "x"}', check=False)
    assert done.code == 2 and "config.json" in done.err


@pytest.mark.slow
def test_a_gguf_file_is_a_model(tmp_path, monkeypatch):
    """The embedded model's own file, given by path, is made trainable in a cache of its own; its ending is any case."""
    from srlm_cli.models.embedded import SMOLLM2, _embedded_gguf

    gguf = tmp_path / "model.GGUF"
    gguf.symlink_to(_embedded_gguf(SMOLLM2, tmp_path))
    monkeypatch.setenv("SRLM_HOME", str(tmp_path / "cache"))
    by_path = srlm("sample", "--model", gguf, "-n", 1, "--max-new-tokens", 8, stdin='{"prompt": "Say hello."}')
    assert all(line.startswith("srlm") for line in by_path.err.splitlines()), by_path.err  # no bar of a library
    monkeypatch.delenv("SRLM_HOME")
    by_name = srlm("sample", "--model", MODEL, "-n", 1, "--max-new-tokens", 8, stdin='{"prompt": "Say hello."}')
    assert json.loads(by_path.out)["response"] == json.loads(by_name.out)["response"]
    assert (tmp_path / "cache" / "gguf").is_dir()
