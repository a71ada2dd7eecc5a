"""A revision of a model from a hub, its own code only if that is allowed, and the attention of transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from helpers import Srlm, as_lines, read_json
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.engines.hf.fallback import FallbackModel
from srlm_cli.errors import EngineError, OptionError
from srlm_cli.models import remote
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load import load_model, load_tokenizer
from srlm_cli.models.locate import locate, use
from srlm_cli.runner.provenance import model_identity
from srlm_cli.train import reference
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.packing import Packing
from srlm_cli.train.sft import sft
from tiny import completions, tiny_model

torch.set_num_threads(1)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).write_text("ran")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch) -> None:
    monkeypatch.setattr(remote, "_revisions", {})
    monkeypatch.setattr(remote, "_trusted", set())
    remote._snapshot.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """The folder of the revision v1 of org/m in the cache of a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub" / "models--org--m"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "v1").write_text(COMMIT)
    return tiny_model(cache / "snapshots" / COMMIT)


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch) -> Path:
    """A model with code of its own, which writes the file `ran` where it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model(tmp_path / "own")
    (model / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    settings = read_json(model / "config.json") | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (model / "config.json").write_text(json.dumps(settings))
    return model


def spec_of(model: str | Path, out: Path, **more) -> TrainSpec:
    return TrainSpec(
        model=str(model), out=out, learning_rate=1e-3, final_learning_rate=1e-3, batch=2, max_length=96, device="cpu",
        dtype="float32", **more,
    )  # fmt: skip


# --- a revision ------------------------------------------------------------------------------


def test_a_revision_is_the_model_and_its_identity(hub: Path) -> None:
    use("org/m", "v1", False)
    assert locate("org/m") == str(hub) and load_tokenizer("org/m").eos_token == "<|end|>"
    assert fingerprint("org/m") == f"org/m@{COMMIT}" != fingerprint("org/other")
    identity = model_identity(EngineSpec(model="org/m", revision="v1"))
    assert (identity["model"], identity["model_fingerprint"]) == ("org/m", f"org/m@{COMMIT}")


def test_a_revision_that_is_not_there_is_one_line(hub: Path) -> None:
    with pytest.raises(EngineError, match="cannot load the model org/m, revision v2: "):
        use("org/m", "v2", False) or locate("org/m")


def test_a_folder_has_no_revision(hub: Path) -> None:
    with pytest.raises(OptionError, match="is on this disk"):
        open_engine(EngineSpec(model=str(hub), revision="v1"))


@pytest.mark.parametrize("rank", [0, 2])
def test_later_stages_find_the_revision_of_a_training(hub: Path, tmp_path: Path, rank: int) -> None:
    """Of M0 for `--ref base`, by the provenance; of the base of an adapter, by its settings."""
    about = {"from": {"model": "org/m", "fingerprint": f"org/m@{COMMIT}", "revision": "v1"}}
    spec = spec_of("org/m", tmp_path / "m", revision="v1", lora_r=rank)
    sft(completions(2), spec, run=RunOptions(quiet=True), provenance=about)
    remote._revisions.clear()
    assert reference.resolve("base", str(tmp_path / "m")) == "org/m" and locate("org/m") == str(hub)
    remote._revisions.clear()
    assert load_model(str(tmp_path / "m"), "float32") is not None
    if rank:
        assert read_json(tmp_path / "m" / "adapter_config.json")["revision"] == "v1"


# --- code of a model -------------------------------------------------------------------------


def test_code_of_a_model_runs_only_if_it_is_allowed(own_code: Path, tmp_path: Path) -> None:
    for load in (
        lambda: load_model(str(own_code), "float32"),
        lambda: open_engine(EngineSpec(model=str(own_code), device="cpu")),
        lambda: sft(completions(2), spec_of(own_code, tmp_path / "m"), run=RunOptions(quiet=True)),
    ):
        with pytest.raises(EngineError) as error:
            load()
        assert re.search("needs code of its own.*--trust-remote-code", str(error.value)), error.value
    assert not (tmp_path / "ran").exists()
    spec = spec_of(own_code, tmp_path / "m", trust_remote_code=True)
    assert sft(completions(2), spec, run=RunOptions(quiet=True))["steps"] == 1
    assert (tmp_path / "ran").exists()
    assert type(open_engine(EngineSpec(model=str(own_code), trust_remote_code=True, device="cpu")).net).__name__ == (
        "OwnModel"
    )


def test_nobody_is_asked_whether_code_may_run(own_code: Path, tmp_path: Path, srlm: Srlm) -> None:
    """transformers would read the answer from stdin, where the rows are."""
    for args in (["sample", "--device", "cpu"], ["doctor"]):
        result = srlm(*args, "--model", str(own_code), stdin=as_lines([{"prompt": "y"}, {"prompt": "y"}]))
        assert result.code == 1 and "--trust-remote-code" in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "ran").exists()


# --- attention -------------------------------------------------------------------------------


def test_the_attention_of_transformers_gives_the_same_text(tmp_path: Path) -> None:
    model = str(tiny_model(tmp_path / "m"))
    request = Request([{"role": "user", "content": "Hi"}], Sampling(temperature=0.0, max_new_tokens=12), (1,))
    texts = []
    for name in (None, "eager"):
        engine = open_engine(EngineSpec(model=model, device="cpu", dtype="float32", attn_implementation=name))
        assert isinstance(engine.reader, FallbackModel) == bool(name)
        assert not name or engine.net.config._attn_implementation == name
        texts += [completion.texts for completion in engine.generate([request])]
    assert texts[0] == texts[1]


def test_a_training_uses_the_attention_that_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    model = tiny_model(tmp_path / "m")
    losses, packed = [], []
    monkeypatch.setattr(Packing, "now", lambda self, now=Packing.now: packed.append(now(self)) or packed[-1])
    for name in (None, "eager"):
        spec = spec_of(model, tmp_path / f"out-{name}", attn_implementation=name)
        losses.append(sft(completions(2), spec, run=RunOptions(quiet=True))["first_loss"])
        assert any(packed) == (name is None)
        packed.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"attn_implementation": "org/kernel"}, "runs code from a hub.*--trust-remote-code"),
        ({"attn_implementation": "no-such"}, "cannot load the model .*no-such"),
        ({"engine": "vllm", "attn_implementation": "eager"}, "is for --engine hf.*attention_backend"),
        ({"engine": "openai", "revision": "v1"}, "--revision is for --engine hf and vllm"),
        ({"engine": "echo", "trust_remote_code": True}, "--trust-remote-code is for --engine hf and vllm"),
    ],
)
def test_what_an_engine_cannot_use_is_refused(tmp_path: Path, more: dict, why: str) -> None:
    model = str(tiny_model(tmp_path / "m"))
    with pytest.raises((OptionError, EngineError)) as error:
        open_engine(EngineSpec(**{"model": model, "device": "cpu", **more}))
    assert re.search(why, str(error.value)), error.value
