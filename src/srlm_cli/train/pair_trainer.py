"""TRL's DPOTrainer with the losses that it lacks, and the proof that training is tied to its reference.

This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from srlm_cli import distributed
from srlm_cli.errors import SrlmError
from srlm_cli.records import Record
from srlm_cli.streams.console import Progress
from srlm_cli.streams.writer import replace_text
from srlm_cli.train.callback import LOGGED
from srlm_cli.train.data import IGNORED
from srlm_cli.train.losses import DPOLossConfig, own_loss
from srlm_cli.train.packing import Packing
from srlm_cli.train.scoring import score_without_padding
from srlm_cli.train.step_trainer import StepTrainer

LN2 = math.log(2)
TOLERANCE = 1e-3  # of a log-probability in float32, by which two batches that hold the same row may differ
CHECKED = 4  # pairs, before the first step
OF_A_PAIR = ("label_smoothing", "real", "at")
FILLER = 2**40  # the index of a filler, which is not in the data


class PairCollator(DataCollatorForPreference):
    """TRL's collator, with three more fields per pair.

    They are the label smoothing, 1 for a pair and 0 for a filler, and the reference's scores of (chosen, rejected),
    found by the index of the pair; 0 if there are none yet.
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

    start: dict[str, float] | None = None
    checked: tuple[Any, Any] | None = None  # the reference's scores of the first pairs, in float32

    def __init__(
        self,
        *args: Any,
        loss_config: DPOLossConfig,
        reference_is_policy: bool,
        quiet: bool,
        processing_class: Any,
        **more: Any,
    ) -> None:
        self.loss_config, self.quiet, self.reference_is_policy = loss_config, quiet, reference_is_policy
        collator = PairCollator(pad_token_id=processing_class.pad_token_id)
        more["rows"] = [{**row, "real": 1.0, "at": at} for at, row in enumerate(more["rows"])]
        more["eval_rows"] = [{**row, "real": 1.0, "at": -1 - at} for at, row in enumerate(more["eval_rows"])]
        super().__init__(*args, processing_class=processing_class, data_collator=collator, **more)
        self.ref_model = None
        if "ref" in getattr(self.model, "peft_config", {}):  # TRL's frozen copy, of which only the scores are needed
            self.model.delete_adapter("ref")
            self.model.set_adapter("default")
        if not distributed.sharded():
            self.start = self.check_start(self.model)

    def _run_epoch(self, *args: Any, model: Any, **more: Any) -> None:
        if distributed.sharded() and self.loss_config.has_reference and not self.data_collator.scores:
            self.ref_model = model  # so that its adapter, if it has one, is part of the reference
            self._score("train", self.train_dataset, self.args.per_device_train_batch_size)
            if self.eval_dataset:
                self._score("eval", self.eval_dataset, self.args.per_device_eval_batch_size)
            self.ref_model = None
            self.start = self.check_start(model)
        super()._run_epoch(*args, model=model, **more)

    @staticmethod
    def filler(row: Record) -> Record:
        """Return a pair that does not count."""
        short = {name: row[name][:1] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        return {**short, "label_smoothing": 0.0, "real": 0.0, "at": FILLER}

    @staticmethod
    def row_items(row: Record) -> int:
        """Return 1: a pair."""
        return 1

    @staticmethod
    def batch_rows(batch: Record) -> int:
        """Return the pairs of a batch, fillers too."""
        return len(batch["real"])

    @staticmethod
    def lengths(batch: Record) -> list[int]:
        """Return the tokens of both rows of each pair of a batch."""
        return batch["attention_mask"].sum(1).view(2, -1).sum(0).tolist()

    @staticmethod
    def rows_of(batch: Record, some: slice) -> Record:
        """Return some pairs of a batch, as a batch."""
        return some_pairs(batch, some, len(batch["real"]))

    @staticmethod
    def items(batch: Record) -> Any:
        """Return the pairs of a batch that count."""
        return batch["real"].sum()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in OF_A_PAIR if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Score the reference, or take the scores that an unfinished run left; the collator adds them to the rows."""
        if name == "train":  # TRL's first call
            copy_rows(self.model)
            score_without_padding(self.packing, self.loss_config.use_weighting)
            if self.ref_model is not None:
                score_without_padding(Packing(self.ref_model))
        if self.loss_config.has_reference and (self._kept_scores(name).exists() or not distributed.sharded()):
            self._score(name, dataset, batch_size)
        return dataset

    def _kept_scores(self, name: str) -> Path:
        return self.workdir.folder / f"reference-{name}.json"

    def _score(self, name: str, dataset: Any, batch_size: int) -> None:
        """Give the collator the reference's log-probabilities, those that an unfinished run left or new ones."""
        kept = self._kept_scores(name)
        rows = dataset.select([row for row, counts in enumerate(dataset["real"]) if counts])
        if kept.exists():
            scores = json.loads(kept.read_text(encoding="utf-8"))
        else:
            scores = self._reference_scores(self.ref_model or self.model, rows, batch_size)
            with self.workdir.writing("the reference's log-probabilities"):
                if distributed.is_main():
                    replace_text(kept, json.dumps(scores))
        self.data_collator.scores = {**self.data_collator.scores, **dict(zip(rows["at"], scores, strict=True))}
        if name == "train":
            self.checked = self.check_scores(self.ref_model or self.model)

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
        return distributed.all_gather(found)[: len(rows)]

    def _first_pairs(self) -> dict[str, Any]:
        """Return the batch on which policy and reference are checked before the first step."""
        few = range(min(len(self.sampler.lengths), self.args.per_device_train_batch_size, CHECKED))
        return self._prepare_inputs(self.data_collator([self.train_dataset[row] for row in few]))

    def check_scores(self, model: Any) -> tuple[Any, Any]:
        """Return the reference's log-probabilities of the first pairs in float32, (pairs,) each of chosen and rejected.

        Raises SrlmError unless they are those of the reference's own logits, and those stored, as near as the dtype
        of the training allows.
        """
        batch, loss_config = self._first_pairs(), self.loss_config
        scored = {name: value for name, value in batch.items() if name not in OF_A_PAIR}
        model.eval()
        with in_float32(self.accelerator), torch.no_grad(), self.accelerator.autocast():
            found = self.compute_ref_log_probs(model, scored)
            if loss_config.ld_alpha is not None:
                return found
            for side, of_side in enumerate(found):
                row = side * len(of_side)
                length = int(batch["attention_mask"][row].sum())
                ids = batch["input_ids"][row, :length]
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
                wanted = batch["completion_mask"][row, 1:length].bool()
                total = float(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][wanted].sum())
                stored = float(batch[("ref_chosen_logps", "ref_rejected_logps")[side]][0])
                near = 10 * TOLERANCE * max(1.0, abs(total))
                rounded = self._rounding(logits[wanted])
                exact = near + rounded if distributed.sharded() else near
                for name, value, allowed in (("", float(of_side[0]), exact), ("stored ", stored, near + rounded)):
                    if not abs(total - value) <= allowed:
                        raise SrlmError(
                            f"the reference's {name}log-probability is {value:.3f}, and {total:.3f} by its own logits",
                            "no model is written; this is a bug in srlm, please report it",
                        )
        return found

    def _rounding(self, logits: Any) -> float:
        """Return by how much bfloat16 may move the summed log-probability of tokens with (tokens, vocabulary) logits.

        It keeps 8 bits of a number, so each addition to the residual stream errs by up to 2^-9 of it; the errors of
        2 x layers additions grow as their square root, and reach a token's logits in proportion. 0 in float32.
        """
        if not self.args.bf16:
            return 0.0
        layers = self.accelerator.unwrap_model(self.model).config.get_text_config().num_hidden_layers
        return float(logits.abs().amax(-1).sum()) * math.sqrt(2 * layers) * 2**-9

    def check_start(self, model: Any) -> dict[str, float]:
        """Return loss and log-ratios of the first pairs before any step, of the model as it is wrapped.

        Raises SrlmError unless a policy that is its own reference equals it: log-ratios 0, and loss ln 2 where the
        loss has no constant of its own.
        """
        batch = self._first_pairs()
        if self.checked is not None:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = self.checked
        ours, theirs = batch["ref_chosen_logps"].mean().item(), batch["ref_rejected_logps"].mean().item()
        pairs = self.items(batch) * self.accelerator.num_processes
        model.eval()
        with in_float32(self.accelerator), torch.no_grad(), self.accelerator.autocast():
            loss = float(self.compute_loss(model, batch, num_items_in_batch=pairs))
        found = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()
        ratios = (found["logps/chosen"] - ours, found["logps/rejected"] - theirs)
        loss_config = self.loss_config
        if self.reference_is_policy and loss_config.has_reference:
            scale = TOLERANCE * max(1.0, abs(ours), abs(theirs))
            apart = not max(map(abs, ratios)) <= scale
            if loss_config.starts_at_ln2:
                apart = apart or abs(loss - LN2) > max(1.0, loss_config.beta) * scale
            if apart:
                raise SrlmError(
                    "policy and reference differ before the first step: "
                    f"log-ratios {ratios[0]:.4f} and {ratios[1]:.4f}, loss {loss:.4f}, not 0, 0 and ln 2",
                    "no model is written; this is a bug in srlm, please report it",
                )
        return {"loss": loss, "log_ratio_chosen": ratios[0], "log_ratio_rejected": ratios[1]}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the pairs, of the whole step's where their number is given.

        The model scores a batch in one pass. The loss is then TRL's for each pair separately, so it does not depend on
        the other pairs. Pairs that do not count have scores and loss 0.
        """
        mode = "train" if self.model.training else "eval"
        real = inputs["real"]
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
        """Return TRL's loss of one pair, or our own from the same scores; TRL logs the rewards either way."""
        mode = "train" if self.model.training else "eval"
        smoothing, real = pair.pop("label_smoothing"), pair.pop("real")
        loss = super()._compute_loss(lambda **_: scores, pair, False)
        lengths = pair["completion_mask"].sum(1).float().chunk(2)
        for side, tokens in zip(("chosen", "rejected"), lengths, strict=True):
            self._metrics[mode][f"lengths/{side}"].append(self.accelerator.gather(tokens * real).mean().item())
        if not self.loss_config.is_own(smoothing):
            return loss
        policy = scores.log_probs.sum(1).chunk(2)
        theirs = (pair["ref_chosen_logps"], pair["ref_rejected_logps"])
        own = own_loss(self.loss_config, policy, theirs, lengths, smoothing)
        return (own - self.loss_config.nll_alpha * policy[0] / lengths[0]).mean()


def copy_rows(model: Any) -> None:
    """Copy what TRL leaves out when it copies an adapter as the reference: embeddings that are trained by token.

    It copies parameters whose names have `.default.`; these end with it (findings/dpo-reference-without-its-tokens.sh).
    """
    if "ref" in getattr(model, "peft_config", {}):
        for name, weight in model.named_parameters():
            if name.endswith(".default"):
                model.get_parameter(f"{name.removesuffix('default')}ref").data.copy_(weight.data)


@contextmanager
def in_float32(accelerator: Any) -> Iterator[None]:
    """Disable the autocast of a training, so that equal passes can be distinguished from different ones.

    In bfloat16 the result of a row changes from batch to batch by more than a wrong reference can change it. In
    float32 it does not. Both types use the same model, adapter and mask. Sharded weights keep
    their dtype.
    """
    before = accelerator.autocast_handler
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    try:
        yield
    finally:
        accelerator.autocast_handler = before


def some_pairs(fields: dict[str, Any], some: slice, pairs: int) -> Any:
    """Return some pairs of a batch: one row of values per pair, two rows of values per reply."""

    def part(value: Any) -> Any:
        return torch.cat([value[:pairs][some], value[pairs:][some]]) if len(value) == 2 * pairs else value[some]

    return type(fields)(**{name: part(value) if value.ndim else value for name, value in fields.items()})
