"""Kahneman-Tversky optimization on desirable and undesirable replies, without pairs (arXiv 2402.01306)."""

from __future__ import annotations

from typing import Any

from srlm_cli.errors import DataError
from srlm_cli.records import Record
from srlm_cli.streams.console import say
from srlm_cli.train import reference, session, setup
from srlm_cli.train.data import DataReport, Refuse, kto_rows, stop
from srlm_cli.train.losses import KTOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.reference_method import ReferenceMethod

MOST = 4 / 3  # of the desirable rows' weight to that of the undesirable ones; at least 1 (the paper, and TRL)


def kto(
    rows: list[Record],
    spec: TrainSpec,
    loss_config: KTOLossConfig,
    *,
    ref: str = reference.PREVIOUS,
    eval_rows: list[Record] | None = None,
    run: RunOptions,
    provenance: dict[str, Any] | None = None,
    refuse: Refuse = stop,
) -> dict[str, Any]:
    """Train on labelled rows; return the results. Raises DataError as `session.train` does.

    Rows are as `stages.labels.labelled_record` returns them. A row that cannot be rendered goes to `refuse`. The
    reference is handled as in `dpo`.
    """
    method = Kto(loss_config, ref, refuse)
    return session.train(method, rows, spec, eval_rows=eval_rows, run=run, provenance=provenance)


class Kto(ReferenceMethod):
    """The method: replies with a label."""

    name = "kto"
    unit = "rows"
    fields = "`prompt`, `completion` and `label`, or judged rows"

    def render(
        self, rows: list[Record], tokenizer: Any, spec: TrainSpec, run: RunOptions
    ) -> tuple[list[Record], DataReport]:
        made, report = kto_rows(
            rows,
            setup.renderer(tokenizer, spec),
            spec.max_length,
            turns=spec.train_turns,
            keep_duplicates=run.keep_duplicates,
            refuse=self.refuse,
        )
        self.check_prompts(made)
        if made and not run.quiet and (advice := self.advice(report)):
            say(f"srlm kto: {advice}")
        return made, report

    def render_eval(self, rows: list[Record], tokenizer: Any, spec: TrainSpec) -> list[Record]:
        made, _ = kto_rows(rows, setup.renderer(tokenizer, spec), spec.max_length, turns=spec.train_turns)
        self.check_prompts(made)
        return made

    def check_prompts(self, rows: list[Record]) -> None:
        """Raise DataError where all rows have one prompt, and the loss needs replies to others."""
        if rows and self.loss_config.estimates_kl and all(row["prompt_ids"] == rows[0]["prompt_ids"] for row in rows):
            raise DataError(
                "all rows have the same prompt: the KL estimate of --loss kto is of replies to other prompts",
                "more prompts, or --loss apo-zero-unpaired",
            )

    def advice(self, report: DataReport) -> str:
        """Return which weight the paper would give, "" where the weights are as it has them."""
        config, counts = self.loss_config, report.notes
        desirable, undesirable = counts["desirable"], counts["undesirable"]
        weights = desirable * config.desirable_weight, undesirable * config.undesirable_weight
        if not (desirable and undesirable):
            return f"all rows are {'desirable' if desirable else 'undesirable'}: the model learns no difference"
        if not all(weights) or 1 <= weights[0] / weights[1] <= MOST:
            return ""
        return (
            f"desirable to undesirable rows, by weight, are {weights[0] / weights[1]:.2f}, not 1 to 1.33 as in the "
            f"paper: --desirable-weight {weights[1] / desirable:.2g} or "
            f"--undesirable-weight {weights[0] / undesirable:.2g}"
        )

    def length(self, row: Record) -> int:
        return len(row["prompt_ids"]) + len(row["completion_ids"])

    def classes(self) -> tuple[type, type]:
        from trl import KTOConfig

        from srlm_cli.train.unpaired_trainer import UnpairedTrainer

        return KTOConfig, UnpairedTrainer
