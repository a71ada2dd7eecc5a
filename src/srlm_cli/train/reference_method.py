"""A training with a reference policy, which `prepare` finds: what `dpo` and `kto` have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from srlm_cli import distributed
from srlm_cli.errors import OptionError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.models.load import load_model, shapes_of
from srlm_cli.models.locate import is_adapter, locate, use
from srlm_cli.records import Record
from srlm_cli.streams.console import say
from srlm_cli.train import reference, session, setup
from srlm_cli.train.callback import LOGGED
from srlm_cli.train.data import Refuse, stop
from srlm_cli.train.losses import DPOLossConfig, KTOLossConfig
from srlm_cli.train.options import RefSync, RunOptions, TrainSpec
from srlm_cli.train.workdir import Workdir


@dataclass
class ReferenceMethod(session.Method):
    """The part of a method that its loss and its reference decide."""

    loss_config: DPOLossConfig | KTOLossConfig
    ref: str = reference.PREVIOUS
    refuse: Refuse = stop
    sync: RefSync | None = None
    reference: dict[str, Any] = field(default_factory=dict)

    padding_side = "right"
    shards = False  # whether it trains weights that are sharded over processes

    def classes(self) -> tuple[type, type]:
        """Return the class of TRL's settings, and that of the trainer."""
        raise NotImplementedError

    def prepare(self, spec: TrainSpec, tokenizer: Any) -> dict[str, Any]:
        if self.sync:
            self.check_sync(spec)
        reference_model = reference.resolve(self.ref, spec.model)
        if reference_model != spec.model:
            use(reference_model, None, spec.trust_remote_code)
            reference.check_tokens(reference_model, tokenizer)
            if self.sync:
                known = not is_adapter(locate(reference_model))  # else its embeddings are known when it is loaded
                check_shapes(reference_model, spec, *(shapes_of(one, known) for one in (reference_model, spec.model)))
        self.reference = {"policy": self.ref, "model": reference_model, "fingerprint": fingerprint(reference_model)}
        self.reference |= asdict(self.sync) if self.sync else {}
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
        if (self.sync or reference_model != spec.model) and self.loss_config.has_reference:
            other = load_model(reference_model, "float32", setup.loading_device(spec))
        if self.sync:
            check_shapes(reference_model, spec, *([one.shape for one in net.parameters()] for net in (other, model)))
        config = config_class(
            **setup.trainer_settings(spec, run, workdir.folder),
            **self.loss_config.trl(),
            **(self.sync.trl() if self.sync else {}),
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
            reference_moves=self.sync is not None,
            caches=run.ref_cache and not run.dry_run,
            quiet=run.quiet,
            workdir=workdir,
        )

    def check_sync(self, spec: TrainSpec) -> None:
        """Raise OptionError where the policy cannot be mixed into the reference: TRL mixes whole, full weights."""
        wrong = {
            "full weights, not an adapter": spec.lora_r or is_adapter(locate(spec.model)),
            "whole weights: a profile without FSDP and DeepSpeed": distributed.sharded(),
            "a loss with a reference": not self.loss_config.has_reference,
        }
        if needed := [what for what, is_wrong in wrong.items() if is_wrong]:
            raise OptionError(f"--ref-sync-steps needs {needed[0]}")

    def results(self, trainer: Any) -> dict[str, Any]:
        start = {"start": trainer.start} if trainer.start else {}
        self.reference |= {"cached": True} if trainer.cached else {}
        if self.sync:
            steps, every = trainer.state.global_step, self.sync.sync_steps
            self.reference["syncs"] = steps // every
            if steps < every and not trainer.quiet:
                say(f"srlm {self.name}: the reference never moved: {steps} steps, and --ref-sync-steps is {every}")
        return {"reference": self.reference, **start, **rewards(trainer.state.log_history)}

    def settings(self) -> dict[str, Any]:
        return asdict(self.loss_config)


def check_shapes(reference_model: str, spec: TrainSpec, theirs: list[Any], mine: list[Any]) -> None:
    """Raise OptionError unless a reference has weights of the policy's shapes, so that both can be mixed."""
    if theirs != mine:
        raise OptionError(
            f"--ref-sync-steps cannot mix {spec.model} into {reference_model}: other shapes of weights",
            "--ref previous, or omit --ref-sync-steps",
        )


def rewards(history: list[dict[str, float]]) -> dict[str, float]:
    """Return the rewards of the last logged step: accuracy, margin, chosen and rejected."""
    last = next((entry for entry in reversed(history) if "rewards/margins" in entry), {})
    return {name: float(last[key]) for key, name in LOGGED.items() if key.startswith("rewards/") and key in last}
