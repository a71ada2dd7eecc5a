"""transformers, imported without the compiler, sharded tensors and SciPy: all of it can still be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import tiny_adapter, tiny_model

LEFT_OUT = ("torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "sympy")


def run(code: str, **env: str) -> object:
    """Return what a fresh process prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}"], capture_output=True, text=True, env=os.environ | env
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_engine_imports_none_of_them() -> None:
    code = f"import srlm_cli.engines.hf.engine\nprint(json.dumps([name for name in {LEFT_OUT} if name in sys.modules]))"
    assert run(code) == []


@pytest.mark.slow
def test_an_adapter_is_loaded_where_nothing_else_has_imported_sharded_tensors(tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", tiny_model(tmp_path / "base"))
    code = f"""
from srlm_cli.models.load import load_model
print(json.dumps(type(load_model({str(adapter)!r}, "float32")).__name__))
"""
    assert run(code) == "LlamaForCausalLM"


@pytest.mark.slow  # three processes that import all
def test_what_was_left_out_is_itself_when_it_is_used() -> None:
    code = """
import torch
disable = torch.compiler.disable
from srlm_cli.models import light_transformers
from transformers import LlamaConfig, masking_utils, models, utils
assert torch.compiler.disable is disable and utils.is_scipy_available() and torch.distributed.is_available()
config = LlamaConfig(hidden_size=8, num_attention_heads=1, attn_implementation="sdpa")
past = masking_utils.sliding_window_causal_mask_function(2)
mask = masking_utils.create_causal_mask(  # it indexes in a vmap, which needs the class of the compiler
    config, torch.zeros(1, 4, 8), None, None, torch.arange(4)[None], and_mask_function=past
)
tensor = torch.distributed.tensor.DTensor  # as peft has it
import torch.distributed.tensor
print(json.dumps([
    mask[0, 0].int().tolist(), type(torch._dynamo).__name__, torch._dynamo.__name__ in sys.modules,
    tensor is torch.distributed.tensor.DTensor,
]))
"""
    mask = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert run(code) == [mask, "module", True, True]


@pytest.mark.slow
def test_transformers_has_the_same_names() -> None:
    names = "print(json.dumps(sorted(name for name in dir(models) if name[0] != '_')))"
    ours = run(f"from srlm_cli.models import light_transformers\nfrom transformers import models\n{names}")
    assert ours == run(f"from transformers import models\n{names}") and "LlamaForCausalLM" in ours


@pytest.mark.parametrize("env", [{"LOCAL_RANK": "0"}, {}], ids=["in a launched training", "after the compiler"])
@pytest.mark.slow
def test_nothing_stands_in_where_it_may_be_needed(env: dict[str, str]) -> None:
    first = "" if env else "import torch._dynamo\n"
    code = f"{first}from srlm_cli.models import light_transformers\nprint(json.dumps('scipy.optimize' in sys.modules))"
    assert run(code, **env) is True
