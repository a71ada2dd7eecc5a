"""TRL's trainers as srlm uses them: an order of rows and checkpoints that can go on, logits of target tokens only.

This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from srlm_cli import distributed
from srlm_cli.records import Row
from srlm_cli.seeds import derive
from srlm_cli.streams.console import Progress
from srlm_cli.streams.writer import replace_text
from srlm_cli.train import reference
from srlm_cli.train.callback import LOGGED
from srlm_cli.train.data import IGNORED, dataset
from srlm_cli.train.embedding_gradient import add_by_row
from srlm_cli.train.losses import Preference, own_loss
from srlm_cli.train.packing import Packing, groups
from srlm_cli.train.scoring import score_without_padding
from srlm_cli.train.workdir import Part

OF_A_PAIR = ("label_smoothing", "real", "at")
FILLER = 2**40  # where a filler stands: nowhere


class StepSampler:
    """The order of the rows: shuffled anew each epoch, the rows of one optimizer step by length, longest first.

    The order is a function of seed and epoch alone, so a training that goes on meets the rows that
    an uninterrupted one would, and several processes those that one would: each in its turn takes the
    next rows of a step. Sorting within a step spares padding and leaves each step its rows. The last step
    of an epoch is filled up to a multiple of `whole`, so that all have as much to do, with the number
    behind the last row: a row without a target.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int, whole: int = 1) -> None:
        self.lengths, self.batch, self.seed, self.whole = lengths, batch, seed, whole
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + -len(self.lengths) % self.whole

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, "epoch", self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for at in range(0, len(order), self.batch):
            yield from sorted(order[at : at + self.batch], key=lambda row: -self.lengths[row])
        yield from [len(self.lengths)] * (len(self) - len(self.lengths))


class StepTrainer:
    """A mixin for a trainer: the sampler above, a loss that is a mean over the whole step, whole checkpoints.

    What a step learns depends on its rows alone: not on how many are on a device at a time, nor on how many
    processes share them. A trainer tells by `items` how many things a batch has that its loss is a mean over
    (target tokens, or pairs), and by `filler` what a row without any looks like.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, rows: list[Row], held: list[Row], length: Callable[[Row], int], spec: Any, part: Part,
        **more: Any,
    ) -> None:  # fmt: skip
        self.part = part
        whole = more["args"].per_device_train_batch_size * distributed.count()
        self.sampler = StepSampler(list(map(length, rows)), spec.batch, spec.seed, whole)
        self.held_items = sum(map(self.row_items, held))
        filler = self.filler(rows[0])
        padded = held + [filler] * (-len(held) % whole)
        super().__init__(
            *args, train_dataset=dataset([*rows, filler]), eval_dataset=dataset(padded) if held else None, **more
        )
        self.splits = distributed.count() == 1 and self.args.device.type == "cpu"
        _ = self.packing  # tries the model out before accelerate, with bfloat16, changes its forward pass
        if self.splits:
            add_by_row(self.model)

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the model can be told the position of each token."""
        return "position_ids" in signature(self.packing.bare.forward).parameters

    @cached_property
    def packing(self) -> Packing:
        """The passes over rows of the model to train."""
        return Packing(self.model)

    def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self.sampler

    def _run_epoch(self, *args: Any, epoch: int, **more: Any) -> None:
        self.sampler.set_epoch(epoch)  # accelerate does not reach it in several processes when batches are skipped
        super()._run_epoch(*args, epoch=epoch, **more)

    def _get_num_items_in_batch(self, batch_samples: list[Row], device: Any) -> Any:
        """Return how many items the loss of these batches is a mean over, in all processes."""
        items = torch.tensor(sum(float(self.items(batch)) for batch in batch_samples), device=device)
        return self.accelerator.gather(items).sum()

    def training_step(self, model: Any, inputs: Row, num_items_in_batch: Any = None) -> Any:
        """Make the gradient of a batch, on a CPU of as many rows at a time as a pass is quickest with."""
        if not self.splits:
            return super().training_step(model, inputs, num_items_in_batch)
        most = self.batch_rows(inputs) if self.packing.now() else 1
        total = 0.0
        for some in groups(self.lengths(inputs), most):
            total = total + super().training_step(model, self.rows_of(inputs, some), num_items_in_batch)
        return total

    def as_mean(self, total: Any, batch: Row, items: Any) -> Any:
        """Return a sum over the items of a batch as its part of the mean over `items`, those of a step.

        The parts of several processes are averaged, so each is that much larger. Without `items` it is,
        on held-out rows, its part of the mean over all of them, as Trainer averages the parts by rows; else
        its own mean.
        """
        if items is not None:
            return total / items * self.accelerator.num_processes
        if not self.model.training:
            return total / self.held_items * len(self.eval_dataset) / self.batch_rows(batch)
        return total / max(1, self.items(batch))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        with self.part.writing(f"the checkpoint of step {step}"):
            Trainer._save_checkpoint(self, model, trial)  # TRL's own would write a model card first
            distributed.wait()
            self.part.keep(step)


class TargetLossTrainer(StepTrainer, SFTTrainer):
    """An SFTTrainer whose logits are made for target positions only.

    A judge's row has hundreds of tokens and one score; logits over the whole vocabulary for the
    prompt's positions bear no loss and, on a CPU, take a quarter of the time.
    """

    @staticmethod
    def filler(row: Row) -> Row:
        """Return a row without a target."""
        return {"input_ids": row["input_ids"][:2], "labels": [IGNORED] * len(row["input_ids"][:2])}

    @staticmethod
    def row_items(row: Row) -> int:
        """Return the target tokens of a row."""
        return sum(label != IGNORED for label in row["labels"][1:])

    @staticmethod
    def batch_rows(batch: Row) -> int:
        """Return the rows of a batch."""
        return len(batch["labels"])

    @staticmethod
    def lengths(batch: Row) -> list[int]:
        """Return the tokens of each row of a batch."""
        return batch["attention_mask"].sum(1).tolist()

    @staticmethod
    def rows_of(batch: Row, some: slice) -> Row:
        """Return some rows of a batch, as a batch."""
        return {name: values[some] for name, values in batch.items()}

    @staticmethod
    def items(batch: Row) -> Any:
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
        logits = self.packing.logits(model, rows, [at.tolist() for at in places])
        targets = (row[at] for row, at in zip(labels, places, strict=True))
        return sum(summed_loss(*one) for one in zip(logits, targets, strict=True))


def padded_loss(model: Any, inputs: Row, takes_positions: bool) -> Any:
    """Return the summed loss of the target tokens of a batch with padding on the left.

    A model counts positions from the first column, unless it is told or (`takes_positions` False) sees to it itself.
    """
    labels = inputs["labels"][:, 1:]
    kept = (labels != IGNORED).any(0).nonzero()[:, 0]
    given = {name: value for name, value in inputs.items() if name != "labels"}
    if takes_positions:
        given["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**given, use_cache=False, logits_to_keep=kept).logits.float()
    return summed_loss(logits.flatten(0, 1), labels[:, kept].flatten())


def summed_loss(logits: Any, targets: Any) -> Any:
    """Return the summed cross-entropy of targets, (tokens,), given logits, (tokens, vocabulary)."""
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


class PairCollator(DataCollatorForPreference):
    """TRL's collator, with what we keep of each pair.

    That is its label smoothing, 1 if it counts and 0 if it is a filler, and the reference's scores of (chosen,
    rejected) by where it stands, 0 while there are none.
    """

    scores: dict[int, tuple[float, float]] = {}

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        columns = {name: [row[name] for row in examples] for name in OF_A_PAIR}
        scores = [self.scores.get(at, (0.0, 0.0)) for at in columns.pop("at")]
        columns["ref_chosen_logps"], columns["ref_rejected_logps"] = zip(*scores, strict=True)
        more = {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}
        return {**super().torch_call(examples), **more}


class PairTrainer(StepTrainer, DPOTrainer):
    """A DPOTrainer that takes rendered rows, scores the reference once, and knows the losses that TRL lacks.

    The reference is scored, and the start checked, when the trainer is made; where the weights are sharded, by
    the policy itself before its first step, when each process has its part.
    """

    of_a_pair = OF_A_PAIR
    start: dict[str, float] | None = None
    checked: tuple[Any, Any] | None = None  # the reference's scores of the first pairs

    def __init__(
        self, *args: Any, about: Preference, quiet: bool, processing_class: Any, itself: bool, **more: Any
    ) -> None:
        self.about, self.quiet, self.itself = about, quiet, itself
        collator = PairCollator(pad_token_id=processing_class.pad_token_id)
        more["rows"] = [{**row, "real": 1.0, "at": at} for at, row in enumerate(more["rows"])]
        more["held"] = [{**row, "real": 1.0, "at": -1 - at} for at, row in enumerate(more["held"])]
        super().__init__(*args, processing_class=processing_class, data_collator=collator, **more)
        self.ref_model = None
        if "ref" in getattr(self.model, "peft_config", {}):  # TRL's frozen copy, of which only the scores are needed
            self.model.delete_adapter("ref")
            self.model.set_adapter("default")
        if not distributed.sharded():
            self.start = reference.check_start(self, self.model, self.checked)

    def _run_epoch(self, *args: Any, model: Any, **more: Any) -> None:
        if distributed.sharded() and self.about.has_reference and not self.data_collator.scores:
            self.ref_model = model  # so that its adapter, if it has one, is part of the reference
            self._score("train", self.train_dataset, self.args.per_device_train_batch_size)
            if self.eval_dataset:
                self._score("eval", self.eval_dataset, self.args.per_device_eval_batch_size)
            self.ref_model = None
            self.start = reference.check_start(self, model, self.checked)
        super()._run_epoch(*args, model=model, **more)

    @staticmethod
    def filler(row: Row) -> Row:
        """Return a pair that does not count."""
        short = {name: row[name][:1] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        return {**short, "label_smoothing": 0.0, "real": 0.0, "at": FILLER}

    @staticmethod
    def row_items(row: Row) -> int:
        """Return 1: a pair."""
        return 1

    @staticmethod
    def batch_rows(batch: Row) -> int:
        """Return the pairs of a batch, fillers too."""
        return len(batch["real"])

    @staticmethod
    def lengths(batch: Row) -> list[int]:
        """Return the tokens of both rows of each pair of a batch."""
        return batch["attention_mask"].sum(1).view(2, -1).sum(0).tolist()

    @staticmethod
    def rows_of(batch: Row, some: slice) -> Row:
        """Return some pairs of a batch, as a batch."""
        return some_pairs(batch, some, len(batch["real"]))

    @staticmethod
    def items(batch: Row) -> Any:
        """Return the pairs of a batch that count."""
        return batch["real"].sum()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in OF_A_PAIR if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Score the reference, or take the scores that an unfinished run left; the collator adds them to the rows."""
        if name == "train":  # TRL's first call
            score_without_padding(self.packing)
            if self.ref_model is not None:
                score_without_padding(Packing(self.ref_model))
        if self.about.has_reference and (self._kept_scores(name).exists() or not distributed.sharded()):
            self._score(name, dataset, batch_size)
        return dataset

    def _kept_scores(self, name: str) -> Path:
        return self.part.folder / f"reference-{name}.json"

    def _score(self, name: str, dataset: Any, batch_size: int) -> None:
        """Give the collator the reference's log-probabilities, those that an unfinished run left or new ones."""
        kept = self._kept_scores(name)
        rows = dataset.select([row for row, counts in enumerate(dataset["real"]) if counts])
        if kept.exists():
            scores = json.loads(kept.read_text(encoding="utf-8"))
        else:
            scores = self._reference_scores(self.ref_model or self.model, rows, batch_size)
            with self.part.writing("the reference's log-probabilities"):
                if distributed.is_main():
                    replace_text(kept, json.dumps(scores))
        self.data_collator.scores = {**self.data_collator.scores, **dict(zip(rows["at"], scores, strict=True))}
        if name == "train":
            self.checked = reference.check_scores(self, self.ref_model or self.model)

    def _reference_scores(self, scorer: Any, rows: Any, batch_size: int) -> list[tuple[float, float]]:
        """Return the summed log-probabilities of (chosen, rejected) by pair; each process scores its share."""
        scorer.eval()
        found: list[tuple[float, float]] = []
        share = -(-len(rows) // distributed.count())  # some of the last ones are scored twice, so that shares are equal
        mine = [min(distributed.rank() * share + place, len(rows) - 1) for place in range(share)]
        bar = Progress("dpo", share, 0, self.quiet, unit="pairs scored by the reference")
        try:
            for at in range(0, share, batch_size):
                examples = [rows[place] for place in mine[at : at + batch_size]]
                batch = self._prepare_inputs(self.data_collator(examples))
                scored = {name: value for name, value in batch.items() if name not in OF_A_PAIR}
                found += zip(*(side.tolist() for side in self.compute_ref_log_probs(scorer, scored)), strict=True)
                bar.advance(len(examples))
        finally:
            bar.close()
        return distributed.joined(found)[: len(rows)]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the pairs, of the whole step's where their number is given.

        The model scores a batch at once; the loss is then TRL's for each pair by itself, so that what
        stands beside a pair changes nothing. Pairs that do not count have scores and loss 0.
        """
        mode = "train" if self.model.training else "eval"
        real = inputs["real"]
        counting = self.accelerator.gather(real).view(-1, len(real)).sum(0).int().tolist()
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        scores = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
            use_cache=False, fused_lm_head=True, **routed,
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
        """Return TRL's loss of one pair, or our own from the same scores; TRL logs the rewards either way."""
        mode = "train" if self.model.training else "eval"
        smoothing, real = pair.pop("label_smoothing"), pair.pop("real")
        loss = super()._compute_loss(lambda **_: scores, pair, False)
        lengths = pair["completion_mask"].sum(1).float().chunk(2)
        for side, tokens in zip(("chosen", "rejected"), lengths, strict=True):
            self._metrics[mode][f"lengths/{side}"].append(self.accelerator.gather(tokens * real).mean().item())
        if not self.about.is_own(smoothing):
            return loss
        policy = scores.log_probs.sum(1).chunk(2)
        theirs = (pair["ref_chosen_logps"], pair["ref_rejected_logps"])
        own = own_loss(self.about, policy, theirs, lengths, smoothing)
        return (own - self.about.nll_alpha * policy[0] / lengths[0]).mean()


def some_pairs(fields: dict[str, Any], some: slice, pairs: int) -> Any:
    """Return some pairs of a batch: their rows of what is by pair, both their rows of what is by reply."""

    def part(value: Any) -> Any:
        return torch.cat([value[:pairs][some], value[pairs:][some]]) if len(value) == 2 * pairs else value[some]

    return type(fields)(**{name: part(value) if value.ndim else value for name, value in fields.items()})
