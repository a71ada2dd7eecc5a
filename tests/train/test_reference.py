"""The reference of DPO: which model it is for a full model, an adapter and a chain, and that it is proven."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import Srlm, slow
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load import load_model, load_tokenizer
from srlm_cli.records import pair_record
from srlm_cli.runner.training import provenance
from srlm_cli.streams.reader import Reader
from srlm_cli.train import reference, reference_trainer, session
from srlm_cli.train.data import dpo_rows
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.render import Renderer
from srlm_cli.train.sft import sft
from tiny import ALONE, completions, pairs, tiny_adapter, tiny_model

torch.set_num_threads(1)
QUIET = RunOptions(quiet=True)
ROWS = pairs(6)
# By how much a log-probability may be off: bfloat16 keeps 8 bits, so each number is right to one part in 256.
NEAR = {"float32": {"abs": 1e-3, "rel": 0.0}, "bfloat16": {"abs": 0.0, "rel": 2**-8}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory) -> Path:
    return tiny_adapter(tmp_path_factory.mktemp("adapter") / "a", base)


def spec_of(model: Path, out: Path, **more: object) -> TrainSpec:
    settings = {"learning_rate": 1e-2, "final_learning_rate": 1e-2, "batch": 3, "dtype": "float32", **more}
    return TrainSpec(str(model), out, **settings)


def sums(folder: Path) -> list[list[float]]:
    """Return summed log-probabilities of (chosen, rejected) by a model's own logits, merged if it is an adapter."""
    model, tokenizer = load_model(str(folder), "float32"), load_tokenizer(str(folder))
    found = []
    for row in dpo_rows(ROWS, Renderer(tokenizer), 512)[0]:
        found.append([])
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            start = len(row["prompt_ids"])
            with torch.inference_mode():
                scores = model(ids).logits[0].log_softmax(-1)
            found[-1].append(sum(float(scores[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
    return found


def scored(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return a list that the reference's log-probabilities are put in as a training computes them."""
    from srlm_cli.train.pair_trainer import PairTrainer

    compute, kept = PairTrainer._reference_scores, []

    def remember(self, *args):
        kept.extend(compute(self, *args))
        return kept

    monkeypatch.setattr(PairTrainer, "_reference_scores", remember)
    return kept


@pytest.mark.parametrize(
    ("model", "more", "dtype"),
    [
        ("base", {}, "bfloat16"),
        ("base", {"lora_r": 2}, "float32"),
        ("adapter", {}, "bfloat16"),
        ("adapter", {"merge": True}, "float32"),
        ("base", {"device_batch_size": 3}, "bfloat16"),
        slow("base", {}, "float32"),
        slow("base", {"lora_r": 2}, "bfloat16"),
        slow("adapter", {}, "float32"),
        slow("adapter", {"merge": True}, "bfloat16"),
        slow("base", {"device_batch_size": 3}, "float32"),
    ],
    ids=str,
)
def test_previous_is_the_model_that_training_starts_from(model, more, dtype, request, tmp_path, monkeypatch):
    start, kept = request.getfixturevalue(model), scored(monkeypatch)
    result = dpo(ROWS, spec_of(start, tmp_path / "m", dtype=dtype, **more), DPOLossConfig(), run=QUIET)
    assert [list(pair) for pair in kept] == [pytest.approx(pair, **NEAR[dtype]) for pair in sums(start)]
    assert result["dtype"] == dtype
    noise = {"float32": 1e-5, "bfloat16": 0.1 * NEAR["bfloat16"]["rel"] * max(map(abs, sum(sums(start), [])))}
    assert result["first_loss"] == pytest.approx(math.log(2), abs=noise[dtype])
    assert result["start"]["log_ratio_chosen"] == pytest.approx(0, abs=1e-4)
    assert result["start"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert result["reference"]["model"] == str(start) and result["last_loss"] < result["first_loss"]
    assert (tmp_path / "m" / "adapter_config.json").exists() == (model == "adapter" or "lora_r" in more) - more.get(
        "merge", False
    )
    assert not (tmp_path / "m" / "ref").exists()


@pytest.mark.parametrize("ref", ["base", "path"])
def test_another_reference_has_its_own_log_probabilities(ref, base, adapter, tmp_path, monkeypatch):
    kept, other = scored(monkeypatch), base if ref == "base" else tiny_model(tmp_path / "other", seed=5)
    name = "base" if ref == "base" else str(other)
    result = dpo(ROWS, spec_of(adapter, tmp_path / "m"), DPOLossConfig(), ref=name, run=QUIET)
    wanted, policy = sums(other), sums(adapter)
    assert [list(pair) for pair in kept] == [pytest.approx(pair, abs=1e-3) for pair in wanted]
    ratios = [ours[0] - theirs[0] for ours, theirs in zip(policy[:3], wanted[:3], strict=True)]
    assert result["start"]["log_ratio_chosen"] == pytest.approx(fmean(ratios), abs=1e-3)
    assert abs(result["start"]["log_ratio_chosen"]) > 0.1
    assert result["reference"] == {"policy": name, "model": str(other), "fingerprint": fingerprint(str(other))}


def test_base_is_where_the_chain_began(base: Path, tmp_path: Path) -> None:
    m1, m2 = tmp_path / "M1", tmp_path / "M2"
    about = {"from": {"model": str(base), "fingerprint": fingerprint(str(base))}}
    sft(completions(6), spec_of(base, m1, lora_r=2), run=QUIET, provenance=about)
    about = {"from": {"model": str(m1), "fingerprint": fingerprint(str(m1))}}
    dpo(ROWS, spec_of(m1, m2, merge=True), DPOLossConfig(), run=QUIET, provenance=about)
    assert reference.resolve("base", str(m2)) == str(base) == reference.resolve("base", str(m1))
    assert reference.resolve("previous", str(m2)) == str(m2)
    (m1 / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(OptionError, match="is not what .*M2 was trained from"):
        reference.resolve("base", str(m2))
    m1.rename(tmp_path / "gone")
    with pytest.raises(OptionError, match="M2 was trained from no such model.*--ref PATH"):
        reference.resolve("base", str(m2))


@pytest.mark.parametrize("dtype", NEAR)
def test_a_policy_that_is_not_its_reference_is_refused_before_the_first_step(dtype, base, tmp_path, monkeypatch):
    from srlm_cli.train.pair_trainer import PairTrainer

    check = PairTrainer.check_scores

    def then_another_policy(trainer, model):
        scores = check(trainer, model)
        with torch.no_grad():
            for layer in trainer.model.parameters():
                layer.mul_(1.1)
        return scores

    monkeypatch.setattr(PairTrainer, "check_scores", then_another_policy)
    monkeypatch.setattr(session, "run_training", lambda *_: pytest.fail("trained all the same"))
    with pytest.raises(SrlmError, match=r"differ before the first step: log-ratios -?0\.\d+ and -?0\.\d+, loss 0\.6"):
        dpo(ROWS, spec_of(base, tmp_path / "m", dtype=dtype), DPOLossConfig(), run=QUIET)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dtype", NEAR)
def test_stored_scores_that_are_not_of_the_reference_are_refused(dtype, base, tmp_path, monkeypatch):
    from srlm_cli.train.pair_trainer import PairTrainer

    compute = PairTrainer._reference_scores
    wrong = lambda *args: [tuple(1.05 * side for side in pair) for pair in compute(*args)]  # noqa: E731
    monkeypatch.setattr(PairTrainer, "_reference_scores", wrong)
    with pytest.raises(SrlmError, match="the reference's stored log-probability is -.* by its own logits"):
        dpo(ROWS, spec_of(base, tmp_path / "m", dtype=dtype), DPOLossConfig(), run=QUIET)


def test_the_check_has_few_logits_at_a_time(base: Path, monkeypatch) -> None:
    """A row of 2,048 tokens and a vocabulary of 50,000 took 1.2 GB for it, more than a step."""
    model, sizes = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), []
    model.register_forward_hook(lambda _, __, found: sizes.append(found.logits.shape[1]))
    monkeypatch.setattr(reference_trainer, "CHUNK", 10 * model.config.vocab_size)
    ids, mask = torch.arange(60) % 50, torch.tensor([0] * 25 + [1] * 35)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped), _rounding=lambda logits: float(len(logits))
    )
    with torch.no_grad():
        total, rounded = reference_trainer.ReferenceTrainer._by_logits(trainer, model, ids, mask)
        assert sizes == [10, 10, 10, 5] and rounded == 35
        log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    assert total == pytest.approx(float(log_probs.gather(1, ids[1:, None])[24:].sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", NEAR)
def test_reference_scores_that_are_not_of_the_reference_are_refused(dtype, base, tmp_path, monkeypatch):
    """As when a mask is off by one: the scores are compared with the reference's own logits."""
    from srlm_cli.train.pair_trainer import PairTrainer

    compute = PairTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        PairTrainer, "compute_ref_log_probs", lambda *args: tuple(side * 0.9 for side in compute(*args))
    )
    with pytest.raises(SrlmError, match="the reference's log-probability is -.* by its own logits"):
        dpo(ROWS, spec_of(base, tmp_path / "m", dtype=dtype), DPOLossConfig(), run=QUIET)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("at_a_time", [0, 1])
def test_short_and_long_replies_are_proven(at_a_time, dtype, base, adapter, tmp_path):
    """Of one token and of hundreds, whose bfloat16 passes differ by more than a wrong reference may."""
    rows = [{"prompt": "Ask?", "chosen": "a" * long, "rejected": "b" * short} for long, short in ((1, 2), (300, 1))]
    spec = spec_of(adapter, tmp_path / "m", batch=2, device_batch_size=at_a_time, dtype=dtype)
    result = dpo(rows, spec, DPOLossConfig(), run=QUIET)
    assert abs(result["start"]["log_ratio_chosen"]) < 1e-3 and result["steps"] == 1


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "a", base)
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    assert load_tokenizer(str(adapter)).chat_template == load_tokenizer(str(base)).chat_template


def test_a_reference_with_other_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = tiny_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(OptionError, match="a different vocabulary from the model to train"):
        dpo(ROWS, spec_of(base, tmp_path / "m"), DPOLossConfig(), ref=str(other), run=QUIET)


def test_merge_writes_the_adapter_into_the_weights(adapter: Path, tmp_path: Path) -> None:
    spec = spec_of(adapter, tmp_path / "a")
    dpo(ROWS, spec, DPOLossConfig(), run=QUIET)
    dpo(ROWS, replace(spec, out=tmp_path / "m", merge=True), DPOLossConfig(), run=QUIET)
    assert (tmp_path / "m" / "model.safetensors").exists() and not list((tmp_path / "m").glob("adapter*"))
    assert sums(tmp_path / "m") == [pytest.approx(pair, abs=1e-3) for pair in sums(tmp_path / "a")]


def test_an_adapter_on_an_adapter_is_a_model(adapter: Path, tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    merged = load_model(str(adapter), "float32")
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer(str(adapter)).save_pretrained(tmp_path / "merged")
    tiny_adapter(upper, tmp_path / "merged", seed=4)
    wanted = sums(upper)
    config = json.loads((upper / "adapter_config.json").read_text())
    (upper / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(adapter)}))
    assert sums(upper) == [pytest.approx(pair, abs=1e-4) for pair in wanted]
    result = dpo(ROWS, spec_of(upper, tmp_path / "m"), DPOLossConfig(), run=QUIET)
    assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dropout_does_not_hide_the_start(base: Path, tmp_path: Path) -> None:
    """Policy and reference are compared without dropout; the first loss, with it, is not ln 2."""
    result = dpo(ROWS, spec_of(base, tmp_path / "m", dropout=0.3, lora_r=2), DPOLossConfig(), run=QUIET)
    assert result["start"]["log_ratio_chosen"] == pytest.approx(0, abs=1e-4)
    assert abs(result["first_loss"] - math.log(2)) > 1e-6


def test_the_command_takes_a_reference(srlm: Srlm, base: Path, adapter: Path) -> None:
    argv = ["dpo", "--model", str(adapter), "--ref", "base", "--max-steps", "1", "--out", "m"]
    result = srlm(*argv, stdin="".join(json.dumps(row) + "\n" for row in ROWS), env=ALONE)
    assert result.code == 0, result.err
    [row] = result.rows
    assert row["reference"]["policy"] == "base" and row["reference"]["model"] == str(base)
    kept = json.loads((srlm.folder / "m" / "provenance.json").read_text())
    assert kept["reference"] == row["reference"] and kept["beta"] == 0.1


def test_provenance_tells_what_a_model_was_trained_with(base: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("trl", "peft", "datasets"):  # as in a process that has not begun to train
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "in.jsonl").write_text("")
    reader = Reader([str(tmp_path / "in.jsonl")], pair_record)
    versions = provenance("dpo", spec_of(base, tmp_path / "out"), reader)["versions"]
    assert versions["torch"] == torch.__version__
    assert {name: versions.get(name) for name in ("trl", "peft", "datasets")} == {
        name: version(name) for name in ("trl", "peft", "datasets")
    }
