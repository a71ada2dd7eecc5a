"""Supervised fine-tuning on IFT and EFT rows: M0 to M1 (arXiv 2401.10020, section 2.1)."""

from __future__ import annotations

from typing import Any

from srlm_cli.errors import DataError
from srlm_cli.records import Row
from srlm_cli.train import session
from srlm_cli.train.data import IGNORED, dataset, sft_rows
from srlm_cli.train.session import TrainSpec


def sft(
    rows: list[Row],
    spec: TrainSpec,
    *,
    drop_long: bool = False,
    quiet: bool = False,
    provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on rows of `prompt` and `completion`, loss on target tokens only; return the results.

    Raises DataError when no row is left, or when an EFT row would lose its score and not `drop_long`.
    """
    if not rows:
        raise DataError("no rows to train on", "--in takes rows with `prompt` and `completion`")
    tokenizer = session.load_tokenizer(spec)
    made, report = sft_rows(rows, tokenizer, spec.max_length, drop_long=drop_long)
    if not made:
        raise DataError(f"none of {len(rows)} rows fits into --max-length {spec.max_length}")
    from transformers import DataCollatorForSeq2Seq
    from trl import SFTConfig

    model = session.load_policy(spec)
    tokenizer.padding_side = "left"  # so that targets, which end their rows, stand at the same positions
    with session.folder_when_whole(spec.out) as folder:
        config = SFTConfig(**session.trainer_settings(spec))
        trainer = target_loss_trainer()(
            model=model,
            args=config,
            train_dataset=dataset(made),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        session.follow(trainer, "sft", quiet, folder)
        results = {"data": report.as_dict(), **session.run_training(trainer, report.tokens)}
        session.save(
            trainer, tokenizer, folder, {**(provenance or {}), "settings": session.settings_of(spec), **results}
        )
    return results


def target_loss_trainer() -> type:
    """Return an SFTTrainer whose logits are made for target positions only.

    A judge's row has hundreds of tokens and one score; logits over the whole vocabulary for the
    prompt's positions bear no loss and, on a CPU, take a quarter of the time.
    """
    import torch
    from trl import SFTTrainer

    class TargetLossTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")[:, 1:]
            positions = (labels != IGNORED).any(0).nonzero()[:, 0]
            outputs = model(**inputs, use_cache=False, logits_to_keep=positions)
            kept = labels[:, positions]
            loss = torch.nn.functional.cross_entropy(
                outputs.logits.float().flatten(0, 1), kept.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            if num_items_in_batch is None:
                loss = loss / (kept != IGNORED).sum().clamp(min=1)
            else:
                loss = loss / num_items_in_batch * self.accelerator.num_processes
            return (loss, outputs) if return_outputs else loss

    return TargetLossTrainer
