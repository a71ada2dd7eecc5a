"""The openai engine against `transformers serve`, with a tiny model; the slow arm has the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_models
from helpers import Srlm, as_lines, read_json
from serving import server
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.errors import EngineError
from srlm_cli.models.embedded import SMOLLM2
from srlm_cli.models.locate import locate

pytestmark = pytest.mark.model
pytestmark = pytest.mark.slow
for library in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(library)

CHATS = ["Why is the sky blue?", "Name three rivers in Europe.", "Write a haiku about tea.", "What is 2+2?"]
GREEDY = Sampling(temperature=0.0, max_new_tokens=16)


@pytest.fixture(scope="module", params=["llama", SMOLLM2.name])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == SMOLLM2.name:
        return locate(request.param)
    return str(tiny_models.save(tmp_path_factory.mktemp("model"), request.param))


@pytest.fixture(scope="module")
def url(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("serve") / "log"
    serve = ("transformers.cli.transformers", "serve", folder, "--device", "cpu", "--dtype", "float32")
    with server(*serve, log=log, OMP_NUM_THREADS="1") as url:
        yield url


@pytest.fixture(scope="module")
def in_process(folder: str):
    return open_engine(EngineSpec(model=folder, dtype="float32"))


def requests(**more) -> list[Request]:
    return [Request([{"role": "user", "content": chat}], GREEDY, (0,), **more) for chat in CHATS]


@pytest.mark.parametrize(("route", "prefix"), [("auto", ""), ("completion", ""), ("auto", "To begin with,")])
def test_greedy_texts_are_those_of_the_hf_engine(url: str, folder: str, in_process, route: str, prefix: str) -> None:
    """The server has no `continue_final_message`: a prefix goes by the completions route, rendered here."""
    engine = open_engine(EngineSpec("openai", folder, base_url=url, route=route, concurrency=2))
    asked, expected = list(engine.generate(requests(prefix=prefix))), list(in_process.generate(requests(prefix=prefix)))
    assert [one.texts[0].strip() for one in asked] == [one.texts[0].strip() for one in expected]
    assert [one.finish_reasons for one in asked] == [one.finish_reasons for one in expected]
    if not prefix:
        assert [(one.tokens_in, one.tokens_out) for one in asked] == [
            (one.tokens_in, one.tokens_out) for one in expected
        ]


def test_sample_and_judge_through_the_server(url: str, folder: str, srlm: Srlm) -> None:
    remote = ["--engine", "openai", "--base-url", url, "--concurrency", "2", "--no-check-sampling"]
    sampled = srlm(
        "sample", "-n", "2", "--max-new-tokens", "12", "--model", folder, *remote, "--out", "r.jsonl",
        stdin=as_lines({"prompt": chat} for chat in CHATS[3:]),
    )  # fmt: skip
    assert sampled.code == 0, sampled.err
    judge = ["judge", "--in", "r.jsonl", "-k", "1", "--max-new-tokens", "6", "--template", "score_only", *remote]
    judged = srlm(*judge, "--force-score")
    assert judged.code == 0, judged.err
    assert [row["judge"]["model"] for row in judged.rows] == [folder] * 2  # the writer of the rows
    assert all(row["scores"][0] is None or 0 <= row["scores"][0] <= 5 for row in judged.rows)
    assert read_json(srlm.folder / "r.jsonl.meta.json")["counts"]["tokens_out"] > 0
    expected = srlm(*judge, "--score", "expected")
    assert expected.code == 1 and "no log-probabilities" in expected.err


@pytest.mark.parametrize("folder", [SMOLLM2.name], indirect=True)
def test_a_server_that_ignores_the_temperature_is_found_out(url: str, folder: str) -> None:
    """The embedded model's generation_config.json has no `do_sample`, without which the server is greedy."""
    engine = open_engine(EngineSpec("openai", folder, base_url=url))
    drawn = Request([{"role": "user", "content": CHATS[0]}], Sampling(max_new_tokens=12), (0, 1))
    with pytest.raises(EngineError, match="does not draw: 2 replies to one prompt are equal"):
        list(engine.generate([drawn]))


def test_a_wrong_model_is_a_plain_error(url: str, srlm: Srlm, tmp_path: Path) -> None:
    remote = ["--engine", "openai", "--base-url", url, "--model", "some/other"]
    result = srlm("sample", *remote, stdin=as_lines([{"prompt": "Why?"}]))
    assert result.code == 1 and "some/other" in result.err and result.err.count("\n") == 1
