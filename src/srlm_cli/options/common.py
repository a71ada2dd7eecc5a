"""Options that several commands share, in groups that `grouping.grouped` lets a command take as one value."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import BadParameter, Context, Option, Typer

from srlm_cli import settings
from srlm_cli.engines.base import EngineSpec, Sampling
from srlm_cli.errors import OptionError
from srlm_cli.options.renamed import RENAMED, Command, note_setting, rename_environment, section
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Shard

OnError = Literal["stop", "skip"]
OnStale = Literal["stop", "restart"]
OnLimit = Annotated[
    Literal["write", "hold"],
    Option("--on-limit", help="When a limit is exceeded (exit 4): write FILE anyway, or keep FILE.part."),
]
EngineName = Literal["hf", "vllm", "openai", "echo", "reward"]
Route = Literal["auto", "chat", "completion"]
SamplingBy = Literal["options", "model"]
ThinkingMode = Literal["auto", "on", "off"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

Seed = Annotated[int, Option("--seed", min=0, help="Random seed.", envvar="SRLM_SEED")]
Quiet = Annotated[
    bool, Option("--quiet", "-q", help="Do not print progress and summary on stderr.", envvar="SRLM_QUIET")
]
In = Annotated[str, Option("--in", "-i", help="JSONL file to read, plain or .gz; - is stdin.", metavar="FILE")]
Out = Annotated[str, Option("--out", "-o", help="JSONL file to write, plain or .gz; - is stdout.", metavar="FILE")]


def shard_of(text: str) -> Shard:
    """Return the part that `K/N` names."""
    number, _, of = str(text).partition("/")  # srlm.toml may have a number
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise BadParameter(f"expected K/N, part K of N, from 1/N to N/N, got {text!r}")
    return Shard(int(number), int(of))


def moment_of(text: str) -> str:
    """Return a date or a date with a time in ISO form."""
    try:
        return datetime.fromisoformat(str(text)).isoformat()  # srlm.toml may have a date
    except ValueError:
        raise BadParameter(f"expected a date such as 2026-07-01, got {text!r}") from None


def json_object(text: str) -> str:
    """Return a JSON object in one spelling; srlm.toml may have a table."""
    try:
        found = json.loads(text) if isinstance(text, str) else dict(text)
        if isinstance(found, dict):
            return json.dumps(found, sort_keys=True, allow_nan=False)
    except (ValueError, TypeError):
        pass
    raise BadParameter(f"expected a JSON object such as '{{\"name\": 1}}', got {text!r}")


TEXT_FILES = (".txt", ".md", ".text", ".prompt", ".jinja", ".toml", ".json")


def text_or_file(text: str) -> str:
    """Return the text of a file of this name, or the text itself, if it is not one word with the ending of a file."""
    text = str(text)  # srlm.toml may have a number
    path = Path(text)
    try:
        if len(text) < 256 and path.is_file():
            return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise BadParameter(f"cannot read {text}: {error}") from None
    if path.suffix.lower() in TEXT_FILES and len(text.split()) == 1:
        raise BadParameter(f"there is no file {text}")
    return text


Thinking = Annotated[
    ThinkingMode,
    Option("--thinking", help="Thinking mode of the chat template (enable_thinking); auto is its own default."),
]
TemplateKwargs = Annotated[
    str | None,
    Option(
        "--template-kwargs", metavar="JSON", parser=json_object,
        help="Options for the chat template, such as '{\"reasoning_effort\": \"low\"}'; chat_template_kwargs of a row "
        "override them.",
    ),
]  # fmt: skip
ThinkMarkers = Annotated[
    tuple[str, str] | None,
    Option(
        "--think-markers", metavar="OPEN CLOSE", show_default="those of the known model families",
        help="How the model begins and ends a thought.",
    ),
]  # fmt: skip
System = Annotated[
    str | None,
    Option("--system", metavar="TEXT|FILE", parser=text_or_file, help="System message before every prompt."),
]

Today = Annotated[
    str | None,
    Option(
        "--today", metavar="DATE", parser=moment_of, show_default="now; a resumed run keeps its date",
        help="Current date for chat templates that write it.",
    ),
]  # fmt: skip

ShardOption = Annotated[
    Shard | None,
    Option(
        "--shard", metavar="K/N", parser=shard_of,
        help="Process shard K of N; concatenating the outputs in order gives the full result.",
    ),
]  # fmt: skip


def use_settings(ctx: Context, path: str | None) -> str:
    """Make the settings of this command the defaults of its options; the flag is read before all others."""
    path = path if path is not None else settings.FILE if Path(settings.FILE).is_file() else ""
    if not ctx.resilient_parsing:
        rename_environment(ctx, section(ctx), ctx.auto_envvar_prefix or "")
        ctx.default_map = settings_for(ctx, path, section(ctx))
    return path


def settings_for(ctx: Context, path: str, command: str) -> dict[str, Any]:
    """Return the settings of one command by parameter name; a string becomes a list if the parameter is a list."""
    lists = {p.name for p in ctx.command.params if getattr(p, "multiple", False)}
    names = {opt.lstrip("-"): p.name for p in ctx.command.params for opt in p.opts if opt.startswith("--")}
    names = {option: name for option, name in names.items() if name not in ("config", "help")}
    sections, note = ctx.find_root().command.sections(), partial(note_setting, ctx, command, path)
    found = settings.of_command(path, command, names, sections, SHARED, RENAMED.get(command), note)
    for option in ctx.command.params:
        if option.name in found:
            refuse_kind(option, found[option.name], path)
    return {name: [value] if name in lists and isinstance(value, str) else value for name, value in found.items()}


def refuse_kind(option: Any, value: Any, path: str) -> None:
    """Raise OptionError for a setting that would become another value, as true the number 1, a list one text."""
    several = option.multiple or option.nargs != 1 or (option.metavar or "").endswith(",...")
    wrong = {
        "true or false": isinstance(value, bool) and not option.is_flag,
        "a list": isinstance(value, list) and not several,
        "a table": isinstance(value, dict) and option.metavar != "JSON",
    }
    for kind in filter(wrong.get, wrong):
        raise OptionError(f"{path}: `{max(option.opts, key=len).lstrip('-')}` cannot be {kind}, got {value!r}")


Config = Annotated[
    str | None,
    Option(
        "--config", "-c", metavar="FILE", envvar="SRLM_CONFIG", is_eager=True, callback=use_settings,
        show_default="srlm.toml, if it is there", help="Settings file with option defaults.",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class ReadOptions:
    """How rows come in."""

    on_error: Annotated[OnError, Option("--on-error", help="On a bad row: stop with exit 3, or skip and count it.")] = (
        "stop"
    )
    rejects: Annotated[
        str | None, Option("--rejects", metavar="FILE", help="Write skipped rows to this file, with reasons.")
    ] = None
    limit: Annotated[int | None, Option("--limit", min=0, help="Read at most N rows.")] = None
    quiet: Quiet = False
    config: Config = None


@dataclass(frozen=True)
class StreamOptions(ReadOptions):
    """How rows come in and go out."""

    in_: In = "-"
    out: Out = "-"
    restart: Annotated[bool, Option("--restart", help="Delete FILE.part of an unfinished run.")] = False
    on_stale: Annotated[
        OnStale, Option("--on-stale", help="When FILE.part is from other settings: stop with exit 2, or restart.")
    ] = "stop"
    on_limit: OnLimit = "write"


Revision = Annotated[
    str | None, Option("--revision", metavar="NAME", help="Branch, tag or commit of a hub id as --model.")
]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="Let code in the model's folder or repository run.")
]
Attention = Annotated[
    str | None,
    Option(
        "--attn-implementation", metavar="NAME", show_default="srlm's own, or that of transformers",
        help="Attention of transformers, such as eager, sdpa or flash_attention_2; without packed passes.",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class EngineOptions:
    """Which model runs, and on what."""

    model: Annotated[
        str | None,
        Option(
            "--model", "-m", "--model-name-or-path", metavar="MODEL", envvar="SRLM_MODEL",
            help="Folder, adapter folder, hub id, .gguf file, or smollm2-135m-instruct (embedded); "
            "with --engine openai the server's model name; with --engine echo: random, longest, shortest, "
            "constant:N or, for srlm judge, rules.",
        ),
    ] = None  # fmt: skip
    engine: Annotated[EngineName, Option("--engine", help="Engine that runs the model.", envvar="SRLM_ENGINE")] = "hf"
    batch_size: Annotated[
        int,
        Option(
            "--batch-size",
            min=1,
            help="Maximum completions generated in parallel; reduced automatically when memory is low.",
        ),
    ] = 256
    device: Annotated[str, Option("--device", help="cpu, cuda or mps; auto picks the best available.")] = "auto"
    dtype: Annotated[
        Dtype, Option("--dtype", help="auto: bfloat16, or float16 with --engine hf, if the hardware is faster with it.")
    ] = "auto"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    attn_implementation: Attention = None
    thinking: Thinking = "auto"
    template_kwargs: TemplateKwargs = None
    think_markers: ThinkMarkers = None
    today: Today = None
    tensor_parallel_size: Annotated[
        int,
        Option("--tensor-parallel-size", min=1, help="With --engine vllm: GPUs per copy of the model."),
    ] = 1
    data_parallel_size: Annotated[
        int, Option("--data-parallel-size", min=1, help="With --engine vllm: copies of the model.")
    ] = 1
    max_model_len: Annotated[
        int | None,
        Option(
            "--max-model-len",
            min=1,
            show_default="the model's own",
            help="With --engine vllm: maximum tokens of prompt and completion.",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Option(
            "--gpu-memory-utilization",
            min=0.01,
            max=1.0,
            show_default="vLLM's own",
            help="With --engine vllm: share of the GPU memory to use.",
        ),
    ] = None
    quantization: Annotated[
        str | None,
        Option(
            "--quantization",
            metavar="NAME",
            show_default="as the model says",
            help="With --engine vllm: quantization of the weights, such as fp8.",
        ),
    ] = None
    engine_arg: Annotated[
        list[str] | None,
        Option(
            "--engine-arg", metavar="KEY=VALUE", help="With --engine vllm: further argument of its engine (repeatable)."
        ),
    ] = None
    base_url: Annotated[
        str | None,
        Option(
            "--base-url", metavar="URL", envvar=["SRLM_BASE_URL", "OPENAI_BASE_URL"], show_default="OpenAI's own",
            help="Server URL for --engine openai, such as http://localhost:8000/v1; the key is OPENAI_API_KEY.",
        ),
    ] = None  # fmt: skip
    route: Annotated[
        Route, Option("--route", help="Server route: chat, or completions with the chat template rendered locally.")
    ] = "auto"
    tokenizer: Annotated[
        str | None,
        Option(
            "--tokenizer",
            metavar="MODEL",
            show_default="--model",
            help="Model whose chat template is rendered locally.",
        ),
    ] = None
    concurrency: Annotated[int, Option("--concurrency", min=1, help="Maximum requests to the server in parallel.")] = 64
    retries: Annotated[
        int, Option("--retries", min=0, help="Retries after 408, 409, 429, 5xx, a dropped connection or a timeout.")
    ] = 8
    timeout: Annotated[float, Option("--timeout", min=0.001, help="Timeout of a server request in seconds.")] = 600.0
    extra_body: Annotated[
        str | None,
        Option("--extra-body", metavar="JSON", parser=json_object, help="Further fields of every server request."),
    ] = None
    check_sampling: Annotated[
        bool,
        Option("--check-sampling/--no-check-sampling", help="Stop when a server ignores temperature and seed."),
    ] = True

    def spec(self, model: str | None = None) -> EngineSpec:
        """Return what to open: these options, with another model where one is given."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return EngineSpec(**{**own, "model": model or self.model, "engine_arg": tuple(self.engine_arg or ())})


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn; the defaults are the paper's."""

    sampling_: Annotated[
        SamplingBy,
        Option(
            "--sampling",
            help="model: use what generation_config.json of the model says, in place of these options, and print it.",
        ),
    ] = "options"
    temperature: Annotated[float, Option("--temperature", min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.7
    top_p: Annotated[
        float,
        Option(
            "--top-p",
            min=0.0,
            max=1.0,
            help="Nucleus sampling: keep the most probable tokens up to this total probability.",
        ),
    ] = 0.9
    top_k: Annotated[int, Option("--top-k", min=0, help="Keep the N most probable tokens; 0 keeps all.")] = 0
    min_p: Annotated[
        float,
        Option("--min-p", min=0.0, max=1.0, help="Keep tokens with at least this share of the largest probability."),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Option("--repetition-penalty", min=0.01, help="Penalty for tokens of prompt and completion; 1 is none."),
    ] = 1.0
    presence_penalty: Annotated[
        float, Option("--presence-penalty", min=-2.0, max=2.0, help="Penalty for tokens of the completion; 0 is none.")
    ] = 0.0
    stop: Annotated[
        list[str] | None,
        Option("--stop", metavar="TEXT", help="End the answer before this text (repeatable)."),
    ] = None
    max_new_tokens: Annotated[
        int, Option("--max-new-tokens", min=1, help="Maximum tokens per completion, the thought included.")
    ] = 512
    max_thinking_tokens: Annotated[
        int | None,
        Option(
            "--max-thinking-tokens", min=1, show_default="no limit",
            help="Close a thought after N tokens; the answer then begins.",
        ),
    ] = None  # fmt: skip
    seed: Seed = 0

    def sampling(self, spec: EngineSpec, stop: tuple[str, ...] = ()) -> Sampling:
        """Return these options as the engines take them, or those of the model to open."""
        if self.max_thinking_tokens is not None and self.max_thinking_tokens >= self.max_new_tokens:
            raise OptionError(
                f"--max-thinking-tokens {self.max_thinking_tokens} leaves no room for an answer",
                f"it has to be below --max-new-tokens, {self.max_new_tokens}",
            )
        own = Sampling(
            self.temperature,
            self.top_p,
            self.max_new_tokens,
            (*stop, *(self.stop or ())),
            max_thinking_tokens=self.max_thinking_tokens,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
        )
        return own if self.sampling_ == "options" else replace(own, **sampling_of_model(spec))


def sampling_of_model(spec: EngineSpec) -> dict[str, float]:
    """Return what a model's own settings say of sampling, and print it; raise OptionError where there are none."""
    if spec.engine not in ("hf", "vllm") or not spec.model:
        raise OptionError("--sampling model reads the settings of a model here: --engine hf or vllm, and --model")
    from srlm_cli.models.load import sampling_of

    if not (found := sampling_of(spec.model)):
        raise OptionError(f"{spec.model} has no settings for sampling in generation_config.json", "--sampling options")
    say(f"srlm: --sampling model: {', '.join(f'{name} {value:g}' for name, value in found.items())}")
    return found


def option_names(*groups: type) -> set[str]:
    """Return the names of a group's options as they are in srlm.toml."""
    return {field.name.strip("_").replace("_", "-") for group in groups for field in fields(group)}


SHARED = option_names(StreamOptions, EngineOptions, SamplingOptions) - {"config", "in", "out"}

# Options that decide how a command works, but not what rows it makes.
OPERATIONAL = {
    "in", "out", "config", "quiet", "restart", "on-stale", "on-limit", "rejects", "batch-size", "device",
    "base-url", "concurrency", "retries", "timeout", "check-sampling",
    "tensor-parallel-size", "data-parallel-size", "gpu-memory-utilization",
    "device-batch-size", "accelerate-config", "num-processes", "save-steps", "report-to", "dry-run", "checkpointing",
    "on-empty",
}  # fmt: skip


def identity(*groups: Any, **values: Any) -> dict[str, Any]:
    """Return what of a command's options decides its rows: all but how rows come and go."""
    own = {f.name.strip("_"): getattr(group, f.name) for group in groups for f in fields(group)}
    return {**own, **values}


def new_app(help: str | None = None) -> Typer:
    """Return an app for the command or the commands of one module."""
    return App(add_completion=False, rich_markup_mode=None, no_args_is_help=False, help=help)


class App(Typer):
    """An app whose commands take the old names of their options, too."""

    def command(self, name: str | None = None, **more: Any) -> Any:
        return super().command(name, **{"cls": Command, **more})
