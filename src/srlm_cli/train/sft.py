"""Supervised fine-tuning on IFT and EFT rows: M0 to M1 (arXiv 2401.10020, section 2.1)."""

from __future__ import annotations

from typing import Any

from srlm_cli import distributed, models
from srlm_cli.errors import DataError
from srlm_cli.records import Row
from srlm_cli.streams.console import say
from srlm_cli.train import dry_run, session
from srlm_cli.train.data import sft_rows
from srlm_cli.train.session import RunOptions, TrainSpec
from srlm_cli.train.workdir import Part, place


def sft(
    rows: list[Row],
    spec: TrainSpec,
    *,
    eval_rows: list[Row] | None = None,
    drop_long: bool = False,
    run: RunOptions,
    provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on rows of `prompt` and `completion`, loss on target tokens only; return the results.

    With `eval_rows` the checkpoint of the lowest loss on them becomes the model, not the last one.

    Raises DataError when no row is left, or when an EFT row would lose its score and not `drop_long`.
    """
    if not rows:
        raise DataError("no rows to train on", "--in takes rows with `prompt` and `completion`")
    tokenizer = session.load_tokenizer(spec)
    spec = session.within_context(spec, "sft", run.quiet)
    made, report = sft_rows(
        rows, tokenizer, spec.max_length, drop_long=drop_long, keep_duplicates=run.keep_duplicates, seed=spec.seed
    )
    if not made:
        raise DataError(f"none of {len(rows)} rows fits into --max-length {spec.max_length}")
    if not run.quiet:
        say(f"srlm sft: {report.line('rows')}")
    held = session.usable(sft_rows(eval_rows or [], tokenizer, spec.max_length, drop_long=True)[0], eval_rows, spec)
    tokenizer.padding_side = "left"  # so that targets, which end their rows, stand at the same positions
    distributed.begin(models.pick_device(spec.device))
    with place(spec.out, run.dry_run) as part:
        identity = session.fingerprint("sft", spec, made + held, held_out=len(held))
        spec = session.take(part, "sft", identity, spec, run)
        if run.dry_run:
            few = dry_run.sample(made, row_length, session.together(spec))
            trainer = make_trainer(few, [], spec, run, tokenizer, part)
            return dry_run.show(trainer, "sft", dry_run.of_sft(made[0]), report, spec)
        trainer = make_trainer(made, held, spec, run, tokenizer, part)
        results = {"data": report.as_dict(), **session.run_training(trainer, part, "sft", run)}
        session.save(trainer, tokenizer, part, spec, {**(provenance or {}), **results})
    return results


def row_length(row: Row) -> int:
    """Return the tokens of a rendered row."""
    return len(row["input_ids"])


def make_trainer(made: list[Row], held: list[Row], spec: TrainSpec, run: RunOptions, tokenizer: Any, part: Part) -> Any:
    """Return the trainer of rendered rows."""
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTConfig

    from srlm_cli.train.trainers import TargetLossTrainer

    return TargetLossTrainer(
        model=session.load_policy(spec),
        args=session.on_one_gpu(SFTConfig(**session.trainer_settings(spec, run, part.folder))),
        rows=made,
        held=held,
        length=row_length,
        spec=spec,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        part=part,
    )
