"""A training with a reference policy, which `prepare` finds: what `dpo` and `kto` have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from srlm_cli import distributed
from srlm_cli.errors import OptionError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load import load_model
from srlm_cli.models.locate import use
from srlm_cli.records import Record
from srlm_cli.train import reference, session, setup
from srlm_cli.train.callback import LOGGED
from srlm_cli.train.data import Refuse, stop
from srlm_cli.train.losses import DPOLossConfig, KTOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.workdir import Workdir


@dataclass
class ReferenceMethod(session.Method):
    """The part of a method that its loss and its reference decide."""

    loss_config: DPOLossConfig | KTOLossConfig
    ref: str = reference.PREVIOUS
    refuse: Refuse = stop
    reference: dict[str, Any] = field(default_factory=dict)

    padding_side = "right"
    shards = False  # whether it trains weights that are sharded over processes

    def classes(self) -> tuple[type, type]:
        """Return the class of TRL's settings, and that of the trainer."""
        raise NotImplementedError

    def prepare(self, spec: TrainSpec, tokenizer: Any) -> dict[str, Any]:
        reference_model = reference.resolve(self.ref, spec.model)
        if reference_model != spec.model:
            use(reference_model, None, spec.trust_remote_code)
            reference.check_tokens(reference_model, tokenizer)
        self.reference = {"policy": self.ref, "model": reference_model, "fingerprint": fingerprint(reference_model)}
        return {"reference": self.reference, "loss": asdict(self.loss_config)}

    def make_trainer(
        self,
        dataset: list[Record],
        eval_dataset: list[Record],
        spec: TrainSpec,
        run: RunOptions,
        tokenizer: Any,
        workdir: Workdir,
    ) -> Any:
        config_class, trainer_class = self.classes()
        reference_model = self.reference["model"]
        model = setup.load_policy(spec, tokenizer)
        other = None
        if distributed.sharded() and not self.shards:
            raise OptionError(f"srlm {self.name} does not train sharded weights", "a profile without FSDP and ZeRO 3")
        if reference_model != spec.model and distributed.sharded():
            raise OptionError(
                "--ref: sharded weights are their own reference only", "--ref previous, or another profile"
            )
        if reference_model != spec.model and self.loss_config.has_reference:
            other = load_model(reference_model, "float32", setup.loading_device(spec))
        config = config_class(
            **setup.trainer_settings(spec, run, workdir.folder),
            **self.loss_config.trl(),
            disable_dropout=not spec.dropout,
            precompute_ref_log_probs=True,
        )
        return trainer_class(
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
