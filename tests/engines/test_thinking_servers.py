"""Real servers with a small model that thinks: `transformers serve`; `vllm serve`, with a parser of thoughts or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import Srlm, as_lines
from serving import server
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import Completion, EngineSpec, Request, Sampling
from srlm_cli.errors import EngineError
from srlm_cli.thoughts import UNFINISHED
from thinking_model import ANSWER, BY_MODEL, BY_PROMPT, THOUGHT, thinking_model

for library in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(library)

HELLO = [{"role": "user", "content": "Why is it so?"}]
WHOLE, CUT = Sampling(0.0, 1.0, 80), Sampling(0.0, 1.0, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model that opens its thoughts, which the template can turn off."""
    return str(thinking_model(tmp_path_factory.mktemp("models") / "thinks", BY_MODEL))


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model whose prompt opens a thought, by a special token."""
    return str(thinking_model(tmp_path_factory.mktemp("models") / "special", BY_PROMPT, special=True))


@contextmanager
def transformers_serve(folder: str, log: Path) -> Iterator[str]:
    serve = ("transformers.cli.transformers", "serve", folder, "--device", "cpu", "--dtype", "float32")
    with server(*serve, log=log, OMP_NUM_THREADS="1") as url:
        yield url


@contextmanager
def vllm_serve(folder: str, log: Path, *more: str) -> Iterator[str]:
    pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")
    small = ["--max-model-len", "2048", "--max-num-seqs", "8", "--dtype", "float32", "--enforce-eager"]
    serve = ("vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", folder, *small)
    # A seeded request whose prompt is read in two parts ends vLLM 0.32 on a CPU.
    with server(*serve, "--no-enable-chunked-prefill", *more, log=log, VLLM_CPU_KVCACHE_SPACE="1") as url:
        yield url


def completion(url: str, folder: str, sampling: Sampling = WHOLE, spec: dict | None = None, **more) -> Completion:
    engine = open_engine(EngineSpec("openai", folder, base_url=url, **(spec or {})))
    [made] = engine.generate([Request(HELLO, sampling, (1,), **more)])
    return made


def check(url: str, folder: str) -> None:
    """Check that thoughts and answers are apart: finished, cut off, and turned off."""
    done, cut, off = (
        completion(url, folder, sampling, spec)
        for sampling, spec in ((WHOLE, {}), (CUT, {}), (WHOLE, {"thinking": "off"}))
    )
    assert (done.texts, done.thoughts[0].text, done.finish_reasons) == ([ANSWER], THOUGHT, ["stop"])
    assert done.thoughts[0].raw == f"<think>\n{THOUGHT}\n</think>\n\n"
    assert cut.texts == [""] and cut.finish_reasons == [UNFINISHED] and THOUGHT.startswith(cut.thoughts[0].text)
    assert (off.texts, off.thoughts, off.finish_reasons) == ([ANSWER], (), ["stop"])


# --- transformers serve --------------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_serve_leaves_a_thought_in_the_text(model: str, tmp_path: Path) -> None:
    with transformers_serve(model, tmp_path / "log") as url:
        check(url, model)


@pytest.mark.slow
def test_transformers_serve_removes_marks_that_are_special_tokens(special: str, tmp_path: Path) -> None:
    unclear = pytest.raises(EngineError, match="opens a thought, and the replies of .* have none")
    with transformers_serve(special, tmp_path / "log") as url, unclear:
        completion(url, special)


# --- vllm serve ----------------------------------------------------------------------------------


@pytest.mark.vllm
def test_vllm_with_a_parser_of_thoughts(model: str, tmp_path: Path, srlm: Srlm) -> None:
    """It has the thought in `reasoning`, and there, too, all that continues the start of an answer."""
    with vllm_serve(model, tmp_path / "log", "--reasoning-parser", "qwen3") as url:
        check(url, model)
        continued = completion(url, model, prefix="It is ")
        assert (continued.texts, continued.thoughts) == ([ANSWER.removeprefix("It is ")], ())
        remote = ["--engine", "openai", "--base-url", url, "--temperature", "0", "--max-new-tokens", "80"]
        sampled = srlm("sample", *remote, "-n", "2", "--out", "r.jsonl", stdin=as_lines([{"prompt": "Why?"}]))
        assert sampled.code == 0, sampled.err
        after = ["--score", "expected", "--force-score", "--tokenizer", model]
        judged = srlm("judge", "--in", "r.jsonl", "-k", "1", *remote, *after)
    assert judged.code == 0, judged.err
    assert [(row["response"], row["thought"]) for row in judged.rows] == [(ANSWER, THOUGHT)] * 2
    assert all(row["judge_thoughts"][0] for row in judged.rows)


@pytest.mark.vllm
def test_vllm_without_a_parser_keeps_marks_that_are_special_tokens(special: str, tmp_path: Path) -> None:
    with vllm_serve(special, tmp_path / "log") as url:
        done = completion(url, special)
    assert (done.texts, done.thoughts[0].text, done.finish_reasons) == ([ANSWER], THOUGHT, ["stop"])
