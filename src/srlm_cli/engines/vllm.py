"""Run a causal LM in this process with vLLM.

Each seed is one vLLM request: with `n` of vLLM's SamplingParams the completions of a prompt would have the seeds s,
s+1, ... instead of their own. This costs nothing, because vLLM also splits `n` into single requests
(`LLMEngine.add_request`), and the prefix cache computes the common prompt once.
"""

from __future__ import annotations

import os

# Settings of vLLM that its modules read as they are imported; what the user has set stays.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of worker processes
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the scheduler in this process: no process is left

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import count
from os.path import commonprefix
from pathlib import Path
from typing import Any

import vllm
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from srlm_cli.engines import choice_probabilities
from srlm_cli.engines.base import TEMPLATE_REFUSED, Completion, EngineSpec, Request, Sampling, no_text
from srlm_cli.engines.chat_template import ChatTemplate, token_ids
from srlm_cli.engines.hf.stopping import Stops
from srlm_cli.errors import BadRow, EngineError, OptionError
from srlm_cli.models.hardware import pick_dtype
from srlm_cli.models.load import load_tokenizer, quiet_libraries
from srlm_cli.models.locate import is_adapter, locate

BATCHES_AHEAD = 4
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Arguments that have an option of their own, or that completions in order depend on.
OWN_ARGS = {
    "model": "--model", "tokenizer": "--model", "dtype": "--dtype", "tensor_parallel_size": "--tensor-parallel-size",
    "max_num_seqs": "--batch-size", "max_model_len": "--max-model-len", "quantization": "--quantization",
    "gpu_memory_utilization": "--gpu-memory-utilization", "enable_lora": "an adapter folder as --model",
}  # fmt: skip
CPU_CACHE_BYTES = 4 << 30


class VllmEngine:
    """A model and its tokenizer in vLLM, loaded once; an adapter is not merged into its base."""

    name = "vllm"

    def __init__(self, spec: EngineSpec) -> None:
        quiet_libraries()
        self.model = spec.model
        self.rows_ahead = spec.batch_size * BATCHES_AHEAD
        self.tokenizer = load_tokenizer(spec.model)
        self.template = ChatTemplate.of(self.tokenizer, spec)
        self.lora = _lora(spec.model)
        self.llm = _load(spec, self.lora)
        self.context = self.llm.model_config.max_model_len
        configured = self.llm.model_config.try_get_generation_config().get("eos_token_id")
        self.stops = Stops(configured, self.template)
        self._names = map(str, count())
        self._finished: dict[str, vllm.RequestOutput] = {}

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in order.

        Requests are read ahead up to `rows_ahead` rows, which is what a killed run has to do again;
        as rows finish others take their place. Another `generate` may run while this one waits.
        """
        waiting: deque[_Asked] = deque()
        rows = 0
        try:
            for request in requests:
                waiting.append(self._ask(request))
                rows += len(waiting[-1].names) or 1
                while rows >= self.rows_ahead:
                    rows -= len(waiting[0].names) or 1
                    yield self._answer(waiting.popleft())
            while waiting:
                yield self._answer(waiting.popleft())
        finally:
            self._abort(name for asked in waiting for name in asked.names)

    def close(self) -> None:
        """End the worker processes of tensor parallelism and free the memory."""
        self.llm.engine_core.shutdown()

    def _ask(self, request: Request) -> _Asked:
        """Hand one request to the scheduler, unless the chat template refuses it."""
        try:
            chat = self.template.turn(request)
        except BadRow as refusal:
            return _Asked(request, 0, fits=False, refusal=no_text(request, TEMPLATE_REFUSED, why=str(refusal)))
        prompt = self._tokens(chat)
        if request.choices:
            return self._ask_choices(request, prompt, [self._tokens(chat + choice) for choice in request.choices])
        room = self.context - len(prompt)
        asked = _Asked(request, len(prompt), fits=room > 0, prompt=prompt, chat=chat)
        if asked.fits:
            first = min(room, request.sampling.max_thinking_tokens or room)
            schema = None if self.template.may_think(request.template_kwargs) else request.schema
            asked.names = [
                self._add(prompt, self._params(request.sampling, seed, first, schema)) for seed in request.seeds
            ]
        return asked

    def _answer(self, asked: _Asked) -> Completion:
        """Step until all parts of a request have finished, and return its completion."""
        outputs = [self._wait(name) for name in asked.names]
        if not asked.fits:
            return asked.refusal or no_text(asked.request, "prompt-too-long", asked.tokens_in)
        if asked.request.choices:
            return self._chosen(asked, outputs)
        written = self._with_closed_thoughts(asked, [list(output.outputs[0].token_ids) for output in outputs])
        opened = self.template.marks.opened(asked.chat)
        ended = [self.stops.finished(tokens, asked.request.sampling, opened, at_limit) for tokens, at_limit in written]
        texts, reasons, thoughts, counts = zip(*ended, strict=True)
        found = thoughts if any(thoughts) else ()
        return Completion(list(texts), list(reasons), asked.tokens_in, sum(counts), thoughts=found)

    def _with_closed_thoughts(self, asked: _Asked, written: list[list[int]]) -> list[tuple[list[int], bool]]:
        """Return the tokens of completions; those inside a thought at its limit continue with their answer."""
        limit, most = asked.request.sampling.max_thinking_tokens, asked.request.sampling.max_new_tokens
        if limit is None:
            return [(tokens, False) for tokens in written]
        more: dict[int, tuple[list[int], str | None]] = {}
        for place, tokens in enumerate(written):
            if len(tokens) < limit or not self.stops.ids.isdisjoint(tokens):
                continue
            closing = self.stops.closing(tokens, asked.chat)
            begun = [*tokens, *closing]
            room = min(most, self.context - len(asked.prompt)) - len(begun)
            params = self._params(asked.request.sampling, asked.request.seeds[place], room) if room > 0 else None
            more[place] = begun, params and self._add([*asked.prompt, *begun], params)
            written[place] = begun
        for place, (begun, name) in more.items():
            if name:
                written[place] = [*begun, *self._wait(name).outputs[0].token_ids]
        return [(tokens, place in more and len(more[place][0]) > limit) for place, tokens in enumerate(written)]

    # --- the scheduler ---------------------------------------------------------------------------

    def _add(self, prompt: list[int], params: SamplingParams) -> str:
        name = next(self._names)
        try:
            self.llm.add_request(name, tokens_input(prompt), params, lora_request=self.lora)
        except ValueError as error:
            raise EngineError(f"vllm rejected a request: {_first_line(error)}") from error
        return name

    def _wait(self, name: str) -> vllm.RequestOutput:
        """Step until one request has finished; other finished requests are kept for their callers."""
        while name not in self._finished:
            try:
                outputs = self.llm.step()
            except Exception as error:  # of the model's code or of a worker process
                raise EngineError(f"vllm failed: {_first_line(error)}", "VLLM_LOGGING_LEVEL=INFO shows more") from error
            self._finished.update((output.request_id, output) for output in outputs if output.finished)
        return self._finished.pop(name)

    def _abort(self, names: Iterable[str]) -> None:
        """Abort requests that are no longer needed."""
        left = [name for name in names if not self._finished.pop(name, None)]
        if left:
            self.llm.abort_request(left)

    # --- tokens and texts ------------------------------------------------------------------------

    def _tokens(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def _params(self, sampling: Sampling, seed: int, room: int, schema: dict[str, Any] | None = None) -> SamplingParams:
        """Return the sampling of one completion; vLLM knows no top-p of 0, which is greedy.

        Its stop texts would end a thought, too: where the template knows thoughts, texts are cut afterwards. So would a
        schema forbid the thought: an answer that can begin with one is not constrained.
        """
        stop = [] if self.template.family else list(sampling.stop)
        greedy = sampling.temperature <= 0 or sampling.top_p <= 0
        try:
            return SamplingParams(
                temperature=0.0 if greedy else sampling.temperature,
                top_p=1.0 if greedy else sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                presence_penalty=sampling.presence_penalty,
                seed=seed,
                max_tokens=min(sampling.max_new_tokens, room),
                stop=stop,
                stop_token_ids=sorted(self.stops.ids),
                detokenize=bool(stop),
                output_kind=RequestOutputKind.FINAL_ONLY,
                structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
            )
        except ValueError as error:
            raise EngineError(f"vllm refused the sampling: {_first_line(error)}") from error

    # --- choices ---------------------------------------------------------------------------------

    def _ask_choices(self, request: Request, prompt: list[int], branches: list[list[int]]) -> _Asked:
        """Request the probabilities of the next token at each branching point of the choices.

        Each choice is tokenized together with the text before it, because a tokenizer can merge the
        two. The choices are a tree of tokens. Each inner node is one request for one token, and the prefix cache has
        their common tokens.
        """
        shared = len(commonprefix(branches))
        ends = [tuple(branch[shared:]) for branch in branches]
        asked = _Asked(request, len(prompt), fits=max(map(len, branches)) <= self.context, ends=ends)
        asked.nodes = sorted({end[:size] for end in ends for size in range(len(end))}) if asked.fits else []
        for node in asked.nodes:
            longer = [end for end in ends if len(end) > len(node) and end[: len(node)] == node]
            params = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                logprob_token_ids=sorted({end[len(node)] for end in longer}),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            asked.names.append(self._add([*branches[0][:shared], *node], params))
        return asked

    def _chosen(self, asked: _Asked, outputs: list[vllm.RequestOutput]) -> Completion:
        """Multiply the probabilities along each choice, and draw."""
        behind = {node: output.outputs[0].logprobs[0] for node, output in zip(asked.nodes, outputs, strict=True)}
        logs = [sum(behind[end[:at]][token].logprob for at, token in enumerate(end)) for end in asked.ends]
        probabilities = choice_probabilities.of_texts(logs, asked.ends)
        mass = choice_probabilities.mass_of(logs, asked.ends)
        return choice_probabilities.completion(asked.request, probabilities, mass, asked.tokens_in)


@dataclass
class _Asked:
    """A request and the names of its vLLM requests: one per seed, or one per branching point of the choices.

    `ends` are the tokens of each choice after the tokens that all have in common. Without `fits` nothing was
    asked: the prompt is too long, or has met a `refusal`.
    """

    request: Request
    tokens_in: int
    fits: bool
    refusal: Completion | None = None
    prompt: list[int] = field(default_factory=list)
    chat: str = ""
    names: list[str] = field(default_factory=list)
    ends: list[tuple[int, ...]] = field(default_factory=list)
    nodes: list[tuple[int, ...]] = field(default_factory=list)


# --- loading -------------------------------------------------------------------------------------


def _load(spec: EngineSpec, lora: LoRARequest | None) -> vllm.LLMEngine:
    """Return vLLM with the model loaded; raise EngineError if this is not possible."""
    kind = current_platform.device_type
    if spec.device not in ("auto", kind):
        raise OptionError(
            f"vllm runs on {kind} here, not on {spec.device}",
            "leave --device out; CUDA_VISIBLE_DEVICES says which GPUs are used",
        )
    options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(lora.lora_path)} if lora else {}
    if kind == "cpu":
        # vLLM 0.32 sets back the random numbers of a prompt that it has read in part, which a CPU's cannot do.
        options["enable_chunked_prefill"] = False
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):  # else it takes nearly all of the memory
            options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    # A weak model writes spaces between the parts of a JSON answer until its limit, where they are allowed.
    options["structured_outputs_config"] = {"backend": "xgrammar", "disable_any_whitespace": True}
    options |= {name: value for name in ("gpu_memory_utilization", "quantization") if (value := getattr(spec, name))}
    options |= engine_args(spec.engine_arg)
    folder = locate(spec.model)
    try:
        own = {
            "model": locate(_adapter(folder)["base_model_name_or_path"]) if lora else folder,
            "tokenizer": folder,
            "dtype": pick_dtype(spec.dtype, kind),
            "tensor_parallel_size": spec.tensor_parallel_size,
            "max_model_len": spec.max_model_len or -1,  # the model's own, or what the memory holds
            "max_num_seqs": spec.batch_size,
            "trust_remote_code": spec.trust_remote_code,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        asked = vllm.EngineArgs(**own | options)
        with _hidden("llvmlite.binding.ffi"):
            return vllm.LLMEngine.from_engine_args(asked)
    except Exception as error:  # of vLLM, and of whatever reads the model for it
        raise EngineError(
            f"vllm cannot load the model {spec.model}: {_first_line(error)}", "VLLM_LOGGING_LEVEL=INFO shows more"
        ) from error


def engine_args(given: Iterable[str]) -> dict[str, Any]:
    """Return arguments of vLLM's engine from `KEY=VALUE`; raise OptionError for an unknown or a wrong one.

    A value is JSON, otherwise a text. It needs the type of the argument's default, if there is one.
    """
    known = {one.name: one.default for one in dataclasses.fields(vllm.EngineArgs)}
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or name not in known:
            close = get_close_matches(name, known, 1)
            raise OptionError(
                f"--engine-arg {text}: vLLM {vllm.__version__} has no argument {name!r}",
                f"perhaps {close[0]}" if close else "KEY=VALUE, by the names of vllm.EngineArgs",
            )
        if name in OWN_ARGS:
            raise OptionError(f"--engine-arg {name}: srlm sets it", OWN_ARGS[name])
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
        default = known[name]
        kind = type(default) if isinstance(default, bool | int | float | str) else None
        right = isinstance(found[name], (int, float) if kind is float else kind) if kind else True
        if not right or (kind in (int, float) and isinstance(found[name], bool)):
            raise OptionError(f"--engine-arg {text}: expected a {kind.__name__}, as its default {default!r}")
    return found


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Hide a module while vLLM looks through all there are.

    On a CPU it asks each object in them for its attributes. The library that llvmlite keeps there, once the hf engine
    has been used in this process, has an attribute of any name, and breaks it.
    """
    found = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if found:
            sys.modules[module] = found


def _lora(model: str) -> LoRARequest | None:
    """Return the request for an adapter folder, or None for a whole model."""
    folder = locate(model)
    return LoRARequest("adapter", 1, folder) if is_adapter(folder) else None


def _adapter(folder: str) -> dict:
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def _rank(folder: str) -> int:
    """Return the smallest rank known to vLLM that an adapter fits in."""
    own = _adapter(folder)
    needed = max([own["r"], *(own.get("rank_pattern") or {}).values()])
    return next((rank for rank in LORA_RANKS if rank >= needed), needed)


def _first_line(error: Exception) -> str:
    """Return vLLM's error message without the text that pydantic adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1].partition(" [type=")[0] if "validation error" in lines[0] and lines[1:] else lines[0]
