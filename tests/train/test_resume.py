"""A training that ends before its end: killed, out of disk, NaN, two at once; and how it goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import HERE, Srlm, read_json, read_rows, slow, write_rows
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load import load_model, load_tokenizer
from srlm_cli.records import Record
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft
from srlm_cli.train.workdir import locked
from tiny import ALONE, completions, pairs, tiny_adapter, tiny_model

torch.set_num_threads(1)
EVERY_2 = RunOptions(quiet=True, save_steps=2)


class Killed(BaseException):
    """Ends a training as kill -9 does: nothing between the step and the test catches it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory) -> Path:
    return tiny_adapter(tmp_path_factory.mktemp("adapter") / "a", base)


def spec_of(model: Path, out: Path, **more: object) -> TrainSpec:
    common = {
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "batch": 4,
        "epochs": 2,
        "device": "cpu",
        "dtype": "float32",
        "device_batch_size": 1,
    }
    return TrainSpec(model=str(model), out=out, **{**common, **more})


def train(kind: str, spec: TrainSpec, run: RunOptions = EVERY_2) -> Record:
    if kind == "sft":
        return sft(completions(18), spec, run=run)
    return dpo(pairs(18), spec, DPOLossConfig(), run=run)


def die_in_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the training die in its micro-batch `number`, from 1."""
    from transformers import Trainer

    step, done = Trainer.training_step, []

    def mortal(self, *args, **named):
        done.append(1)
        if len(done) == number:
            raise Killed
        return step(self, *args, **named)

    monkeypatch.setattr(Trainer, "training_step", mortal)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-6


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Return uninterrupted trainings, each made once: its folder and its results."""
    made = {}

    def whole(kind: str, model: Path, more: Record) -> tuple[Path, Record]:
        key = (kind, model.name, *more.items())
        if key not in made:
            out = tmp_path_factory.mktemp("whole") / "m"
            made[key] = out, train(kind, spec_of(model, out, **more))
        return made[key]

    return whole


# 18 rows in steps of 4: an epoch has 5 steps (18 micro-batches, the last step of 2), two have 10.
@pytest.mark.parametrize(
    ("kind", "model", "more", "at"),
    [
        ("dpo", "base", {"lora_r": 2, "dropout": 0.1}, 27),
        slow("sft", "base", {"dropout": 0.1}, 27),
        slow("dpo", "base", {}, 11),
        slow("dpo", "base", {}, 27),
        slow("dpo", "adapter", {"device_batch_size": 2}, 11),
        slow("dpo", "base", {"lora_r": 2, "dropout": 0.1}, 11),
        slow("dpo", "adapter", {"device_batch_size": 2}, 27),
        slow("sft", "base", {"dropout": 0.1}, 11),
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights(kind, model, more, at, wholes, request, tmp_path, monkeypatch):
    model = request.getfixturevalue(model)
    if more.get("device_batch_size") == 2:
        at = (at + 1) // 2
    uninterrupted, whole = wholes(kind, model, more)
    spec = spec_of(model, tmp_path / "killed", **more)
    with monkeypatch.context() as patched:
        die_in_micro_batch(patched, at)
        with pytest.raises(Killed):
            train(kind, spec)
    part = tmp_path / "killed.part"
    kept = read_json(part / "state.json")["checkpoint"]
    assert kept > 0 and [file.name for file in part.glob("checkpoint-*")] == [f"checkpoint-{kept}"]
    result = train(kind, spec)
    assert result["resumed_from"] == kept and result["steps"] == whole["steps"] == 10
    assert not part.exists() and not list((tmp_path / "killed").glob("checkpoint*"))
    assert_same(uninterrupted, tmp_path / "killed")
    one, other = (read_rows(folder / "metrics.jsonl") for folder in (uninterrupted, tmp_path / "killed"))
    assert [row["step"] for row in other] == list(range(1, 11))
    for a, b in zip(one, other, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6) and b["learning_rate"] == a["learning_rate"]
    assert result["first_loss"] == whole["first_loss"] and result["train_loss"] == pytest.approx(whole["train_loss"])


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "here"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_resumed_training_keeps_the_dtype_that_it_began_with(begun, here, base, tmp_path, monkeypatch, capsys):
    """`--dtype auto` on a processor of one kind, then on one of the other; another dtype by name is refused."""

    def on_a_processor_of(dtype: str) -> None:
        monkeypatch.setenv("SRLM_CPU", {"bfloat16": "AMD avx512_bf16", "float32": "Intel"}[dtype])

    spec = spec_of(base, tmp_path / "m", dtype="auto")
    on_a_processor_of(begun)
    with monkeypatch.context() as patched:
        die_in_micro_batch(patched, 11)
        with pytest.raises(Killed):
            train("sft", spec)
    on_a_processor_of(here)
    with pytest.raises(OptionError, match=f"other settings: dtype '{begun}' -> '{here}'"):
        train("sft", replace(spec, dtype=here))
    result = train("sft", spec, replace(EVERY_2, quiet=False))
    assert result["dtype"] == begun and result["resumed_from"] == 2
    assert f"training in {begun}, as the unfinished run began; --dtype auto is {here}" in capsys.readouterr().err
    assert read_json(tmp_path / "m" / "provenance.json")["settings"]["dtype"] == begun
    train("sft", replace(spec, out=tmp_path / "whole", dtype=begun))
    assert_same(tmp_path / "whole", tmp_path / "m")


def test_kill_9_and_the_same_command_again(srlm: Srlm, base: Path) -> None:
    write_rows(srlm.folder / "pairs.jsonl", pairs(18))
    options = "--train-batch-size 4 --device-batch-size 1 --epochs 2 --learning-rate 1e-3 --save-steps 2".split()
    options += ["--in", "pairs.jsonl"]
    argv = ["dpo", "--model", str(base), *options]
    mortal = [sys.executable, str(HERE / "mortal_training.py")]
    assert srlm(*argv, "--out", "whole", env=ALONE).code == 0
    killed = srlm.run([*mortal, "21", *argv, "--out", "killed"], env=ALONE)
    assert killed.code == -9 and not (srlm.folder / "killed").exists()
    again = srlm(*argv, "--out", "killed", env=ALONE)
    assert again.code == 0 and "resuming from step 4" in again.err, again.err
    assert again.rows[0]["resumed_from"] == 4
    assert_same(srlm.folder / "whole", srlm.folder / "killed")
    assert not (srlm.folder / "killed.part").exists()


@pytest.fixture(scope="module")
def killed_at_step_5(base: Path, tmp_path_factory) -> Path:
    """The unfinished folder of a training that was killed after the checkpoint of step 4."""
    spec = spec_of(base, tmp_path_factory.mktemp("killed") / "m")
    with pytest.MonkeyPatch.context() as patched:
        die_in_micro_batch(patched, 20)
        with pytest.raises(Killed):
            train("dpo", spec)
    return spec.out.with_name("m.part")


@pytest.fixture
def unfinished(base: Path, killed_at_step_5: Path, tmp_path: Path) -> TrainSpec:
    """A copy of that training."""
    shutil.copytree(killed_at_step_5, tmp_path / "m.part")
    return spec_of(base, tmp_path / "m")


def test_the_reference_is_not_scored_again(unfinished: TrainSpec, monkeypatch) -> None:
    from srlm_cli.train.pair_trainer import PairTrainer

    monkeypatch.setattr(PairTrainer, "_reference_scores", lambda *_: pytest.fail("scored again"))
    assert train("dpo", unfinished)["steps"] == 10


def test_another_setting_is_refused_and_named(unfinished: TrainSpec) -> None:
    state = (unfinished.out.with_name("m.part") / "state.json").read_text()
    for change in ({"learning_rate": 2e-3}, {"seed": 1}, {"lora_r": 2}):
        with pytest.raises(OptionError, match=f"other settings: {next(iter(change))} .* -> .*--restart"):
            train("dpo", replace(unfinished, **change))
    with pytest.raises(OptionError, match="beta"):
        dpo(pairs(18), unfinished, DPOLossConfig(beta=0.2), run=EVERY_2)
    with pytest.raises(OptionError, match="'loss': 'sigmoid'.* -> .*'apo-zero': 0.2"):
        dpo(pairs(18), unfinished, DPOLossConfig(loss={"sigmoid": 0.8, "apo-zero": 0.2}), run=EVERY_2)
    with pytest.raises(OptionError, match="rows"):
        dpo(pairs(19), unfinished, DPOLossConfig(), run=EVERY_2)
    assert (unfinished.out.with_name("m.part") / "state.json").read_text() == state
    assert "resumed_from" not in train("dpo", replace(unfinished, seed=1), replace(EVERY_2, on_stale="restart"))


def test_restart_begins_anew(unfinished: TrainSpec) -> None:
    assert "resumed_from" not in train("dpo", unfinished, replace(EVERY_2, restart=True))


def test_a_smaller_device_batch_goes_on(unfinished: TrainSpec) -> None:
    """What ran out of memory goes on with less at a time."""
    assert train("dpo", replace(unfinished, device_batch_size=2))["resumed_from"] == 4


def test_a_checkpoint_that_is_gone_is_none(unfinished: TrainSpec) -> None:
    """As after a kill while OUT.part was being removed."""
    shutil.rmtree(unfinished.out.with_name("m.part") / "checkpoint-4")
    result = train("dpo", unfinished)
    assert result["steps"] == 10 and "resumed_from" not in result


def test_a_torn_checkpoint_is_thrown_away(unfinished: TrainSpec) -> None:
    part = unfinished.out.with_name("m.part")
    shutil.copytree(part / "checkpoint-4", part / "checkpoint-6")
    (part / "checkpoint-6" / "optimizer.pt").write_bytes(b"torn")
    with open(part / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert train("dpo", unfinished)["resumed_from"] == 4
    assert [row["step"] for row in read_rows(unfinished.out / "metrics.jsonl")] == list(range(1, 11))


@pytest.mark.parametrize("fails", ["checkpoint", slow("model")])
def test_a_full_disk_leaves_the_last_checkpoint(base: Path, tmp_path: Path, monkeypatch, fails: str) -> None:
    from transformers import Trainer
    from transformers.modeling_utils import PreTrainedModel

    spec = spec_of(base, tmp_path / "m")
    kind, name = (
        (Trainer, "_save_optimizer_and_scheduler") if fails == "checkpoint" else (PreTrainedModel, "save_pretrained")
    )
    save = getattr(kind, name)

    def full(self, folder, *args, **named):
        save(self, folder, *args, **named)
        if Path(folder).name == ("checkpoint-6" if fails == "checkpoint" else "model"):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patched:
        patched.setattr(kind, name, full)
        with pytest.raises(SrlmError) as failed:
            train("dpo", spec)
    kept = 4 if fails == "checkpoint" else 8
    assert "No space left on device" in failed.value.message and "MB are free" in failed.value.message
    assert f"resume from step {kept}" in failed.value.hint
    assert not spec.out.exists() and not (tmp_path / "m.part" / "checkpoint-6").exists()
    assert train("dpo", spec)["resumed_from"] == kept
    train("dpo", replace(spec, out=tmp_path / "whole"))
    assert_same(tmp_path / "whole", spec.out)


def test_files_that_may_not_grow_end_in_one_line(srlm: Srlm, base: Path) -> None:
    """A real write error in the middle of a checkpoint: files are limited to less than the optimizer's."""
    import resource

    size = (base / "model.safetensors").stat().st_size
    write_rows(srlm.folder / "rows.jsonl", completions(8))
    argv = "--train-batch-size 2 --save-steps 2 --in rows.jsonl --out m".split()
    limit = (int(size * 1.4), resource.RLIM_INFINITY)
    result = srlm(
        "sft",
        "--model",
        str(base),
        *argv,
        env=ALONE,
        file_size=limit,
    )
    [line] = [line for line in result.err.splitlines() if "error" in line]
    assert result.code == 1 and "cannot write the checkpoint of step 2" in line, result.err
    assert not (srlm.folder / "m").exists() and "Traceback" not in result.err


def test_a_nan_ends_the_training_at_its_step(base: Path, tmp_path: Path, monkeypatch) -> None:
    from srlm_cli.train.pair_trainer import PairTrainer

    loss, done = PairTrainer._pair_loss, []

    def poisoned(self, *args):
        done.append(1)
        return loss(self, *args) * (float("nan") if len(done) == 20 else 1)

    with monkeypatch.context() as patched:
        patched.setattr(PairTrainer, "_pair_loss", poisoned)
        with pytest.raises(SrlmError, match="step 6: loss is not a finite number.*step 4") as failed:
            train("dpo", spec_of(base, tmp_path / "m"))
    assert "lower --learning-rate" in failed.value.hint and not (tmp_path / "m").exists()
    assert len(done) == 23  # 1 of the check at the start, 4 + 4 + 4 + 4 + 2 of epoch 1, 4 of step 6, none behind it
    last = (tmp_path / "m.part" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 6 and json.loads(last)["loss"] is None
    saved = weights(tmp_path / "m.part" / "checkpoint-4")
    assert all(bool(torch.isfinite(value).all()) for value in saved.values())


@pytest.mark.slow
def test_two_trainings_on_one_folder(unfinished: TrainSpec) -> None:
    held, ready = multiprocessing.get_context("spawn").Event(), multiprocessing.get_context("spawn").Event()
    other = multiprocessing.get_context("spawn").Process(target=hold, args=(str(unfinished.out), held, ready))
    other.start()
    assert held.wait(60)
    with pytest.raises(OptionError, match="another srlm process is training"):
        train("dpo", unfinished, replace(EVERY_2, restart=True))
    ready.set()
    other.join(60)
    assert train("dpo", unfinished)["resumed_from"] == 4


def hold(out: str, held, ready) -> None:
    """Hold the lock of a folder, as a training does, until told to let go."""
    with locked(Path(out)):
        held.set()
        ready.wait(60)


def test_an_older_model_is_replaced_when_the_new_one_is_whole(base: Path, tmp_path: Path, monkeypatch) -> None:
    spec = spec_of(base, tmp_path / "m")
    train("sft", spec)
    before = weights(spec.out)
    with monkeypatch.context() as patched:
        die_in_micro_batch(patched, 20)
        with pytest.raises(Killed):
            train("sft", replace(spec, seed=3))
    assert all(torch.equal(value, before[name]) for name, value in weights(spec.out).items())
    train("sft", replace(spec, seed=3))
    assert any(not torch.equal(value, before[name]) for name, value in weights(spec.out).items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_checkpoint_that_is_best_on_held_out_rows_is_the_model(
    kind, base: Path, tmp_path: Path, monkeypatch
) -> None:
    """On held-out rows that say the contrary, whose loss rises; also after a kill, and behind the last step."""
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(6)]
    rows, held = (
        (pairs(18), swapped) if kind == "dpo" else (completions(18), [{"prompt": "?", "completion": "@#%&" * 9}])
    )
    spec = spec_of(base, tmp_path / "m", learning_rate=0.05, final_learning_rate=0.05, epochs=4, max_steps=17)

    def run(out: str) -> Record:
        if kind == "sft":
            return sft(rows, replace(spec, out=tmp_path / out), eval_rows=held, run=EVERY_2)
        return dpo(rows, replace(spec, out=tmp_path / out), DPOLossConfig(), eval_rows=held, run=EVERY_2)

    whole = run("whole")
    assert [row["step"] for row in whole["evals"]] == [2, 4, 6, 8, 10, 12, 14, 16, 17] and whole["steps"] == 17
    assert whole["chosen_step"] == min(whole["evals"], key=lambda row: row["loss"])["step"] < 17
    assert ("accuracy" in whole["evals"][0]) == (kind == "dpo")
    with monkeypatch.context() as patched:
        die_in_micro_batch(patched, 45)
        with pytest.raises(Killed):
            run("killed")
    assert run("killed")["evals"] == whole["evals"]
    assert_same(tmp_path / "whole", tmp_path / "killed")
    with monkeypatch.context() as patched:
        patched.setattr("srlm_cli.train.session.save", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run("late")
    assert run("late")["steps"] == 17
    assert_same(tmp_path / "whole", tmp_path / "late")


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path: Path) -> None:
    with locked(tmp_path / "m") as part:
        part.take({"seed": 0}, restart=False, on_stale="stop")
        for step, value in ((2, 1.0), (4, 2.0)):
            part.step(step).mkdir()
            if value < 2:
                part.note_best(step, value)
            part.keep(step)
        part.note_best(6, 0.5)
        part.step(6).mkdir()
        with pytest.raises(SrlmError, match="cannot write the checkpoint: full"), part.writing("the checkpoint"):
            raise OSError("full")
        assert sorted(file.name for file in part.folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    with locked(tmp_path / "m") as part:
        part.take({"seed": 0}, restart=False, on_stale="stop")
        assert (part.checkpoint, part.best, part.best_value) == (4, 2, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_all_checkpoints_are_kept_as_models(kind: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch) -> None:
    """Also those before a kill; each is the model of a training that ends at its step, but for the learning rate."""
    run = replace(EVERY_2, keep_checkpoints=True)
    spec = spec_of(base if kind == "sft" else adapter, tmp_path / "m", final_learning_rate=1e-3)
    with monkeypatch.context() as patched:
        die_in_micro_batch(patched, 20)
        with pytest.raises(Killed):
            train(kind, spec, run)
    assert train(kind, spec, run)["resumed_from"] == 4
    kept = sorted(spec.out.glob("checkpoints/*"), key=lambda folder: int(folder.name))
    assert [folder.name for folder in kept] == ["2", "4", "6", "8"]
    assert not list(spec.out.glob("checkpoints/*/*.pt")) and fingerprint(str(kept[0]))
    assert load_model(str(kept[0]), "float32") and load_tokenizer(str(kept[0])).chat_template
    train(kind, replace(spec, out=tmp_path / "short", max_steps=4))
    assert_same(tmp_path / "short", kept[1])
    assert not (tmp_path / "m.part").exists()
