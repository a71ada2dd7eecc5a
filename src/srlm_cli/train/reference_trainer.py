"""A trainer with a reference policy: it scores the reference once, and proves that training is tied to it.

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
from trl.trainer.callbacks import SyncRefModelCallback

from srlm_cli import distributed
from srlm_cli.errors import SrlmError
from srlm_cli.models.files import broken_file
from srlm_cli.models.load import restore
from srlm_cli.records import Record
from srlm_cli.streams.console import Progress, say
from srlm_cli.streams.writer import replace_text
from srlm_cli.train import reference_cache
from srlm_cli.train.chunked_logits import CHUNK
from srlm_cli.train.float32_logits import make_few_in_float32
from srlm_cli.train.packing import Packing
from srlm_cli.train.scoring import score_without_padding
from srlm_cli.train.step_trainer import StepTrainer
from srlm_cli.train.workdir import REFERENCE

TOLERANCE = 1e-3  # of a log-probability in float32, by which two batches that hold the same row may differ
CHECKED = 4  # rows, before the first step
FILLER = 2**40  # the index of a filler, which is not in the data


class ScoredCollator:
    """A mixin for TRL's collators, with more fields per row: its `own`, and the reference's scores (`reference`).

    Own are 1 for a row and 0 for a filler (`real`), and what a method adds. The scores are found by the index of the
    row (`at`); they are 0 if there are none yet.
    """

    own: tuple[str, ...] = ("real",)
    reference: tuple[str, ...]
    scores: dict[int, tuple[float, ...]] = {}

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        columns = {name: [row[name] for row in examples] for name in self.own}
        scores = [self.scores.get(row["at"], (0.0,) * len(self.reference)) for row in examples]
        columns |= dict(zip(self.reference, zip(*scores, strict=True), strict=True))
        more = {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}
        return {**super().torch_call(examples), **more}


class ReferenceTrainer(StepTrainer):
    """A mixin for TRL's trainers that have a reference: it is scored once, and the start of the policy is checked.

    Both happen when the trainer is made; where the weights are sharded, the policy itself does it before its first
    step, when each process has its part.

    A reference that moves (TR-DPO) stays in memory, and TRL's callback mixes the policy into it. From its first move on
    each step scores it again. Held-out rows keep the scores of the start, so that checkpoints can be compared.

    With `caches` the scores are those of an earlier run, if there was one with all that they depend on; `cached` is
    the file that those of the training rows were read from.
    """

    command: str  # for the progress
    unit: str
    weighted = False  # whether WPO's weights are needed (see `score_without_padding`)
    own_scores = False  # whether the scores are not sums of log-probabilities
    start: dict[str, float] | None = None
    checked: tuple[Any, ...] | None = None  # the reference's scores of the first rows, in float32
    cached: Path | None = None

    def __init__(
        self,
        *args: Any,
        loss_config: Any,
        reference_is_policy: bool,
        reference_moves: bool,
        caches: bool,
        quiet: bool,
        data_collator: Any,
        **more: Any,
    ) -> None:
        self.loss_config, self.quiet, self.reference_is_policy = loss_config, quiet, reference_is_policy
        self.caches = caches and not distributed.sharded()  # no process has the whole weights to identify them by
        more["rows"] = [{**row, "real": 1.0, "at": at} for at, row in enumerate(more["rows"])]
        more["eval_rows"] = [{**row, "real": 1.0, "at": -1 - at} for at, row in enumerate(more["eval_rows"])]
        super().__init__(*args, data_collator=data_collator, **more)
        self.moving, self.ref_model = self.ref_model if reference_moves else None, None
        if self.moving is not None:
            self.add_callback(SyncRefModelCallback(self.moving, self.accelerator))
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

    def scored_texts(self, batch: Record) -> list[tuple[Any, Any]]:
        """Return token ids and completion mask of what the reference scores of the first row, in the scores' order."""
        raise NotImplementedError

    def at_start(self, model: Any, batch: Record, items: Any) -> tuple[float, dict[str, float]]:
        """Return the loss of a batch, a mean over `items`, and its mean log-ratios by name."""
        raise NotImplementedError

    def loss_at_start(self, batch: Record) -> tuple[float, str] | None:
        """Return the loss of a batch where policy and reference are equal, also in words; None if it is not known."""
        raise NotImplementedError

    def forward_passes(self, epochs: float) -> float:
        return 1.0 if self.moving is None else 1.0 + epochs

    @staticmethod
    def row_items(row: Record) -> int:
        """Return 1: a row."""
        return 1

    @staticmethod
    def batch_rows(batch: Record) -> int:
        """Return the rows of a batch, fillers too."""
        return len(batch["real"])

    @staticmethod
    def items(batch: Record) -> Any:
        """Return the rows of a batch that count."""
        return batch["real"].sum()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        mine = (*self.data_collator.own, "at")
        self._signature_columns += [name for name in mine if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Score the reference, or take the scores that an unfinished run left; the collator adds them to the rows."""
        if name == "train":  # TRL's first call
            copy_rows(self.model)
            score_without_padding(self.packing, self.weighted)
            if self.ref_model is not None:
                # without the autocast that accelerate adds, which `in_float32` cannot disable
                self.ref_model.forward = getattr(self.ref_model, "_original_forward", self.ref_model.forward)
                score_without_padding(Packing(self.ref_model))
            if self.splits:  # before the reference is scored, so that both are the same function in bfloat16, too
                for one in filter(None, (self.model, self.ref_model)):
                    make_few_in_float32(one)
        if self.loss_config.has_reference and (self._kept_scores(name).exists() or not distributed.sharded()):
            self._score(name, dataset, batch_size)
        return dataset

    def _kept_scores(self, name: str) -> Path:
        return self.workdir.folder / f"reference-{name}.json"

    def _score(self, name: str, dataset: Any, batch_size: int) -> None:
        """Give the collator the reference's log-probabilities: of an unfinished run, of an earlier one, or new ones."""
        kept, scorer = self._kept_scores(name), self.ref_model or self.model
        rows = dataset.select([row for row, counts in enumerate(dataset["real"]) if counts])
        new = None
        if kept.exists():
            scores = json.loads(kept.read_text(encoding="utf-8"))
        else:
            file = self._cache_file(scorer, rows, batch_size) if self.caches else None
            scores = self._from_cache(file, name, rows) if self.caches else None
            if scores is None:
                scores, new = self._reference_scores(scorer, rows, batch_size), file
            with self.workdir.writing("the reference's log-probabilities"):
                if distributed.is_main():
                    replace_text(kept, json.dumps(scores))
        self.data_collator.scores = {**self.data_collator.scores, **dict(zip(rows["at"], scores, strict=True))}
        if name == "train":
            self.checked = self.check_scores(scorer)
        if new:
            reference_cache.write(new, scores, self.command)

    def _cache_file(self, scorer: Any, rows: Any, batch_size: int) -> Path | None:
        """Return the file of the cache for the scores of rows, in the main process only."""
        if not distributed.is_main():
            return None
        settings = {
            "scores": self.data_collator.reference,
            "ld_alpha": getattr(self, "ld_alpha", None),
            "max_length": getattr(self.data_collator, "max_length", None),
            "batch": batch_size,
            "bfloat16": self.args.bf16,
        }
        return reference_cache.file_of(scorer, rows, self.args.device, settings)

    def _from_cache(self, file: Path | None, name: str, rows: Any) -> reference_cache.Scores | None:
        """Return the scores in a file that the main process reads, and say so; None if there are none."""
        scores = file and reference_cache.read(file, len(rows), len(self.data_collator.reference), self.command)
        file, scores = distributed.broadcast((file, scores))
        if scores is not None:
            self.cached = file if name == "train" else self.cached
            if not self.quiet:
                say(f"srlm {self.command}: the reference's scores of {len(rows)} {self.unit} are from {file}")
        return scores

    def _reference_scores(self, scorer: Any, rows: Any, batch_size: int) -> list[tuple[float, ...]]:
        """Return the summed log-probabilities of each row, as `reference` names them; each process has its share."""
        scorer.eval()
        found: list[tuple[float, ...]] = []
        share = -(-len(rows) // distributed.count())  # some of the last ones are scored twice, so that shares are equal
        mine = [min(distributed.rank() * share + place, len(rows) - 1) for place in range(share)]
        bar = Progress(self.command, share, 0, self.quiet, unit=f"{self.unit} scored by the reference")
        try:
            for at in range(0, share, batch_size):
                examples = [rows[place] for place in mine[at : at + batch_size]]
                scores = self._scores_by(scorer, self._prepare_inputs(self.data_collator(examples)))
                found += zip(*(side.tolist() for side in scores), strict=True)
                bar.advance(len(examples))
        finally:
            bar.close()
        return distributed.all_gather(found)[: len(rows)]

    def _scores_by(self, scorer: Any, batch: Record) -> tuple[Any, ...]:
        """Return the summed log-probabilities of a batch by a model, (rows,) each, as `reference` names them."""
        inputs = {name: value for name, value in batch.items() if name not in self.data_collator.own}
        return self.compute_ref_log_probs(scorer, inputs)

    def with_current_reference(self, batch: Record) -> Record:
        """Return a batch of a training step with the scores of the reference as it is now, 0 for a filler."""
        if self.moving is None or not self.model.training or self.state.global_step < self.args.ref_model_sync_steps:
            return batch
        scores = (side * batch["real"] for side in self._scores_by(self.moving, batch))
        return {**batch, **dict(zip(self.data_collator.reference, scores, strict=True))}

    def save_beside(self, folder: Path) -> None:
        if self.moving is not None and distributed.is_main():
            self.accelerator.unwrap_model(self.moving).save_pretrained(folder / REFERENCE)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        super()._load_from_checkpoint(folder, model)
        if self.moving is not None:
            kept = Path(folder) / REFERENCE
            if fault := broken_file(kept) if kept.is_dir() else "it is missing":
                raise SrlmError(f"cannot resume from {kept}: {fault}", "--restart starts the training again")
            restore(self.accelerator.unwrap_model(self.moving), kept)

    def _first_rows(self) -> dict[str, Any]:
        """Return the batch on which policy and reference are checked before the first step."""
        few = range(min(len(self.sampler.lengths), self.args.per_device_train_batch_size, CHECKED))
        return self._prepare_inputs(self.data_collator([self.train_dataset[row] for row in few]))

    def check_scores(self, model: Any) -> tuple[Any, ...]:
        """Return the reference's log-probabilities of the first rows in float32, (rows,) each, as `reference` has them.

        Raises SrlmError unless they are those of the reference's own logits, and those stored, as near as the dtype
        of the training allows.
        """
        batch = self._first_rows()
        model.eval()
        with in_float32(self.accelerator), torch.no_grad(), self.accelerator.autocast():
            found = self._scores_by(model, batch)
            if self.cached and not self.args.bf16:
                for mine, name in zip(found, self.data_collator.reference, strict=True):
                    for total, stored in zip(mine.tolist(), batch[name].tolist(), strict=True):
                        self._compare("stored ", stored, total, TOLERANCE * max(1.0, abs(total)))
            texts = zip(self.scored_texts(batch), found, self.data_collator.reference, strict=True)
            for (ids, mask), mine, name in texts:
                total, rounded = self._by_logits(model, ids, mask)
                total = float(mine[0]) if self.own_scores else total
                near = 10 * TOLERANCE * max(1.0, abs(total))
                self._compare("", float(mine[0]), total, near + rounded if distributed.sharded() else near)
                self._compare("stored ", float(batch[name][0]), total, near + rounded)
        return found

    def _by_logits(self, model: Any, ids: Any, mask: Any) -> tuple[float, float]:
        """Return the summed log-probability of the tokens of a mask by a model's own logits, and its rounding.

        The logits are made for some of the tokens at a time, each time by a whole forward pass of the model: the check
        has no part in common with `chunked_logits`, which makes the scores.
        """
        places = mask[1:].nonzero()[:, 0]
        vocabulary = self.accelerator.unwrap_model(model).config.get_text_config().vocab_size
        total = rounded = 0.0
        for some in places.split(max(1, CHUNK // vocabulary)):
            logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=some).logits[0].float()
            total -= float(torch.nn.functional.cross_entropy(logits, ids[some + 1], reduction="sum"))
            rounded += self._rounding(logits)
        return total, rounded

    def _compare(self, kind: str, value: float, total: float, allowed: float) -> None:
        """Raise SrlmError unless a log-probability of the reference is the one that was found now."""
        if not abs(total - value) <= allowed:
            cached = f"no model is written; remove {self.cached}, or use --no-ref-cache"
            raise SrlmError(
                f"the reference's {kind}log-probability is {value:.3f}, and {total:.3f} by its own logits",
                cached if self.cached else "no model is written; this is a bug in srlm, please report it",
            )

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
        """Return loss and mean log-ratios of the first rows before any step, of the model as it is wrapped.

        Raises SrlmError unless a policy that is its own reference equals it: log-ratios 0, and the loss that follows.
        """
        batch = self._first_rows()
        if self.checked is not None:
            batch |= dict(zip(self.data_collator.reference, self.checked, strict=True))
        sizes = [abs(batch[name].mean().item()) for name in self.data_collator.reference]
        model.eval()
        with in_float32(self.accelerator), torch.no_grad(), self.accelerator.autocast():
            loss, ratios = self.at_start(model, batch, self.items(batch) * self.accelerator.num_processes)
        self._metrics["eval"].clear()
        if self.reference_is_policy and self.loss_config.has_reference:
            scale, expected = TOLERANCE * max(1.0, *sizes), self.loss_at_start(batch)
            apart = not max(map(abs, ratios.values())) <= scale
            if expected:
                weight = max(1.0, expected[0])  # a loss with a weight moves by as much more
                apart = apart or abs(loss - expected[0]) > max(1.0, self.loss_config.beta) * weight * scale
            if apart:
                raise SrlmError(
                    "policy and reference differ before the first step: log-ratios "
                    f"{' and '.join(f'{ratio:.4f}' for ratio in ratios.values())}, loss {loss:.4f}, "
                    f"not {', '.join('0' for _ in ratios)}{f' and {expected[1]}' if expected else ''}",
                    "no model is written; this is a bug in srlm, please report it",
                )
        return {"loss": loss, **ratios}


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
