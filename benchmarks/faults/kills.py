"""End commands at random moments, run them again, and compare their files with those of an uninterrupted run.

    python benchmarks/faults/kills.py                 # at least 1,000 ends
    python benchmarks/faults/kills.py --ends 60       # what CI runs

Ends: SIGKILL, SIGTERM and SIGINT; a server that is killed; a full disk (a small file system, where this user may mount
one); a pipe whose reader closes it. After each the same command is run again, until it is done. Its file, or the
weights of its model, then have the bytes of the uninterrupted run. What a closed pipe got is the beginning of it.

Engines are echo, slowed down, a server in a process of its own, and `hf` with a tiny model or with `--model`; `sft`
and `dpo` train the tiny one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SUPPORT = HERE.parents[1] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

import srlm_cli.cli  # noqa: E402
from commands_table import RANKED, RESPONSES  # noqa: E402
from srlm_cli.engines.echo import EchoEngine  # noqa: E402
from srlm_cli.streams import writer  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PAUSE = 0.002  # seconds for a completion of the echo engine
ROOM = 512  # KiB of the small file system


@dataclass(frozen=True)
class Stage:
    """A command to end: its arguments without `--out`, and the files of its output that have to be equal."""

    name: str
    argv: tuple[str, ...]
    files: str = ""
    server: bool = False

    def outputs(self, out: Path) -> dict[str, bytes]:
        """Return the bytes that have to be equal."""
        found = sorted(out.glob(self.files)) if self.files else [out]
        return {file.name: file.read_bytes() for file in found}


# --- processes -------------------------------------------------------------------------------


def start(argv: list[str], folder: Path, pipe: tuple[int, int] | None = None) -> int:
    """Run a command in a fork of this process, which has imported all; return its process."""
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        os.chdir(folder)
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 2)
        os.dup2(pipe[1] if pipe else said, 1)
        for end in pipe or ():
            os.close(end)
        for sign in SIGNALS[1:]:
            signal.signal(sign, signal.SIG_DFL if sign != signal.SIGINT else signal.default_int_handler)
        sys.argv = ["srlm", *argv]
        srlm_cli.cli.main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:  # noqa: BLE001 - the child of a fork must not return
        os._exit(99)
    os._exit(0)


def wait(process: int, seconds: float = 120.0) -> int | None:
    """Return how a process ended, None if it has not after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def finish(stage: Stage, out: Path, folder: Path) -> None:
    """Run a command to its end."""
    code = wait(start([*stage.argv, "--out", str(out)], folder))
    if code != 0:  # None: it has not ended in time
        raise SystemExit(f"{stage.name}: ended with {code} when run again: {(folder / 'said').read_text()[-2000:]}")


@contextmanager
def serving(port: int = 0) -> Any:
    """Run the server of the tests in a process of its own; give that process and its port."""
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); from stub_server import Stub; import time\n"
        f"print(Stub(delay=lambda asked: 0.003, port={port}).port, flush=True); time.sleep(3600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


# --- ends ------------------------------------------------------------------------------------


def by_signal(stage: Stage, out: Path, folder: Path, seconds: float) -> str | None:
    """End a command by a signal at a random moment; return which, None if it was done before."""
    sign = random.choice(SIGNALS)
    process = start([*stage.argv, "--out", str(out)], folder)
    if wait(process, random.uniform(0.0, 1.1 * seconds)) is not None:
        return None
    os.killpg(process, sign) if in_session(process) else os.kill(process, sign)
    wait(process)
    return sign.name


def in_session(process: int) -> bool:
    """Tell whether a process leads a session of its own, as it does soon after its start."""
    try:
        return os.getsid(process) == process
    except ProcessLookupError:
        return False


def by_dead_server(stage: Stage, out: Path, folder: Path, seconds: float) -> str | None:
    """Kill the server that a command asks, at a random moment, and start another in its place."""
    port = int(stage.argv[stage.argv.index("--base-url") + 1].split(":")[2].split("/")[0])
    with serving(port) as (server, _):
        process = start([*stage.argv, "--out", str(out)], folder)
        code = wait(process, random.uniform(0.0, 1.1 * seconds))
        server.kill()
        server.wait()
        code = wait(process) if code is None else 0
    return "server killed" if code else None


def by_full_disk(stage: Stage, out: Path, folder: Path, seconds: float) -> str | None:
    """Run a command on a file system with too little room, then make room."""
    filler = out.parent / "filler"
    free = os.statvfs(out.parent).f_bavail * os.statvfs(out.parent).f_frsize
    left = random.randrange(0, max(free // 4, 1))
    try:
        with open(filler, "wb") as file:
            file.write(b"\0" * (free - left))
    except OSError:
        pass
    code = wait(start([*stage.argv, "--out", str(out)], folder))
    filler.unlink()
    if code not in (0, 1):
        raise SystemExit(f"{stage.name}: a full disk ended it with {code}: {(folder / 'said').read_text()[-2000:]}")
    return "full disk" if code else None


def by_closed_pipe(stage: Stage, whole: bytes, folder: Path, seconds: float) -> str | None:
    """Close the pipe that a command writes to, at a random moment; what came is the beginning of the whole."""
    reading, writing = os.pipe()
    process = start(list(stage.argv), folder, pipe=(reading, writing))
    os.close(writing)
    time.sleep(random.uniform(0.0, seconds))
    os.set_blocking(reading, False)
    try:
        got = os.read(reading, 1 << 22)
    except BlockingIOError:
        got = b""
    os.close(reading)
    code = wait(process)
    if code not in (0, 141):
        raise SystemExit(f"{stage.name}: a closed pipe ended it with {code}")
    if not whole.startswith(got):
        raise SystemExit(f"{stage.name}: a closed pipe got other rows")
    return "closed pipe" if code else None


# --- all of it -------------------------------------------------------------------------------


def stages(folder: Path, port: int, other_model: str | None) -> list[Stage]:
    """Return the commands that are ended, with their inputs in `folder`."""
    from tiny import completions, labelled, pairs, reward_model, tiny_model

    def rows(name: str, made: list[dict]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in made))
        return str(folder / name)

    prompts = rows("prompts.jsonl", [{"prompt": f"Question {n}: why is the sky blue?"} for n in range(60)])
    dialogues = rows(
        "dialogues.jsonl", [{"turns": [f"Question {n}?", "And then?", "Why?"][: 1 + n % 3]} for n in range(40)]
    )
    responses = rows(
        "responses.jsonl", [{**row, "prompt": f"{row['prompt']} {n}"} for n in range(8) for row in RESPONSES]
    )
    judged = rows("judged.jsonl", [
        {"prompt": f"Question {n // 4}", "response": f"Reply {n}", "k": n % 4, "score": float(n * 7 % 5)}
        for n in range(4000)
    ])  # fmt: skip
    ranked = rows("ranked.jsonl", [{**row, "prompt": f"{row['prompt']} {n}"} for n in range(15) for row in RANKED])
    others = rows("others.jsonl", [{**json.loads(line), "response": "Another."} for line in open(responses)])
    echo = ("--engine", "echo", "--quiet")
    asked = ("--engine", "openai", "--base-url", f"http://127.0.0.1:{port}/v1", "--model", "stub-model", "--quiet")
    asked += ("--retries", "0", "--concurrency", "3", "--route", "chat")
    model, other = str(tiny_model(folder / "tiny")), str(tiny_model(folder / "other", seed=1))
    reward = str(reward_model(folder / "reward"))
    scorer = ("--device", "cpu", "--dtype", "float32", "--quiet")
    rewarding = ("--engine", "reward", "--model", reward, *scorer)
    implicit = ("--implicit", "--model", model, "--ref", other, *scorer)
    train = (
        "--model",
        model,
        "--train-batch-size",
        "2",
        "--learning-rate",
        "1e-3",
        "--save-steps",
        "2",
        "--device",
        "cpu",
    )
    train += ("--dtype", "float32", "--quiet")
    hf = ("--model", other_model or model, "--device", "cpu", "--dtype", "float32", "--batch-size", "8", "--quiet")
    hf += ("--max-new-tokens", "12")
    return [
        Stage("sample", ("sample", "--in", prompts, *echo)),
        Stage("sample, turns", ("sample", "--in", dialogues, *echo)),
        Stage("judge", ("judge", "--in", responses, *echo)),
        Stage("judge --by pairwise", ("judge", "--in", responses, *echo, "--by", "pairwise", "--direct")),
        Stage("judge --by group", ("judge", "--in", responses, *echo, "--by", "group")),
        Stage("judge, criteria", ("judge", "--in", responses, *echo, "--template", "criteria")),
        Stage("judge --engine reward, hf", ("judge", "--in", responses, *rewarding)),
        Stage("judge --implicit, hf", ("judge", "--in", responses, *implicit)),
        Stage("gen-prompts", ("gen-prompts", "--in", prompts, *echo, "--count", "40")),
        Stage("make-eft", ("make-eft", "--in", ranked, *echo, "--method", "accept")),
        Stage("make-pairs", ("make-pairs", "--in", judged, "--quiet")),
        Stage("jury", ("jury", "--in", judged, "--limit", "1200", "--quiet")),  # the small file system holds them
        Stage("eval head-to-head",
              ("eval", "head-to-head", "--in", responses, "--against", others, *echo, "--direct")),
        Stage("eval probe", ("eval", "probe", "--in", responses, *echo)),
        Stage("eval judges", ("eval", "judges", "--in", ranked, *echo, "--kinds", "text,pairwise-direct,group")),
        Stage("make-rubric",
              ("make-rubric", "--in", rows("longer.jsonl", [
                  {"prompt": f"Ask {n}?", "responses": [{"text": "Long. " * 9, "rank": 0}, {"text": "No.", "rank": 1}]}
                  for n in range(30)
              ]), *echo, "--model", "longest", "--num-candidates", "0", "--criteria", "criteria",
               "--asked", str(folder / "asked.jsonl"))),
        Stage("sample, server", ("sample", "--in", prompts, *asked, "-n", "2", "--limit", "40"), server=True),
        Stage("judge, server", ("judge", "--in", responses, *asked), server=True),
        Stage("sample, hf", ("sample", "--in", prompts, *hf)),
        Stage("judge, criteria, hf", ("judge", "--in", responses, *hf, "--template", "criteria", "--limit", "16")),
        Stage("judge, hf", ("judge", "--in", responses, *hf, "--template", "score_only")),
        Stage("sft", ("sft", "--in", rows("ift.jsonl", completions(16)), *train), "*.safetensors"),
        Stage("dpo", ("dpo", "--in", rows("pairs.jsonl", pairs(12)), *train), "*.safetensors"),
        # mixed after steps 2, 4 and 6, so that a step after a resumed one is scored by a reference of the checkpoint
        Stage("dpo --ref-sync-steps",
              ("dpo", "--in", rows("pairs.jsonl", pairs(12)), *train, "--ref-sync-steps", "2", "--beta", "1"),
              "*.safetensors"),
        Stage("kto", ("kto", "--in", rows("labelled.jsonl", labelled(12)), *train), "*.safetensors"),
    ]  # fmt: skip


@contextmanager
def small_file_system(folder: Path) -> Any:
    """Mount a file system of little room; give None where this user may not."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={ROOM}k", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def prepare() -> None:
    """Import what the commands do, once, and let them run slowly enough to be ended in the middle."""
    import torch
    import trl  # noqa: F401
    from trl import DPOTrainer, KTOTrainer, SFTTrainer  # noqa: F401

    import srlm_cli.engines.hf.engine
    import srlm_cli.engines.openai
    import srlm_cli.engines.reward
    import srlm_cli.train.dpo
    import srlm_cli.train.implicit
    import srlm_cli.train.kto
    import srlm_cli.train.sft  # noqa: F401

    torch.set_num_threads(1)
    writer.SECONDS_BETWEEN_CHECKPOINTS = 0.01
    generate = EchoEngine.generate

    def slowly(self: EchoEngine, requests: Any) -> Any:
        for completion in generate(self, requests):
            time.sleep(PAUSE)
            yield completion

    EchoEngine.generate = slowly
    gc.freeze()


def ends_of(stage: Stage, whole: bytes, small: Path | None) -> list[tuple[Callable, bool]]:
    """Return the ways to end a stage, and whether it then writes to the small file system."""
    trains = bool(stage.files)
    ways: list[tuple[Callable, bool]] = [(by_signal, False)] * (1 if stage.server else 3)
    ways += [(by_dead_server, False)] * 2 if stage.server else []
    ways += [(by_full_disk, True)] if small and not trains and not stage.server else []
    return ways if trains or stage.server else [*ways, (by_closed_pipe, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ends", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one stage")
    parser.add_argument("--model", help="of the engine hf, instead of a tiny one")
    options = parser.parse_args()
    random.seed(options.seed)
    prepare()
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch, small_file_system(Path(scratch) / "small") as small:
        folder = Path(scratch)
        with serving() as (_, port):
            pass
        todo = [stage for stage in stages(folder, port, options.model) if options.only in (None, stage.name)]
        if not todo:
            parser.error(f"--only {options.only}: no such stage")
        shares = {stage.name: 1 if stage.files or stage.name.endswith("hf") else 4 for stage in todo}  # models are slow
        for stage in todo:
            found[stage.name] = ended = Counter()
            out = folder / ("model" if stage.files else "whole.jsonl")
            with serving(port):
                started = time.monotonic()
                finish(stage, out, folder)
            seconds, whole = time.monotonic() - started, stage.outputs(out)
            remove(out)
            ways = ends_of(stage, b"", small)
            enough = -(-options.ends * shares[stage.name] // sum(shares.values()))
            while ended.total() < enough:
                end, on_small = random.choice(ways)
                if end is by_closed_pipe:
                    ended.update(filter(None, [end(stage, whole[out.name], folder, seconds)]))
                    continue
                target = small / out.name if on_small else out
                for _ in range(random.choice((1, 1, 2))):  # some twice
                    with serving(port) if stage.server and end is by_signal else nothing():
                        if kind := end(stage, target, folder, seconds):
                            ended[kind] += 1
                    if target.exists():
                        break
                with serving(port) if stage.server else nothing():
                    if not target.exists():
                        finish(stage, target, folder)
                if (got := stage.outputs(target)).keys() != whole.keys() or list(got.values()) != list(whole.values()):
                    keep = tempfile.mkdtemp(prefix="srlm-fault-")
                    for name, content in got.items():
                        (Path(keep) / name).write_bytes(content)
                    raise SystemExit(f"{stage.name}: other bytes after {dict(ended)}, kept in {keep}")
                remove(target)
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ended.items()))
            print(f"{stage.name}: {ended.total()} ends ({kinds}), all resumed to the same bytes", flush=True)
    total = sum((Counter(counts) for counts in found.values()), Counter())
    print(f"{total.total()} ends: " + ", ".join(f"{count} {kind}" for kind, count in sorted(total.items())))


@contextmanager
def nothing() -> Any:
    """Do nothing around a block."""
    yield


def remove(out: Path) -> None:
    """Remove an output and what lies beside it."""
    import shutil

    for path in out.parent.glob(out.name + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
