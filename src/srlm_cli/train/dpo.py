"""Direct preference optimization: Mt to M(t+1), with Mt as the reference (arXiv 2401.10020, section 2.4)."""

from __future__ import annotations

import math
from typing import Any

from srlm_cli.errors import DataError, SrlmError
from srlm_cli.records import Row
from srlm_cli.train import session
from srlm_cli.train.data import dataset, dpo_rows
from srlm_cli.train.session import TrainSpec

LN2 = math.log(2)
STEP_0_TOLERANCE = 0.02


def dpo(
    rows: list[Row], spec: TrainSpec, beta: float, *, quiet: bool = False, provenance: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train on pairs; return the results.

    The reference is the model as it is when training starts: a full fine-tune's reference
    log-probabilities are computed before the first step, so one model is in memory; a new adapter's
    reference is the base without it; an adapter that goes on is compared with a frozen copy of
    itself. That policy and reference are equal at the start (loss ln 2) is checked.
    """
    if not rows:
        raise DataError("no pairs to train on", "--in takes rows with `prompt`, `chosen` and `rejected`")
    tokenizer = session.load_tokenizer(spec)
    made, report = dpo_rows(rows, tokenizer, spec.max_length)
    if not made:
        raise DataError(f"none of {len(rows)} pairs fits into --max-length {spec.max_length}")
    from trl import DPOConfig, DPOTrainer

    model = session.load_policy(spec)
    with session.folder_when_whole(spec.out) as folder:
        config = DPOConfig(
            **session.trainer_settings(spec) | {"train_sampling_strategy": "random"},
            beta=beta,
            precompute_ref_log_probs=not hasattr(model, "peft_config"),
            precompute_ref_batch_size=spec.together,
        )
        trainer = DPOTrainer(model=model, args=config, train_dataset=dataset(made), processing_class=tokenizer)
        session.follow(trainer, "dpo", quiet, folder)
        results = {"data": report.as_dict(), **session.run_training(trainer, report.tokens)}
        check_reference(results["first_loss"])
        results |= rewards(trainer.state.log_history)
        session.save(
            trainer,
            tokenizer,
            folder,
            {**(provenance or {}), "beta": beta, "settings": session.settings_of(spec), **results},
        )
    return results


def check_reference(first_loss: float | None) -> None:
    """Raise unless the policy began as the reference: then the DPO loss of the first step is ln 2."""
    if first_loss is not None and abs(first_loss - LN2) > STEP_0_TOLERANCE:
        raise SrlmError(
            f"the first DPO loss is {first_loss:.4f}, not ln 2 = {LN2:.4f}: policy and reference differ at the start",
            "no model is written; this is a fault of srlm, please report it",
        )


def rewards(history: list[dict[str, float]]) -> dict[str, float]:
    """Return the rewards of the last logged step: accuracy, margin, chosen and rejected."""
    last = next((entry for entry in reversed(history) if "rewards/margins" in entry), {})
    return {
        name: float(last[key]) for key, name in session.LOGGED.items() if key.startswith("rewards/") and key in last
    }
