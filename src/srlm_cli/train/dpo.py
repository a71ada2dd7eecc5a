"""Direct preference optimization: Mt to M(t+1), with Mt as the reference (arXiv 2401.10020, section 2.4)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from srlm_cli import distributed
from srlm_cli.errors import DataError, OptionError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load import load_model
from srlm_cli.models.locate import use
from srlm_cli.records import Record
from srlm_cli.train import reference, session, setup
from srlm_cli.train.callback import LOGGED
from srlm_cli.train.data import DataReport, Refuse, dpo_rows, stop
from srlm_cli.train.losses import SMOOTHED, DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.workdir import Workdir


def dpo(
    rows: list[Record],
    spec: TrainSpec,
    loss_config: DPOLossConfig,
    *,
    ref: str = reference.PREVIOUS,
    eval_rows: list[Record] | None = None,
    run: RunOptions,
    provenance: dict[str, Any] | None = None,
    refuse: Refuse = stop,
) -> dict[str, Any]:
    """Train on pairs; return the results. Raises DataError as `session.train` does.

    A pair that cannot be rendered goes to `refuse`.

    The log-probabilities of the reference are computed before the first step, so only one model is in memory during
    training. Before the first step it is also checked that the reference is the one that `ref` names.
    """
    method = Dpo(loss_config, ref, refuse)
    return session.train(method, rows, spec, eval_rows=eval_rows, run=run, provenance=provenance)


@dataclass
class Dpo(session.Method):
    """The method: pairs of a chosen and a rejected reply, and a reference policy, which `prepare` finds."""

    loss_config: DPOLossConfig
    ref: str = reference.PREVIOUS
    refuse: Refuse = stop
    reference: dict[str, Any] = field(default_factory=dict)

    name = "dpo"
    unit = "pairs"
    fields = "`prompt`, `chosen` and `rejected`"
    padding_side = "right"

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

    def prepare(self, spec: TrainSpec, tokenizer: Any) -> dict[str, Any]:
        reference_model = reference.resolve(self.ref, spec.model)
        if reference_model != spec.model:
            use(reference_model, None, spec.trust_remote_code)
            reference.check_tokens(reference_model, tokenizer)
        self.reference = {"policy": self.ref, "model": reference_model, "fingerprint": fingerprint(reference_model)}
        return {"reference": self.reference, "loss": asdict(self.loss_config)}

    def length(self, row: Record) -> int:
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    def make_trainer(
        self,
        dataset: list[Record],
        eval_dataset: list[Record],
        spec: TrainSpec,
        run: RunOptions,
        tokenizer: Any,
        workdir: Workdir,
    ) -> Any:
        from trl import DPOConfig

        from srlm_cli.train.pair_trainer import PairTrainer

        reference_model = self.reference["model"]
        model = setup.load_policy(spec, tokenizer)
        other = None
        if reference_model != spec.model and distributed.sharded():
            raise OptionError(
                "--ref: sharded weights are their own reference only", "--ref previous, or another profile"
            )
        if reference_model != spec.model and self.loss_config.has_reference:
            other = load_model(reference_model, "float32", setup.loading_device(spec))
        config = DPOConfig(
            **setup.trainer_settings(spec, run, workdir.folder),
            **self.loss_config.trl(),
            disable_dropout=not spec.dropout,
            precompute_ref_log_probs=True,
        )
        return PairTrainer(
            model=model,
            ref_model=other,
            args=setup.on_one_gpu(config),
            rows=dataset,
            eval_rows=eval_dataset,
            length=self.length,
            batch=spec.batch,
            seed=spec.seed,
            processing_class=tokenizer,
            loss_config=self.loss_config,
            reference_is_policy=reference_model == spec.model,
            quiet=run.quiet,
            workdir=workdir,
        )

    def results(self, trainer: Any) -> dict[str, Any]:
        start = {"start": trainer.start} if trainer.start else {}
        return {"reference": self.reference, **start, **rewards(trainer.state.log_history)}

    def settings(self) -> dict[str, Any]:
        return asdict(self.loss_config)


def rewards(history: list[dict[str, float]]) -> dict[str, float]:
    """Return the rewards of the last logged step: accuracy, margin, chosen and rejected."""
    last = next((entry for entry in reversed(history) if "rewards/margins" in entry), {})
    return {name: float(last[key]) for key, name in LOGGED.items() if key.startswith("rewards/") and key in last}
