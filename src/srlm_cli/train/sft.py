"""Supervised fine-tuning on IFT and EFT rows: M0 to M1 (arXiv 2401.10020, section 2.1)."""

from __future__ import annotations

from typing import Any

from srlm_cli.errors import DataError
from srlm_cli.records import Row
from srlm_cli.train import session
from srlm_cli.train.data import dataset, sft_rows
from srlm_cli.train.session import TrainSpec


def sft(
    rows: list[Row], spec: TrainSpec, *, quiet: bool = False, provenance: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train on rows of `prompt` and `completion`, loss on target tokens only; return the results.

    Raises DataError when no row is left, or when an EFT row would lose its score.
    """
    if not rows:
        raise DataError("no rows to train on", "--in takes rows with `prompt` and `completion`")
    tokenizer = session.load_tokenizer(spec)
    made, report = sft_rows(rows, tokenizer, spec.max_length)
    if not made:
        raise DataError(f"none of {len(rows)} rows fits into --max-length {spec.max_length}")
    from trl import SFTConfig, SFTTrainer

    model = session.load_policy(spec)
    with session.folder_when_whole(spec.out) as folder:
        config = SFTConfig(**session.trainer_settings(spec))
        trainer = SFTTrainer(model=model, args=config, train_dataset=dataset(made), processing_class=tokenizer)
        session.follow(trainer, "sft", quiet)
        results = {"data": report.as_dict(), **session.run_training(trainer, report.tokens)}
        session.save(
            trainer, tokenizer, folder, {**(provenance or {}), "settings": session.settings_of(spec), **results}
        )
    return results
