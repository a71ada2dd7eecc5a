"""The vllm engine against the hf engine: the same rows under greedy decoding, and clean streams and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, clean_env, read_rows, write_rows
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import Completion, EngineSpec, Request, Sampling

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")

MODEL = "smollm2-135m-instruct"
QUICKSTART = ROOT / "examples" / "quickstart"
# Not what is tested, and a minute for each model that is loaded.
EAGER = {"TORCH_COMPILE_DISABLE": "1"}
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB per engine: two are open in this process at the same time
CHATS = [
    "Why is the sky blue?",
    "Name three rivers in Europe and say through which countries each of them flows.",
    "Write a haiku about tea.",
    "What is 2+2?",
]
DIGITS = tuple("012345")
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=24)


def command(*args: str | Path | int) -> list[str]:
    return [sys.executable, "-m", "srlm_cli", *map(str, args)]


def srlm(*args: str | Path | int) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*args), capture_output=True, text=True, check=False, env=clean_env(EAGER))
    assert done.returncode == 0, done.stderr
    return done


def both(*args: str | Path | int) -> tuple[list[dict], list[dict]]:
    """Return the rows of one command with either engine; stdout has rows only, stderr little more than the summary."""
    made = []
    for engine in ("vllm", "hf"):
        done = srlm(*args, "--engine", engine, "--dtype", "float32")
        made.append([json.loads(line) for line in done.stdout.splitlines()])
        assert len(done.stderr.splitlines()) < 8, done.stderr
    return made[0], made[1]


def ask(text: str, sampling: Sampling, seeds: tuple[int, ...] = (0,), **more) -> Request:
    return Request([{"role": "user", "content": text}], sampling, seeds, **more)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model of random weights, with the real tokenizer, 4 heads that two processes can share and a short context."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from srlm_cli.models.load import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """An adapter trained by `srlm sft`, of rank 12, which vLLM rounds up; its weights change every answer."""
    folder = tmp_path_factory.mktemp("adapter")
    taught = write_rows(folder / "ift.jsonl", read_rows(QUICKSTART / "ift.jsonl")[:8])
    settings = ["--lora-r", 12, "--learning-rate", 0.1, "--train-batch-size", 4]
    srlm("sft", "--in", taught, "--model", tiny, *settings, "--out", folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def engines(tiny):
    """The vllm engine and the hf engine over one model."""
    os.environ.update(EAGER | SMALL)
    made = [open_engine(EngineSpec(name, str(tiny), dtype="float32", batch_size=4)) for name in ("vllm", "hf")]
    yield made
    made[0].close()


def answers(engines, requests: list[Request]) -> tuple[list[Completion], list[Completion]]:
    return tuple(list(engine.generate(requests)) for engine in engines)


# --- the same rows ---------------------------------------------------------------------------


def test_sample_writes_the_rows_of_the_hf_engine():
    ours, theirs = both(
        "sample", "--in", QUICKSTART / "ift.jsonl", "--limit", 5, "--model", MODEL, "-n", 2, "--temperature", 0,
        "--max-new-tokens", 24,
    )  # fmt: skip
    assert len(ours) == 10 and ours == theirs
    assert {row["finish_reason"] for row in ours} <= {"stop", "length"}


def test_judge_writes_the_rows_of_the_hf_engine():
    ours, theirs = both(
        "judge", "--in", QUICKSTART / "ranked_eval.jsonl", "--limit", 2, "--model", MODEL, "-k", 1, "--temperature", 0,
        "--max-new-tokens", 24, "--score", "expected", "--force-score",
    )  # fmt: skip
    assert len(ours) == len(theirs) > 2 and len({row["score"] for row in theirs}) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for field in ("scores", "score", "score_mass"):
            assert mine.pop(field) == pytest.approx(other.pop(field), abs=5e-3)
    assert ours == theirs


def test_an_adapter_answers_as_when_it_is_merged(adapter, tiny):
    args = ["sample", "--in", QUICKSTART / "ift.jsonl", "--limit", 3, "-n", 1, "--temperature", 0]
    ours, theirs = both(*args, "--max-new-tokens", 16, "--model", adapter)
    assert ours == theirs
    base = srlm(*args, "--max-new-tokens", 16, "--model", tiny, "--dtype", "float32").stdout
    assert all(
        json.loads(line)["response"] != row["response"] for line, row in zip(base.splitlines(), ours, strict=True)
    )


def test_two_replicas_write_the_rows_of_one_engine(tiny):
    args = ["sample", "--in", QUICKSTART / "ift.jsonl", "--limit", 12, "-n", 1, "--temperature", 0, "--model", tiny]
    args += ["--max-new-tokens", 8, "--batch-size", 1, "--dtype", "float32"]
    replicas = srlm(*args, "--engine", "vllm", "--data-parallel-size", 2)
    assert replicas.stdout == srlm(*args).stdout


# --- the protocol ----------------------------------------------------------------------------


def test_greedy_texts_reasons_and_counts(engines):
    requests = [ask(chat, GREEDY, (0, 1)) for chat in CHATS]
    requests += [ask("word " * 600, GREEDY, (0, 1)), ask("Go on.", GREEDY, prefix="Well,")]
    ours, theirs = answers(engines, requests)
    assert ours == theirs
    assert ours[4].finish_reasons == ["prompt-too-long"] * 2


def test_the_context_may_end_a_completion(engines):
    ours, theirs = answers(engines, [ask("word " * 470, GREEDY)])
    assert ours == theirs
    assert ours[0].finish_reasons == ["length"] and 0 < ours[0].tokens_out < 24


def test_a_stop_text_ends_a_completion_and_is_cut_off(engines):
    free = next(engines[1].generate([ask(CHATS[0], GREEDY)])).texts[0]
    stop = free[len(free) // 2 :][:3]
    ours, theirs = answers(engines, [ask(CHATS[0], Sampling(0.0, 1.0, 24, stop=(stop,)))])
    assert ours[0].texts == theirs[0].texts == [free[: free.index(stop)]]
    assert ours[0].finish_reasons == ["stop"] and ours[0].tokens_out < 24


def test_choices_have_the_probabilities_of_the_hf_engine(engines):
    asked = [ask(chat, Sampling(0.0), prefix="Score: ", choices=DIGITS) for chat in CHATS]
    asked += [
        ask("Rate this from 1 to 10.", Sampling(0.0), prefix="Rating: ", choices=("1", "10", "7")),
        ask("Which?", Sampling(0.0), choices=("Paris is the capital of France", "Paris is the capital of Peru")),
        ask("Pick one.", Sampling(0.7), (3, 4, 5, 6, 7), prefix="Score: ", choices=DIGITS),
        ask("word " * 600, Sampling(0.0), prefix="Score: ", choices=DIGITS),
    ]
    ours, theirs = answers(engines, asked)
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert mine.probabilities == pytest.approx(other.probabilities, abs=1e-3)
        assert sum(mine.probabilities) == pytest.approx(1) and mine.mass == pytest.approx(other.mass, abs=1e-3)
        assert (mine.texts, mine.tokens_in, mine.tokens_out) == (other.texts, other.tokens_in, other.tokens_out)
    assert ours[-1] == theirs[-1] and ours[-1].probabilities is None


def test_a_completion_has_its_own_seed(engines):
    sampling = Sampling(max_new_tokens=8)
    together = [one for c in engines[0].generate([ask(chat, sampling, (5, 6, 7)) for chat in CHATS]) for one in c.texts]
    alone = [next(engines[0].generate([ask(c, sampling, (seed,))])).texts[0] for c in CHATS for seed in (5, 6, 7)]
    assert together == alone and len(set(together)) == len(together)


def test_a_generation_may_wait_for_another_or_be_given_up(engines):
    """The judge asks for missing scores while its first requests are still under way."""
    wanted = list(engines[1].generate([ask(chat, GREEDY) for chat in CHATS * 6]))
    outer = engines[0].generate(ask(chat, GREEDY) for chat in CHATS * 6)
    first = next(outer)
    inner = list(engines[0].generate([ask(CHATS[1], GREEDY)]))
    assert [first, inner[0], next(outer)] == [wanted[0], wanted[1], wanted[1]]
    outer.close()
    assert not engines[0].llm.has_unfinished_requests()
    assert next(engines[0].generate([ask(CHATS[2], GREEDY)])) == wanted[2]


def test_requests_are_read_as_they_are_needed(engines):
    read = []

    def requests():
        for chat in CHATS * 12:
            read.append(chat)
            yield ask(chat, Sampling(0.0, 1.0, 2))

    next(engines[0].generate(requests()))
    assert len(read) == 16  # four batches of four rows


def test_an_answer_follows_its_json_schema(engines):
    value = {"type": "string", "enum": ["0", "1"]}
    schema = {"type": "object", "properties": {"a": value, "b": value}, "required": ["a", "b"]}
    [made] = engines[0].generate([ask("Write a poem.", Sampling(max_new_tokens=64), (0, 1), schema=schema)])
    assert all(set(json.loads(text)) == {"a", "b"} for text in made.texts)


def test_prompts_with_more_tokens_than_vllm_reads_in_a_step(tiny):
    """2,048 tokens. On a CPU vLLM 0.32 ends at a prompt that is read in two parts and has a seed.

    No test may use `engines` after this one: the engine that is closed here ends vLLM's process groups.
    """
    engine = open_engine(EngineSpec("vllm", str(tiny), dtype="float32", batch_size=16))
    try:
        asked = [ask(f"{place} " + "word " * 440, Sampling(max_new_tokens=4), (place,)) for place in range(16)]
        made = list(engine.generate(asked))
    finally:
        engine.close()
    assert sum(one.tokens_in for one in made) > 2 * 2048
    assert [one.finish_reasons[0] in ("stop", "length") for one in made] == [True] * 16


# --- the ends --------------------------------------------------------------------------------


def test_ctrl_c_ends_every_process(tiny, tmp_path):
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        command(
            "sample", "--in", QUICKSTART / "ift.jsonl", "--model", tiny, "--engine", "vllm", "--data-parallel-size", 2,
            "--batch-size", 1, "-n", 1, "--max-new-tokens", 300, "--out", out,
        ),
        stderr=subprocess.PIPE, text=True, env=clean_env(EAGER), start_new_session=True,
    )  # fmt: skip
    part = Path(f"{out}.part")
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in complaint and "Traceback" not in complaint
    gone_by = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < gone_by:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_closed_pipe_ends_quietly(tiny):
    args = ["sample", "--in", QUICKSTART / "ift.jsonl", "--model", tiny, "--engine", "vllm", "--max-new-tokens", 4]
    process = subprocess.Popen(
        command(*args, "--batch-size", 1, "-n", 1, "--quiet"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env(EAGER),
    )  # fmt: skip
    assert json.loads(process.stdout.readline())["response"]
    process.stdout.close()
    complaint = process.stderr.read()
    assert process.wait(timeout=60) == 141 and "Traceback" not in complaint


def test_a_model_that_vllm_cannot_load_is_one_line(tiny, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes() if file.suffix != ".safetensors" else b"no weights")
    done = subprocess.run(
        command("sample", "--model", broken, "--engine", "vllm"),
        input='{"prompt": "x"}', capture_output=True, text=True, env=clean_env(EAGER),
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert "srlm sample: error: vllm cannot load the model" in done.stderr.splitlines()[-1]


def test_arguments_of_the_engine_are_known_and_of_their_kind() -> None:
    from srlm_cli.engines.vllm import engine_args
    from srlm_cli.errors import OptionError

    assert engine_args(["--enforce-eager=true", "seed=7"]) == {"enforce_eager": True, "seed": 7}
    for wrong, why in (
        ("enforce_egaer=true", "perhaps enforce_eager"),
        ("enforce_eager=4", "expected a bool"),
        ("seed", "no argument"),
        ("max_model_len=9", "srlm sets it"),
    ):
        with pytest.raises(OptionError, match=why):
            engine_args([wrong])
