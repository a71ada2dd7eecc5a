"""TRL's SFTTrainer with logits of target tokens only, of some of them at a time.

This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from srlm_cli.records import Record
from srlm_cli.train.chunked_logits import add_chunked_loss
from srlm_cli.train.data import IGNORED
from srlm_cli.train.step_trainer import StepTrainer


class TargetLossTrainer(StepTrainer, SFTTrainer):
    """An SFTTrainer whose logits are made for target positions only.

    A judge's row has hundreds of tokens and one score; logits over the whole vocabulary for the
    prompt's positions bear no loss and, on a CPU, take a quarter of the time.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        add_chunked_loss(self.packing.bare)

    @staticmethod
    def filler(row: Record) -> Record:
        """Return a row without a target."""
        return {"input_ids": row["input_ids"][:2], "labels": [IGNORED] * len(row["input_ids"][:2])}

    @staticmethod
    def row_items(row: Record) -> int:
        """Return the target tokens of a row."""
        return sum(label != IGNORED for label in row["labels"][1:])

    @staticmethod
    def batch_rows(batch: Record) -> int:
        """Return the rows of a batch."""
        return len(batch["labels"])

    @staticmethod
    def lengths(batch: Record) -> list[int]:
        """Return the tokens of each row of a batch."""
        return batch["attention_mask"].sum(1).tolist()

    @staticmethod
    def rows_of(batch: Record, some: slice) -> Record:
        """Return some rows of a batch, as a batch."""
        return {name: values[some] for name, values in batch.items()}

    @staticmethod
    def items(batch: Record) -> Any:
        """Return the target tokens of a batch."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the target tokens, of the whole step's where their number is given."""
        if self.args.device.type == "cpu":
            loss = self._without_padding(model, inputs)
        else:
            loss = padded_loss(model, inputs, self.takes_positions)
        loss = self.as_mean(loss, inputs, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _without_padding(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return the summed loss of the target tokens."""
        seen = inputs["attention_mask"].bool()
        labels = [row[own][1:] for row, own in zip(inputs["labels"], seen, strict=True)]
        rows = [row[own].tolist() for row, own in zip(inputs["input_ids"], seen, strict=True)]
        places = [(row != IGNORED).nonzero()[:, 0] for row in labels]
        targets = [row[at] for row, at in zip(labels, places, strict=True)]
        return sum(self.packing.losses(model, rows, [at.tolist() for at in places], targets))


def padded_loss(model: Any, inputs: Record, takes_positions: bool) -> Any:
    """Return the summed loss of the target tokens of a batch with padding on the left.

    A model counts positions from the first column, unless it gets them or (`takes_positions` False) handles padding.
    """
    labels = inputs["labels"][:, 1:]
    kept = (labels != IGNORED).any(0).nonzero()[:, 0]
    given = {name: value for name, value in inputs.items() if name != "labels"}
    if takes_positions:
        given["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**given, use_cache=False, logits_to_keep=kept, targets=labels[:, kept].flatten()).loss
