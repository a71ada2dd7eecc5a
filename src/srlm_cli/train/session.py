"""One training of either kind: prepare the data, continue or begin, train, and write the folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from srlm_cli import distributed
from srlm_cli.engines.chat_template import now, writes_date
from srlm_cli.errors import DataError, SrlmError
from srlm_cli.models.collection import without_collection
from srlm_cli.models.files import broken_file
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.hardware import pick_device
from srlm_cli.models.locate import use
from srlm_cli.records import Record, short_hash
from srlm_cli.streams.console import say
from srlm_cli.streams.writer import dumps
from srlm_cli.train import dry_run, router
from srlm_cli.train.callback import follower
from srlm_cli.train.copied import copy_model
from srlm_cli.train.data import DataReport
from srlm_cli.train.options import OPERATIONAL, RunOptions, TrainSpec
from srlm_cli.train.setup import open_tokenizer, training_dtype, usable, within_context
from srlm_cli.train.workdir import METRICS, Workdir, place, write_provenance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer


class Method(Protocol):
    """The differences between SFT, DPO and KTO."""

    name: str
    unit: str  # the name of sequences or pairs in messages
    fields: str  # the required fields of a record
    padding_side: str  # of the trainer's batches

    def render(
        self, rows: Iterable[Record], tokenizer: PreTrainedTokenizerBase, spec: TrainSpec, run: RunOptions
    ) -> tuple[list[Record], DataReport]:
        """Return the rendered records, and a report of cut and dropped ones."""
        ...

    def render_eval(self, rows: Iterable[Record], tokenizer: PreTrainedTokenizerBase, spec: TrainSpec) -> list[Record]:
        """Return the rendered held-out records."""
        ...

    def prepare(self, spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Check everything except the records; return the part of it that decides the model, by name."""
        ...

    def length(self, row: Record) -> int:
        """Return the tokens of a rendered row."""
        ...

    def make_trainer(
        self,
        dataset: list[Record],
        eval_dataset: list[Record],
        spec: TrainSpec,
        run: RunOptions,
        tokenizer: Any,
        workdir: Workdir,
    ) -> Any:
        """Return the trainer of rendered rows."""
        ...

    def results(self, trainer: Any) -> dict[str, Any]:
        """Return the figures that only this method has."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the settings that only this method has, for the provenance."""
        ...


def train(
    method: Method,
    rows: list[Record],
    spec: TrainSpec,
    *,
    eval_rows: list[Record] | None,
    run: RunOptions,
    provenance: dict[str, Any] | None,
) -> dict[str, Any]:
    """Train with a method on records; return the results.

    With `eval_rows` the checkpoint with the lowest loss on them becomes the model, not the last one. Raises DataError
    if no record is left.
    """
    if not rows and not copies(run):
        raise DataError(f"no {method.unit} to train on", f"--in takes rows with {method.fields}")
    use(spec.model, spec.revision, spec.trust_remote_code)
    tokenizer = open_tokenizer(spec, run.quiet)
    spec = dated(method.name, within_context(spec, method.name, run.quiet), tokenizer, run)
    dataset, report = method.render(rows, tokenizer, spec, run)
    if not dataset and copies(run):
        return copied(method, spec, run, report, provenance or {})
    if not dataset:
        why = ", ".join(report.dropped())
        raise DataError(f"none of {len(rows)} {method.unit} can be trained on: {why}", report.ways_out())
    if not run.quiet:
        say(f"srlm {method.name}: {report.line(method.unit)}")
    eval_dataset = usable(method.render_eval(eval_rows or [], tokenizer, spec), eval_rows, spec)
    more = method.prepare(spec, tokenizer)
    if spec.chat_template:
        more["template_hash"] = short_hash(tokenizer.get_chat_template())
    tokenizer.padding_side = method.padding_side
    distributed.init(pick_device(spec.device))
    with place(spec.out, run.dry_run) as workdir:
        identity = run_identity(method.name, spec, dataset + eval_dataset, held_out=len(eval_dataset), **more)
        spec = take(workdir, method.name, identity, spec, run)
        if run.dry_run:
            passes = dry_run.passes_of(dataset, method.length, spec)
            trainer = method.make_trainer(passes.rows, [], spec, run, tokenizer, workdir)
            return dry_run.show(trainer, method.name, report, spec, passes)
        with without_collection():
            trainer = method.make_trainer(dataset, eval_dataset, spec, run, tokenizer, workdir)
        results = {"data": report.as_dict(), **run_training(trainer, workdir, method.name, run)}
        results |= method.results(trainer)
        save(trainer, tokenizer, workdir, spec, {**(provenance or {}), **method.settings(), **results})
    return results


def copies(run: RunOptions) -> bool:
    """Return whether the model is copied if there is nothing to train on; a dry run says what is wrong."""
    return run.on_empty == "copy" and not run.dry_run


def copied(
    method: Method, spec: TrainSpec, run: RunOptions, report: DataReport, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Write a copy of the starting model, of 0 steps, because no record is left; return the results."""
    results = {"data": report.as_dict(), "steps": 0}
    copy_model(spec, settings_of(method.name, spec), {**provenance, **method.settings(), **results})
    if not run.quiet:
        dropped = "".join(f", {reason}" for reason in report.dropped())
        say(f"srlm {method.name}: no {method.unit} to train on{dropped}: {spec.out} is a copy of {spec.model}")
    return results


# --- a training that can be resumed ----------------------------------------------------------


def dated(name: str, spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, run: RunOptions) -> TrainSpec:
    """Return a spec with the date that the chat template writes; without one where it writes none.

    It is the given one, that of an unfinished run of these settings, so that its rows come out the same, or now.
    """
    if not writes_date(tokenizer):
        return replace(spec, today="")
    begun = "" if run.restart or run.dry_run else Workdir(spec.out).begun_with(settings_of(name, spec)).get("today")
    distributed.init(pick_device(spec.device))  # each process has its own time
    return replace(spec, today=distributed.broadcast(spec.today or begun or now()))


def settings_of(command: str, spec: TrainSpec) -> dict[str, Any]:
    """Return the settings that decide the trained model, without the records, the dtype and the date."""
    from srlm_cli import __version__

    settings = {key: value for key, value in asdict(spec).items() if key not in {*OPERATIONAL, "dtype", "today"}}
    about = {"command": command, "srlm": __version__, "model_fingerprint": fingerprint(spec.model)}
    return {**about, **settings}


def run_identity(command: str, spec: TrainSpec, rows: list[Record], **more: Any) -> dict[str, Any]:
    """Return everything except the dtype that decides the trained model; a run is resumed only with equal values."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(dumps(row).encode("utf-8", "surrogatepass") + b"\n")
    about = {"rows": digest.hexdigest(), "today": spec.today}
    return {**settings_of(command, spec), **about, **more}


def take(workdir: Workdir, name: str, identity: dict[str, Any], spec: TrainSpec, run: RunOptions) -> TrainSpec:
    """Take the folder for a training of this identity; return the spec with its dtype settled.

    `auto` is the dtype that an unfinished run of this identity began with, perhaps on another processor, else the
    device's.
    """
    dtype = training_dtype(spec)
    begun = None if run.restart or spec.dtype != "auto" else workdir.begun_with(identity).get("dtype")
    if begun and begun != dtype and not run.quiet:
        say(f"srlm {name}: training in {begun}, as the unfinished run began; --dtype auto is {dtype} on this machine")
    spec = replace(spec, dtype=begun or dtype)
    # accelerate trains in this dtype, also with a profile of another one.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if spec.dtype == "bfloat16" else "no"
    workdir.take({**identity, "dtype": spec.dtype}, run.restart, run.on_stale, run.keep_checkpoints)
    return spec


def run_training(trainer: Trainer, workdir: Workdir, name: str, run: RunOptions) -> dict[str, Any]:
    """Train to the end, from the last checkpoint where there is one; return the figures of the whole training."""
    from transformers import PrinterCallback

    steps = workdir.logged()
    chooses = trainer.eval_dataset is not None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(follow := follower(workdir, name, run, chooses))
    if workdir.checkpoint and not run.quiet:
        say(f"srlm {name}: resuming from step {workdir.checkpoint}, saved in {workdir.folder}")
    if workdir.checkpoint:
        check_complete(workdir.step(workdir.checkpoint))
    started = time.monotonic()
    before = state_of(workdir)
    if before and before.global_step >= before.max_steps:  # a training that was killed after its last step
        trainer.state = before
    else:
        try:
            trainer.train(resume_from_checkpoint=str(workdir.step(workdir.checkpoint)) if before else None)
        finally:
            follow.close()
    state = trainer.state
    if chooses:
        load_checkpoint(trainer, str(workdir.step(workdir.best)))
    seconds = time.monotonic() - started
    tokens = state.num_input_tokens_seen - (before.num_input_tokens_seen if before else 0)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return {
        "dtype": "bfloat16" if trainer.args.bf16 else "float32",
        "steps": state.global_step,
        **({"resumed_from": steps[-1]["step"]} if steps else {}),
        **({"chosen_step": workdir.best, "evals": evals(state.log_history)} if chooses else {}),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
    }


def check_complete(checkpoint: Path) -> None:
    """Raise SrlmError if a file of a checkpoint is missing or broken; the Trainer would resume without some of them."""
    rank = distributed.rank()
    numbers = "rng_state.pth" if distributed.count() == 1 else f"rng_state_{rank}.pth"
    names = ["trainer_state.json", *([] if distributed.sharded() else ["optimizer.pt", "scheduler.pt", numbers])]
    missing = [f"{name} is missing" for name in names if not (checkpoint / name).is_file()]
    if fault := missing[0] if missing else broken_file(checkpoint):
        raise SrlmError(f"cannot resume from {checkpoint}: {fault}", "--restart starts the training again")


def load_checkpoint(trainer: Trainer, folder: str) -> None:
    """Load the weights of a checkpoint into the trainer's model, also if they are sharded over processes."""
    if distributed.sharded():
        trainer.state.best_model_checkpoint = folder
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(folder)


def state_of(workdir: Workdir) -> Any:
    """Return transformers' state of the last checkpoint, or None before the first."""
    from transformers import TrainerState

    if not workdir.checkpoint:
        return None
    return TrainerState.load_from_json(str(workdir.step(workdir.checkpoint) / "trainer_state.json"))


def evals(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the figures on held-out rows by step: loss and, of pairs, accuracy."""
    kept = {"step": "step", "eval_loss": "loss", "eval_rewards/accuracies": "accuracy"}
    found = [entry for entry in history if "eval_loss" in entry]
    return [{name: entry[key] for key, name in kept.items() if key in entry} for entry in found]


# --- the folder ------------------------------------------------------------------------------


def check_finite(weights: dict[str, Any], workdir: Workdir) -> None:
    """Raise SrlmError if a weight is NaN or infinite, as after a last step that was too large."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise SrlmError(f"{name} has a number that is not finite", f"lower --learning-rate; {workdir.way_on()}")


def save(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    workdir: Workdir,
    spec: TrainSpec,
    provenance: dict[str, Any],
) -> None:
    """Write model, tokenizer and chat template, the provenance file last; then let the folder appear as OUT."""
    whole = None if not distributed.sharded() else trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not distributed.is_main():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_finite(whole or dict(model.named_parameters()), workdir)
    model.config.use_cache = True
    router.set_router_settings(model, trainer.router_settings)
    tokenizer.padding_side = "left"
    with workdir.writing("the model"):
        shutil.rmtree(workdir.model, ignore_errors=True)
        if not hasattr(model, "peft_config"):
            model.save_pretrained(workdir.model, state_dict=whole)
        elif spec.merge:
            model.merge_and_unload().save_pretrained(workdir.model)
        else:
            model.save_pretrained(workdir.model, selected_adapters=["default"], state_dict=whole)
            base = model.peft_config["default"].base_model_name_or_path
            provenance["base"] = {"model": base, "fingerprint": fingerprint(base, weights_only=True)}
        tokenizer.save_pretrained(workdir.model)
        shutil.copyfile(workdir.metrics, workdir.model / METRICS)
        write_provenance(workdir.model, provenance, spec)
        workdir.publish()
