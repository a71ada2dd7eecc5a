"""How the vllm engine asks for an answer by a JSON schema, with vLLM's classes played: the real ones need vLLM."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from srlm_cli.engines.base import Request, Sampling

SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}, "required": ["a"]}


class Given(SimpleNamespace):
    """Anything that keeps the arguments it is made of."""

    FINAL_ONLY = "final"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch):
    """Return the engine's module, imported with played classes of vLLM 0.32."""
    names = {
        "vllm": ["SamplingParams", "LLMEngine", "RequestOutput", "EngineArgs"],
        "vllm.inputs": ["tokens_input"],
        "vllm.lora": [],
        "vllm.lora.request": ["LoRARequest"],
        "vllm.platforms": ["current_platform"],
        "vllm.sampling_params": ["RequestOutputKind", "StructuredOutputsParams"],
    }
    for name, held in names.items():
        module = ModuleType(name)
        vars(module).update(dict.fromkeys(held, Given))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "srlm_cli.engines.vllm", raising=False)
    yield importlib.import_module("srlm_cli.engines.vllm")
    sys.modules.pop("srlm_cli.engines.vllm", None)


@pytest.mark.parametrize(("thinks", "constrained"), [(False, True), (True, False)])
def test_an_answer_is_constrained_unless_a_thought_can_come_first(engine, thinks: bool, constrained: bool) -> None:
    one = object.__new__(engine.VllmEngine)
    added = []
    one.context, one._tokens, one.stops = 99, lambda text: [1], Given(ids={2})
    one._add = lambda prompt, params: added.append(params) or str(len(added))
    one.template = Given(turn=lambda request: "chat", may_think=lambda more: thinks, family=thinks or None)
    asked = one._ask(Request([], Sampling(), (1, 2), schema=SCHEMA))
    assert asked.names == ["1", "2"]
    schemas = [params.structured_outputs and params.structured_outputs.json for params in added]
    assert schemas == [SCHEMA if constrained else None] * 2
    one._ask(Request([], Sampling(), (1,)))
    assert added[-1].structured_outputs is None
