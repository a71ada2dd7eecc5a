"""Supervised fine-tuning on IFT and EFT rows: M0 to M1 (arXiv 2401.10020, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from srlm_cli.records import Record
from srlm_cli.train import session, setup
from srlm_cli.train.data import DataReport, Refuse, sft_rows, stop
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.workdir import Workdir


def sft(
    rows: list[Record],
    spec: TrainSpec,
    *,
    eval_rows: list[Record] | None = None,
    drop_long: bool = False,
    run: RunOptions,
    provenance: dict[str, Any] | None = None,
    refuse: Refuse = stop,
) -> dict[str, Any]:
    """Train on rows of `prompt` and `completion`, loss on target tokens only; return the results.

    Raises DataError, as `session.train` does, and when an EFT row would lose its score and not `drop_long`. A row
    that cannot be rendered goes to `refuse`.
    """
    return session.train(Sft(drop_long, refuse), rows, spec, eval_rows=eval_rows, run=run, provenance=provenance)


@dataclass(frozen=True)
class Sft(session.Method):
    """The method: sequences whose target tokens bear the loss."""

    drop_long: bool = False
    refuse: Refuse = stop

    name = "sft"
    unit = "rows"
    fields = "`prompt` and `completion`"
    padding_side = "left"  # so that targets, which are at the end, have the same positions

    def render(
        self, rows: list[Record], tokenizer: Any, spec: TrainSpec, run: RunOptions
    ) -> tuple[list[Record], DataReport]:
        return sft_rows(
            rows,
            setup.renderer(tokenizer, spec),
            spec.max_length,
            turns=spec.train_turns,
            drop_long=self.drop_long,
            keep_duplicates=run.keep_duplicates,
            seed=spec.seed,
            refuse=self.refuse,
        )

    def render_eval(self, rows: list[Record], tokenizer: Any, spec: TrainSpec) -> list[Record]:
        render = setup.renderer(tokenizer, spec)
        return sft_rows(rows, render, spec.max_length, turns=spec.train_turns, drop_long=True)[0]

    def prepare(self, spec: TrainSpec, tokenizer: Any) -> dict[str, Any]:
        return {}

    def length(self, row: Record) -> int:
        return len(row["input_ids"])

    def make_trainer(
        self,
        dataset: list[Record],
        eval_dataset: list[Record],
        spec: TrainSpec,
        run: RunOptions,
        tokenizer: Any,
        workdir: Workdir,
    ) -> Any:
        from transformers import DataCollatorForSeq2Seq
        from trl import SFTConfig

        from srlm_cli.train.sft_trainer import TargetLossTrainer

        return TargetLossTrainer(
            model=setup.load_policy(spec, tokenizer),
            args=setup.on_one_gpu(SFTConfig(**setup.trainer_settings(spec, run, workdir.folder))),
            rows=dataset,
            eval_rows=eval_dataset,
            length=self.length,
            batch=spec.batch,
            seed=spec.seed,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            workdir=workdir,
        )

    def results(self, trainer: Any) -> dict[str, Any]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {}
