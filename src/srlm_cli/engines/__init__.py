"""Engines run a model, and all follow the protocol in `base`; `open_engine` returns one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import Any

from srlm_cli.engines.base import Completion, Engine, EngineSpec, Request, Scored, Scorer
from srlm_cli.engines.echo import JUDGES, EchoEngine, echo_name
from srlm_cli.engines.equal_questions import asked_once
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.models.collection import without_collection
from srlm_cli.records import Record

NAMES = ("hf", "vllm", "openai", "echo")
FOR_VLLM = ("max_model_len", "gpu_memory_utilization", "quantization", "engine_arg")
OF_MODELS = ("revision", "trust_remote_code", "attn_implementation")
LOCAL = ("hf", "vllm")  # they load a model that srlm can find and train
LOADING = (*LOCAL, "reward")  # they load a model that srlm can find


def open_engine(spec: EngineSpec) -> Engine:
    """Return an engine with its model loaded; raise EngineError if this is not possible."""
    check_options(spec)
    if spec.engine == "echo":
        return EchoEngine(spec.model)
    if spec.engine == "openai":
        from srlm_cli.engines.openai import OpenAIEngine

        return OpenAIEngine(with_model(spec))
    if not spec.model:
        raise OptionError("no model given", "--model takes a folder, a hub id, a .gguf file or an adapter folder")
    from srlm_cli.models.adapters import trains_embeddings
    from srlm_cli.models.locate import is_adapter, locate

    use_model(spec)
    folder = locate(spec.model)  # before torch is loaded: it reports a wrong path immediately
    if spec.engine == "vllm" and is_adapter(folder) and trains_embeddings(folder):
        raise OptionError(f"vLLM cannot load {spec.model}: this adapter has embeddings", "train it with --merge")
    if spec.engine == "hf":
        with without_collection():
            from srlm_cli.engines.hf.engine import HfEngine

            return HfEngine(spec)
    if not find_spec("vllm"):
        raise EngineError("vllm is not installed", "pip install vllm; without a GPU see docs/engines.md")
    if spec.data_parallel_size > 1:
        from srlm_cli.engines.vllm_replicas import Replicas

        return Replicas(spec)
    from srlm_cli.engines.vllm import VllmEngine

    return VllmEngine(spec)


def check_options(spec: EngineSpec) -> None:
    """Raise OptionError for an option of another engine."""
    if spec.engine not in (*NAMES, "reward"):
        raise OptionError(f"no engine {spec.engine!r}", f"one of {', '.join(NAMES)}")
    if spec.engine != "vllm" and (spec.tensor_parallel_size, spec.data_parallel_size) != (1, 1):
        raise OptionError("--tensor-parallel-size and --data-parallel-size are for --engine vllm")
    if spec.engine != "vllm" and (given := [name for name in FOR_VLLM if getattr(spec, name)]):
        raise OptionError(f"--{given[0].replace('_', '-')} is for --engine vllm")
    if spec.engine not in LOADING and (given := [name for name in OF_MODELS if getattr(spec, name)]):
        raise OptionError(f"--{given[0].replace('_', '-')} is for --engine {' and '.join(LOCAL)}")
    if spec.engine == "vllm" and spec.attn_implementation:
        raise OptionError("--attn-implementation is for --engine hf", "--engine-arg attention_backend=NAME")
    if spec.engine != "openai" and spec.extra_body:
        raise OptionError("--extra-body is for --engine openai")
    if spec.engine in LOADING and spec.model in JUDGES and not os.path.exists(spec.model):
        raise OptionError(f"there is no folder {spec.model}", f"--engine echo has the judge `{spec.model}`")


def use_model(spec: EngineSpec) -> None:
    """Use the revision of a spec, and the code of its model, where a spec asks for them."""
    if spec.engine in LOADING and spec.model and (spec.revision or spec.trust_remote_code):
        from srlm_cli.models.locate import use

        use(spec.model, spec.revision, spec.trust_remote_code)


@cache
def template_kwargs(spec: EngineSpec) -> dict[str, Any]:
    """Return what an engine gives to the chat template, by name; raise OptionError for what the template ignores."""
    if spec.engine == "echo" or (spec.thinking == "auto" and not spec.template_kwargs):
        return {}
    if spec.engine == "openai":
        from srlm_cli.engines.openai import LocalTemplate

        template = LocalTemplate(with_model(spec))
        return template.load().kwargs if template.at_hand else template.kwargs
    from srlm_cli.engines.chat_template import ChatTemplate
    from srlm_cli.models.load import load_tokenizer, quiet_libraries

    quiet_libraries()
    return ChatTemplate.of(load_tokenizer(spec.model), spec).kwargs


@cache
def with_model(spec: EngineSpec) -> EngineSpec:
    """Return a spec with a model: if none is given, the only model of the server, which is asked once."""
    if spec.model or spec.engine != "openai":
        return spec
    from srlm_cli.engines.openai_server import only_model

    return replace(spec, model=only_model(spec))


class LazyEngine:
    """An engine that is opened by its first request: without rows no model is loaded.

    `today` is the date of the run if the spec has none.
    """

    scores = False  # whether it scores replies, and writes no text

    def __init__(self, spec: EngineSpec) -> None:
        if spec.engine == "reward" and not self.scores:
            raise OptionError("--engine reward scores replies and writes no text", "srlm judge --engine reward")
        use_model(spec)
        self.spec = spec
        self.name = spec.engine
        self.model = echo_name(spec.model) if spec.engine == "echo" else spec.model or ""
        self.loads = 0
        self.today = spec.today
        self._engine: Engine | None = None

    @property
    def noted(self) -> Mapping[str, int]:
        """The number of server responses that were changed, by the kind of change."""
        return getattr(self._engine, "noted", {})

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in order; open the engine at the first request."""
        pending = iter(requests)
        for first in pending:
            yield from asked_once(chain([first], pending), self.open().generate)

    def open(self) -> Engine:
        """Return the engine, opened by the first call."""
        if self._engine is None:
            self._engine = open_engine(replace(self.spec, today=self.today))
            self.model = self._engine.model
            self.loads += 1
        return self._engine


class LazyScorer(LazyEngine):
    """A scorer that `make` opens at its first replies, from a spec with the date of the run."""

    scores = True

    def __init__(self, spec: EngineSpec, make: Callable[[EngineSpec], Scorer], kind: str) -> None:
        check_options(spec)
        super().__init__(spec)
        self.kind, self._make = kind, make
        self._scorer: Scorer | None = None

    def score(self, replies: list[Record]) -> list[Scored]:
        """Return the score of each response record, in order; open the scorer for the first ones."""
        if not replies:
            return []
        if self._scorer is None:
            self._scorer = self._make(replace(self.spec, today=self.today))
            self.loads += 1
        return self._scorer.score(replies)
