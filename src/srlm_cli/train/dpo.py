"""Direct preference optimization: Mt to M(t+1), with Mt as the reference (arXiv 2401.10020, section 2.4)."""

from __future__ import annotations

from typing import Any

from srlm_cli.errors import DataError
from srlm_cli.records import Record
from srlm_cli.train import reference, session, setup
from srlm_cli.train.data import DataReport, Refuse, dpo_rows, stop
from srlm_cli.train.losses import SMOOTHED, DPOLossConfig
from srlm_cli.train.options import RefSync, RunOptions, TrainSpec
from srlm_cli.train.reference_method import ReferenceMethod


def dpo(
    rows: list[Record],
    spec: TrainSpec,
    loss_config: DPOLossConfig,
    *,
    ref: str = reference.PREVIOUS,
    sync: RefSync | None = None,
    eval_rows: list[Record] | None = None,
    run: RunOptions,
    provenance: dict[str, Any] | None = None,
    refuse: Refuse = stop,
) -> dict[str, Any]:
    """Train on pairs; return the results. Raises DataError as `session.train` does.

    A pair that cannot be rendered goes to `refuse`.

    The log-probabilities of the reference are computed before the first step, so only one model is in memory during
    training, unless `sync` moves the reference. Before the first step it is also checked that the reference is the one
    that `ref` names.
    """
    method = Dpo(loss_config, ref, refuse, sync)
    return session.train(method, rows, spec, eval_rows=eval_rows, run=run, provenance=provenance)


class Dpo(ReferenceMethod):
    """The method: pairs of a chosen and a rejected reply."""

    name = "dpo"
    unit = "pairs"
    fields = "`prompt`, `chosen` and `rejected`"
    shards = True

    def render(
        self, rows: list[Record], tokenizer: Any, spec: TrainSpec, run: RunOptions
    ) -> tuple[list[Record], DataReport]:
        if not self.loss_config.takes_smoothing and any("label_smoothing" in row for row in rows):
            raise DataError(
                "these rows have a `label_smoothing`",
                f"--loss {' or '.join(SMOOTHED)}, without --ld-alpha and --use-weighting",
            )
        return dpo_rows(
            rows,
            setup.renderer(tokenizer, spec),
            spec.max_length,
            turns=spec.train_turns,
            smoothing=self.loss_config.label_smoothing,
            keep_duplicates=run.keep_duplicates,
            refuse=self.refuse,
        )

    def render_eval(self, rows: list[Record], tokenizer: Any, spec: TrainSpec) -> list[Record]:
        smoothing = self.loss_config.label_smoothing
        render = setup.renderer(tokenizer, spec)
        return dpo_rows(rows, render, spec.max_length, turns=spec.train_turns, smoothing=smoothing)[0]

    def length(self, row: Record) -> int:
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    def classes(self) -> tuple[type, type]:
        from trl import DPOConfig

        from srlm_cli.train.pair_trainer import PairTrainer

        return DPOConfig, PairTrainer
