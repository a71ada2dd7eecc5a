"""Direct preference optimization: Mt to M(t+1), with Mt as the reference (arXiv 2401.10020, section 2.4)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from srlm_cli import distributed, models
from srlm_cli.errors import DataError, OptionError
from srlm_cli.records import Row
from srlm_cli.streams.console import say
from srlm_cli.train import dry_run, reference, session
from srlm_cli.train.callback import LOGGED
from srlm_cli.train.data import dpo_rows
from srlm_cli.train.losses import SMOOTHED, Preference
from srlm_cli.train.session import RunOptions, TrainSpec
from srlm_cli.train.workdir import Part, place


def dpo(
    rows: list[Row],
    spec: TrainSpec,
    about: Preference,
    *,
    ref: str = reference.PREVIOUS,
    eval_rows: list[Row] | None = None,
    run: RunOptions,
    provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on pairs; return the results.

    With `eval_rows` the checkpoint of the lowest loss on them becomes the model, not the last one.

    The reference's log-probabilities are computed before the first step, so that one model is in
    memory while it trains. What `ref` says of policy and reference is checked before the first step.
    """
    if not rows:
        raise DataError("no pairs to train on", "--in takes rows with `prompt`, `chosen` and `rejected`")
    tokenizer = session.load_tokenizer(spec)
    spec = session.within_context(spec, "dpo", run.quiet)
    made, report = dpo_rows(
        rows, tokenizer, spec.max_length, smoothing=about.label_smoothing, keep_duplicates=run.keep_duplicates
    )
    if not made:
        raise DataError(f"none of {len(rows)} pairs fits into --max-length {spec.max_length}")
    unsmoothed = about.loss not in SMOOTHED or about.ld_alpha is not None
    if unsmoothed and any("label_smoothing" in row for row in rows):
        raise DataError("these rows have a `label_smoothing`", f"--loss {' or '.join(SMOOTHED)}, without --ld-alpha")
    held, _ = dpo_rows(eval_rows or [], tokenizer, spec.max_length, smoothing=about.label_smoothing)
    held = session.usable(held, eval_rows, spec)
    if not run.quiet:
        say(f"srlm dpo: {report.line('pairs')}")
    named = reference.resolve(ref, spec.model)
    if named != spec.model:
        reference.check_tokens(named, tokenizer)
    origin = {"policy": ref, "model": named, "fingerprint": models.fingerprint(named)}
    identity = session.fingerprint("dpo", spec, made + held, held_out=len(held), reference=origin, loss=asdict(about))
    distributed.begin(models.pick_device(spec.device))
    with place(spec.out, run.dry_run) as part:
        spec = session.take(part, "dpo", identity, spec, run)
        if run.dry_run:
            few = dry_run.sample(made, pair_length, session.together(spec))
            trainer = make_trainer(few, [], spec, about, named, run, tokenizer, part)
            return dry_run.show(trainer, "dpo", dry_run.of_pair(made[0]), report, spec)
        trainer = make_trainer(made, held, spec, about, named, run, tokenizer, part)
        results = {"data": report.as_dict(), "reference": origin}
        results |= session.run_training(trainer, part, "dpo", run)
        results |= {"start": trainer.start} if trainer.start else {}
        results |= rewards(trainer.state.log_history)
        session.save(trainer, tokenizer, part, spec, {**(provenance or {}), **asdict(about), **results})
    return results


def pair_length(row: Row) -> int:
    """Return the tokens of the longer side of a rendered pair."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def make_trainer(
    made: list[Row],
    held: list[Row],
    spec: TrainSpec,
    about: Preference,
    named: str,
    run: RunOptions,
    tokenizer: Any,
    part: Part,
) -> Any:
    """Return the trainer of rendered pairs; `named` is the reference."""
    from trl import DPOConfig

    from srlm_cli.train.trainers import PairTrainer

    model = session.load_policy(spec)
    other = None
    if named != spec.model and distributed.sharded():
        raise OptionError("--ref: sharded weights are their own reference only", "--ref previous, or another profile")
    if named != spec.model and about.has_reference:
        other = models.load_model(named, "float32", session.loading_device(spec))
    config = DPOConfig(
        **session.trainer_settings(spec, run, part.folder),
        **about.trl(),
        disable_dropout=not spec.dropout,
        precompute_ref_log_probs=True,
    )
    return PairTrainer(
        model=model,
        ref_model=other,
        args=session.on_one_gpu(config),
        rows=made,
        held=held,
        length=pair_length,
        spec=spec,
        processing_class=tokenizer,
        about=about,
        itself=named == spec.model,
        quiet=run.quiet,
        part=part,
    )


def rewards(history: list[dict[str, float]]) -> dict[str, float]:
    """Return the rewards of the last logged step: accuracy, margin, chosen and rejected."""
    last = next((entry for entry in reversed(history) if "rewards/margins" in entry), {})
    return {name: float(last[key]) for key, name in LOGGED.items() if key.startswith("rewards/") and key in last}
