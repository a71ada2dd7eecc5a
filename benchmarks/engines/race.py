"""Run the same requests through several engines in turn, each warm and in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from paths import output_file
from work import requests_of

from srlm_cli.models.hardware import pick_dtype
from srlm_cli.models.load import load_tokenizer
from srlm_cli.models.locate import locate

HERE = Path(__file__).parent
CONTENDERS = {
    "srlm": ["srlm_engine.py"],
    "transformers": ["transformers_generate.py"],
    "vllm": ["vllm_generate.py"],
    # other ways of transformers, raced only where they are named
    "static": ["transformers_generate.py", "static"],  # a cache of fixed size
    "compiled": ["transformers_generate.py", "compiled"],  # and a forward pass by torch.compile
    "continuous": ["transformers_continuous.py"],  # generate_batch
}
RACED = ("srlm", "transformers", "vllm")


@dataclass
class Contender:
    """A process that runs a job whenever it is asked; the model stays loaded."""

    name: str
    rows: int
    dtype: str
    process: subprocess.Popen
    versions: dict[str, str] = field(default_factory=dict)
    runs: list[dict] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, python: str, job: dict) -> Contender:
        """Start a contender and wait until it has loaded and warmed up."""
        script, *ways = CONTENDERS[name]
        process = subprocess.Popen(
            [python, str(HERE / "contenders" / script), *ways],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        contender = cls(name, job["rows"], job["dtype"], process)
        contender.versions = contender.tell(json.dumps(job))["ready"]
        return contender

    def tell(self, line: str) -> dict:
        """Send a line and return the answer to it."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} ended with exit code {self.process.wait()}")
        return json.loads(answer)

    def run(self, requests: int) -> dict:
        """Return `tokens`, `rows` and `seconds` of the first N requests."""
        return self.tell(str(requests))

    def stop(self) -> None:
        """End the process, which frees its memory."""
        self.process.stdin.close()
        self.process.wait()


def contenders_of(text: str) -> list[str]:
    """Return the contenders that a command line names."""
    names = text.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"no such contender: {', '.join(unknown)}")
    return names


def options(description: str, unit: str, **defaults: int) -> argparse.ArgumentParser:
    """Return the options that all races have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto: each contender's fastest on this processor; 'float32,srlm=float16' is a type for one alone",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contender, in turn")
    parser.add_argument(
        "--rows",
        default="32,64,128",
        help="completions at once: each size is tried, the best is run; 'srlm=256' is a size for one contender alone",
    )
    parser.add_argument("--probe", type=int, default=defaults["probe"], help=f"{unit} in the trial of a size")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--only", type=contenders_of, default=",".join(RACED), help=f"contenders: {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python", help="Python that has vllm (make test-vllm)")
    parser.add_argument("--write", type=output_file, metavar="FILE", help="put the table into a Markdown file")
    return parser


def race(given: argparse.Namespace, work: dict, stops: list[str], counted: str, unit: str) -> None:
    """Run all contenders in turn and print their rates: `counted` (tokens or rows) a second."""
    command = command_line()
    amount = f"{len(requests_of(**work))} requests x {work['each']}"
    print(f"{command}\n{hardware()}\n{amount}", flush=True)
    contenders = raced(given, work, stops, counted, unit)
    table = as_table(contenders, counted, unit)
    print(table)
    if given.write:
        about = f"{hardware()}. {amount}, up to {given.max_new_tokens} new tokens"
        write_section(given.write, work["task"], f"{about}. Made by `{command}`.\n\n{table}")


def command_line() -> str:
    """Return the command that was given."""
    return "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def raced(
    given: argparse.Namespace, work: dict, stops: list[str], counted: str, unit: str, requests: str = ""
) -> list[Contender]:
    """Return all contenders after their runs in turn; `requests` can give one of them fewer ('64,transformers=8')."""
    if "vllm" in given.only and not shutil.which(given.vllm_python):
        sys.exit(f"{given.vllm_python} does not exist: make test-vllm installs it, and --only can leave vllm out")
    folder = locate(given.model)
    tokenizer = load_tokenizer(given.model)
    asked = requests_of(**work)
    sampling = {name: work["sampling"][name] for name in ("temperature", "top_p")}
    job = {
        "model": folder,
        "sampling": {**sampling, "max_tokens": given.max_new_tokens},
        "stops": stops,
        "stop_ids": stop_ids(folder, tokenizer),
        "work": work,
        "requests": [
            {"at": at, "tokens": tokens(tokenizer, request), "seeds": list(request.seeds)}
            for at, request in enumerate(asked)
        ],
    }
    contenders = [best_size(name, given, job, counted) for name in given.only]
    for repeat in range(given.repeats):
        for contender in contenders:
            (some,) = named_for(contender.name, requests, "--prompts") if requests else [len(asked)]
            contender.runs.append(contender.run(int(some)))
            print(f"  {repeat + 1}. {contender.name}: {told(contender.runs[-1], counted, unit)}", flush=True)
    for contender in contenders:
        contender.stop()
    return contenders


def best_size(name: str, given: argparse.Namespace, job: dict, counted: str) -> Contender:
    """Return a contender with the batch size that was the fastest on a part of the work."""
    python = given.vllm_python if name == "vllm" else sys.executable
    best = None
    sizes = [int(size) for size in named_for(name, given.rows, "--rows")]
    job = {**job, "dtype": dtype_for(name, given.dtype)}
    for rows in sizes:
        contender = Contender.start(name, python, {**job, "rows": rows})
        if len(sizes) == 1:
            return contender
        trial = contender.run(given.probe)
        print(f"  {name}, {rows} at once, {given.probe} requests: {rate(trial, counted):.1f}/s", flush=True)
        if best is None or rate(trial, counted) > best[0]:
            if best:
                best[1].stop()
            best = rate(trial, counted), contender
        else:
            contender.stop()
    return best[1]


def named_for(name: str, choices: str, option: str) -> list[str]:
    """Return those of an option's choices that name a contender, else those that name none."""
    parts = [choice.rpartition("=") for choice in choices.split(",")]
    own = [choice for whose, _, choice in parts if whose == name]
    found = own or [choice for whose, _, choice in parts if not whose]
    return found or sys.exit(f"{option} {choices} has none for {name}")


def dtype_for(name: str, dtypes: str) -> str:
    """Return the type that a contender computes in."""
    (dtype,) = named_for(name, dtypes, "--dtype")
    return pick_dtype(dtype, "cpu", float16=name == "srlm")


def tokens(tokenizer, request) -> list[int]:
    """Return the prompt of a request as the contenders get it."""
    text = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_ids(folder: str, tokenizer) -> list[int]:
    """Return the tokens that end a completion."""
    from transformers import GenerationConfig

    configured = GenerationConfig.from_pretrained(folder).eos_token_id
    return sorted({tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None})


def rate(run: dict, counted: str) -> float:
    """Return what a run counted, a second."""
    return run[counted] / run["seconds"]


def told(run: dict, counted: str, unit: str) -> str:
    """Return a run in words."""
    return f"{rate(run, counted):.1f} {unit}/s, {run['rows']} rows of {run['tokens'] / run['rows']:.0f} tokens"


def as_table(contenders: list[Contender], counted: str, unit: str) -> str:
    """Return the rates as a Markdown table, with the first contender's ratio to each, repeat by repeat."""
    ratio = f"{contenders[0].name}'s ratio to it"
    lines = [
        f"| contender | sequences in parallel | dtype | {unit}/s (lowest to highest) "
        f"| tokens per sequence | {ratio} | versions |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in contenders:
        rates = [rate(run, counted) for run in one.runs]
        ratios = [rate(a, counted) / rate(b, counted) for a, b in zip(contenders[0].runs, one.runs, strict=True)]
        length = statistics.fmean(run["tokens"] / run["rows"] for run in one.runs)
        versions = ", ".join(f"{name} {number}" for name, number in one.versions.items())
        cells = (one.name, one.rows, one.dtype, spread(rates, 1), f"{length:.0f}", spread(ratios, 2), versions)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Return the median and, of several values, the ends."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def hardware() -> str:
    """Return the processor, its cores and the memory."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.+)", about)
    names = {"amx_bf16": "AMX", "avx512_fp16": "AVX512-FP16", "avx512_bf16": "AVX512-BF16"}
    products = "".join(f", {said}" for name, said in names.items() if name in about)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}{products}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a section, or add it at the end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{text}\n{end}"
    old = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    if begin in old and end in old:
        new = old[: old.index(begin)] + section + old[old.index(end) + len(end) :]
    else:
        new = f"{old.rstrip()}\n\n{section}\n"
    path.write_text(new, encoding="utf-8")
