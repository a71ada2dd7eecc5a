"""TRL's DPOTrainer with the losses that it lacks.

This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from trl import DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from srlm_cli.records import Record
from srlm_cli.train.callback import LOGGED
from srlm_cli.train.data import IGNORED
from srlm_cli.train.losses import LN2, DPOLossConfig, own_loss
from srlm_cli.train.reference_trainer import FILLER, ReferenceTrainer, ScoredCollator


class PairCollator(ScoredCollator, DataCollatorForPreference):
    """TRL's collator, with the label smoothing of each pair."""

    own = ("label_smoothing", "real")
    reference = ("ref_chosen_logps", "ref_rejected_logps")


class PairTrainer(ReferenceTrainer, DPOTrainer):
    """A DPOTrainer that takes rendered rows, scores the reference once, and knows the losses that TRL lacks."""

    command, unit = "dpo", "pairs"

    def __init__(self, *args: Any, loss_config: DPOLossConfig, processing_class: Any, **more: Any) -> None:
        self.weighted, self.own_scores = loss_config.use_weighting, loss_config.ld_alpha is not None
        collator = PairCollator(pad_token_id=processing_class.pad_token_id)
        with patch.object(dpo_trainer, "hash_module", lambda model: None, create=True):  # of TRL's own cache
            super().__init__(
                *args, loss_config=loss_config, processing_class=processing_class, data_collator=collator, **more
            )

    @staticmethod
    def filler(row: Record) -> Record:
        """Return a pair that does not count."""
        short = {name: row[name][:1] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        return {**short, "label_smoothing": 0.0, "real": 0.0, "at": FILLER}

    @staticmethod
    def lengths(batch: Record) -> list[int]:
        """Return the tokens of both rows of each pair of a batch."""
        return batch["attention_mask"].sum(1).view(2, -1).sum(0).tolist()

    @staticmethod
    def rows_of(batch: Record, some: slice) -> Record:
        """Return some pairs of a batch, as a batch."""
        return some_pairs(batch, some, len(batch["real"]))

    def scored_texts(self, batch: Record) -> list[tuple[Any, Any]]:
        pairs, length = len(batch["real"]), batch["attention_mask"].sum(1)
        return [
            (batch["input_ids"][row, : length[row]], batch["completion_mask"][row, : length[row]]) for row in (0, pairs)
        ]

    def at_start(self, model: Any, batch: Record, items: Any) -> tuple[float, dict[str, float]]:
        loss = float(self.compute_loss(model, dict(batch), num_items_in_batch=items))
        found = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
        sides = ("chosen", "rejected")
        return loss, {
            f"log_ratio_{side}": found[f"logps/{side}"] - batch[f"ref_{side}_logps"].mean().item() for side in sides
        }

    def loss_at_start(self, batch: Record) -> tuple[float, str] | None:
        start = self.loss_config.start
        return None if start is None else (start, "ln 2" if start == LN2 else f"{start:.4f}")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the pairs, of the whole step's where their number is given.

        The model scores a batch in one pass. The loss is then TRL's for each pair separately, so it does not depend on
        the other pairs. Pairs that do not count have scores and loss 0.
        """
        mode = "train" if self.model.training else "eval"
        inputs, real = self.with_current_reference(inputs), inputs["real"]
        counting = self.accelerator.gather(real).view(-1, len(real)).sum(0).int().tolist()
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        scores = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
            use_cache=False, fused_lm_head=True,
        )  # fmt: skip
        scores.log_probs = scores.log_probs * real.repeat(2)[:, None]
        total = 0.0
        for pair, count in enumerate(counting):
            only = slice(pair, pair + 1)
            loss = self._pair_loss(some_pairs(scores, only, len(real)), some_pairs(inputs, only, len(real)))
            total = total + loss * real[pair]
            for name in LOGGED:  # the mean over the processes, of which `count` have a pair that counts
                if values := self._metrics[mode].get(name):
                    values.append(values.pop() * self.accelerator.num_processes)
                    values[-1:] = [values[-1] / max(count, 1)] * count
        loss = self.as_mean(total, inputs, num_items_in_batch)
        return (loss, scores) if return_outputs else loss

    def _pair_loss(self, scores: Any, pair: dict[str, Any]) -> Any:
        """Return the loss of one pair: TRL's, and our own from the same scores; TRL logs the rewards either way."""
        mode = "train" if self.model.training else "eval"
        smoothing, real = pair.pop("label_smoothing"), pair.pop("real")
        config, smoothed = self.loss_config, bool(smoothing.any())
        of_trl = config.of_trl(smoothed)
        self.loss_types, self.loss_weights = list(of_trl), list(of_trl.values())
        loss = super()._compute_loss(lambda **_: scores, pair, False)
        lengths = pair["completion_mask"].sum(1).float().chunk(2)
        for side, tokens in zip(("chosen", "rejected"), lengths, strict=True):
            self._metrics[mode][f"lengths/{side}"].append(self.accelerator.gather(tokens * real).mean().item())
        policy = scores.log_probs.sum(1).chunk(2)
        theirs = (pair["ref_chosen_logps"], pair["ref_rejected_logps"])
        for name, weight in config.own(smoothed).items():
            loss = loss + weight * own_loss(name, config, policy, theirs, lengths, smoothing).mean()
        return loss


def some_pairs(fields: dict[str, Any], some: slice, pairs: int) -> Any:
    """Return some pairs of a batch: one row of values per pair, two rows of values per reply."""

    def part(value: Any) -> Any:
        return torch.cat([value[:pairs][some], value[pairs:][some]]) if len(value) == 2 * pairs else value[some]

    return type(fields)(**{name: part(value) if value.ndim else value for name, value in fields.items()})
