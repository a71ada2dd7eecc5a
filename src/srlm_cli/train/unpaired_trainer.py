"""TRL's KTOTrainer on rendered rows, with the KL estimate of a whole optimizer step.

This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from trl import KTOTrainer
from trl.trainer import kto_trainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from srlm_cli.records import Record
from srlm_cli.train.data import IGNORED
from srlm_cli.train.losses import KTOLossConfig
from srlm_cli.train.reference_trainer import FILLER, ReferenceTrainer, ScoredCollator
from srlm_cli.train.step_trainer import StepSampler

SHIFTS = 64  # to look through for one that gives each prompt the reply to another
REPLIES = ("completion_ids", "KL_completion_ids")
SIDES = ("chosen", "rejected")


class UnpairedCollator(ScoredCollator, DataCollatorForUnpairedPreference):
    """TRL's collator, with the reference's scores of the reply and, where the loss has a KL estimate, the other one."""

    def __init__(self, estimates: bool, **more: Any) -> None:
        super().__init__(**more)
        self.reference = ("ref_logps", "ref_KL_logps") if estimates else ("ref_logps",)


class UnpairedTrainer(ReferenceTrainer, KTOTrainer):
    """A KTOTrainer whose step depends only on its rows, and whose loss is TRL's.

    TRL estimates the KL term over a device batch, in the order of the file. Here the rows are shuffled, and the
    estimate is over the rows of the whole step, on all devices: it is found before the step's first gradient.
    """

    command, unit = "kto", "rows"
    kl: Any = None

    def __init__(
        self,
        *args: Any,
        loss_config: KTOLossConfig,
        processing_class: Any,
        rows: list[Record],
        eval_rows: list[Record],
        length: Callable[[Record], int],
        batch: int,
        seed: int,
        **more: Any,
    ) -> None:
        if loss_config.estimates_kl:
            order = list(StepSampler(list(map(length, rows)), batch, seed))
            rows = with_others(rows, [order[at : at + batch] for at in range(0, len(order), batch)])
            eval_rows = with_others(eval_rows, [range(len(eval_rows))])
        collator = UnpairedCollator(
            loss_config.estimates_kl, pad_token_id=processing_class.pad_token_id, max_length=more["args"].max_length
        )
        with patch.object(kto_trainer, "hash_module", lambda model: None, create=True):  # of TRL's own cache
            super().__init__(
                *args, loss_config=loss_config, processing_class=processing_class, data_collator=collator, rows=rows,
                eval_rows=eval_rows, length=length, batch=batch, seed=seed, **more,
            )  # fmt: skip

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # Not before: see `KTOLossConfig.trl`.
        self.loss_type, self.calculate_KL = self.loss_config.trl_name, self.loss_config.estimates_kl
        return super()._precompute_ref_logps(dataset, name, batch_size)

    @staticmethod
    def filler(row: Record) -> Record:
        """Return a row that does not count."""
        short = {name: row[name][:1] for name in ("prompt_ids", *REPLIES) if name in row}
        return {**short, "label": True, "real": 0.0, "at": FILLER}

    @staticmethod
    def lengths(batch: Record) -> list[int]:
        """Return the tokens of each row of a batch."""
        return batch["attention_mask"].sum(1).tolist()

    @staticmethod
    def rows_of(batch: Record, some: Any) -> Record:
        """Return some rows of a batch, as a batch."""
        return type(batch)(**{name: values[some] if values.ndim else values for name, values in batch.items()})

    def forward_passes(self, epochs: float) -> float:
        return 2.0 + epochs if self.calculate_KL else 1.0

    def scored_texts(self, batch: Record) -> list[tuple[Any, Any]]:
        texts = []
        for prefix in ("", "KL_")[: len(self.data_collator.reference)]:
            length = batch[f"{prefix}attention_mask"][0].sum()
            texts.append((batch[f"{prefix}input_ids"][0, :length], batch[f"{prefix}completion_mask"][0, :length]))
        return texts

    def compute_ref_log_probs(self, model: Any, inputs: Record) -> tuple[Any, ...]:
        """Return the reference's log-probabilities of a batch, (rows,) each: replies and, if needed, the others'."""
        return tuple(scores for scores in super().compute_ref_log_probs(model, inputs) if scores is not None)

    def at_start(self, model: Any, batch: Record, items: Any) -> tuple[float, dict[str, float]]:
        self.kl = self.estimate_kl(model, [batch])
        loss = float(self.compute_loss(model, batch, num_items_in_batch=items))
        ratios = {"log_ratio": self.scores(model, batch).log_probs.sum(1) - batch["ref_logps"]}
        if self.calculate_KL:
            ratios["log_ratio_of_others"] = self.ratios_of_others(model, batch)
        return loss, {name: values.mean().item() for name, values in ratios.items()}

    def loss_at_start(self, batch: Record) -> tuple[float, str]:
        config, desirable = self.loss_config, batch["label"].float().mean().item()
        expected = (config.desirable_weight * desirable + config.undesirable_weight * (1 - desirable)) / 2
        return expected, f"{expected:.4f}"

    # --- the KL estimate -----------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Record], device: Any) -> Any:
        """Return the number of rows of a step, in all processes; find its KL estimate, since Trainer asks before it."""
        self.kl = self.estimate_kl(self.model_wrapped, batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
        """Measure the loss on the held-out rows, with the KL estimate over all of them."""
        self.kl = self.estimate_kl(self.model_wrapped, self.get_eval_dataloader())
        return super().evaluate(*args, **more)

    def estimate_kl(self, model: Any, batches: Iterable[Record]) -> Any:
        """Return the estimate of KL(policy || reference), (1,): a mean over rows in all processes.

        It is without dropout and has no gradient (arXiv 2402.01306). TRL's loss takes 0 for an estimate below 0.
        """
        found = torch.zeros(2, device=self.args.device)
        if not self.calculate_KL:
            return found[:1]
        training = model.training
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for batch in map(self._prepare_inputs, batches):
                found += torch.stack([(self.ratios_of_others(model, batch) * batch["real"]).sum(), batch["real"].sum()])
        model.train(training)
        total, rows = self.accelerator.gather(found).view(-1, 2).sum(0)
        return (total / rows).view(1)

    def ratios_of_others(self, model: Any, batch: Record) -> Any:
        """Return the log-ratio of each prompt with the reply to another, (rows,)."""
        inputs = {name: values for name, values in batch.items() if name not in self.data_collator.own}
        return super()._compute_kl_logps(model, inputs) - batch["ref_KL_logps"]

    def _compute_kl_logps(self, model: Any, batch: Record) -> Any:
        """Return the step's estimate where TRL's loss asks for that of its batch, less the reference's score, 0."""
        return self.kl if self.calculate_KL else None

    # --- the loss ------------------------------------------------------------------------------

    def scores(self, model: Any, inputs: Record) -> Any:
        """Return the scores of the replies of a batch."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        return model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
            use_cache=False, fused_lm_head=True,
        )  # fmt: skip

    def compute_loss(
        self, model: Any, inputs: Record, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the rows, of the whole step's where their number is given; it is TRL's loss."""
        counting = inputs["real"].bool()
        scores = self.scores(model, inputs)
        some = self.rows_of(scores, counting)
        batch = {**self.rows_of(inputs, counting), "ref_KL_logps": torch.zeros_like(self.kl)}
        mean = super()._compute_loss(lambda **_: some, {name: batch[name] for name in batch if name != "real"}, False)
        total = mean * counting.sum() if counting.any() else scores.log_probs.sum() * 0  # TRL's mean of no rows is NaN
        self._count(batch)
        loss = self.as_mean(total, inputs, num_items_in_batch)
        return (loss, scores) if return_outputs else loss

    def _count(self, batch: Record) -> None:
        """Let the figures that TRL has just logged, means over the rows of each label, count once per row."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        tokens = batch["completion_mask"].sum(1)
        for name, rows in zip(SIDES, (batch["label"], ~batch["label"]), strict=True):
            mine = torch.stack([tokens[rows].sum(), rows.sum()])
            total, count = self.accelerator.gather(mine).view(-1, 2).sum(0).tolist()
            if count:
                metrics[f"lengths/{name}"].append(total / count)
                for kind in ("rewards", "logps", "lengths"):
                    metrics[f"{kind}/{name}"] += metrics[f"{kind}/{name}"][-1:] * (count - 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the figures, with the margin of the means of both labels."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics.pop("rewards/margins", None)  # means of the batches that have both labels
        means = [sum(values) / len(values) for side in SIDES if (values := metrics.get(f"rewards/{side}"))]
        if len(means) == 2:
            metrics["rewards/margins"] = [means[0] - means[1]]
        super().log(logs, start_time)


def with_others(rows: list[Record], steps: Iterable[Sequence[int]]) -> list[Record]:
    """Return rows with `KL_completion_ids`, the reply to another prompt of the same step.

    `steps` are the rows of each step by their index. The replies of a step are shifted by one, as in the paper, or by
    the smallest number with which as few as possible stay with their own prompt. The only row of a step gets the first
    reply to another prompt.
    """
    made, first = list(rows), [row for step in steps for row in step]
    prompts = {tuple(row["prompt_ids"]): at for at, row in enumerate(rows)}
    prompt = [prompts[tuple(row["prompt_ids"])] for row in rows]
    for step in steps:
        if len(step) == 1:
            others = [next((row for row in first if prompt[row] != prompt[step[0]]), first[0])]
        else:
            shift = best_shift([prompt[row] for row in step])
            others = [step[at - shift] for at in range(len(step))]
        for row, other in zip(step, others, strict=True):
            made[row] = {**rows[row], "KL_completion_ids": rows[other]["completion_ids"]}
    return made


def best_shift(prompts: Sequence[int]) -> int:
    """Return the smallest shift, at least 1, with which as few prompts as possible meet themselves."""
    best, fewest = 1, len(prompts) + 1
    for shift in range(1, min(len(prompts), SHIFTS + 1)):
        alike = sum(prompts[at] == prompts[at - shift] for at in range(len(prompts)))
        if alike < fewest:
            best, fewest = shift, alike
        if not alike:
            break
    return best
