"""Scorers that are no chat judge: reward models and DPO's implicit reward, against their definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from helpers import Srlm, as_lines, read_json, read_rows, slow, write_rows
from srlm_cli.engines.base import EngineSpec
from srlm_cli.engines.reward import RewardModel
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.models.reward import check_reward_model
from srlm_cli.stages.scorers import judge_by_scores
from srlm_cli.train.implicit import ImplicitReward, reference_of
from tiny import ALONE, reward_model, tiny_adapter, tiny_model

torch.set_num_threads(1)

TALK = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "No."}, {"role": "user", "content": "b?"}]
ROWS = [
    {"id": f"p/{n}", "prompt_id": "p", "prompt": "Why is it so?", "response": "Since " + "it is " * (n * 7 % 5), "k": n}
    for n in range(9)
] + [{"id": "t/0", "prompt_id": "t", "prompt": TALK, "response": "Yes.", "thought": "Hm, hm."}]  # fmt: skip


@pytest.fixture(scope="module", params=["llama", slow("qwen3")])
def reward(request, tmp_path_factory) -> Path:
    return reward_model(tmp_path_factory.mktemp("reward") / "m", request.param)


def bare_scores(model: Path, rows: list[dict]) -> list[float]:
    """Return what transformers alone makes of the rows, as the cards of reward models show it."""
    net = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    scores = []
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        chat = [*prompt, {"role": "assistant", "content": row["response"]}]
        inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            scores.append(float(net(**inputs).logits[0, 0]))
    return scores


def test_scores_are_those_of_the_bare_model(reward: Path, srlm: Srlm) -> None:
    done = srlm("judge", "--engine", "reward", "--model", str(reward), stdin=as_lines(ROWS), env=ALONE)
    assert done.code == 0, done.err
    scores = [row["score"] for row in done.rows]
    assert scores == bare_scores(reward, ROWS) and len(set(scores)) > 4
    first = done.rows[0]
    assert (first["id"], first["scores"], first["score_from"], first["judgements"]) == (
        "p/0",
        [scores[0]],
        ["reward"],
        [""],
    )
    assert first["judge"] == {"model": str(reward), "engine": "reward"} and first["judgement_finish_reasons"] == [
        "stop"
    ]
    assert done.rows[-1]["thought"] == "Hm, hm."  # kept in the row, and not shown to the model


def test_batches_give_the_same_scores_to_rounding(reward: Path) -> None:
    model = RewardModel(EngineSpec("reward", str(reward), device="cpu", dtype="float32"))
    alone = [one.score for one in model.score(ROWS)]
    model.together = 4
    assert sorted(len(some) for some in model._batches([[1] * len(row["response"]) for row in ROWS])) == [2, 4, 4]
    together = [one.score for one in model.score(ROWS)]
    assert together == pytest.approx(alone, abs=1e-6) and alone == bare_scores(reward, ROWS)


@pytest.mark.slow
def test_a_killed_run_and_shards_give_the_bytes_of_a_whole_one(reward: Path, srlm: Srlm) -> None:
    rows = str(
        write_rows(srlm.folder / "r.jsonl", [{**row, "id": f"{row['id']}-{n}"} for n in range(20) for row in ROWS])
    )
    argv = ["judge", "--in", rows, "--engine", "reward", "--model", str(reward), "--out"]
    assert srlm(*argv, "whole.jsonl", env=ALONE).code == 0
    whole = (srlm.folder / "whole.jsonl").read_bytes()
    for shard in ("1/2", "2/2"):
        assert srlm(*argv, f"{shard[0]}.jsonl", "--shard", shard, env=ALONE).code == 0
    assert (srlm.folder / "1.jsonl").read_bytes() + (srlm.folder / "2.jsonl").read_bytes() == whole
    about = read_json(srlm.folder / "whole.jsonl.meta.json")
    assert (about["engine"], about["model"], about["counts"]["kept"]) == ("reward", str(reward), 200)
    assert srlm(*argv, "cut.jsonl", "--limit", "70", env=ALONE).code == 0
    assert whole.startswith((srlm.folder / "cut.jsonl").read_bytes())


def test_replies_without_text_and_too_long_ones(tmp_path: Path) -> None:
    model = RewardModel(
        EngineSpec("reward", str(reward_model(tmp_path / "m", max_position_embeddings=60)), device="cpu")
    )
    rows = [{**ROWS[0], "response": " "}, {**ROWS[0], "response": "x" * 99}, ROWS[0], {**ROWS[0], "response": None}]
    made = list(judge_by_scores(rows, model, {"model": "m"}))
    assert [outcome.rows[0]["score"] is None for outcome in made] == [True, True, False, True]
    assert made[1].rows[0]["judgement_finish_reasons"] == ["prompt-too-long"] and made[1].rows[0]["score_from"] == [
        None
    ]
    assert made[1].counts["prompt too long"] == made[1].counts["unparsed"] == 1 and made[0].counts["no reply"] == 1
    assert made[0].rows[0]["scores"] == [] and made[2].tokens_in > 0


def test_models_that_are_no_reward_models_are_refused_in_one_line(srlm: Srlm, tmp_path: Path) -> None:
    chat, several = tiny_model(tmp_path / "chat"), reward_model(tmp_path / "several", num_labels=3)
    headless = reward_model(tmp_path / "headless")
    tiny_model(tmp_path / "other")
    config = read_json(headless / "config.json")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for model, problem in ((chat, "has no classification head"), (several, "3 labels, and a reward model has one")):
        done = srlm("judge", "--engine", "reward", "--model", str(model), stdin=as_lines(ROWS), env=ALONE)
        assert done.code == 2 and problem in done.err and done.err.count("\n") == 1, done.err
    with pytest.raises(EngineError, match=r"tensors missing \(score.weight\)"):
        RewardModel(EngineSpec("reward", str(tmp_path / "other"), device="cpu"))
    with pytest.raises(OptionError, match="is an adapter"):
        check_reward_model(str(tiny_adapter(tmp_path / "adapter", chat)))
    for more, problem in (
        (("--meta",), "not with --meta"),
        (("--rule", "no-commas"), "not with --rule"),
        (("--force-score",), "not with --force-score"),
        (("--conversation", "last"), "not with --conversation last"),
        (("--settle", "0.9"), "not with --settle"),
        (("--beta", "0.3"), "--beta is for DPO's implicit reward (--implicit)"),
        (("--ref", "base"), "--ref is for DPO's implicit reward (--implicit)"),
        ((), "no model given"),
    ):
        model = ("--model", str(headless)) if more else ()
        done = srlm("judge", "--engine", "reward", *model, *more, stdin=as_lines(ROWS), env=ALONE)
        assert done.code == 2 and problem in done.err, done.err
    done = srlm("sample", "--engine", "reward", "--model", str(headless), stdin=as_lines(ROWS), env=ALONE)
    assert done.code == 2 and "scores replies and writes no text" in done.err


@pytest.mark.slow
def test_from_rewards_to_pairs_and_metrics(reward: Path, srlm: Srlm) -> None:
    ranked = {"prompt": "Why?", "responses": [{"text": "So it is.", "rank": 0}, {"text": "No", "rank": 1}]}
    judged = srlm("judge", "--engine", "reward", "--model", str(reward), stdin=as_lines([ranked]), env=ALONE)
    scores = [row["score"] for row in judged.rows]
    [pair] = srlm("make-pairs", stdin=judged.out).rows
    assert (pair["score_chosen"], pair["score_rejected"]) == (max(scores), min(scores))
    metrics = {row["metric"]: row["value"] for row in srlm("eval", "reward", stdin=judged.out).rows}
    assert metrics["pairwise_accuracy"] == float(scores[0] > scores[1])
    health = {row["metric"]: row["value"] for row in srlm("eval", "health", stdin=judged.out).rows}
    assert health["forced_score_rate"] == 0


# --- DPO's implicit reward ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("implicit")
    return tiny_model(folder / "M2", seed=1), tiny_model(folder / "M1", seed=2)


def log_prob(model: Path, prompt: list[dict], target: str) -> float:
    """Return the summed log-probability of a target after a prompt, by transformers alone, as TRL sums it."""
    net, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
    )
    head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(head + target, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        log_probs = net(ids).logits[0, :-1].log_softmax(-1)
    return float(log_probs.gather(1, ids[0, 1:, None])[start - 1 :, 0].sum())


def test_the_implicit_reward_is_beta_times_the_log_ratio(models: tuple[Path, Path], srlm: Srlm) -> None:
    policy, ref = models
    argv = ["judge", "--implicit", "--model", str(policy), "--ref", str(ref), "--beta", "0.3", "--dtype", "float32"]
    done = srlm(*argv, "--out", "judged.jsonl", stdin=as_lines(ROWS), env=ALONE)
    assert done.code == 0, done.err
    made = read_json(srlm.folder / "judged.jsonl.meta.json")["fingerprint"]  # of all that decides a score
    assert (made["implicit"], made["ref"], made["beta"]) == (True, str(ref), 0.3) and made["ref_fingerprint"]
    rows = read_rows(srlm.folder / "judged.jsonl")
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        thought = f"<think>\n{row['thought']}\n</think>\n\n" if row.get("thought") else ""
        target = f"{thought}{row['response']}<|end|>"
        wanted = 0.3 * (log_prob(policy, prompt, target) - log_prob(ref, prompt, target))
        assert row["score"] == pytest.approx(wanted, abs=1e-4) and row["score_from"] == ["implicit"]
    assert rows[0]["judge"] == {"model": str(policy), "implicit": {"ref": str(ref), "beta": 0.3}}
    assert len({row["score"] for row in rows}) > 4


def test_the_reference_is_the_model_that_the_policy_was_trained_from(models: tuple[Path, Path], srlm: Srlm) -> None:
    _, ref = models
    rows = as_lines([{"prompt": f"Ask {n}?", "chosen": "Good one.", "rejected": "Bad."} for n in range(2)])
    done = srlm(
        "dpo",
        "--model",
        str(ref),
        "--out",
        "M",
        "--learning-rate",
        "1e-2",
        "--max-steps",
        "2",
        "--train-batch-size",
        "2",
        stdin=rows,
        env=ALONE,
    )
    assert done.code == 0, done.err
    model = str(srlm.folder / "M")
    assert reference_of("parent", model) == reference_of("base", model) == str(ref)
    both = [{"prompt": "Ask 0?", "response": text} for text in ("Good one.", "Bad.")]
    good, bad = srlm("judge", "--implicit", "--model", model, stdin=as_lines(both), env=ALONE).rows
    assert good["score"] > 0 and good["score"] > bad["score"]  # as it was trained
    for model, name in ((str(ref), "parent"), (str(ref), "base"), (str(ref), str(ref))):
        with pytest.raises(OptionError, match="needs the model that"):
            reference_of(name, model)
    for missing, said in (
        ("mistyped", "there is no folder mistyped"),
        ("runs/M1/model", "no such model: runs/M1/model"),
    ):
        with pytest.raises(OptionError, match=said):
            reference_of("parent", missing)


def test_too_long_a_reply_has_no_implicit_reward(tmp_path: Path) -> None:
    policy, ref = (str(tiny_model(tmp_path / f"{n}", n, max_position_embeddings=60)) for n in (1, 2))
    scorer = ImplicitReward(EngineSpec("hf", policy, device="cpu"), ref, 0.1)
    long, short = scorer.score([{**ROWS[0], "response": "x" * 99}, ROWS[0]])
    assert long.score is None and short.score is not None
