"""TRL's trainers as srlm uses them: an order of rows and checkpoints that can go on, logits of target tokens only.

This module imports torch and TRL and is itself imported late.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from srlm_cli.seeds import derive
from srlm_cli.streams.console import Progress
from srlm_cli.streams.writer import replace_text
from srlm_cli.train import reference
from srlm_cli.train.data import IGNORED
from srlm_cli.train.losses import Preference, own_loss
from srlm_cli.train.part import Part
from srlm_cli.train.scoring import score_by_row


class StepSampler:
    """The order of the rows: shuffled anew each epoch, the rows of one optimizer step by length, longest first.

    The order is a function of seed and epoch alone, so a training that goes on meets the rows that
    an uninterrupted one would. Sorting within a step spares padding and leaves each step its rows.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed = lengths, batch, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, "epoch", self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for at in range(0, len(order), self.batch):
            yield from sorted(order[at : at + self.batch], key=lambda row: -self.lengths[row])


class Resumable:
    """A mixin for a trainer: the sampler above, and a checkpoint that counts only when it is whole."""

    def __init__(self, *args: Any, part: Part, sampler: StepSampler, **more: Any) -> None:
        self.part, self.sampler = part, sampler
        super().__init__(*args, **more)

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self.sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        with self.part.writing(f"the checkpoint of step {step}"):
            Trainer._save_checkpoint(self, model, trial)  # TRL's own would write a model card first
            self.part.keep(step)


class TargetLossTrainer(Resumable, SFTTrainer):
    """An SFTTrainer whose logits are made for target positions only.

    A judge's row has hundreds of tokens and one score; logits over the whole vocabulary for the
    prompt's positions bear no loss and, on a CPU, take a quarter of the time.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the target tokens, of the whole step's where their number is given."""
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


class PairCollator(DataCollatorForPreference):
    """TRL's collator, with the label smoothing of each pair."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        smoothing = torch.tensor([row["label_smoothing"] for row in examples], dtype=torch.float32)
        return {**super().torch_call(examples), "label_smoothing": smoothing}


class PairTrainer(Resumable, DPOTrainer):
    """A DPOTrainer that takes rendered rows, scores the reference once, and knows the losses that TRL lacks."""

    def __init__(self, *args: Any, about: Preference, quiet: bool, processing_class: Any, **more: Any) -> None:
        self.about, self.quiet = about, quiet
        collator = PairCollator(pad_token_id=processing_class.pad_token_id)
        super().__init__(*args, processing_class=processing_class, data_collator=collator, **more)
        self.ref_model = None
        if "ref" in getattr(self.model, "peft_config", {}):  # TRL's frozen copy, of which only the scores are needed
            self.model.delete_adapter("ref")
            self.model.set_adapter("default")

    def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "label_smoothing" not in self._signature_columns:
            self._signature_columns.append("label_smoothing")

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return the dataset with the reference's log-probabilities, those that an unfinished run left or new ones."""
        scorer = self.ref_model or self.model
        for model in {id(m): m for m in (self.model, scorer)}.values():
            score_by_row(model)
        kept = self.part.folder / f"reference-{name}.json"
        if not self.about.has_reference:
            scores = [(0.0, 0.0)] * len(dataset)
        elif kept.exists():
            scores = json.loads(kept.read_text(encoding="utf-8"))
        else:
            scores = self._reference_scores(scorer, dataset, batch_size)
            with self.part.writing("the reference's log-probabilities"):
                replace_text(kept, json.dumps(scores))
        chosen, rejected = map(list, zip(*scores, strict=True))
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def _reference_scores(self, scorer: Any, rows: Any, batch_size: int) -> list[tuple[float, float]]:
        """Return the summed log-probabilities of (chosen, rejected) by pair."""
        scorer.eval()
        found: list[tuple[float, float]] = []
        bar = Progress("dpo", len(rows), 0, self.quiet, unit="pairs scored by the reference")
        try:
            for at in range(0, len(rows), batch_size):
                examples = [rows[place] for place in range(at, min(at + batch_size, len(rows)))]
                batch = self._prepare_inputs(self.data_collator(examples))
                batch.pop("label_smoothing")
                found += zip(*(side.tolist() for side in self.compute_ref_log_probs(scorer, batch)), strict=True)
                if at == 0:
                    with self.accelerator.autocast():
                        reference.check_scores(scorer, batch, found[0], self.about)
                bar.advance(len(examples))
        finally:
            bar.close()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Return TRL's loss, or our own from the same scores; TRL logs the rewards either way."""
        smoothing = inputs.pop("label_smoothing")
        mode = "train" if self.model.training else "eval"
        kept = {}

        def scored(**given: Any) -> Any:
            kept["scores"] = model(**given)
            return kept["scores"]

        loss = super()._compute_loss(scored, inputs, return_outputs)
        lengths = inputs["completion_mask"].sum(1).float().chunk(2)
        for side, tokens in zip(("chosen", "rejected"), lengths, strict=True):
            self._metrics[mode][f"lengths/{side}"].append(self.accelerator.gather(tokens).mean().item())
        if not self.about.is_own(smoothing):
            return loss
        policy = kept["scores"].log_probs.sum(1).chunk(2)
        scores = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        own = own_loss(self.about, policy, scores, lengths, smoothing)
        own = (own - self.about.nll_alpha * policy[0] / lengths[0]).mean()
        return (own, loss[1]) if return_outputs else own
