"""The openai engine against `vllm serve`, with the embedded model behind it: n, prefixes, log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from helpers import ROOT, Srlm, as_lines, read_rows, write_rows
from serving import server
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.models.embedded import SMOLLM2
from srlm_cli.models.locate import locate

pytestmark = pytest.mark.vllm
for library in ("vllm", "openai"):
    pytest.importorskip(library, reason=f"{library} is not installed")

CHATS = ["Why is the sky blue?", "Name three rivers in Europe.", "Write a haiku about tea.", "What is 2+2?"]
NAME = "served-model"
CONTEXT = 512
SCORES = tuple("012345")
QUICKSTART = ROOT / "examples" / "quickstart"


def serve(log: Path, *more: str) -> AbstractContextManager[str]:
    """Return a server of the embedded model, which is open at a URL within a `with`."""
    folder = locate(SMOLLM2.name)
    small = ["--max-model-len", str(CONTEXT), "--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager"]
    asked = ("vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", NAME, *small, *more)
    return server(*asked, log=log, VLLM_CPU_KVCACHE_SPACE="1")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("vllm") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def engine(url: str):
    return open_engine(EngineSpec("openai", base_url=url))


@pytest.fixture(scope="module")
def in_process():
    return open_engine(EngineSpec(model=SMOLLM2.name, dtype="float32"))


def requests(sampling: Sampling, seeds: tuple[int, ...] = (0,), **more) -> list[Request]:
    return [Request([{"role": "user", "content": chat}], sampling, seeds, **more) for chat in CHATS]


def test_the_model_is_found(engine) -> None:
    assert engine.model == NAME


@pytest.mark.parametrize("prefix", ["", "To begin with,", "Well,"])
def test_greedy_texts_are_those_of_the_hf_engine(engine, in_process, prefix: str) -> None:
    asked = requests(Sampling(temperature=0.0, max_new_tokens=24), prefix=prefix)
    expected = list(in_process.generate(asked))
    made = list(engine.generate(asked))
    assert [one.texts[0].strip() for one in made] == [one.texts[0].strip() for one in expected]
    if not prefix:
        assert [(one.tokens_in, one.tokens_out) for one in made] == [
            (one.tokens_in, one.tokens_out) for one in expected
        ]


def test_n_completions_differ_and_come_again_under_the_same_seeds(engine) -> None:
    asked = requests(Sampling(max_new_tokens=16), (5, 6, 7))
    first, second = ([one.texts for one in engine.generate(asked)] for _ in range(2))
    assert all(len(set(texts)) == 3 for texts in first)
    same = sum(a == b for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))
    assert same >= 10  # of 12: batches differ, and so may the last bit of a logit


@pytest.mark.parametrize("choices", [SCORES, ("A", "B")])
def test_probabilities_of_choices_are_those_of_the_hf_engine(engine, in_process, choices: tuple[str, ...]) -> None:
    """A digit has its space before it as a token of its own, a letter within it."""
    prefix = "Score: " if choices == SCORES else "Verdict: "
    asked = requests(Sampling(), prefix=prefix, choices=choices)
    for made, expected in zip(engine.generate(asked), in_process.generate(asked), strict=True):
        if made.probabilities is None:  # none of the choices is among the 20 most probable tokens
            assert made.finish_reasons == ["no-choice"]
            continue
        left_out = sum(e for m, e in zip(made.probabilities, expected.probabilities, strict=True) if m == 0)
        for m, e in zip(made.probabilities, expected.probabilities, strict=True):
            assert m == 0 or m * (1 - left_out) == pytest.approx(e, abs=0.01)
        assert left_out < 0.5


def test_prompts_at_the_end_of_the_context(engine) -> None:
    long = Request([{"role": "user", "content": "word " * 2 * CONTEXT}], Sampling(max_new_tokens=8), (0, 1))
    tight = Request([{"role": "user", "content": "word " * (CONTEXT - 60)}], Sampling(max_new_tokens=200), (0,))
    too_long, cut = engine.generate([long, tight])
    assert too_long.finish_reasons == ["prompt-too-long"] * 2 and too_long.texts == ["", ""]
    assert cut.finish_reasons[0] in ("stop", "length", "empty")
    assert CONTEXT - 200 < cut.tokens_in < cut.tokens_in + cut.tokens_out <= CONTEXT


def test_sample_and_judge_with_expected_scores(url: str, srlm: Srlm) -> None:
    remote = ["--engine", "openai", "--base-url", url]
    prompts = as_lines({"prompt": chat} for chat in CHATS)
    sampled = srlm("sample", "-n", "2", "--max-new-tokens", "16", *remote, "--out", "r.jsonl", stdin=prompts)
    assert sampled.code == 0, sampled.err
    judged = srlm("judge", "--in", "r.jsonl", "--template", "score_only", "--score", "expected", *remote)
    assert judged.code == 0, judged.err
    scores = [row["score"] for row in judged.rows]
    assert len(scores) == 8 and all(score is None or 0 <= score <= 5 for score in scores)
    assert sum(score is not None and score != int(score) for score in scores) >= 6
    assert {row["judge"]["model"] for row in judged.rows} == {NAME}


def test_a_wrong_model_is_told_which_there_is(url: str, srlm: Srlm) -> None:
    result = srlm("sample", "--engine", "openai", "--base-url", url, "--model", "x", stdin=as_lines([{"prompt": "?"}]))
    assert result.code == 1 and "does not serve the model x" in result.err and f"it offers {NAME}" in result.err


def test_an_adapter_trained_here_is_served_as_it_is(tmp_path: Path, srlm: Srlm) -> None:
    base, adapter = SMOLLM2.name, tmp_path / "adapter"
    taught = write_rows(tmp_path / "ift.jsonl", read_rows(QUICKSTART / "ift.jsonl")[:4])
    settings = ["--lora-r", "12", "--learning-rate", "2e-2", "--train-batch-size", "2"]
    trained = srlm("sft", "--in", taught, "--model", base, *settings, "--out", adapter)
    assert trained.code == 0, trained.err
    asked = ["sample", "-n", "1", "--temperature", "0", "--max-new-tokens", "16"]
    prompts = as_lines({"prompt": chat} for chat in CHATS)
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"trained={adapter}"]
    with serve(tmp_path / "log", *lora) as url:
        served = srlm(*asked, "--engine", "openai", "--base-url", url, "--model", "trained", stdin=prompts)
    assert served.code == 0, served.err
    loaded, untrained = (
        srlm(*asked, "--dtype", "float32", "--model", model, stdin=prompts) for model in (adapter, base)
    )
    texts = [[row["response"].strip() for row in done.rows] for done in (served, loaded, untrained)]
    assert texts[0] == texts[1]
    assert all(ours != other for ours, other in zip(texts[0], texts[2], strict=True))
