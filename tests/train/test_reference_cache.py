"""The reference's log-probabilities across runs: when they are read from the cache, and when they must not be."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import Srlm, read_json, write_rows
from srlm_cli.errors import SrlmError
from srlm_cli.train import reference_cache
from srlm_cli.train.dpo import dpo
from srlm_cli.train.kto import kto
from srlm_cli.train.losses import DPOLossConfig, KTOLossConfig
from srlm_cli.train.options import RefSync, RunOptions, TrainSpec
from srlm_cli.train.reference_trainer import ReferenceTrainer
from tiny import ALONE, labelled, pairs, tiny_adapter, with_template

torch.set_num_threads(1)
CACHED = RunOptions(quiet=True, ref_cache=True)
ROWS = pairs(6)


def spec_of(model: Path, out: Path) -> TrainSpec:
    settings = {"batch": 3, "dtype": "float32", "device": "cpu", "max_length": 128, "max_steps": 1}
    return TrainSpec(str(model), out, 1e-2, 1e-2, **settings)


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory) -> Path:
    """The cache of a first run on `ROWS`."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SRLM_HOME", str(folder / "home"))
        assert "cached" not in dpo(ROWS, spec_of(base, folder / "m"), DPOLossConfig(), run=CACHED)["reference"]
    return folder / "home"


@pytest.fixture(autouse=True)
def home(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, as a first run left it."""
    monkeypatch.setenv("SRLM_HOME", str(tmp_path / "home"))
    shutil.copytree(first, tmp_path / "home")
    return tmp_path / "home" / "reference"


@pytest.fixture
def spec(base: Path, tmp_path: Path) -> TrainSpec:
    return spec_of(base, tmp_path / "m")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each pass of scoring."""
    compute, made = ReferenceTrainer._reference_scores, []

    def counted(self, scorer, rows, batch_size):
        made.append(len(rows))
        return compute(self, scorer, rows, batch_size)

    monkeypatch.setattr(ReferenceTrainer, "_reference_scores", counted)
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("more", "loss"),
    [
        ({}, {"beta": 0.3}),
        ({"learning_rate": 1e-3, "max_steps": 2, "seed": 1, "optim": "sgd"}, {"loss": "ipo"}),
        ({"max_length": 127, "checkpointing": True}, {"label_smoothing": 0.1}),  # no row is as long
        ({}, {"use_weighting": True}),
    ],
    ids=str,
)
def test_a_later_run_has_the_scores_of_the_first(more, loss, spec, scored, tmp_path, capsys) -> None:
    """It does what it does without the cache, to the last bit."""
    later, config = replace(spec, **more), DPOLossConfig(**loss)
    result = dpo(ROWS, later, config, run=replace(CACHED, quiet=False))
    assert not scored and result["reference"]["cached"]
    assert f"srlm dpo: the reference's scores of 6 pairs are from {tmp_path}/home/reference/" in capsys.readouterr().err
    assert result["start"]["log_ratio_chosen"] == pytest.approx(0, abs=1e-4)
    assert read_json(tmp_path / "m" / "provenance.json")["reference"]["cached"]
    dpo(ROWS, replace(later, out=tmp_path / "n"), config, run=replace(CACHED, ref_cache=False))
    assert scored == [6]
    one, other = weights(tmp_path / "m"), weights(tmp_path / "n")
    assert all(torch.equal(one[name], other[name]) for name in other)


def one_weight(base: Path, folder: Path) -> Path:
    """Return a model with one other weight, where a fingerprint of some blocks of the file does not look."""
    shutil.copytree(base, folder)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][7, 7] += 0.5
    save_file(tensors, file, {"format": "pt"})
    return folder


def other_config(base: Path, folder: Path) -> Path:
    """Return a model with the same weights that computes something else."""
    shutil.copytree(base, folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        "weight", "config", "template", "text", "order", "row", "cut", "bfloat16", "batch", "ld", "attention", "ref",
        "processor", "version", "code",
    ],
)  # fmt: skip
def test_what_scores_depend_on_is_never_mistaken(change, spec, base, other, scored, tmp_path, monkeypatch) -> None:
    rows, config, ref = ROWS, DPOLossConfig(), "previous"
    if change == "weight":
        spec = replace(spec, model=str(one_weight(base, tmp_path / "w")))
    elif change == "config":
        spec = replace(spec, model=str(other_config(base, tmp_path / "w")))
    elif change == "template":
        template = (base / "chat_template.jinja").read_text()
        spec = replace(spec, model=str(with_template(base, tmp_path / "w", "<|system|>" + template)))
    elif change == "text":
        rows = [*ROWS[:-1], {**ROWS[-1], "rejected": ROWS[-1]["rejected"] + "x"}]
    elif change == "order":
        rows = ROWS[::-1]
    elif change == "row":
        rows = ROWS[:-1]
    elif change == "cut":
        spec = replace(spec, max_length=30)
    elif change == "bfloat16":
        spec = replace(spec, dtype="bfloat16")
    elif change == "batch":
        spec = replace(spec, batch=2)
    elif change == "ld":
        config = DPOLossConfig(ld_alpha=0.5)
    elif change == "attention":
        spec = replace(spec, attn_implementation="eager")
    elif change == "ref":
        ref = str(other)
    elif change == "processor":
        monkeypatch.setenv("SRLM_CPU", "another")
    elif change == "version":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif change == "code":
        monkeypatch.setattr(reference_cache, "source_hash", lambda: "another")
    assert "cached" not in dpo(rows, spec, config, ref=ref, run=CACHED)["reference"] and scored == [len(rows)]


@pytest.mark.slow
def test_a_new_adapter_does_not_change_the_reference_and_a_trained_one_does(spec, base, scored, tmp_path) -> None:
    """Whatever its rank and its random numbers are."""
    dpo(ROWS, replace(spec, lora_r=2), DPOLossConfig(), run=CACHED)
    dpo(ROWS, replace(spec, lora_r=4, lora_alpha=32, seed=3, out=tmp_path / "n"), DPOLossConfig(), run=CACHED)
    assert scored == [6]
    for at, seed in enumerate((1, 2)):
        adapter = tiny_adapter(tmp_path / f"a{seed}", base, seed)
        dpo(ROWS, replace(spec, model=str(adapter), out=tmp_path / f"b{seed}"), DPOLossConfig(), run=CACHED)
        assert scored == [6] * (2 + at)
    adapter = tiny_adapter(tmp_path / "a1", base, 1)
    settings = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 3}))
    dpo(ROWS, replace(spec, model=str(adapter), out=tmp_path / "c"), DPOLossConfig(), run=CACHED)
    assert scored == [6] * 4


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_trl_does_not_hash_the_weights_for_its_own_cache(method, spec, monkeypatch) -> None:
    from trl.trainer import dpo_trainer, kto_trainer

    def hashed(model: object) -> str:
        raise AssertionError("hashed")

    for module in (dpo_trainer, kto_trainer):
        monkeypatch.setattr(module, "hash_module", hashed)
    if method == "dpo":
        dpo(ROWS, spec, DPOLossConfig(), run=RunOptions(quiet=True))
    else:
        kto(labelled(6), spec, KTOLossConfig(), run=RunOptions(quiet=True))
    assert dpo_trainer.hash_module is kto_trainer.hash_module is hashed


@pytest.mark.slow
def test_kto_has_scores_of_its_own(spec, scored, tmp_path) -> None:
    """The replies to other prompts depend on the seed, which shuffles the rows."""
    rows = labelled(6)
    for at, (config, more, wanted) in enumerate(
        [
            (KTOLossConfig(), {}, [6]),
            (KTOLossConfig(beta=0.3, desirable_weight=2.0), {"learning_rate": 1e-3}, [6]),
            (KTOLossConfig(), {"seed": 5}, [6, 6]),
            (KTOLossConfig(loss="apo-zero-unpaired"), {}, [6, 6, 6]),
            (KTOLossConfig(loss="apo-zero-unpaired"), {"seed": 5}, [6, 6, 6]),
        ]
    ):
        kto(rows, replace(spec, out=tmp_path / str(at), **more), config, run=CACHED)
        assert scored == wanted, at


@pytest.mark.slow
def test_held_out_rows_and_a_moving_reference(spec, scored, tmp_path) -> None:
    result = dpo(ROWS, spec, DPOLossConfig(), eval_rows=pairs(9)[6:], run=CACHED)
    again = replace(spec, out=tmp_path / "n")
    assert dpo(ROWS, again, DPOLossConfig(), eval_rows=pairs(9)[6:], run=CACHED)["evals"] == result["evals"]
    assert scored == [3]
    moving = replace(spec, out=tmp_path / "o", max_steps=2)
    moved = [dpo(ROWS, moving, DPOLossConfig(beta=beta), sync=RefSync(1, 0.5), run=CACHED) for beta in (0.1, 0.3)]
    assert scored == [3, 6]  # a model of its own, with the configuration of its file
    assert [one["reference"]["syncs"] for one in moved] == [2, 2] and moved[1]["reference"]["cached"]


@pytest.mark.parametrize("kept", ["", "[[1.0, 2.0], [3.", "{}", "[[1.0, 2.0]]", "[1, 2]", str([[-1.0] * 3] * 6), "NaN"])
def test_a_broken_file_is_named_and_made_again(kept, home, spec, scored, tmp_path, capsys) -> None:
    [file] = home.iterdir()
    whole = file.read_text()
    file.write_text(whole.replace(whole.split(", ")[1].rstrip("]"), kept) if kept == "NaN" else kept)
    dpo(ROWS, spec, DPOLossConfig(), run=CACHED)
    assert capsys.readouterr().err.startswith(f"srlm dpo: {file} is broken and not used: ") and scored == [6]
    assert file.read_text() == whole and [*home.iterdir()] == [file]


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.003), ("bfloat16", 1.2)])
@pytest.mark.parametrize("ld", [None, 0.5])
def test_a_wrong_score_stops_the_training_before_its_first_step(dtype, factor, ld, home, spec, tmp_path) -> None:
    """As of another model: the first rows are scored again before each training."""
    spec, config = replace(spec, dtype=dtype), DPOLossConfig(ld_alpha=ld)
    shutil.rmtree(home)
    dpo(ROWS, spec, config, run=CACHED)
    [file] = home.iterdir()
    file.write_text(json.dumps([[score * factor for score in pair] for pair in json.loads(file.read_text())]))
    with pytest.raises(SrlmError, match="the reference's stored log-probability is -.*, and -") as error:
        dpo(ROWS, replace(spec, out=tmp_path / "n"), config, run=CACHED)
    assert error.value.hint == f"no model is written; remove {file}, or use --no-ref-cache"
    assert not (tmp_path / "n").exists()


def test_a_cache_that_cannot_be_written_does_not_stop_a_training(home, spec, tmp_path, capsys, monkeypatch) -> None:
    shutil.rmtree(home.parent)
    home.parent.write_text("a file, where the folder would be")
    assert dpo(ROWS, spec, DPOLossConfig(), run=CACHED)["steps"] == 1
    line = f"srlm dpo: the reference's scores are not kept for later runs: {home}: "
    assert capsys.readouterr().err.startswith(line)
    home.parent.unlink()
    rename = os.replace

    def full(draft, file):
        if Path(file).parent == home:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(draft, file)

    monkeypatch.setattr(os, "replace", full)
    assert dpo(ROWS, replace(spec, out=tmp_path / "n"), DPOLossConfig(), run=CACHED)["steps"] == 1
    assert capsys.readouterr().err == f"{line}No space left on device\n" and not [*home.iterdir()]


def test_the_command_has_a_cache_unless_told_otherwise(srlm: Srlm, base: Path, home: Path) -> None:
    [kept] = home.iterdir()
    kept.unlink()
    write_rows(srlm.folder / "pairs.jsonl", ROWS)
    argv = ["dpo", "--in", "pairs.jsonl", "--model", str(base), "--train-batch-size", "3", "--quiet"]
    env = {**ALONE, "SRLM_HOME": str(home.parent), "SRLM_DPO_REF_CACHE": "true"}
    assert srlm(*argv, "--out", "a", "--no-ref-cache", env=env).code == 0
    assert srlm(*argv, "--out", "b", "--dry-run", env=env).code == 0
    assert not [*home.iterdir()]
    for out, cached in (("c", None), ("d", True)):
        [result] = srlm(*argv, "--out", out, "--beta", "0.3", env=env).rows
        assert result["reference"].get("cached") is cached
